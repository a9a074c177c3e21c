"""The embedded miniature family: weights as data, and the folders that diffusers reads.

Shared parts lie here once, in fp16: ``shared/`` (tokenizer, text encoder, VAE, scheduler, index),
``unet-teacher`` ... ``unet-tiny``; ``clip`` and ``looks`` for scoring.  No torch is loaded.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from bksdm_tune.artifacts import cached, content_key, sha256_file

HERE = Path(__file__).parent
PREFIX = "pocket-"


def _facts(sources: list[Path]) -> str:
    files = sorted(path for source in sources for path in source.rglob("*") if path.is_file())
    return content_key({path.relative_to(HERE).as_posix(): sha256_file(path) for path in files})


def _widen(source: Path, target: Path) -> None:
    """fp16 -> fp32, so that a plain ``from_pretrained`` runs on a CPU."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    tensors = {
        key: value.astype(np.float32) if value.dtype == np.float16 else value
        for key, value in load_file(source).items()
    }
    save_file(tensors, target, metadata={"format": "pt"})


def _copy(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.is_dir() or "__pycache__" in path.parts:
            continue
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            _widen(path, place)
        else:
            shutil.copyfile(path, place)


def materialise(name: str) -> Path:
    """The pipeline folder of ``pocket-teacher``, ``-base``, ``-small``, ``-tiny``, in the cache."""
    size = name.removeprefix(PREFIX)
    parts = {"unet": HERE / f"unet-{size}", "": HERE / "shared"}

    def make(folder: Path) -> None:
        for place, source in parts.items():
            _copy(source, folder / place)
        shutil.copyfile(HERE / f"card-{size}.md", folder / "README.md")

    return cached("backbones", {"name": name, "files": _facts([*parts.values()])}, make)


def encoder(name: str) -> Path:
    """Model folder of an encoder for scoring, in the cache: ``clip`` (with its tokenizer), a CLIP
    pair, or ``looks``, a self-supervised ResNet."""
    sources = [HERE / name] + ([HERE / "shared/tokenizer"] if name == "clip" else [])

    def make(folder: Path) -> None:
        for source in sources:
            _copy(source, folder)

    return cached("encoders", {"name": name, "files": _facts(sources)}, make)
