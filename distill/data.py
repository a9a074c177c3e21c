"""Image-caption pairs: an image folder, a ``datasets`` table or WebDataset shards, as rows.

A row is raw bytes or a path, its caption and its name; decoding happens in loader workers.  The
order of rows is a function of the seed, so a run can start anywhere in it.
"""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.loop import shuffled
from bksdm_tune.resolve import HUB_ID

SHUFFLE_BUFFER = 1_000  # rows of a stream held to shuffle them; raw bytes, about 100 MB
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("text", "caption", "txt", "prompt")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Row(NamedTuple):
    """``image``: a path, or the bytes of an image file."""

    name: str
    image: Path | bytes
    caption: str


class Source(Protocol):
    """Pairs in an order of their own; rows without a caption are left out and counted."""

    facts: dict[str, Any]
    """What identifies the data, for caches and resumed runs."""
    size: int | None
    """Rows, where they are known without reading all."""
    empty: list[str]
    """Names of rows left out because their caption is empty, until somebody lists them."""

    def once(self, start: int = 0) -> Iterator[Row]:
        """Every row in file order, from number ``start`` on."""

    def endless(self, seed: int, start: int = 0) -> Iterator[Row]:
        """Shuffled pass after shuffled pass, from position ``start`` on."""


class Folder:
    """An image folder with ``metadata.csv``, ``.jsonl`` or ``.parquet``: file_name, text."""

    def __init__(self, root: Path, metadata: Path, caption_column: str | None) -> None:
        rows = _read_table(metadata)
        if not rows:
            raise DataError(f"{metadata} has no rows.")
        column = _column(list(rows[0]), CAPTION_COLUMNS, caption_column, "--caption-column")
        if "file_name" not in rows[0]:
            raise DataError(f"{metadata} needs a column file_name; it has {', '.join(rows[0])}.")
        pairs = [
            (_file_name(metadata, number, row), str(row.get(column) or "").strip())
            for number, row in enumerate(rows, 1)
        ]
        self.root, self.rows = root, [pair for pair in pairs if pair[1]]
        self.size: int | None = len(self.rows)
        self.empty = [name for name, caption in pairs if not caption]
        self.facts = {"folder": [(*pair, _bytes(root / pair[0])) for pair in self.rows]}
        if not self.rows:
            raise DataError(f"{metadata}: every caption in column {column!r} is empty.")

    def __getitem__(self, number: int) -> Row:
        name, caption = self.rows[number]
        return Row(name, self.root / name, caption)

    def once(self, start: int = 0) -> Iterator[Row]:
        return (self[number] for number in range(start, len(self.rows)))

    def endless(self, seed: int, start: int = 0) -> Iterator[Row]:
        return (self[int(number)] for (number,) in shuffled(len(self.rows), 1, seed)(start))


class Stream:
    """A ``datasets.IterableDataset`` with an image and a caption column, never held in memory.

    To start in the middle, the rows before are read (not decoded) and dropped.
    """

    size: int | None = None

    def __init__(self, dataset: Any, facts: dict[str, Any], columns: tuple[str, str]) -> None:
        self.dataset, (self.image, self.caption) = dataset, columns
        self.facts = facts | {"columns": columns}
        self.empty: list[str] = []

    def once(self, start: int = 0) -> Iterator[Row]:
        return self._rows(self.dataset, start)

    def endless(self, seed: int, start: int = 0) -> Iterator[Row]:
        shuffling, epoch, position = (
            self.dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER),
            0,
            0,
        )
        while True:
            shuffling.set_epoch(epoch)
            before = position
            for row in self._rows(shuffling, 0):
                if position >= start:
                    yield row
                position += 1
            if position == before:
                raise DataError("The data has no row with an image and a caption.")
            epoch += 1

    def _rows(self, dataset: Any, start: int) -> Iterator[Row]:
        position = 0
        for number, row in enumerate(_readable(dataset)):
            image = row[self.image] or {}
            name = str(row.get("__key__") or image.get("path") or number)
            caption = _caption(row, self.caption)
            if not caption:
                self.empty.append(name)
                continue
            if position >= start:
                yield Row(name, image.get("bytes") or Path(image.get("path") or ""), caption)
            position += 1


def _readable(dataset: Any) -> Iterator[dict[str, Any]]:
    """Raises DataError: the source breaks off (a truncated shard, text that is not UTF-8, ...)."""
    try:
        yield from dataset
    except Exception as error:  # the library and its file systems raise their own
        raise DataError(f"--data cannot be read on ({type(error).__name__}: {error})") from None


def open_source(
    ref: str, image_column: str | None = None, caption_column: str | None = None
) -> Source:
    """What ``--data`` names: a folder with metadata, arrow or parquet files, shards, a Hub id.

    Raises:
        UsageError: it is none of these.
        DataError: it is one, but has no usable columns, or cannot be read.
    """
    path = Path(ref).expanduser()
    for name in METADATA:
        if (path / name).is_file():
            return Folder(path, path / name, caption_column)
    if shards := find_shards(ref):
        loaded = _load("webdataset", data_files={"train": shards})
        return _stream(loaded, _file_facts(shards), image_column, caption_column)
    if (path / "state.json").is_file():
        from datasets import load_from_disk

        files = sorted(str(file) for file in path.glob("*.arrow"))
        loaded = load_from_disk(str(path)).to_iterable_dataset()
        return _stream(loaded, _file_facts(files), image_column, caption_column)
    for kind in ("parquet", "arrow"):
        if files := sorted(glob.glob(f"{path}/**/*.{kind}", recursive=True)):
            loaded = _load(kind, data_files={"train": files})
            return _stream(loaded, _file_facts(files), image_column, caption_column)
    if not path.exists() and HUB_ID.fullmatch(ref):
        return _stream(_load(ref), {"hub": ref}, image_column, caption_column)
    raise UsageError(
        f"--data {ref} is no data set. Right would be: a folder with images and metadata.csv, "
        ".jsonl or .parquet (file_name, text); a folder of .parquet or .arrow files; WebDataset "
        "shards such as 'shards/{000..131}.tar' (local or a URL); a latent cache; a Hub id."
    )


def find_shards(ref: str) -> list[str]:
    """The .tar files that a folder, a pattern (``*``, ``{000..131}``) or a URL names.

    Raises:
        DataError: some of the shards that a range names are not on disk.
    """
    if Path(ref).is_dir():
        return sorted(glob.glob(f"{ref}/*.tar"))
    if not ref.endswith(".tar"):
        return []
    names = _expand(ref)
    if "://" in ref:
        return names
    found = {name: sorted(glob.glob(name)) for name in names}
    missing = [name for name in names if not found[name]]
    if missing and len(names) > 1:
        raise DataError(
            f"--data {ref}: {len(missing)} of {len(names)} shards are not there: "
            f"{', '.join(missing[:5])}."
        )
    return [file for name in names for file in found[name]]


def _expand(pattern: str) -> list[str]:
    """``{000..131}`` as the shell expands it."""
    found = RANGE.search(pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [
        name
        for number in numbers
        for name in _expand(pattern[: found.start()] + number + pattern[found.end() :])
    ]


def _load(kind: str, **files: Any) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(kind, split="train", streaming=True, **files)
    except Exception as error:  # the library and its file systems raise their own
        raise DataError(
            f"--data {kind}: cannot be read ({type(error).__name__}: {error})"
        ) from None


def _stream(
    dataset: Any, facts: dict[str, Any], image_column: str | None, caption_column: str | None
) -> Stream:
    from datasets import Image

    try:
        first = next(iter(dataset.decode(False)), None)
    except Exception as error:
        raise DataError(f"The data cannot be read ({type(error).__name__}: {error})") from None
    if first is None:
        raise DataError("The data set is empty.")
    columns = list(first)
    if "json" in columns and caption_column is None and "txt" not in columns:
        caption_column = "json"
    image = _column(columns, IMAGE_COLUMNS, image_column, "--image-column")
    caption = _column(columns, CAPTION_COLUMNS, caption_column, "--caption-column")
    return Stream(dataset.cast_column(image, Image(decode=False)), facts, (image, caption))


def _caption(row: dict[str, Any], column: str) -> str:
    """Text of a column; of a WebDataset's json the field that looks like a caption."""
    value = row.get(column)
    if isinstance(value, dict):
        value = next((value[name] for name in CAPTION_COLUMNS if value.get(name)), "")
    return str(value or "").strip()


def _column(columns: list[str], usual: tuple[str, ...], asked: str | None, flag: str) -> str:
    candidates = (asked,) if asked else usual
    for name in candidates:
        if name in columns:
            return name
    raise DataError(
        f"The data has the columns {', '.join(columns)}, none of them {' or '.join(candidates)}. "
        f"Name the right one with {flag}."
    )


def _file_name(table: Path, number: int, row: dict[str, Any]) -> str:
    name = row.get("file_name")
    if not name:
        raise DataError(f"{table}: row {number} has no file_name.")
    return str(name)


def _bytes(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _file_facts(files: list[str]) -> dict[str, Any]:
    """Names, and sizes where they are local: content would take hours at 2.3 million pairs."""
    return {
        "files": [
            (name, None) if "://" in name else (Path(name).name, Path(name).stat().st_size)
            for name in files
        ]
    }


def _read_table(path: Path) -> list[dict[str, Any]]:
    readers: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        ".csv": _read_csv,
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
    }
    try:
        return readers[path.suffix](path)
    except (ValueError, OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("every line must be an object with file_name and text")
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return list(pyarrow.parquet.read_table(path).to_pylist())


def coin(seed: int, position: int, probability: float, name: int) -> bool:
    """A random decision about the row at ``position``; ``name`` tells decisions apart."""
    return bool(np.random.default_rng((seed, name, position)).random() < probability)
