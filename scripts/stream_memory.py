"""Memory while a WebDataset streams: peak after each part of the rows, decoded in workers.

    python scripts/stream_memory.py --out work/shards [--rows 100000]

Writes the shards once (small JPEGs and captions), then reads them all as training would and prints
the peak resident memory of this process and of its workers at every tenth of the way.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import psutil
from PIL import Image

from distill.data import open_source
from distill.loading import decode, training_items

PER_SHARD, SIDE, BATCH, WORKERS = 4_000, 64, 64, 2


def members(number: int) -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(number)
    file = io.BytesIO()
    small = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
    small.resize((SIDE, SIDE)).save(file, "JPEG")
    yield f"{number:07d}.jpg", file.getvalue()
    yield f"{number:07d}.txt", f"picture {number}".encode()


def write_shards(folder: Path, rows: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, rows, PER_SHARD):
        path = folder / f"{start // PER_SHARD:05d}.tar"
        if path.exists():
            continue
        scratch = path.with_suffix(".tmp")
        with tarfile.open(scratch, "w") as tar:
            for number in range(start, min(start + PER_SHARD, rows)):
                for name, data in members(number):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        scratch.rename(path)


def resident() -> float:
    """MB of this process and its workers, shared pages counted once (PSS)."""
    me = psutil.Process()
    return sum(p.memory_full_info().pss for p in [me, *me.children(recursive=True)]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    options = parser.parse_args()
    write_shards(options.out, options.rows)
    size = sum(path.stat().st_size for path in options.out.glob("*.tar")) / 1e6
    source = open_source(str(options.out))
    batches = decode(training_items(source, BATCH, seed=0, start=0), SIDE, WORKERS)
    total = options.rows // BATCH
    print(f"{options.rows:,} rows, {size:.0f} MB of shards, batch {BATCH}, {WORKERS} workers")
    for number in range(1, total + 1):
        next(batches)
        if number % (total // 10) == 0:
            print(f"{number * BATCH:>9,} rows read: {resident():7.0f} MB", flush=True)


if __name__ == "__main__":
    main()
