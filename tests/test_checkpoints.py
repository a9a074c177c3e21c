"""Resume state on disk: exact, whole or absent, never pickled."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bksdm_tune.checkpoints import (
    STATE_FILE,
    list_checkpoints,
    load_tree,
    save_checkpoint,
    save_tree,
)
from bksdm_tune.errors import DataError
from bksdm_tune.optim import make_optimiser, make_schedule


def trained_adamw() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    layer = torch.nn.Linear(3, 2)
    groups = [{"params": [layer.weight], "lr": 1e-3}, {"params": [layer.bias], "lr": 1e-2}]
    optimiser = make_optimiser("adamw", groups, betas=(0.8, 0.95))
    layer(torch.randn(4, 3)).pow(2).sum().backward()
    optimiser.step()
    return layer, optimiser


def assert_equal_trees(mine: Any, theirs: Any) -> int:
    """Types, keys and values agree (a tuple may be a list); the number of tensors."""
    if isinstance(theirs, torch.Tensor):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        return 1
    if isinstance(theirs, dict):
        assert list(mine) == list(theirs)
        return sum(assert_equal_trees(mine[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list | tuple):
        assert len(mine) == len(theirs)
        return sum(assert_equal_trees(a, b) for a, b in zip(mine, theirs, strict=True))
    assert mine == theirs and type(mine) is type(theirs)
    return 0


def test_optimiser_and_schedule_come_back_exactly(tmp_path: Path) -> None:
    layer, optimiser = trained_adamw()
    schedule = make_schedule("cosine", optimiser, 2, 9)
    state = {"optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}
    save_tree(tmp_path / "state", state)
    restored = load_tree(tmp_path / "state")
    assert assert_equal_trees(restored, state) == 6  # step, exp_avg, exp_avg_sq of two tensors
    assert list(restored["optimiser"]["state"]) == [0, 1]
    optimiser.load_state_dict(restored["optimiser"])
    assert optimiser.param_groups[1]["params"][0] is layer.bias


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"a": [], "b": {}, 3: None},
        {"x": [torch.arange(3), {"y": torch.tensor(1.5, dtype=torch.float64)}], "z": 0.1},
        {"half": torch.ones(2, dtype=torch.float16), "bytes": torch.ones(2, dtype=torch.uint8)},
        {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, 1: {0: True}, "1": {"0": False}},
    ],
)
def test_round_trip(tmp_path: Path, tree: Any) -> None:
    save_tree(tmp_path / "state", tree)
    assert_equal_trees(load_tree(tmp_path / "state"), tree)


def test_tensors_that_share_memory_come_back_apart(tmp_path: Path) -> None:
    row = torch.arange(6.0).reshape(2, 3)
    save_tree(tmp_path / "state", {"whole": row, "turned": row.T, "part": row[0]})
    restored = load_tree(tmp_path / "state")
    assert_equal_trees(restored, {"whole": row, "turned": row.T, "part": row[0]})
    restored["part"].zero_()
    assert torch.equal(restored["whole"], row)


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "text", "foreign"])
def test_a_damaged_file_is_reported(tmp_path: Path, damage: str) -> None:
    path = tmp_path / STATE_FILE
    save_tree(path, {"x": torch.ones(100)})
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        from safetensors.torch import save_file

        save_file({"x": torch.ones(1)}, path)
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"x" * 99}[damage])
    with pytest.raises(DataError, match=f"{STATE_FILE} cannot be read"):
        load_tree(path)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / STATE_FILE)
    with pytest.raises(DataError):
        load_tree(tmp_path / STATE_FILE)


def write_weights(folder: Path) -> None:
    (folder / "weights").write_text("w")


def test_whole_checkpoints_are_listed_in_order_of_steps(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        save_checkpoint(tmp_path, step, {"n": step}, write_weights, None)
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-12").touch()
    shutil.copytree(tmp_path / "checkpoint-9", tmp_path / "checkpoint-9-old")
    shutil.copytree(tmp_path / "checkpoint-9", tmp_path / ".checkpoint-13.abc")
    assert [(step, path.name) for step, path in list_checkpoints(tmp_path)] == [
        (step, f"checkpoint-{step}") for step in (9, 10, 100)
    ]
    assert load_tree(tmp_path / "checkpoint-100" / STATE_FILE) == {"n": 100}


def test_a_failed_write_leaves_the_last_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    def disk_full(folder: Path) -> None:
        write_weights(folder)
        raise OSError(28, "No space left on device")

    save_checkpoint(tmp_path, 2, {}, write_weights, 1)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 4, {}, disk_full, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save_checkpoint(tmp_path, step, {}, write_weights, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-8"]


def test_nothing_is_pickled(tmp_path: Path) -> None:
    """A zip is torch.save's, 0x80 opens a pickle; safetensors opens with its header's length."""
    _, optimiser = trained_adamw()
    save_checkpoint(tmp_path, 1, {"optimiser": optimiser.state_dict()}, write_weights, 1)
    data = (tmp_path / "checkpoint-1" / STATE_FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert data[8:9] == b"{" and length < len(data) and not data.startswith((b"PK", b"\x80"))
