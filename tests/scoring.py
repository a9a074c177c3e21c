"""Random small judges, a manifest of random pictures, and a scorer that does one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, ViTConfig, ViTModel

from tiny import make_tokenizer

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SUBJECTS = {"dog": ("dog", "live"), "cat2": ("cat", "live"), "backpack_dog": ("backpack", "object"),
            "backpack": ("backpack", "object")}  # fmt: skip
PROMPTS = {"live": ["a {0} {1} in the snow", "a {0} {1} wearing a red hat", "a red {0} {1}"],
           "object": ["a {0} {1} in the snow", "a {0} {1} on top of a mirror"]}  # fmt: skip


def spread(model: Any) -> None:
    """Weights with a standard deviation of 0.2, so that errors show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower() and "logit_scale" not in name:
                parameter.normal_(0, 0.2)


def make_judges(folder: Path) -> tuple[Path, Path]:
    """Folders of a ViT and of a CLIP with its tokenizer, both for 224 pixels."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vit = ViTModel(ViTConfig(**small, num_attention_heads=4, image_size=224, patch_size=32))
    text = {**small, "num_attention_heads": 4, "vocab_size": 514, "max_position_embeddings": 77,
            "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}  # fmt: skip
    vision = {**small, "num_attention_heads": 4, "image_size": 224, "patch_size": 32}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    for model, name in ((vit, "vit"), (clip, "clip")):
        spread(model)
        model.save_pretrained(folder / name)
    make_tokenizer().save_pretrained(folder / "clip")
    return folder / "vit", folder / "clip"


def picture(rng: np.random.Generator, size: tuple[int, int] = (64, 64)) -> Image.Image:
    blocks = rng.integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def make_rows(
    folder: Path, photos: int = 3, samples: int = 2, prior: int = 2
) -> list[dict[str, Any]]:
    """Pictures on disk, and the lines of a manifest beside them."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []

    def add(path: str, size: tuple[int, int] = (64, 64), **facts: Any) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        picture(rng, size).save(folder / path)
        rows.append({"path": path} | facts)

    for number, (name, (noun, group)) in enumerate(SUBJECTS.items()):
        for i in range(photos + number % 2):  # so that the averaging order matters
            add(f"{name}/photo{i}.png", (301, 260), role="reference", subject_id=name)
        for p, template in enumerate(PROMPTS[group]):
            for i in range(samples):
                add(f"{name}/{p}-{i}.png", role="generated", subject_id=name, prompt_id=f"p{p}",
                    prompt_template=template, class_noun=noun, identifier="sks", group=group,
                    seed=100 + i, sample_idx=i)  # fmt: skip
        for i in range(prior):
            add(f"{name}/class{i}.png", role="class_prior", subject_id=name, class_noun=noun,
                seed=100 + i)  # fmt: skip
    return rows


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Naive:
    """One picture at a time, in float64, written from the protocol alone."""

    def __init__(self, vit: Path, clip: Path) -> None:
        self.vit = ViTModel.from_pretrained(vit, add_pooling_layer=False).double().eval()
        self.clip = CLIPModel.from_pretrained(clip).double().eval()
        self.tokenizer = AutoTokenizer.from_pretrained(clip)

    @torch.inference_mode()
    def dino(self, path: Path) -> torch.Tensor:
        tokens = self.vit(pixel_values=_pixels(path, 256, IMAGENET)).last_hidden_state
        return torch.nn.functional.normalize(tokens[0, 0], dim=0)

    @torch.inference_mode()
    def image(self, path: Path) -> torch.Tensor:
        found = self.clip.get_image_features(pixel_values=_pixels(path, 224, CLIP))
        found = found if torch.is_tensor(found) else found.pooler_output
        return torch.nn.functional.normalize(found[0], dim=0)

    @torch.inference_mode()
    def text(self, words: str) -> torch.Tensor:
        ids = self.tokenizer(words, padding="max_length", max_length=77, return_tensors="pt")
        found = self.clip.get_text_features(input_ids=ids.input_ids)
        found = found if torch.is_tensor(found) else found.pooler_output
        return torch.nn.functional.normalize(found[0], dim=0)

    def scores(self, folder: Path, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        """path -> dino, clip_i, clip_t of the generated, pres of the class pictures."""
        photos: dict[str, list[Path]] = {}
        for row in rows:
            if row["role"] == "reference":
                photos.setdefault(row["subject_id"], []).append(folder / row["path"])
        found: dict[str, dict[str, float]] = {}
        for row in rows:
            path, own = folder / row["path"], photos[row["subject_id"]]
            if row["role"] == "generated":
                words = row["prompt_template"].replace("{0} ", "").replace("{1}", row["class_noun"])
                found[row["path"]] = {
                    "dino": _mean(float(self.dino(path) @ self.dino(photo)) for photo in own),
                    "clip_i": _mean(float(self.image(path) @ self.image(photo)) for photo in own),
                    "clip_t": float(self.image(path) @ self.text(words)),
                }
            elif row["role"] == "class_prior":
                pairs = (float(self.dino(path) @ self.dino(photo)) for photo in own)
                found[row["path"]] = {"pres": _mean(pairs)}
        return found


def macro(rows: list[dict[str, Any]], found: dict[str, dict[str, float]], name: str) -> float:
    """Pictures of a prompt, prompts, subjects."""
    subjects: dict[str, dict[Any, list[float]]] = {}
    for row in rows:
        if name in found.get(row["path"], {}):
            cell = row.get("prompt_id", row.get("seed"))
            subjects.setdefault(row["subject_id"], {}).setdefault(cell, []).append(
                found[row["path"]][name]
            )
    return _mean(_mean(_mean(cell) for cell in cells.values()) for cells in subjects.values())


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _pixels(path: Path, short: int, norms: tuple[tuple[float, ...], ...]) -> torch.Tensor:
    image = Image.open(path).convert("RGB")
    shape = transforms.Compose([
        transforms.Resize(short, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224),
    ])  # fmt: skip
    pixels = torch.from_numpy(np.array(shape(image))).double().permute(2, 0, 1) / 255
    centre, width = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in norms)
    return ((pixels - centre) / width)[None]
