"""Resume state: weights in their ecosystem's format, optimiser and the rest as safetensors.

A checkpoint is a folder ``checkpoint-<step>`` that appears whole or not at all.  Nothing is
pickled: a tree of tensors and JSON values is split into a safetensors file and its metadata.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bksdm_tune.artifacts import atomic_folder
from bksdm_tune.errors import DataError

STATE_FILE = "training_state.safetensors"
Tensors = dict[str, torch.Tensor]


def split_tree(tree: Any, tensors: Tensors) -> Any:
    """Replace each tensor in nested dicts and lists by a reference; collect it in ``tensors``."""
    if isinstance(tree, torch.Tensor):
        name = str(len(tensors))  # a path of keys would not be unique: 1 and "1", "a.b"
        tensors[name] = tree.detach().contiguous().clone()
        return {"__tensor__": name}
    if isinstance(tree, dict):
        return {"__dict__": [[key, split_tree(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return [split_tree(value, tensors) for value in tree]
    return tree


def join_tree(skeleton: Any, tensors: Tensors) -> Any:
    """Inverse of :func:`split_tree` (tuples come back as lists)."""
    if isinstance(skeleton, dict) and "__tensor__" in skeleton:
        return tensors[skeleton["__tensor__"]]
    if isinstance(skeleton, dict):
        return {key: join_tree(value, tensors) for key, value in skeleton["__dict__"]}
    if isinstance(skeleton, list):
        return [join_tree(value, tensors) for value in skeleton]
    return skeleton


def save_tree(path: Path, tree: Any) -> None:
    tensors: Tensors = {}
    skeleton = split_tree(tree, tensors)
    save_file(tensors, path, metadata={"tree": json.dumps(skeleton)})


def load_tree(path: Path) -> Any:
    """Raises DataError: the file is missing, truncated or not ours."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            skeleton = json.loads(file.metadata()["tree"])
    except Exception as error:
        raise DataError(f"{path} cannot be read ({error}); delete its folder.") from error
    return join_tree(skeleton, tensors)


def drop_unfinished(folder: Path) -> None:
    """Delete what a killed run was writing; nobody else may be writing there."""
    for path in folder.glob(".checkpoint-*"):
        shutil.rmtree(path)


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints in ``folder``, oldest first."""
    found = []
    for path in folder.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / STATE_FILE).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def save_checkpoint(
    folder: Path, step: int, state: Any, save_weights: Callable[[Path], None], keep: int | None
) -> None:
    """Write ``checkpoint-<step>`` atomically, then drop all but the last ``keep``."""
    target = folder / f"checkpoint-{step}"
    if not target.exists():
        with atomic_folder(target) as scratch:
            save_weights(scratch)
            save_tree(scratch / STATE_FILE, state)
    if keep is not None:
        for _, path in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(path)
