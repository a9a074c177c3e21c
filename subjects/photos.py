"""Photos on disk: where they lie, how they are decoded, and what is wrong with them."""

from __future__ import annotations

import io
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from bksdm_tune.artifacts import MANIFEST, cache_root, sha256_file
from bksdm_tune.errors import DataError
from subjects.catalogue import Subject

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Named so that a file in disguise never reaches a plug-in that starts another program (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
LAYOUTS = ("", "dataset", "dreambooth")  # subjects below a data folder, or below a clone
WHITE = (255, 255, 255, 255)


@dataclass(frozen=True)
class Photo:
    """One decodable photo; ``size`` is (width, height) in pixels after EXIF orientation."""

    path: Path
    sha256: str
    size: tuple[int, int]


@dataclass(frozen=True)
class PhotoSet:
    """The photos of one folder in natural order, and the names of what else lies there."""

    folder: Path
    photos: tuple[Photo, ...]
    ignored: tuple[str, ...]


def open_photo(path: Path) -> Image.Image:
    """As :func:`decode_photo`; the error names the path."""
    try:
        return decode_photo(path)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def decode_photo(file: Path | bytes) -> Image.Image:
    """Decode to 8-bit RGB: whole file, EXIF orientation, alpha over white, 16-bit / 257.

    Of an animation, the first frame.  Source: protocols.md 2.3.

    Raises:
        DataError: the file, or the bytes of one, cannot be decoded completely.
    """
    try:
        with Image.open(
            io.BytesIO(file) if isinstance(file, bytes) else file, "r", FORMATS
        ) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError:
        empty = not file if isinstance(file, bytes) else file.stat().st_size == 0
        raise DataError("is empty" if empty else f"is not a {', '.join(FORMATS)} image") from None
    except Image.DecompressionBombError:
        raise DataError("has too many pixels to be a photo; make it smaller") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"is damaged or truncated ({reason})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _eight_bits(image).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError("has 32 bits a channel; save it with 8 or 16")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    import numpy as np  # only these rare files need it, and listing subjects should be quick

    return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))


def natural_order(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key by which 2.jpg comes before 10.jpg and case decides only between equals."""
    parts = re.split(r"([0-9]+)", name.lower())  # text and numbers in turn, text first
    texts, numbers = parts[::2], parts[1::2]
    return list(zip([-1, *map(int, numbers)], texts, strict=True)), name


def is_photo_name(path: Path) -> bool:
    """By name alone: a visible file with one of ``EXTENSIONS`` in either case."""
    hidden = path.name.startswith(".")
    return not hidden and path.suffix.lower() in EXTENSIONS and not path.is_dir()


def _listing(folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {found}: give a folder that holds the photos.")
    entries = sorted(folder.iterdir(), key=lambda path: natural_order(path.name))
    photos = [path for path in entries if is_photo_name(path)]
    others = [path for path in entries if path not in photos and path.name != MANIFEST]
    return photos, tuple(f"{path.name}/" if path.is_dir() else path.name for path in others)


def read_photos(folder: Path, minimum_side: int) -> PhotoSet:
    """Decode every photo in ``folder``; stray files and sub-folders are ignored and named.

    Args:
        minimum_side: pixels that the shorter side needs.

    Raises:
        DataError: one report of every bad file, or that there are no photos at all.
    """
    paths, ignored = _listing(folder)
    if not paths:
        there = f"there are only: {', '.join(ignored)}" if ignored else "the folder is empty"
        raise DataError(f"No photos in {folder}: {' '.join(EXTENSIONS)} are read; {there}.")
    photos: list[Photo] = []
    bad: list[str] = []
    for path in paths:
        try:
            photos.append(_read_photo(path, minimum_side, photos))
        except DataError as error:
            bad.append(f"{path.name} {error}")
    if bad:
        report = "\n  ".join(bad)
        raise DataError(f"{len(bad)} of {len(paths)} photos in {folder} are bad:\n  {report}")
    return PhotoSet(folder, tuple(photos), ignored)


def _read_photo(path: Path, minimum_side: int, earlier: list[Photo]) -> Photo:
    size = decode_photo(path).size
    if min(size) < minimum_side:
        raise DataError(f"is {size[0]}x{size[1]}; the shorter side needs {minimum_side} pixels")
    sha256 = sha256_file(path)
    for photo in earlier:
        if photo.sha256 == sha256:
            raise DataError(f"is a copy of {photo.path.name}; delete one")
    return Photo(path, sha256, size)


def download_folder() -> Path:
    """Where ``subjects fetch`` puts the dataset unless told otherwise."""
    return cache_root() / "dreambooth"


def subject_folder(root: Path, name: str) -> Path | None:
    """The folder of exactly that name in ``root``, or in a clone or a data folder there."""
    folders = (root / layout / name for layout in LAYOUTS)
    return next((folder for folder in folders if folder.is_dir()), None)


def find_photos(name: str, data_root: Path | None) -> Path | None:
    """Look for a subject's folder in ``data_root``, then ``$BKSDM_DATA``, then the cache.

    Raises:
        DataError: ``data_root`` was given and is not a folder.
    """
    if data_root is not None and not data_root.is_dir():
        raise DataError(
            f"--data-root {data_root} is not a folder; give the one above the subjects."
        )
    environment = os.environ.get("BKSDM_DATA")
    for root in (data_root, Path(environment) if environment else None, download_folder()):
        folder = subject_folder(root, name) if root else None
        if folder:
            return folder
    return None


def check_photos(folder: Path, subject: Subject) -> list[str]:
    """What differs from the published photos: missing, changed and extra ones; empty if nothing."""
    problems = []
    for name, sha256 in subject.photos:
        if not (folder / name).is_file():
            problems.append(f"{folder / name}: missing")
        elif sha256_file(folder / name) != sha256:
            problems.append(f"{folder / name}: differs from the published photo")
    published = dict(subject.photos)
    extra = [path for path in _listing(folder)[0] if path.name not in published]
    return problems + [f"{path}: is not one of the published photos" for path in extra]
