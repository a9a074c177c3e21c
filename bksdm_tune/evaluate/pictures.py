"""One picture a caption, each with its own seed: resumable, shared between processes."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from bksdm_tune import processes
from bksdm_tune.errors import DataError
from bksdm_tune.pipeline import Shot, draw, write_png

KEPT_SIDE = 256  # pixels; larger pictures are reduced to it, bicubic in PIL


def read_captions(path: Path, n: int) -> list[tuple[str, str]]:
    """The first ``n`` (key, caption) pairs; keys are file names, or line numbers.

    Raises:
        DataError: the file cannot be read, or has no captions.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.suffix == ".csv":
                rows = [(row["file_name"], row["text"]) for row in csv.DictReader(file)]
            else:
                rows = [(f"{i:06d}", line.strip()) for i, line in enumerate(file)]
    except KeyError as error:
        raise DataError(f"{path} has no column {error}; file_name and text are needed.") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    pairs = [(key, text) for key, text in rows if text][:n]
    if not pairs:
        raise DataError(f"{path} has no captions.")
    if len({key for key, _ in pairs}) < len(pairs):
        raise DataError(f"{path} names a file twice; every caption needs its own key.")
    return pairs


def captions_hash(pairs: list[tuple[str, str]]) -> str:
    return hashlib.sha256("\n".join(f"{key}\t{text}" for key, text in pairs).encode()).hexdigest()


def picture_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def draw_all(pipe: Any, shots: list[Shot], folder: Path, batch_size: int) -> list[Path]:
    """Draw what is not there yet; the processes take turns at the numbers, whatever lies there, or
    one that looks later would count the others' pictures as done and share out the rest anew."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [picture_path(folder, number) for number in range(len(shots))]
    turns = range(processes.rank(), len(paths), processes.count())
    mine = [number for number in turns if not paths[number].exists()]
    with tqdm(total=len(mine), desc="drawing", unit="picture", disable=None) as bar:
        for start in range(0, len(mine), batch_size):
            numbers = mine[start : start + batch_size]
            for number, image in zip(
                numbers, draw(pipe, [shots[i] for i in numbers], batch_size), strict=True
            ):
                keep(image, paths[number])
            bar.update(len(numbers))
    processes.wait()
    return paths


def keep(image: Image.Image, path: Path) -> None:
    """Save whole, reduced to KEPT_SIDE."""
    if image.width > KEPT_SIDE:
        image = image.resize((KEPT_SIDE, KEPT_SIDE), Image.Resampling.BICUBIC)
    write_png(path, image)


def files_of(folder: Path) -> list[Path]:
    """Pictures of a folder of real ones.

    Raises:
        DataError: there are none.
    """
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds)
    if not found:
        raise DataError(f"{folder} has no pictures ({', '.join(kinds)}).")
    return found
