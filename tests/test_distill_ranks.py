"""``bksdm-tune distill`` itself in two processes: the losses of one with twice the batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from app_server import free_port
from bksdm_tune.cli import main
from pairs import image_folder, shards
from tiny import make_pipeline


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("teacher") / "teacher")


def words(teacher: Path, data: Path, out: Path, batch: int, steps: int) -> list[str]:
    models = ["--size", "tiny", "--teacher", str(teacher), "--data", str(data), "--out", str(out)]
    few = ["--steps", str(steps), "--batch-size", str(batch), "--accumulation", "2"]
    rest = ["--learning-rate", "1e-3", "--caption-dropout", "0.3", "--tracker", "none"]
    return ["distill", *models, *few, *rest, "--workers", "1", "--checkpoint-every", "2"]


def two(command: list[str]) -> list[subprocess.Popen[str]]:
    """As torchrun starts them, on CPUs."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
              "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", "bksdm_tune", *command],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


def losses(folder: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = ("task", "out", "feat", "loss")
    return torch.tensor([[row[name] for name in names] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["folder", "cache", "tars"])
def test_two_processes_of_the_command_are_one(kind: str, teacher: Path, tmp_path: Path) -> None:
    """Image folder, latent cache and stream; seven rows, so that epochs end inside a batch."""
    data = shards(tmp_path / "tars") if kind == "tars" else image_folder(tmp_path / "pairs")
    if kind == "cache":
        made = ["cache", "--teacher", str(teacher), "--data", str(data), "--workers", "1"]
        assert main([*made, "--out", str(tmp_path / "cache")]) == 0
        data = tmp_path / "cache"
    alone, together = tmp_path / "alone", tmp_path / "together"
    started = two(words(teacher, data, together, 1, 4))
    assert main(words(teacher, data, alone, 2, 4)) == 0
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    assert losses(alone).shape == (4, 4)
    torch.testing.assert_close(losses(together), losses(alone), rtol=1e-4, atol=1e-6)
    assert (together / "unet/diffusion_pytorch_model.safetensors").is_file()


def test_a_killed_process_ends_the_command_with_one_message(teacher: Path, tmp_path: Path) -> None:
    """Through the command's own exit; then one process goes on from the checkpoint."""
    data, out = image_folder(tmp_path / "pairs"), tmp_path / "run"
    survivor, victim = two(words(teacher, data, out, 1, 5000))
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoint-*")):
        assert time.monotonic() < deadline and survivor.poll() is None, survivor.communicate()
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    _, errors = survivor.communicate(timeout=120)
    victim.communicate()
    assert survivor.returncode == 3, errors
    said = [line for line in errors.splitlines() if line.startswith("bksdm-tune:")]
    assert len(said) == 1 and "Another process of this job has ended" in said[0]
    assert "Traceback" not in errors
    steps = len((out / "log.jsonl").read_text().splitlines())
    assert main(words(teacher, data, out, 2, steps + 1)) == 0
    assert len((out / "log.jsonl").read_text().splitlines()) == steps + 1
