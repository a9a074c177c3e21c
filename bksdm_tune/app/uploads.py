"""Photos from a browser: what is wrong with each, said before anything starts.

Nothing of a name that came in is used as a path; what is kept is numbered.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from bksdm_tune.artifacts import sha256_file
from bksdm_tune.errors import DataError, UsageError
from subjects.photos import FORMATS, decode_photo

FEWEST, MOST = 3, 20
MOST_BYTES, MOST_PIXELS = 30 * 2**20, 60_000_000
ALIKE = 4  # of 64 bits: nearer pictures are views of one moment
SHARP = 12.0  # grey levels: spread of the Laplacian of a photo 256 pixels wide
SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}


@dataclass(frozen=True)
class Verdict:
    """``bad``: cannot be used; ``warnings``: can, but the person should know."""

    name: str
    path: Path
    size: tuple[int, int] | None
    bad: str | None
    warnings: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        if self.bad:
            return f"not used: {self.bad}"
        return "; ".join(self.warnings) or "good"


def examine(paths: list[Path], smallest_side: int) -> list[Verdict]:
    """A verdict on each file, in order; names are for people only.

    Raises:
        UsageError: there are too many.
    """
    if len(paths) > MOST:
        raise UsageError(f"{len(paths)} photos are too many; choose the best {FEWEST} to {MOST}.")
    verdicts: list[Verdict] = []
    seen: list[tuple[str, NDArray[Any]]] = []
    hashes: dict[str, str] = {}
    for path in paths:
        verdict, print_ = _look(path, smallest_side)
        if verdict.bad is None:
            first = hashes.setdefault(sha256_file(path), verdict.name)
            if first != verdict.name or path in {v.path for v in verdicts}:
                verdict = Verdict(verdict.name, path, verdict.size, f"is a copy of {first}")
        if print_ is not None and verdict.bad is None:
            twin = next((n for n, other in seen if int((other != print_).sum()) <= ALIKE), None)
            if twin is not None:
                text = f"almost the same as {twin}; another view would teach more"
                verdict = Verdict(verdict.name, path, verdict.size, None, (*verdict.warnings, text))
            seen.append((verdict.name, print_))
        verdicts.append(verdict)
    return verdicts


def _look(path: Path, smallest_side: int) -> tuple[Verdict, NDArray[Any] | None]:
    name = path.name

    def bad(reason: str) -> tuple[Verdict, None]:
        return Verdict(name, path, None, reason), None

    try:
        if path.stat().st_size > MOST_BYTES:
            return bad(f"has more than {MOST_BYTES >> 20} MB")
        with Image.open(path, formats=FORMATS) as header:
            if header.width * header.height > MOST_PIXELS:
                return bad(f"has {header.width} x {header.height} pixels; make it smaller")
            turned = header.getexif().get(0x0112, 1) != 1
        image = decode_photo(path)
    except DataError as error:
        return bad(str(error))
    except Image.UnidentifiedImageError:
        return bad("is no picture")
    except Exception as error:  # decoders and EXIF readers raise what they like on damaged files
        return bad(str(error) or "is damaged")
    if min(image.size) < smallest_side:
        return bad(
            f"is {image.width} x {image.height}; the shorter side needs {smallest_side} pixels"
        )
    warnings = []
    if turned:
        warnings.append("was turned as the camera said")
    if sharpness(image) < SHARP:
        warnings.append("looks blurred")
    return Verdict(name, path, image.size, None, tuple(warnings)), fingerprint(image)


def fingerprint(image: Image.Image) -> NDArray[np.bool_]:
    """64 bits that differ little between pictures that look alike: is each cell darker than the
    next one to its right (dHash)."""
    grey = ImageOps.grayscale(image).resize((9, 8), Image.Resampling.BOX)
    cells = np.asarray(grey).astype(int)
    return np.asarray(cells[:, :-1] < cells[:, 1:]).reshape(-1)


def sharpness(image: Image.Image) -> float:
    """Standard deviation of the Laplacian at a common size; blurred photos have little."""
    grey = ImageOps.grayscale(image)
    grey.thumbnail((256, 256), Image.Resampling.BOX)
    x = np.asarray(grey).astype(float)
    if min(x.shape) < 3:
        return 0.0
    centre = 4 * x[1:-1, 1:-1]
    return float((centre - x[:-2, 1:-1] - x[2:, 1:-1] - x[1:-1, :-2] - x[1:-1, 2:]).std())


def keep(verdicts: list[Verdict], folder: Path) -> Path:
    """Copy the usable photos into ``folder`` under numbers.

    Raises:
        UsageError: too few are usable.
    """
    good = [verdict for verdict in verdicts if verdict.bad is None]
    if len(good) < FEWEST:
        raise UsageError(
            f"{len(good)} of {len(verdicts)} photos can be used; {FEWEST} are needed, "
            "4 to 6 are best."
        )
    folder.mkdir(parents=True)
    for number, verdict in enumerate(good):
        with Image.open(verdict.path) as image:
            suffix = SUFFIXES.get(image.format or "", ".png")
        shutil.copyfile(verdict.path, folder / f"{number:02d}{suffix}")
    return folder
