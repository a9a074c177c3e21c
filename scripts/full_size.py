"""Full-size shapes with random weights on any machine: the same code path as the pocket family.

    python scripts/full_size.py --work DIR [--photos DIR]

Builds a bk-tiny of SD-v1 (512 px, epsilon) and one of SD-v2 (768 px, v-prediction), takes two LoRA
steps on each with prior preservation through ``bksdm-tune dreambooth``, prints seconds and peak
memory, and loads the adapter with stock diffusers.  On two CPU cores it takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bksdm_tune.unet_configs import PLANS, TEACHER_UNETS, student_config

V1 = {"teacher": "v1", "prediction": "epsilon", "width": 768, "layers": 12}
V2 = {"teacher": "v2-768", "prediction": "v_prediction", "width": 1024, "layers": 23}
SHAPES: dict[str, dict[str, Any]] = {
    "sd-v1": V1 | {"size": None},
    "bk-base": V1 | {"size": "base"},
    "bk-small": V1 | {"size": "small"},
    "bk-tiny": V1 | {"size": "tiny"},
    "bk-tiny-v2-768": V2 | {"size": "tiny"},
}


def tokenizer() -> CLIPTokenizer:
    letters = list(bytes_to_unicode().values())
    words = letters + [f"{letter}</w>" for letter in letters]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def write_pipeline(
    folder: Path, teacher: str, prediction: str, width: int, layers: int, size: str | None
) -> None:
    """A random pipeline with the published sizes (the vocabulary is the byte alphabet alone)."""
    torch.manual_seed(0)
    unet = TEACHER_UNETS[teacher]
    if size is not None:
        unet = student_config(unet, PLANS[size])
    text = CLIPTextConfig(
        vocab_size=514, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, max_position_embeddings=77, bos_token_id=512,
        eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=512,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer(),
        unet=UNet2DConditionModel(**unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def check(name: str, work: Path, photos: Path) -> dict[str, Any]:
    folder, out = work / name, work / f"{name}-run"
    if not (folder / "model_index.json").exists():
        write_pipeline(folder, **SHAPES[name])
    command = [sys.executable, "-m", "bksdm_tune", "dreambooth", "--photos", str(photos)]
    command += ["--class-noun", "dog", "--lora", "--backbone", str(folder), "--out", str(out)]
    command += ["--steps", "2", "--prior", "prediction", "--preview-prompts"]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started
    results = json.loads((out / "manifest.json").read_text())["results"]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    pipe = StableDiffusionPipeline.from_pretrained(folder, unet=unet, safety_checker=None)
    pipe.load_lora_weights(out)
    loaded = sum(p.numel() for n, p in pipe.unet.named_parameters() if "lora_" in n)
    assert loaded == results["trained_parameters"], (loaded, results)
    return {
        "model": name,
        "unet_parameters": sum(p.numel() for n, p in unet.named_parameters() if "lora_" not in n),
        "lora_parameters": loaded,
        "losses": [line["loss"] for line in log],
        "seconds_per_step": [line["seconds"] for line in log],
        "seconds": round(seconds, 1),
        "peak_memory_gb": results["peak_memory_gb"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True, help="folder with 512 px photos")
    parser.add_argument("--model", choices=SHAPES, nargs="+", default=["bk-tiny", "bk-tiny-v2-768"])
    options = parser.parse_args()
    for name in options.model:
        print(json.dumps(check(name, options.work, options.photos)), flush=True)


if __name__ == "__main__":
    main()
