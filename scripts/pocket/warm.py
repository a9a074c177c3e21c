"""Stage ``warm``: let ``vae`` and ``unet`` begin from the shipped weights, not from random ones.

Not part of ``all``.  Run it after ``data`` and before ``vae``; the cards add the steps up.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from scripts.pocket.pack import POCKET

PARTS = {
    "vae": {"vae": "shared/vae/diffusion_pytorch_model.safetensors"},
    "unet": {
        "unet": "unet-teacher/diffusion_pytorch_model.safetensors",
        "text_encoder": "shared/text_encoder/model.safetensors",
    },
}


def keep_tokenizer(folder: Path) -> None:
    """Number the tokens as the shipped tokenizer does (ties in learning it fall either way)."""
    learned = json.loads((folder / "tokenizer/vocab.json").read_text())
    shipped = json.loads((POCKET / "shared/tokenizer/vocab.json").read_text())
    if learned.keys() != shipped.keys():
        raise SystemExit("the captions changed the vocabulary: the text encoder cannot go on")
    numbers = np.zeros(len(shipped), np.uint16)
    for symbol, number in learned.items():
        numbers[number] = shipped[symbol]
    for path in folder.glob("*-tokens.npy"):
        np.save(path, numbers[np.load(path)])
    shutil.copytree(POCKET / "shared/tokenizer", folder / "tokenizer", dirs_exist_ok=True)


def run(work: Path) -> None:
    keep_tokenizer(work / "data")
    training = json.loads((POCKET / "facts.json").read_text())["training"]
    for stage, files in PARTS.items():
        start = work / stage / "start"
        start.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            tensors = {key: value.float() for key, value in load_file(POCKET / file).items()}
            save_file(tensors, start / f"{name}.safetensors")
        (start / "training.json").write_text(json.dumps(training[stage]) + "\n")
