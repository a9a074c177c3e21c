"""Several processes train as one would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bksdm_tune import processes
from bksdm_tune.checkpoints import list_checkpoints

SCRIPT = Path(__file__).with_name("ranks.py")
PATHS = f"{SCRIPT.parent}:{SCRIPT.parent.parent}"


def launch(tmp_path: Path, name: str, world: int, batch: int, *more: str) -> list[tuple[int, str]]:
    """Exit code and stderr of every process; they share one run folder."""
    meeting, out = tmp_path / f"{name}-meeting", tmp_path / name
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(world), meeting, out, str(batch), *more],
            env={"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    return [(process.wait(240), process.stderr.read()) for process in started if process.stderr]


def losses(folder: Path) -> torch.Tensor:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = ("task", "out", "feat", "loss")
    return torch.tensor([[line[name] for name in names] for line in lines], dtype=torch.float64)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    _, checkpoint = list_checkpoints(folder)[-1]
    return load_file(checkpoint / "unet/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with batches of four."""
    folder = tmp_path_factory.mktemp("alone")
    ((code, errors),) = launch(folder, "run", 1, 4)
    assert code == 0, errors
    return folder / "run"


def test_two_processes_are_one_with_twice_the_batch(alone: Path, tmp_path: Path) -> None:
    for code, errors in launch(tmp_path, "two", 2, 2):
        assert code == 0, errors
    assert losses(alone).shape == (20, 4)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(alone), rtol=0, atol=1e-9)
    ours, theirs = weights(tmp_path / "two"), weights(alone)
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-9


def test_another_number_of_processes_goes_on_in_the_same_order(alone: Path, tmp_path: Path) -> None:
    """Two processes are lost at step 13; one takes over from the checkpoint of step 8."""
    results = launch(tmp_path, "moved", 2, 2, "26")
    assert sorted(code for code, _ in results) == [-9, 3]
    assert [step for step, _ in list_checkpoints(tmp_path / "moved")] == [8]
    ((code, errors),) = launch(tmp_path, "moved", 1, 4)
    assert code == 0, errors
    torch.testing.assert_close(losses(tmp_path / "moved"), losses(alone), rtol=0, atol=1e-9)


def test_a_lost_process_ends_the_job_with_one_clear_message(tmp_path: Path) -> None:
    (survivor, message), (killed, _) = launch(tmp_path, "lost", 2, 2, "5")
    assert (survivor, killed) == (3, -9)
    lines = [line for line in message.splitlines() if line.startswith("bksdm-tune:")]
    assert len(lines) == 1 and "Another process of this job has ended" in lines[0]
    assert "Traceback" not in message


def test_one_process_pays_nothing() -> None:
    tensor = torch.ones(2)
    assert processes.mean(tensor) is tensor and processes.first_says(True)
    assert torch.equal(processes.my_share(torch.arange, 3), torch.arange(3))
