"""Half the rows in a forked process: the same step, and nobody left behind."""

from __future__ import annotations

import copy
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

import tiny
from bksdm_tune.adapters import inject
from bksdm_tune.dreambooth.ahead import Ahead
from bksdm_tune.dreambooth.objective import DreamBooth
from bksdm_tune.errors import DataError
from bksdm_tune.twin import SMALL, Twin, pays, shared_like
from test_objective import ahead, embeddings, frozen_unet, moments, noising

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="a twin is a fork on a CPU"
)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def learner(prior: str, size: int, lora: bool = True) -> tuple[DreamBooth, Ahead, list[Tensor]]:
    """In float64, two subjects."""
    unet = tiny.make_unet(size="tiny").double()
    text, kind = (row.double() for row in embeddings())
    untuned = frozen_unet(copy.deepcopy(unet), kind) if prior == "prediction" else None
    parameters = list(unet.parameters())
    if lora:
        parameters = inject(unet, 2, 3.0, 0.0, ("to_q", "to_k"))
        for parameter in parameters:
            parameter.data = torch.randn_like(parameter).double()
    objective = DreamBooth(unet, noising("epsilon"), lambda: [(text, kind)] * 2, 0.7)
    others = moments(size, 9).double() if prior == "images" else None
    data = [(moments(size, number).double(), others) for number in (1, 2)]
    return objective, ahead(noising("epsilon"), untuned, *data, window=3), parameters


def stepped(
    objective: DreamBooth, batches: Ahead, parameters: list[Tensor], twin: Twin | None
) -> list[tuple[dict[str, float], list[Tensor]]]:
    """Losses and gradients of three micro-batches from number 4 on, training on the way."""
    found = []
    for batch in itertools.islice(batches(4), 3):
        if twin is not None:
            twin.go()
        losses = objective(batch)
        (losses["loss"] / 2).backward()
        if twin is not None:
            losses = twin.join(losses)
        gradients = [parameter.grad.clone() for parameter in parameters]  # type: ignore[union-attr]
        found.append(({name: value.item() for name, value in losses.items()}, gradients))
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.1 * parameter.grad  # type: ignore[operator]
                parameter.grad = None
    return found


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(
    ("prior", "size"),
    [("none", 2), ("none", 3), ("images", 1), ("prediction", 1), ("prediction", 2)],
)
def test_two_halves_are_the_whole(prior: str, size: int, lora: bool) -> None:
    torch.manual_seed(1)
    objective, batches, parameters = learner(prior, size, lora)
    start = [parameter.detach().clone() for parameter in parameters]
    whole = stepped(objective, batches, parameters, None)
    for parameter, value in zip(parameters, start, strict=True):
        parameter.data = value
    twin = Twin(objective, replace(batches, share=(1, 2)), seed=0, accumulation=2)
    with twin.running(parameters, 4):
        assert torch.get_num_threads() == 1
        halves = stepped(objective, replace(batches, share=(0, 2)), parameters, twin)
    assert torch.get_num_threads() == 2
    for (losses, gradients), (wanted, wanted_gradients) in zip(halves, whole, strict=True):
        assert losses == pytest.approx(wanted, rel=1e-6)
        ours, all_ = (torch.cat([g.flatten() for g in s]) for s in (gradients, wanted_gradients))
        # diffusers' time embedding is float32, and its last bits follow the number of rows.
        assert (ours - all_).norm() <= 1e-3 * all_.norm()
    assert not psutil.Process().children()


def test_shared_memory_keeps_layouts_and_has_a_storage_for_each() -> None:
    tensors = [
        torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last),
        torch.randn(5),
        torch.randn(2, 3, dtype=torch.float64),
    ]
    shared = shared_like(tensors)
    for tensor, there in zip(tensors, shared, strict=True):
        there.copy_(tensor)
    for tensor, there in zip(tensors, shared, strict=True):
        assert torch.equal(there, tensor) and there.stride() == tensor.stride()
    assert len({there.untyped_storage().data_ptr() for there in shared}) == 3
    assert pid_that_writes(shared[1]) and shared[1][0] == 7


def pid_that_writes(tensor: Tensor) -> int:
    child = os.fork()
    if child == 0:
        tensor[0] = 7
        os._exit(0)
    return os.waitpid(child, 0)[0]


@pytest.mark.parametrize("how", ["killed", "fails"])
def test_a_dead_twin_is_one_clear_error(how: str, capfd: pytest.CaptureFixture[str]) -> None:
    objective, batches, parameters = learner("none", 2)

    def strike(batch: Any) -> dict[str, Tensor]:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise MemoryError("no more")

    twin = Twin(strike, replace(batches, share=(1, 2)), seed=0, accumulation=2)
    with pytest.raises(DataError, match="OMP_NUM_THREADS=1"), twin.running(parameters, 0):
        stepped(objective, replace(batches, share=(0, 2)), parameters, twin)
    assert ("no more" in capfd.readouterr().err) == (how == "fails")
    assert not psutil.Process().children()


def test_a_failure_between_the_halves_leaves_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    objective, batches, parameters = learner("none", 2)
    twin = Twin(objective, replace(batches, share=(1, 2)), seed=0, accumulation=2)
    with pytest.raises(MemoryError), twin.running(parameters, 0):
        with twin.resting():
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
        twin.go()
        raise MemoryError
    assert torch.get_num_threads() == 2
    assert capfd.readouterr().err == ""
    assert not psutil.Process().children()


def test_when_it_pays() -> None:
    assert pays("cpu", 10_000_000, 2)
    assert not pays("cuda", 10_000_000, 2)
    assert not pays("cpu", int(SMALL) + 1, 2)
    assert not pays("cpu", 10_000_000, 1)
    for threads in (1, 16):
        torch.set_num_threads(threads)
        assert not pays("cpu", 10_000_000, 2)


def test_the_twin_of_a_killed_run_dies(tmp_path: Path) -> None:
    backbone = tiny.make_pipeline(tmp_path / "base", size="base")
    command = [sys.executable, "-m", "bksdm_tune", "dreambooth", "--subject", "dog", "--lora"]
    command += ["--backbone", str(backbone), "--out", str(tmp_path / "run"), "--steps", "100000"]
    command += ["--preview-prompts", "--batch-size", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    log = tmp_path / "run/log.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_text()):
        time.sleep(0.05)
    (twin,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert psutil.wait_procs([twin], timeout=20) == ([twin], [])
