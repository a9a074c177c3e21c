"""Adapter files that were read back and compared before they get their name."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from bksdm_tune.adapters import canonical
from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.lora import layouts
from bksdm_tune.lora.adapter import Adapter, Update
from bksdm_tune.provenance import Provenance

TOLERANCE = 1e-6


def check_free(out: Path) -> None:
    """Raise UsageError if something lies there."""
    if out.exists():
        raise UsageError(f"{out} is there already; choose another --out.")


def write_adapter(
    path: Path, adapter: Adapter, layout: str, provenance: Provenance | None, **more: str
) -> float:
    """Write in the layout diffusers or kohya; the largest relative difference after reading back.

    Raises:
        DataError: the file reads back to something else; nothing is left.
    """
    if layout == "kohya":
        tensors, metadata = layouts.kohya_tensors(adapter.updates.items()), {"format": "pt"}
    else:
        tensors = layouts.diffusers_tensors(adapter)
        metadata = layouts.diffusers_metadata(adapter)
    if provenance is not None:
        metadata |= provenance.metadata()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        scratch.write_bytes(canonical(save(tensors, metadata | more)))
        worst = difference(adapter, layouts.read(scratch))
        if not worst <= TOLERANCE:  # nor NaN
            raise DataError(
                f"{path} would read back with a difference of {worst:.2g}; not written."
            )
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return worst


def difference(a: Adapter, b: Adapter) -> float:
    """Of the updates' largest entries, relative to the layer's own; infinite if layers differ."""
    if a.updates.keys() != b.updates.keys():
        return float("inf")
    shares = [torch.zeros(())]
    for path, update in a.updates.items():
        ones, others = says(update), says(b.updates[path])
        if len(ones) != len(others):
            return float("inf")
        for one, other in zip(ones, others, strict=True):
            scale = one.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            shares.append((one - other).abs().max() / scale)
    return float(torch.stack(shares).max())  # NaN if one is


def says(update: Update) -> list[Tensor]:
    """The change, and the magnitude of a DoRA; flat."""
    size = update.magnitude
    return [update.delta().flatten()] + ([] if size is None else [size.float().flatten()])
