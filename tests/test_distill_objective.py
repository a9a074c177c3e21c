"""The distillation loss against a plain implementation of its definition, value and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from bksdm_tune.diffusion import Noising, training_scheduler
from bksdm_tune.unet_configs import PLANS
from distill.objective import Distillation
from distill.surgery import feature_pairs, inherit

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = (1 - BETAS).cumprod(0)  # in float64, or rounding would hide small errors
LAMBDAS = {"lambda_task": 0.7, "lambda_out": 1.3, "lambda_feat": 0.4}
STAGES = [f"{side}_blocks.{stage}" for side in ("down", "up") for stage in range(4)]
PAIRS = {
    "base": [(stage, stage) for stage in STAGES],
    "small": [(stage, stage) for stage in STAGES],
    "tiny": [
        ("down_blocks.0", "down_blocks.0"),
        ("down_blocks.1", "down_blocks.1"),
        ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out"),
        ("up_blocks.1", "up_blocks.0"),
        ("up_blocks.2", "up_blocks.1"),
        ("up_blocks.3", "up_blocks.2"),
    ],
}


def make(
    size: str, v2: bool = False, prediction_type: str = "epsilon", **lambdas: float
) -> Distillation:
    teacher = tiny.make_unet(v2=v2).double()
    student = inherit(teacher, PLANS[size]).train()
    with torch.no_grad():
        torch.manual_seed(1)
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    scheduler = training_scheduler(dict(tiny.make_scheduler(prediction_type).config))
    scheduler.alphas_cumprod = ALPHAS
    pairs = feature_pairs(teacher.config, PLANS[size])
    return Distillation(student, teacher, Noising(scheduler), pairs, **lambdas)


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    text = torch.randn(2, 77, tiny.TEXT_WIDTH, dtype=torch.float64)
    return torch.randn(2, 4, 8, 8, dtype=torch.float64), text


def outputs(unet: Any, paths: list[str], *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    seen: dict[str, Tensor] = {}
    handles = []
    for path in paths:

        def record(module: Any, args: Any, output: Any, path: str = path) -> None:
            seen[path] = output if isinstance(output, Tensor) else output[0]

        handles.append(unet.get_submodule(path).register_forward_hook(record))
    predicted = unet(*inputs, return_dict=False)[0]
    for handle in handles:
        handle.remove()
    return predicted, [seen[path] for path in paths]


def squares(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).pow(2).sum() / a.numel()


def reference(made: Distillation, size: str, velocity: bool) -> dict[str, Tensor]:
    """The losses of protocol 1.3 with the noise of the global generator."""
    latents, text = batch()
    torch.manual_seed(3)
    noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (2,))
    a = ALPHAS[timesteps].reshape(2, 1, 1, 1)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    target = a.sqrt() * noise - (1 - a).sqrt() * latents if velocity else noise
    ours, theirs = zip(*PAIRS[size], strict=True)
    with torch.no_grad():
        taught, teacher = outputs(made.teacher, list(ours), noisy, timesteps, text)
    predicted, student = outputs(made.student, list(theirs), noisy, timesteps, text)
    losses = {"task": squares(predicted, target), "out": squares(predicted, taught)}
    features = [squares(s, t) for s, t in zip(student, teacher, strict=True)]
    losses["feat"] = sum(features[1:], features[0])
    weighted = [LAMBDAS[f"lambda_{name}"] * value for name, value in losses.items()]
    return losses | {"loss": sum(weighted[1:], weighted[0])}


def run(made: Distillation) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    data = batch()
    torch.manual_seed(3)
    losses = made(data)
    losses["loss"].backward()
    return losses, take_gradients(made)


def take_gradients(made: Distillation) -> dict[str, Tensor]:
    found = {}
    for name, parameter in made.student.named_parameters():
        assert parameter.grad is not None, name
        found[name], parameter.grad = parameter.grad, None
    return found


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("size", ["base", "small", "tiny"])
def test_losses_and_gradients(size: str, v2: bool, prediction_type: str) -> None:
    made = make(size, v2, prediction_type, **LAMBDAS)
    losses, gradients = run(made)
    expected = reference(made, size, prediction_type == "v_prediction")
    assert losses.keys() == {"task", "out", "feat", "loss"}
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=0, abs=1e-6), name
    expected["loss"].backward()
    theirs = take_gradients(made)
    assert len(gradients) == {"base": 442, "small": 396, "tiny": 358}[size]
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("size", ["base", "tiny"])
def test_gradient_checkpointing_keeps_every_term(size: str) -> None:
    """The features alone: under the published code's checkpointing, Tiny's proj_out got none."""
    alone = {"lambda_task": 0.0, "lambda_out": 0.0}
    made = make(size, **alone)
    plain_losses, _ = feature_gradients(made)
    plain = feature_gradients(made)[1]
    made.student.enable_gradient_checkpointing()
    losses, saved = feature_gradients(made)
    assert losses["feat"].item() == pytest.approx(plain_losses["feat"].item(), rel=1e-5)
    assert plain.keys() == saved.keys() and len(plain) > 300
    path = {"base": "down_blocks.2", "tiny": "down_blocks.2.attentions.0.proj_out"}[size]
    assert any(name.startswith(path) and saved[name].abs().max() > 0 for name in saved)
    for name, gradient in plain.items():
        tolerance = 1e-6 + 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(saved[name], gradient, rtol=0, atol=tolerance, msg=name)


def feature_gradients(made: Distillation) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As ``run``, where the last layers have none."""
    data = batch()
    torch.manual_seed(3)
    losses = made(data)
    losses["loss"].backward()
    parameters = dict(made.student.named_parameters())
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    made.student.zero_grad()
    return losses, found


def test_proj_out_alone_teaches_what_lies_before_it() -> None:
    made = make("tiny", lambda_task=0.0, lambda_out=0.0)
    made.pairs = [PAIRS["tiny"][2]]
    made.student.enable_gradient_checkpointing()
    _, found = feature_gradients(made)
    assert found["down_blocks.2.attentions.0.proj_out.weight"].abs().max() > 0
    assert found["conv_in.weight"].abs().max() > 0
    assert not any(name.startswith("up_blocks") for name in found)


def test_the_teacher_stays_frozen_and_in_eval() -> None:
    made = make("base")
    made.student.train()
    run(made)
    assert not made.teacher.training and made.student.training
    assert not any(p.requires_grad or p.grad is not None for p in made.teacher.parameters())


@pytest.mark.parametrize("name", ["task", "out", "feat"])
def test_a_lambda_of_zero_removes_its_term(name: str) -> None:
    lambdas = LAMBDAS | {f"lambda_{name}": 0.0}
    losses, _ = (
        run(make("tiny", **lambdas))
        if name != "task"
        else feature_gradients(make("tiny", **lambdas))
    )
    assert losses.keys() == {"task", "out", "feat", "loss"} - {name}
    rest = sum(lambdas[f"lambda_{key}"] * losses[key].item() for key in losses if key != "loss")
    assert losses["loss"].item() == pytest.approx(rest, rel=1e-5)


def test_min_snr_weights_predictions_and_leaves_features() -> None:
    plain, weighted = make("tiny"), make("tiny", min_snr_gamma=0.01)
    (before, _), (after, _) = run(plain), run(weighted)
    latents, text = batch()
    torch.manual_seed(3)
    noisy, timesteps, target = plain.noising(latents)
    predicted = plain.student(noisy, timesteps, text).sample
    taught = plain.teacher(noisy, timesteps, text).sample
    a = ALPHAS[timesteps]
    weights = (a / (1 - a)).clamp(max=0.01) / (a / (1 - a))
    assert weights.min() < 0.9
    for name, wanted in (("task", target), ("out", taught)):
        each = (predicted - wanted).pow(2).flatten(1).mean(1)
        assert after[name].item() == pytest.approx((weights * each).mean().item(), rel=1e-5)
        assert after[name].item() < before[name].item()
    assert after["feat"].item() == before["feat"].item()


def test_without_a_teacher_term_the_teacher_does_not_run() -> None:
    made = make("tiny", lambda_out=0.0, lambda_feat=0.0)
    made.teacher.forward = None  # type: ignore[method-assign]
    assert run(made)[0].keys() == {"task", "loss"}
