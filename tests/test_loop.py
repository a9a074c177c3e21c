"""The training loop: resumed equals uninterrupted, and nothing beside it changes the losses."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bksdm_tune.checkpoints import list_checkpoints
from bksdm_tune.errors import DataError
from bksdm_tune.loop import Event, LoopSettings, fit, shuffled
from bksdm_tune.optim import EMA, make_optimiser, make_schedule
from bksdm_tune.seeds import seed_for

SETTINGS = LoopSettings(steps=7, accumulation=2, checkpoint_every=2, keep=2, seed=3)
EXAMPLES, BATCH = 7, 2  # 28 examples of 7: an epoch ends inside a batch


class Stop(Exception):
    """Stands for a kill: nobody catches it."""


@dataclass
class Toy:
    """A network with dropout on noisy data: objective and trainable in one."""

    calls: int = 0
    before: Callable[[int], None] = lambda call: None
    spoil: Callable[[int, Tensor], Tensor] = lambda call, loss: loss
    seen: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Linear(8, 4))
            self.data = torch.randn(EXAMPLES, 4)

    def __call__(self, batch: np.ndarray[Any, Any]) -> dict[str, Tensor]:
        self.calls += 1
        self.before(self.calls)
        self.seen.append(batch.tolist())
        clean = self.data[batch]
        loss = (self.net(clean + torch.randn_like(clean)) - clean).pow(2).mean()
        return {"toy": loss.detach(), "loss": self.spoil(self.calls, loss)}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.net.parameters()), "lr": 1e-2}]

    def save(self, folder: Path) -> None:
        plain = {key: value.contiguous() for key, value in self.net.state_dict().items()}
        save_file(plain, folder / "net.safetensors")

    def load(self, folder: Path) -> None:
        self.net.load_state_dict(load_file(folder / "net.safetensors"))


def train(
    folder: Path,
    toy: Toy | None = None,
    events: tuple[Event, ...] = (),
    ema: bool = True,
    warmup: int = 3,
    **changes: Any,
) -> Toy:
    toy = toy or Toy()
    settings = replace(SETTINGS, **changes)
    optimiser = make_optimiser("adamw", toy.parameter_groups())
    schedule = make_schedule("constant_with_warmup", optimiser, warmup, settings.steps)
    batches = shuffled(EXAMPLES, BATCH, settings.seed)
    average = EMA(list(toy.net.parameters()), 0.9) if ema else None
    fit(toy, toy, batches, optimiser, schedule, settings, folder, average, events)
    return toy


def log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(folder: Path, toy: Toy, reference: Path, whole: Toy) -> None:
    assert [line["step"] for line in log(reference)] == list(range(1, 8))
    assert log(folder) == log(reference)
    for name, tensor in whole.net.state_dict().items():
        assert torch.equal(toy.net.state_dict()[name], tensor), name
    names = [path.name for _, path in list_checkpoints(reference)]
    assert names == ["checkpoint-6", "checkpoint-7"]
    for name, file in itertools.product(names, ("net", "training_state")):
        path = Path(name) / f"{file}.safetensors"
        assert (folder / path).read_bytes() == (reference / path).read_bytes(), path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Toy]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


def raise_at(number: int, error: type[BaseException]) -> Callable[[int], None]:
    def strike(now: int) -> None:
        if now == number:
            raise error

    return strike


# Micro-batches 7 and 8 make step 4: before the first checkpoint, inside a step, between steps.
@pytest.mark.parametrize("call", [1, 4, 8, 9, 14])
def test_killed_and_resumed_is_uninterrupted(
    tmp_path: Path, whole: tuple[Path, Toy], call: int
) -> None:
    with pytest.raises(Stop):
        train(tmp_path, Toy(before=raise_at(call, Stop)))
    assert_same_run(tmp_path, train(tmp_path), *whole)


def convolutions() -> Toy:
    """A toy whose weights do not lie in memory in the order of their indices."""
    toy = Toy()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = [nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1)]
        toy.net = nn.Sequential(nn.Unflatten(1, (4, 1, 1)), *layers, nn.Flatten())
    toy.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return toy


def test_channels_last_weights_resume_to_the_same_bytes(tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = train(tmp_path / "whole", convolutions())
    toy = convolutions()
    toy.before = raise_at(9, Stop)
    with pytest.raises(Stop):
        train(tmp_path / "cut", toy)
    assert_same_run(
        tmp_path / "cut", train(tmp_path / "cut", convolutions()), tmp_path / "whole", whole
    )


@pytest.mark.parametrize("step", [0, 3, 7])
def test_a_failed_event_and_resumed_is_uninterrupted(
    tmp_path: Path, whole: tuple[Path, Toy], step: int
) -> None:
    with pytest.raises(DataError):
        train(tmp_path, events=(Event(1, raise_at(step, DataError)),))
    assert_same_run(tmp_path, train(tmp_path), *whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_the_step_in_progress(
    tmp_path: Path, whole: tuple[Path, Toy], number: signal.Signals
) -> None:
    def interrupt(call: int) -> None:
        if call == 9:
            os.kill(os.getpid(), number)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    toy = Toy(before=interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, toy)
    assert toy.calls == 10 and list_checkpoints(tmp_path)[-1][0] == 5
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed = train(tmp_path)
    assert resumed.calls == 4
    assert_same_run(tmp_path, resumed, *whole)


def test_a_second_interrupt_strikes_at_once(tmp_path: Path) -> None:
    def interrupt(call: int) -> None:
        if call in (3, 4):
            os.kill(os.getpid(), signal.SIGINT)

    toy = Toy(before=interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, toy)
    assert toy.calls == 4 and not list_checkpoints(tmp_path)


def test_a_finished_run_is_not_trained_again(tmp_path: Path, whole: tuple[Path, Toy]) -> None:
    train(tmp_path)
    again = train(tmp_path)
    assert again.calls == 0
    assert_same_run(tmp_path, again, *whole)


def test_more_steps_continue_a_finished_run(tmp_path: Path, whole: tuple[Path, Toy]) -> None:
    train(tmp_path, steps=4)
    assert_same_run(tmp_path, train(tmp_path), *whole)


def test_fewer_steps_than_done_are_not_trained_for_ever(tmp_path: Path) -> None:
    train(tmp_path, steps=4)
    with pytest.raises(AssertionError):
        train(tmp_path, steps=3)


@pytest.mark.parametrize(("every", "checkpoint_every"), [(1, 1), (3, 5), (0, 100)])
def test_cadence_does_not_change_the_losses(
    tmp_path: Path, whole: tuple[Path, Toy], every: int, checkpoint_every: int
) -> None:
    at: list[int] = []

    def draw(step: int) -> None:
        at.append(step)
        torch.manual_seed(11)
        torch.randn(5)

    toy = train(tmp_path, events=(Event(every, draw),), checkpoint_every=checkpoint_every)
    assert at == {1: [0, 1, 2, 3, 4, 5, 6, 7], 3: [0, 3, 6, 7], 0: [0, 7]}[every]
    assert log(tmp_path) == log(whole[0])
    for mine, theirs in zip(toy.net.parameters(), whole[1].net.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("keep", "steps"), [(2, [6, 7]), (1, [7]), (None, [2, 4, 6, 7])])
def test_how_many_checkpoints_stay(tmp_path: Path, keep: int | None, steps: list[int]) -> None:
    train(tmp_path, keep=keep)
    assert [step for step, _ in list_checkpoints(tmp_path)] == steps


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops(tmp_path: Path, value: float) -> None:
    toy = Toy(spoil=lambda call, loss: loss * value if call == 9 else loss)
    with pytest.raises(DataError, match="at step 5"):
        train(tmp_path, toy)
    step, path = list_checkpoints(tmp_path)[-1]
    assert step == 4 and len(log(tmp_path)) == 4
    assert all(tensor.isfinite().all() for tensor in load_file(path / "net.safetensors").values())


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    """The loss of the last step is finite, and no later one would show what it did."""
    toy = Toy(spoil=lambda call, loss: loss + (loss - loss).sqrt() if call == 14 else loss)
    with pytest.raises(DataError, match="at step 7"):
        train(tmp_path, toy)
    assert list_checkpoints(tmp_path)[-1][0] == 6
    assert all(tensor.isfinite().all() for tensor in toy.net.parameters())


@pytest.mark.parametrize("accumulation", [1, 4])
def test_warm_up_counts_optimiser_steps(tmp_path: Path, accumulation: int) -> None:
    train(tmp_path, warmup=4, accumulation=accumulation)
    rates = [line["lr"] / 1e-2 for line in log(tmp_path)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1])


def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path: Path) -> None:
    """Weights after one step of SGD, against the mean gradient over both micro-batches."""
    toy, copy = Toy(), Toy()
    toy.net[1].p = copy.net[1].p = 0.0
    optimiser = torch.optim.SGD(toy.net.parameters(), lr=0.1)
    schedule = make_schedule("constant", optimiser, 0, 1)
    settings = LoopSettings(steps=1, accumulation=2, max_grad_norm=1e9, seed=3)
    fit(toy, toy, shuffled(EXAMPLES, BATCH, 3), optimiser, schedule, settings, tmp_path)
    losses = []
    for micro, batch in enumerate(toy.seen):
        torch.manual_seed(seed_for(3, 0, micro))
        clean = copy.data[batch]
        losses.append((copy.net(clean + torch.randn_like(clean)) - clean).pow(2).mean())
    assert len(losses) == 2
    torch.stack(losses).mean().backward()
    for mine, theirs in zip(toy.net.parameters(), copy.net.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs - 0.1 * theirs.grad)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    toy = Toy()
    before = [p.detach().clone() for p in toy.net.parameters()]
    optimiser = torch.optim.SGD(toy.net.parameters(), lr=1.0)
    schedule = make_schedule("constant", optimiser, 0, 1)
    settings = LoopSettings(steps=1, max_grad_norm=0.01)
    fit(toy, toy, shuffled(EXAMPLES, BATCH, 3), optimiser, schedule, settings, tmp_path)
    moved = [p - b for p, b in zip(toy.net.parameters(), before, strict=True)]
    length = torch.cat([m.flatten() for m in moved]).norm().item()
    assert length == pytest.approx(0.01, rel=1e-3)


def test_the_average_follows_its_definition_and_ends_in_the_parameters(tmp_path: Path) -> None:
    raw: list[Tensor] = []
    toy = Toy()
    record = Event(1, lambda step: raw.append(toy.net[0].weight.detach().clone()))
    train(tmp_path, toy, events=(record,))
    average = raw[0]
    for n, weight in enumerate(raw[1:], start=1):
        decay = min(0.9, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight
    assert len(raw) == 8
    torch.testing.assert_close(toy.net[0].weight.detach(), average)


def test_the_log_drops_what_the_checkpoint_does_not_hold(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(tmp_path, Toy(before=raise_at(11, Stop)))
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # the power went
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6
    train(tmp_path)
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert set(log(tmp_path)[0]) == {"step", "lr", "toy", "loss"}


@pytest.mark.parametrize(("size", "batch_size"), [(7, 2), (3, 5), (1, 4), (4, 4)])
def test_every_epoch_holds_each_example_once(size: int, batch_size: int) -> None:
    stream = list(itertools.islice(shuffled(size, batch_size, 0)(0), 4 * size))
    flat = np.concatenate(stream)
    assert len(flat) == 4 * size * batch_size
    epochs = flat.reshape(-1, size)
    assert (np.sort(epochs) == np.arange(size)).all()
    assert size == 1 or len({tuple(epoch) for epoch in epochs}) > 1
    for start in range(4 * size):
        assert (next(shuffled(size, batch_size, 0)(start)) == stream[start]).all()


def test_seeds_of_neighbours_differ() -> None:
    seeds = {seed_for(*numbers) for numbers in itertools.product(range(10), range(10), range(4))}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
