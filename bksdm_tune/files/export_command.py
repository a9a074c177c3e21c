"""``bksdm-tune export``: a run or an adapter as a file that other tools open."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from bksdm_tune.config import check_range, parse
from bksdm_tune.resolve import tuned_from

if TYPE_CHECKING:
    from bksdm_tune.files.export import Source


@dataclass(frozen=True)
class Config:
    """Write a run or an adapter in another tool's format, read it back, and compare."""

    model: Positional[str]
    """Run folder, adapter (file, or PEFT's folder), or (merged, single-file, onnx, coreml) any
    backbone."""
    format: Literal["diffusers", "peft", "kohya", "merged", "single-file", "onnx", "coreml", "svd"]
    """diffusers, peft, kohya: the adapter; merged: a whole pipeline with it folded in; single-file:
    the same as one checkpoint in LDM's layout (ComfyUI, A1111); onnx: U-Net, text encoder and VAE
    for onnxruntime; coreml: the same as palettised ML programs; svd: a LoRA out of a full run."""
    out: Path
    """File or, for peft, merged, onnx and coreml, folder to write."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Of merged and single-file."""
    rank: int = 16
    """Of svd."""
    backbone: str | None = None
    """What an adapter file goes on; default: what its metadata names."""
    base: str | None = None
    """Where the other parts come from, if the backbone is a U-Net alone."""

    def __post_init__(self) -> None:
        check_range("--rank", self.rank, 1)


def source_of(
    model: str,
    dtype: str = "fp16",
    rank: int = 16,
    backbone: str | None = None,
    base: str | None = None,
) -> Source:
    """What a run folder, adapter file or backbone is exported from."""
    from bksdm_tune.files.export import Source
    from bksdm_tune.generate import Config as Drawing
    from bksdm_tune.generate import find_model

    found = find_model(Drawing(model, "", backbone=backbone, base=base))
    before = replace(found.parts, adapter=None)
    if found.parts.adapter is None:
        before = tuned_from(Path(model)) or before
    return Source(found.parts, before, found.trigger, dtype, rank)


def main(argv: list[str]) -> int:
    config = parse(Config, argv, "bksdm-tune export")
    from bksdm_tune.files.coreml_format import summary
    from bksdm_tune.files.export import energy, export

    source = source_of(config.model, config.dtype, config.rank, config.backbone, config.base)
    found = export(source, config.format, config.out)
    print(f"Wrote {config.out}. Read back and asked the same, the largest difference is:")
    for name, value in found.items():
        print(f"  {name}: {value:.2g} of the largest answer")
    if config.format == "coreml":
        print(summary(config.out))
    if config.format == "svd":
        print(f"Rank {config.rank} keeps {100 * energy(source, config.out):.2f} % of the change.")
    return 0
