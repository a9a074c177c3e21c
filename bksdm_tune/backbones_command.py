"""``bksdm-tune backbones``: what can be tuned, how large it is, what is already on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from bksdm_tune.backbones import BACKBONES, EMBEDDED, Backbone
from bksdm_tune.resolve import local_snapshot

HEADER = (
    *("name", "params", "GMACs", "px", "target", "disk"),
    *("teacher", "licence", "source", "on disk"),
)
FOOTNOTE = """\
params: U-Net alone.  GMACs: one U-Net pass, batch 1, 77 tokens, native size; convolution, linear
and norm modules.  disk: U-Net, text encoder, VAE and safety checker as published."""


@dataclass(frozen=True)
class Config:
    """List what can be tuned, how large it is, and what is already on disk."""

    json: bool = False
    """Print a JSON list of objects instead of the table."""


def describe(row: Backbone) -> dict[str, Any]:
    """Everything the registry and this disk know of a row; sizes in bytes, sides in pixels."""
    local = find_local(row)
    return {
        "name": row.name,
        "family": row.family,
        "size": row.plan.name,
        "unet_parameters": row.unet_parameters,
        "text_encoder_parameters": row.text_encoder_parameters,
        "vae_parameters": row.vae_parameters,
        "gmacs": row.gmacs,
        "resolution": row.resolution,
        "prediction_type": row.prediction_type,
        "precision": row.precision,
        "disk_bytes": row.disk_bytes,
        "teacher": row.teacher,
        "source": row.source,
        "licence": row.licence,
        "local": None if local is None else str(local),
    }


def find_local(row: Backbone) -> Path | None:
    """The row's pipeline folder if it is on this disk; never touches the network."""
    if row.source != EMBEDDED:
        return local_snapshot(row.source)
    from bksdm_tune.pocket import materialise

    return materialise(row.name)


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned text, one line a row under a header."""
    cells = [HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        f"{row['unet_parameters'] / 1e6:.1f}M",
        f"{row['gmacs']:.5g}",
        str(row["resolution"]),
        row["prediction_type"],
        f"{row['disk_bytes'] / 1e6:.0f} MB",
        row["teacher"] or "-",
        row["licence"],
        row["source"],
        row["local"] or "-",
    )


def main(argv: list[str]) -> int:
    config = tyro.cli(Config, args=argv, prog="bksdm-tune backbones")
    rows = [describe(row) for row in BACKBONES.values()]
    if config.json:
        print(json.dumps(rows, indent=2))
    else:
        print(f"{table(rows)}\n\n{FOOTNOTE}")
    return 0
