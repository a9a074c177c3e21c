"""A small image-caption data set in each of the layouts that ``--data`` takes."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, side: int = 40) -> Image.Image:
    """Smooth and different for every number; no two mirror images are alike."""
    x, y = np.meshgrid(np.linspace(0, 1, side + 8), np.linspace(0, 1, side))
    waves = [128 + 127 * np.sin((number + 2) * x * (c + 1) + y * 3 + c) for c in range(3)]
    return Image.fromarray(np.stack(waves, 2).astype(np.uint8))


def png(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def image_folder(folder: Path, count: int = 7, broken: tuple[int, ...] = ()) -> Path:
    """``metadata.csv`` and PNGs; pictures in ``broken`` are cut off."""
    folder.mkdir(parents=True)
    with open(folder / "metadata.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text"])
        for n in range(count):
            rows.writerow([f"{n}.png", f"picture {n}"])
            data = png(n)
            (folder / f"{n}.png").write_bytes(data[: len(data) // 2] if n in broken else data)
    return folder


def shards(folder: Path, count: int = 7, per_shard: int = 3, as_json: bool = False) -> Path:
    """WebDataset tars of png and txt (or json) files."""
    folder.mkdir(parents=True)
    for start in range(0, count, per_shard):
        with tarfile.open(folder / f"{start // per_shard:03d}.tar", "w") as tar:
            for n in range(start, min(start + per_shard, count)):
                text = json.dumps({"caption": f"picture {n}"}) if as_json else f"picture {n}"
                kind = "json" if as_json else "txt"
                for name, data in ((f"{n}.png", png(n)), (f"{n}.{kind}", text.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def table(count: int = 7) -> object:
    """A ``datasets.Dataset`` with columns image and caption."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    columns = {
        "image": [{"bytes": png(n), "path": f"{n}.png"} for n in range(count)],
        "caption": [f"picture {n}" for n in range(count)],
    }
    return Dataset.from_dict(
        columns, Features({"image": ImageFeature(), "caption": Value("string")})
    )
