"""Latents computed once: ``bksdm-tune cache`` and the reader that training takes them from.

A cache is a folder of shards, ``shard-00000.safetensors`` (``latents`` float16 (rows, 2, C, h, w),
unmirrored and mirrored; ``embeds`` float16 (rows, tokens, width) if asked) with a ``.json`` beside
each (names, captions, what was skipped, bytes, sha256), and a manifest, written last, that says
what they were made with.  A latent is the posterior's mean times the VAE's scale: Stable
Diffusion's posterior is so narrow that its mean stands for it.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from bksdm_tune.artifacts import (
    MANIFEST,
    locked,
    read_manifest,
    sha256_file,
    write_manifest,
    write_text_atomic,
)
from bksdm_tune.diffusion import embed, tokenise, unit_range
from bksdm_tune.errors import DataError
from bksdm_tune.runs import occupy
from distill.data import Row, Source
from distill.loading import Pictures, Skipped, decode, passing

KIND = "latent-cache"
SHARD_ROWS = 2_048


@dataclass(frozen=True)
class Encoders:
    """What turns pictures and captions into what a U-Net sees; frozen, in eval.

    ``text_encoder`` is None where only latents are wanted.
    """

    vae: Any
    scaling_factor: float
    tokenizer: Any = None
    text_encoder: Any = None

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """uint8 NCHW -> scaled latent means, rounded to float16 and back, float32 NCHW.

        On a CPU one picture at a time, so that a latent does not depend on its neighbours.
        """
        device = self.vae.device
        piece = 1 if device.type == "cpu" else 16
        means = [
            self.vae.encode(unit_range(part.to(device)).to(self.vae.dtype)).latent_dist.mean
            for part in pixels.split(piece)
        ]
        return (torch.cat(means).float() * self.scaling_factor).half().float()

    @torch.no_grad()
    def embeds(self, captions: list[str]) -> Tensor:
        """Captions -> (N, tokens, width), rounded to float16 and back, float32."""
        piece = 1 if self.text_encoder.device.type == "cpu" else 64
        ids = tokenise(self.tokenizer, captions)
        parts = [embed(self.text_encoder, part) for part in ids.split(piece)]
        return torch.cat(parts).half().float()


def shard_paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"shard-{number:05d}.safetensors", folder / f"shard-{number:05d}.json"


def whole(folder: Path, number: int, thorough: bool) -> dict[str, Any] | None:
    """Facts of a shard that is as it was written, else None.  ``thorough``: by sha256, not size."""
    tensors, facts_path = shard_paths(folder, number)
    if not (tensors.is_file() and facts_path.is_file()):
        return None
    try:
        facts: dict[str, Any] = json.loads(facts_path.read_text())
    except ValueError:
        return None
    if tensors.stat().st_size != facts["bytes"]:
        return None
    if thorough and sha256_file(tensors) != facts["sha256"]:
        return None
    return facts


@dataclass
class Writer:
    """Fills ``folder``; whole shards that are there already stay."""

    folder: Path
    source: Source
    encoders: Encoders
    resolution: int
    batch_size: int
    workers: int
    max_broken: float
    shard_rows: int = SHARD_ROWS
    _rows: Iterator[Row] | None = None
    _position: int = 0

    def run(self, facts: dict[str, Any]) -> dict[str, int]:
        """Rows cached and rows skipped.

        Raises:
            UsageError: the folder holds something else.
            DataError: too many broken images.
        """
        with locked(self.folder):
            plan = facts | {"shard_rows": self.shard_rows}
            occupy(self.folder, plan, "cache", "a cache of other data, model, resolution or kind")
            (self.folder / MANIFEST).unlink(missing_ok=True)  # until all is whole again
            listed = self.folder / "skipped.jsonl"
            listed.unlink(missing_ok=True)
            skipped = Skipped(listed, self.max_broken, self.source)
            rows = 0
            with tqdm(desc="caching", total=self.source.size, unit="image", disable=None) as bar:
                for number in itertools.count():
                    shard = whole(self.folder, number, thorough=True) or self.write(number)
                    bar.update(shard["read"])
                    skipped.note(shard["read"], [tuple(entry) for entry in shard["broken"]])
                    rows += len(shard["captions"])
                    if shard["read"] < self.shard_rows:
                        break
            totals = {"rows": rows, "skipped": len(skipped.names)}
            results = totals | {"shards": number + 1} | finish(self.folder, number + 1)
            write_manifest(self.folder, KIND, facts, results=results)
        return totals

    def rows_from(self, position: int) -> Iterator[Row]:
        """The source goes on where it stands; a stream is opened again only to jump."""
        if self._rows is None or self._position != position:
            self._rows = self.source.once(position)
        self._position = position + self.shard_rows
        return itertools.islice(self._rows, self.shard_rows)

    def write(self, number: int) -> dict[str, Any]:
        """One shard; its facts, written after it, make it whole."""
        tensors: dict[str, list[Tensor]] = {"latents": []}
        facts: dict[str, Any] = {"read": 0, "names": [], "captions": [], "places": [], "broken": []}
        rows = self.rows_from(number * self.shard_rows)
        for pictures in decode(passing(rows, self.batch_size), self.resolution, self.workers):
            facts["places"] += [facts["read"] + place for place in pictures.places]
            facts["read"] += len(pictures.captions) + len(pictures.bad)
            facts["broken"] += pictures.bad
            facts["captions"] += pictures.captions
            facts["names"] += pictures.names
            if pictures.captions:
                self.encode(pictures, tensors)
        path, facts_path = shard_paths(self.folder, number)
        scratch = path.with_suffix(".tmp")
        save_file({name: torch.cat(parts) for name, parts in tensors.items() if parts}, scratch)
        os.replace(scratch, path)
        facts |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        write_text_atomic(facts_path, json.dumps(facts))
        return facts

    def encode(self, pictures: Pictures, tensors: dict[str, list[Tensor]]) -> None:
        both = [self.encoders.latents(p) for p in (pictures.pixels, pictures.pixels.flip(-1))]
        tensors["latents"].append(torch.stack(both, 1).half().cpu())
        if self.encoders.text_encoder is not None:
            embeds = self.encoders.embeds(pictures.captions).half().cpu()
            tensors.setdefault("embeds", []).append(embeds)


def finish(folder: Path, shards: int) -> dict[str, Any]:
    """Drop shards of an earlier, longer cache; the shape of a latent."""
    for number in itertools.count(shards):
        paths = [path for path in shard_paths(folder, number) if path.exists()]
        if not paths:
            break
        for path in paths:
            path.unlink()
    with safe_open(shard_paths(folder, 0)[0], "pt") as file:
        return {"latent_shape": file.get_slice("latents").get_shape()[2:]}


class LatentCache:
    """Random access to a finished cache; shards are mapped, not loaded, and checked when opened.

    ``size`` counts the rows of the data, broken ones too, so that the order of training is that of
    the data itself.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            DataError: the folder is no finished cache, or a shard is missing or truncated.
        """
        self.folder = folder
        manifest = read_manifest(folder, KIND)
        self.facts: dict[str, Any] = manifest["config"]
        self.skipped: int = manifest["results"]["skipped"]
        numbers = range(manifest["results"]["shards"])
        found = [whole(folder, number, thorough=False) for number in numbers]
        self.shards = [facts for facts in found if facts]
        if len(self.shards) < len(found):
            bad = [shard_paths(folder, i)[0].name for i in numbers if found[i] is None]
            raise self.damaged(", ".join(bad))
        self.captions = [text for facts in self.shards for text in facts["captions"]]
        counts = np.array([len(facts["captions"]) for facts in self.shards])
        self.ends = np.cumsum(counts)
        self.starts = self.ends - counts
        self.size: int = sum(facts["read"] for facts in self.shards)
        if not self.captions:
            raise DataError(f"{folder} holds no pictures.")
        self.rows = self._find_rows()
        self._files: dict[int, Any] = {}
        self._open = ExitStack()

    def damaged(self, shards: str) -> DataError:
        return DataError(
            f"{self.folder}: {shards} missing or damaged. Type the same `bksdm-tune cache` "
            "command again: it makes only these anew."
        )

    def _find_rows(self) -> np.ndarray:
        """(size,): for every row of the data its number here, -1 for a broken picture."""
        rows, first = np.full(self.size, -1), 0
        for facts, start in zip(self.shards, self.starts, strict=True):
            rows[first + np.array(facts["places"], int)] = start + np.arange(len(facts["places"]))
            first += facts["read"]
        return rows

    def _slice(self, shard: int, name: str) -> Any:
        """Raises DataError: the shard's bytes are not those that were written."""
        if shard not in self._files:
            path = shard_paths(self.folder, shard)[0]
            if sha256_file(path) != self.shards[shard]["sha256"]:
                raise self.damaged(path.name)
            self._files[shard] = self._open.enter_context(safe_open(path, "pt"))
        return self._files[shard].get_slice(name)

    def _places(self, numbers: np.ndarray) -> list[tuple[int, int]]:
        """(shard, place in it) of each row."""
        shards = np.searchsorted(self.ends, numbers, side="right")
        places = numbers - self.starts[shards]
        return [(int(shard), int(place)) for shard, place in zip(shards, places, strict=True)]

    def latents(self, numbers: np.ndarray, flips: list[bool]) -> Tensor:
        """Scaled latents of rows, float32 NCHW; ``flips`` picks the mirrored ones."""
        parts = [
            self._slice(shard, "latents")[place : place + 1, int(flip) : int(flip) + 1]
            for (shard, place), flip in zip(self._places(numbers), flips, strict=True)
        ]
        return torch.cat(parts)[:, 0].float()

    def embeds(self, numbers: np.ndarray) -> Tensor | None:
        """Prompt embeddings float32 (N, tokens, width), or None if the cache has none."""
        if not self.facts["text_encoder"]:
            return None
        parts = [
            self._slice(shard, "embeds")[place : place + 1]
            for shard, place in self._places(numbers)
        ]
        return torch.cat(parts).float()
