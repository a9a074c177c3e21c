"""Decoding in worker processes: rows in, batches of pixels and captions out, in order.

Rows travel to the workers as they are (paths or bytes), so a stream is read once and only the
workers ever decode.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bksdm_tune import processes
from bksdm_tune.diffusion import crop
from bksdm_tune.errors import DataError
from distill.data import Row, Source, coin
from subjects.photos import decode_photo

T = TypeVar("T")
FEWEST = 1_000  # rows of a stream of which a share is taken
FLIP = 1  # names the coin, see distill.data.coin


class Item(NamedTuple):
    """What a worker gets: a row, and whether its picture is mirrored."""

    row: Row
    flip: bool


class Pictures(NamedTuple):
    """A decoded batch: ``pixels`` uint8 NCHW and ``captions`` of the good rows."""

    pixels: Tensor
    captions: list[str]
    names: list[str]
    places: list[int]
    """Which of the batch's rows the good ones were."""
    bad: list[tuple[str, str]]
    """Name and reason of the others."""


def without_gaps(
    batches: Iterable[T], places: Callable[[T], list[int]], size: int
) -> Iterator[tuple[T, list[int]]]:
    """For every batch: from which batch its ``size`` pictures come, and which good one of it each.

    ``places``: where in a batch its good rows stand.  A bad row's place is taken by the next good
    one of its batch, round the end; a batch without any takes the first of the next batch that has
    one.  So a batch depends on nothing before it, and a run can start anywhere.
    """
    without = 0
    for batch in batches:
        good = places(batch)
        if not good:
            without += 1
            continue
        for _ in range(without):
            yield batch, [0] * size
        without = 0
        nearest = [
            min(range(len(good)), key=lambda i: (good[i] - place) % size)  # noqa: B023
            for place in range(size)
        ]
        yield batch, nearest


class Decoder(Dataset[tuple[Item, Tensor | str]]):
    """Item -> the item and its pixels, uint8 CHW, or the reason why there are none."""

    def __init__(self, resolution: int) -> None:
        self.resolution = resolution

    def __getitem__(self, item: Item) -> tuple[Item, Tensor | str]:
        try:
            pixels = crop(decode_photo(item.row.image), self.resolution)
        except DataError as error:
            return item, str(error)
        return item, torch.from_numpy(
            np.ascontiguousarray(pixels[:, ::-1] if item.flip else pixels)
        )


def collate(decoded: list[tuple[Item, Tensor | str]]) -> Pictures:
    good = [i for i, (_, pixels) in enumerate(decoded) if isinstance(pixels, Tensor)]
    bad = [(item.row.name, reason) for item, reason in decoded if isinstance(reason, str)]
    images = [pixels.permute(2, 0, 1) for _, pixels in decoded if isinstance(pixels, Tensor)]
    return Pictures(
        torch.stack(images) if images else torch.empty(0, dtype=torch.uint8),
        [decoded[i][0].row.caption for i in good],
        [decoded[i][0].row.name for i in good],
        good,
        bad,
    )


def decode(
    batches: Iterable[list[Item]], resolution: int, workers: int, pin: bool = False
) -> Iterator[Pictures]:
    """Decode batches of items in order; the workers run a few batches ahead, no more."""
    return iter(
        DataLoader(
            Decoder(resolution),
            batch_sampler=batches,  # the "indices" are the rows themselves
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin,
        )
    )


def training_items(
    source: Source, batch_size: int, seed: int, start: int, flip: bool = True
) -> Iterator[list[Item]]:
    """Micro-batches from number ``start`` on: this process's share of the one global order."""
    together = batch_size * processes.count()
    first = batch_size * processes.rank()
    position = start * together
    rows = source.endless(seed, position)
    while True:
        batch = [
            Item(row, flip and coin(seed, position + i, 0.5, FLIP))
            for i, row in enumerate(itertools.islice(rows, together))
        ]
        position += together
        yield batch[first : first + batch_size]


def passing(rows: Iterable[Row], batch_size: int) -> Iterator[list[Item]]:
    """Rows as they come, unmirrored, in batches."""
    stream = iter(rows)
    while batch := [Item(row, False) for row in itertools.islice(stream, batch_size)]:
        yield batch


@dataclass
class Skipped:
    """Counts and lists what could not be used; too large a share of it stops the run."""

    path: Path
    limit: float
    source: Source
    seen: int = 0
    found: int = 0
    """Of the bad ones, by this call."""
    names: set[str] = field(default_factory=set)
    """Of all bad ones."""

    def __post_init__(self) -> None:
        """A resumed run knows what it listed before."""
        size = self.source.size
        whole = None if size is None else size + len(self.source.empty)
        self.total = None if whole is None else -(-whole // processes.count())
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.names = {json.loads(line)["name"] for line in lines}

    def note(self, rows: int, bad: list[tuple[str, str]]) -> None:
        """``rows`` were read, ``bad`` of them are broken; empty captions the source tells itself,
        all of them to every process.

        Raises:
            DataError: more than ``limit`` of this process's rows (of a stream: of those that this
                call saw, or of FEWEST) are bad.
        """
        empty, self.source.empty = self.source.empty[processes.rank() :: processes.count()], []
        self.seen += rows + len(empty)
        bad = bad + [(name, "the caption is empty") for name in empty]
        new = {name: reason for name, reason in bad if name not in self.names}
        if not new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            for name, reason in new.items():
                file.write(json.dumps({"name": name, "reason": reason}) + "\n")
        self.names |= new.keys()
        self.found += len(new)
        of, wrong = max(self.seen, FEWEST), self.found
        if self.total is not None:
            of, wrong = self.total, len(self.names)
        if wrong > self.limit * of:
            raise DataError(
                f"{wrong} of {of} rows are broken or without a caption, more than the "
                f"share {self.limit:g} that --max-broken allows; {self.path} lists them."
            )
