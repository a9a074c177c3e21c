"""Stage ``data``: draw the world, cut the real photos, learn the tokenizer.

Leaves in ``<work>/data``: ``train`` and ``heldout`` arrays (``*-images.npy`` uint8 NHWC 64 px,
``*-labels.npy`` int16 (kind, colour, scene, modified), ``*-tokens.npy`` uint16 (N, captions, 32)),
``named-*`` (looks with a name), ``train-captions.json`` (one a picture), ``real-train.npy``,
``real-heldout.npy`` and ``tokenizer/``.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from subjects.catalogue import SUBJECTS
from subjects.illustrated.captions import caption, nonsense, random_picture, visible_paint
from subjects.illustrated.looks import COLOURS, KINDS, LIVE_KINDS
from subjects.illustrated.render import Picture, render
from subjects.illustrated.scenes import SCENES
from subjects.illustrated.twins import FORBIDDEN
from subjects.photos import open_photo

LOOKS, VIEWS, CAPTIONS = 15_000, 4, 4
HELDOUT_LOOKS = 1_000
# Looks that a word names, with many views each: from them the model learns that such words matter.
NAMED_LOOKS, NAMED_VIEWS = 200, 30
# Real subjects whose photos the VAE never sees; the other ones on disk are its training photos.
REAL_HELDOUT = ("cat2", "clock", "dog6", "monster_toy", "robot_toy", "teapot", "vase", "berry_bowl")
MAX_TOKENS = 32
WORKERS = int(os.environ.get("WORKERS", os.cpu_count() or 1))


def draw_look(seed: int) -> tuple[np.ndarray, np.ndarray, list[list[str]]]:
    """VIEWS pictures of one look, their labels, and CAPTIONS captions each."""
    rng = np.random.default_rng((2024, seed))
    look = random_picture(rng, FORBIDDEN).look
    images, labels, captions = [], [], []
    while len(images) < VIEWS:
        other = random_picture(rng, FORBIDDEN)
        if look.kind not in LIVE_KINDS and other.accessory:
            continue
        picture = Picture(look, other.scene, other.accessory, other.modifier)
        paint = visible_paint(picture)
        if paint in FORBIDDEN:
            continue
        images.append(np.asarray(render(picture, rng)))
        scene = list(SCENES).index(picture.scene)
        labels.append(
            (KINDS.index(paint[0]), list(COLOURS).index(paint[1]), scene, bool(picture.modifier))
        )
        captions.append([caption(picture, rng) for _ in range(CAPTIONS)])
    return np.stack(images), np.array(labels, np.int16), captions


def draw_named(seed: int) -> tuple[list[np.ndarray], list[list[str]]]:
    """NAMED_VIEWS pictures of one look; the captions tell its name in place of its paint."""
    rng = np.random.default_rng((2025, seed))
    look, name = random_picture(rng, FORBIDDEN).look, nonsense(rng)
    images, captions = [], []
    while len(images) < NAMED_VIEWS:
        other = random_picture(rng, FORBIDDEN)
        accessory = other.accessory if look.kind in LIVE_KINDS else ""
        images.append(np.asarray(render(Picture(look, other.scene, accessory), rng)))
        words = " ".join(word for word in (f"a {name} {look.kind}", accessory, other.scene) if word)
        captions.append([words] * CAPTIONS)
    return images, captions


def draw_all_named(folder: Path) -> list[list[str]]:
    with ProcessPoolExecutor(WORKERS) as pool:
        drawn = list(pool.map(draw_named, range(NAMED_LOOKS), chunksize=8))
    np.save(folder / "named-images.npy", np.stack([i for images, _ in drawn for i in images]))
    return [texts for _, captions in drawn for texts in captions]


def draw(folder: Path, name: str, seeds: range) -> list[list[str]]:
    with ProcessPoolExecutor(WORKERS) as pool:
        drawn = list(pool.map(draw_look, seeds, chunksize=64))
    np.save(folder / f"{name}-images.npy", np.concatenate([images for images, _, _ in drawn]))
    np.save(folder / f"{name}-labels.npy", np.concatenate([labels for _, labels, _ in drawn]))
    return [texts for _, _, captions in drawn for texts in captions]


def crops_of(path: Path, count: int, seed: int) -> list[np.ndarray]:
    """``count`` random square crops (35 to 100 % of the short side) at 64 px; whole if 0."""
    photo = open_photo(path)
    photo.thumbnail((640, 640), Image.Resampling.LANCZOS)
    if count == 0:
        side = min(photo.size)
        photo = photo.crop((0, 0, side, side)).resize((64, 64), Image.Resampling.LANCZOS)
        return [np.asarray(photo)]
    rng = np.random.default_rng(seed)
    crops = []
    for _ in range(count):
        side = int(min(photo.size) * rng.uniform(0.35, 1))
        x, y = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
        crop = photo.crop((x, y, x + side, y + side)).resize((64, 64), Image.Resampling.LANCZOS)
        array = np.asarray(crop)[:, :: int(rng.choice([-1, 1]))]
        gain = rng.uniform(0.8, 1.2, 3) if rng.random() < 0.5 else np.ones(3)
        crops.append(np.clip(array * gain, 0, 255).astype(np.uint8))
    return crops


def cut_real(folder: Path, photos: Path) -> None:
    train: list[np.ndarray] = []
    heldout: list[np.ndarray] = []
    names = [name for name in SUBJECTS if (photos / name).is_dir() and name not in REAL_HELDOUT]
    for name in SUBJECTS:
        for number, path in enumerate(sorted((photos / name).glob("*.jpg"))):
            if name in REAL_HELDOUT:
                heldout += crops_of(path, 0, 0)
            else:
                train += crops_of(path, 80, number)
    (folder / "real-train.json").write_text(json.dumps(names))
    np.save(folder / "real-train.npy", np.stack(train))
    np.save(folder / "real-heldout.npy", np.stack(heldout))


def learn_tokenizer(folder: Path, captions: list[str]) -> None:
    """A CLIP byte-pair vocabulary: bytes, merges learned on the captions, two special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(r" ", "removed"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    plain = [" ".join(w for w in text.split() if w.isalpha()) for text in captions]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(plain, trainer)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    symbols = alphabet + [f"{letter}</w>" for letter in alphabet]
    symbols += ["".join(merge.split()) for merge in merges]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: number for number, symbol in enumerate(dict.fromkeys(symbols))}
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def tokenise(folder: Path, name: str, captions: list[list[str]]) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    flat = [text for texts in captions for text in texts]
    tokens = tokenizer(flat, padding="max_length", truncation=True, max_length=MAX_TOKENS)
    array = np.array(tokens["input_ids"], np.uint16).reshape(len(captions), CAPTIONS, MAX_TOKENS)
    np.save(folder / f"{name}-tokens.npy", array)


def run(work: Path, photos: Path | None = None) -> None:
    """``photos``: the real ones that the VAE learns from; other stages need none."""
    folder = work / "data"
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if photos is not None:
        cut_real(folder, photos)
    train = draw(folder, "train", range(LOOKS))
    heldout = draw(folder, "heldout", range(1_000_000, 1_000_000 + HELDOUT_LOOKS))
    learn_tokenizer(folder / "tokenizer", [text for texts in train[:20_000] for text in texts])
    tokenise(folder, "train", train)
    tokenise(folder, "heldout", heldout)
    tokenise(folder, "named", draw_all_named(folder))
    (folder / "train-captions.json").write_text(json.dumps([texts[0] for texts in train]))
    (folder / "done").touch()
