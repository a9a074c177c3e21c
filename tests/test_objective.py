"""The DreamBooth loss against a plain computation, and gradients in every LoRA tensor."""

from __future__ import annotations

import itertools
from dataclasses import astuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from bksdm_tune.adapters import inject
from bksdm_tune.diffusion import Noising, embed, tokenise, training_scheduler
from bksdm_tune.dreambooth.ahead import OWN_STREAM, Ahead, Moments, Noised, Predict
from bksdm_tune.dreambooth.learner import make_untuned
from bksdm_tune.dreambooth.objective import DreamBooth
from bksdm_tune.seeds import seed_for

SCALE, WEIGHT, SEED = 0.3, 0.7, 4
SIZES = ("teacher", "base", "small", "tiny")


def moments(n: int, seed: int, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, 4, side, side, generator=generator)
    return torch.stack([mean, torch.rand(n, 4, side, side, generator=generator)], 1)


def noising(prediction_type: str) -> Noising:
    return Noising(training_scheduler(dict(tiny.make_scheduler(prediction_type).config)))


def embeddings() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    both = torch.randn(2, 77, tiny.TEXT_WIDTH, generator=generator)
    return both[:1], both[1:]


def frozen_unet(unet: Any, kind: Tensor | None = None) -> Any:
    kind = embeddings()[1] if kind is None else kind

    @torch.no_grad()
    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return unet(noisy, timesteps, kind.expand(len(noisy), -1, -1)).sample

    return predict


def ahead(noising: Noising, untuned: Predict | None, *subjects: Moments, window: int = 1) -> Ahead:
    """Micro-batches of the whole data each time."""
    return Ahead(
        lambda start: itertools.repeat(list(subjects)),
        noising,
        SCALE,
        SEED,
        accumulation=2,
        untuned=untuned,
        window=window,
    )


class Reference:
    """One sample at a time, float64 means, schedule and weights written out."""

    def __init__(self, unet: Any, prediction_type: str, gamma: float | None) -> None:
        self.unet, self.velocity, self.gamma = unet, prediction_type == "v_prediction", gamma
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.alpha_bar = (1 - betas).cumprod(0)

    def draw(self, parts: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        latents = (parts[:, 0] + parts[:, 1] * torch.randn_like(parts[:, 0])) * SCALE
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),))
        rows = []
        for clean, eps, t in zip(latents, noise, timesteps, strict=True):
            a = self.alpha_bar[t]
            noisy = a.sqrt() * clean + (1 - a).sqrt() * eps
            target = a.sqrt() * eps - (1 - a).sqrt() * clean if self.velocity else eps
            rows.append((noisy.float(), t, target))
        return rows

    def error(self, row: tuple[Tensor, Tensor, Tensor], prompt: Tensor, target: Tensor) -> float:
        noisy, t, _ = row
        with torch.no_grad():
            predicted = self.unet(noisy[None], t, prompt).sample[0]
        error = (predicted.double() - target.double()).pow(2).mean().item()
        if self.gamma is None:
            return error
        snr = (self.alpha_bar[t] / (1 - self.alpha_bar[t])).item()
        return error * min(snr, self.gamma) / (snr + 1 if self.velocity else snr)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 1.0])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("prior", ["none", "images", "prediction"])
def test_losses(prior: str, size: int, gamma: float | None, prediction_type: str) -> None:
    unet, untuned = tiny.make_unet(size="tiny"), tiny.make_unet(seed=1, size="tiny")
    instance, kind = embeddings()
    objective = DreamBooth(
        unet=unet,
        noising=noising(prediction_type),
        conditions=lambda: [embeddings()],
        prior_weight=WEIGHT,
        min_snr_gamma=gamma,
    )
    others = moments(2 * size, 2) if prior == "images" else None
    old_unet = frozen_unet(untuned) if prior == "prediction" else None
    losses = objective(
        next(ahead(noising(prediction_type), old_unet, (moments(size, 1), others))(0))
    )

    reference = Reference(unet, prediction_type, gamma)
    torch.manual_seed(seed_for(SEED, 0, 0, OWN_STREAM))
    parts = moments(size, 1)
    rows = reference.draw(parts if others is None else torch.cat([parts, others]))
    expected = {"instance": mean([reference.error(r, instance, r[2]) for r in rows[:size]])}
    if prior == "images":
        expected["prior"] = mean([reference.error(r, kind, r[2]) for r in rows[size:]])
    if prior == "prediction":
        old = [frozen_unet(untuned)(r[0][None], r[1])[0] for r in rows]
        pairs = zip(rows, old, strict=True)
        expected["prior"] = mean([reference.error(r, kind, o) for r, o in pairs])
    expected["loss"] = expected["instance"] + WEIGHT * expected.get("prior", 0.0)
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(
        expected, rel=2e-4
    )


def take(stream: Ahead, start: int, count: int) -> list[list[Noised]]:
    return list(itertools.islice(stream(start), count))


def test_answers_ahead_are_those_of_one_by_one_and_do_not_depend_on_the_start() -> None:
    untuned = frozen_unet(tiny.make_unet(size="tiny").double(), embeddings()[1].double())
    kind, cat, dog = noising("epsilon"), *((moments(2, n).double(), None) for n in (1, 2))
    several = ahead(kind, untuned, cat, dog, window=3)
    single = take(ahead(kind, untuned, cat, dog), 0, 7)
    for one, other in zip(take(several, 0, 7), single, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(astuple(a), astuple(b), rtol=1e-9, atol=1e-12)
    (alone,) = take(ahead(kind, untuned, dog), 5, 1)
    torch.testing.assert_close(astuple(alone[0]), astuple(single[5][1]), rtol=1e-9, atol=1e-12)


def test_what_is_answered_together_does_not_depend_on_the_start() -> None:
    """Else the last bits of a resumed run would."""
    asked = []

    def untuned(noisy: Tensor, timesteps: Tensor) -> Tensor:
        asked.append(noisy)
        return noisy

    stream = ahead(noising("epsilon"), untuned, (moments(2, 1), None), window=3)
    whole = take(stream, 0, 9)
    for start, window in ((1, 0), (3, 1), (5, 1), (6, 2)):
        (again,) = take(stream, start, 1)
        torch.testing.assert_close(astuple(again[0]), astuple(whole[start][0]), rtol=0, atol=0)
        assert torch.equal(asked[-1], asked[window])


@pytest.mark.parametrize("lora", [True, False])
def test_eps_0_shares_the_weights_under_a_lora_alone(lora: bool) -> None:
    """A LoRA leaves them as they are, so a second copy would be memory for nothing; full tuning
    overwrites its own."""
    unet, kind = tiny.make_unet(size="tiny"), embeddings()[1]
    training = SimpleNamespace(precision="no")
    config = SimpleNamespace(
        prior=SimpleNamespace(prior="prediction"),
        model=SimpleNamespace(lora=lora),
        training=training,
    )
    job: Any = SimpleNamespace(config=config, device="cpu", class_prompt="a dog")
    untuned = make_untuned([job], unet, {"a dog": kind})
    assert untuned is not None
    noisy, timesteps = torch.randn(2, 4, 16, 16), torch.tensor([5, 700])
    before = untuned(noisy, timesteps)
    torch.testing.assert_close(before, unet(noisy, timesteps, kind.expand(2, -1, -1)).sample)
    inject(unet, 2, 3.0, 0.0, ("to_q",))
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    assert torch.equal(untuned(noisy, timesteps), before)
    unet.conv_out.bias.data += 1
    assert torch.equal(untuned(noisy, timesteps), before) != lora
    config.prior.prior = "images"
    assert make_untuned([job], unet, {}) is None


def test_noise_differs_between_micro_batches() -> None:
    rows = [
        batch[0].noisy
        for batch in take(ahead(noising("epsilon"), None, (moments(1, 1), None)), 0, 4)
    ]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(rows, 2))


def tuned(size: str, text: bool, checkpointing: bool) -> tuple[Any, Any, dict[str, Any]]:
    """U-Net and text encoder with LoRAs whose B is not zero, so that A has a gradient too."""
    unet = tiny.make_unet(size=size)
    encoder = tiny.make_text_encoder().requires_grad_(False)
    inject(unet, 2, 3.0, 0.0, ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"))
    if text:
        inject(encoder, 2, 3.0, 0.0, ("q_proj", "k_proj", "v_proj", "out_proj"))
    unet.train()
    encoder.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
        encoder.gradient_checkpointing_enable({"use_reentrant": False})
    lora = {f"unet.{name}": p for name, p in unet.named_parameters() if "lora" in name}
    lora |= {f"text.{name}": p for name, p in encoder.named_parameters() if "lora" in name}
    with torch.no_grad():
        for name, parameter in lora.items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return unet, encoder, lora


def gradients(size: str, text: bool, checkpointing: bool, prior: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    unet, encoder, lora = tuned(size, text, checkpointing)
    before = tiny.make_unet(size=size)
    ids = tokenise(tiny.make_tokenizer(), ["a xyz dog", "a dog"])

    def conditions() -> list[tuple[Tensor, Tensor]]:
        both = embed(encoder, ids)
        return [(both[:1], both[1:])]

    kind = embeddings()[1]

    @torch.no_grad()
    def untuned(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return before(noisy, timesteps, kind.expand(len(noisy), -1, -1)).sample

    objective = DreamBooth(unet, noising("epsilon"), conditions)
    # The mid block of an 8x8 latent attends to its one position: no gradient for q and k.
    batch = (moments(1, 1, side=16), moments(1, 2, side=16) if prior == "images" else None)
    stream = ahead(noising("epsilon"), untuned if prior == "prediction" else None, batch)
    objective(next(stream(0)))["loss"].backward()
    trained = list(unet.parameters()) + list(encoder.parameters())
    assert len(lora) == sum(parameter.requires_grad for parameter in trained)
    assert all(parameter.dtype == torch.float32 for parameter in lora.values())
    found = {}
    for name, parameter in lora.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        found[name] = parameter.grad
    return found


# A U-Net has 16, 10, 9, 9 transformer blocks, each of 2 attentions with 4 targets and a feed-
# forward with 2; every target has A and B.
UNET_TENSORS = {"teacher": 320, "base": 200, "small": 180, "tiny": 180}
TEXT_TENSORS = 2 * 4 * 2  # layers, targets, A and B


@pytest.mark.parametrize("prior", ["images", "prediction"])
@pytest.mark.parametrize("text", [False, True], ids=["unet", "unet+text"])
@pytest.mark.parametrize("size", SIZES)
def test_every_lora_tensor_learns_with_and_without_checkpointing(
    size: str, text: bool, prior: str
) -> None:
    plain = gradients(size, text, False, prior)
    assert len(plain) == UNET_TENSORS[size] + (TEXT_TENSORS if text else 0)
    saved = gradients(size, text, True, prior)
    assert plain.keys() == saved.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(saved[name], gradient, rtol=1e-3, atol=1e-7, msg=name)
