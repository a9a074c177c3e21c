"""diffusers' own LoRA loader tests on the shapes of compressed U-Nets, with files written here.

    python scripts/diffusers_lora_tests.py --diffusers CHECKOUT [--sizes base small tiny] [-k NAME]

Runs ``tests/lora``'s ``PeftLoraLoaderMixinTests`` of a diffusers checkout from a scratch copy.
Only two things are ours: the U-Net's shape, and ``save_lora_weights``, which writes by
``bksdm_tune.files.write``, so that what diffusers loads in its tests are this program's files;
pickles, which this program never writes, are left to diffusers.  Needs pytest and parameterized;
text encoder and tokenizer are random small ones, not the Hub's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("__init__.py", "testing_utils.py", "lora/__init__.py", "lora/utils.py")
MODULE = '''
import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [{root!r}, {root!r} + "/tests"]

import tiny
from diffusers import DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from bksdm_tune.files.write import write_adapter
from bksdm_tune.lora import layouts

from .utils import PeftLoraLoaderMixinTests
import unittest

FOLDER = Path({folder!r})
tiny.make_text_encoder().save_pretrained(FOLDER)
tiny.make_tokenizer().save_pretrained(FOLDER)
WRITTEN = []


def save(cls, save_directory, unet_lora_layers=None, text_encoder_lora_layers=None,
         safe_serialization=True, unet_lora_adapter_metadata=None,
         text_encoder_lora_adapter_metadata=None, **_):
    """In place of diffusers' own: the same arguments, our writer."""
    if not safe_serialization:
        return THEIRS(save_directory, unet_lora_layers, text_encoder_lora_layers,
                      safe_serialization=False)
    tensors, said = {{}}, {{}}
    sides = (("unet", unet_lora_layers, unet_lora_adapter_metadata),
             ("text_encoder", text_encoder_lora_layers, text_encoder_lora_adapter_metadata))
    for part, layers, metadata in sides:
        tensors |= {{f"{{part}}.{{k}}": v.detach().cpu() for k, v in (layers or {{}}).items()}}
        said |= {{f"{{part}}.{{k}}": v for k, v in (metadata or {{}}).items()}}
    text = json.dumps(said, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    alphas = layouts.said_by({{"lora_adapter_metadata": text}})
    adapter = layouts._adapter(tensors, {{}}, alphas)
    path = Path(save_directory) / "pytorch_lora_weights.safetensors"
    more = {{"lora_adapter_metadata": text}} if said else {{}}
    write_adapter(path, adapter, "diffusers", None, **more)
    WRITTEN.append(path)


THEIRS = StableDiffusionPipeline.save_lora_weights
StableDiffusionPipeline.save_lora_weights = classmethod(save)


class Compressed(PeftLoraLoaderMixinTests):
    pipeline_class = StableDiffusionPipeline
    scheduler_cls = DDIMScheduler
    scheduler_kwargs = {{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                        "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}}
    vae_kwargs = {{"block_out_channels": [32, 64], "in_channels": 3, "out_channels": 3,
                  "down_block_types": ["DownEncoderBlock2D"] * 2,
                  "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4}}
    text_encoder_cls, text_encoder_id = CLIPTextModel, str(FOLDER)
    tokenizer_cls, tokenizer_id = CLIPTokenizer, str(FOLDER)

    @property
    def output_shape(self):
        return (1, 64, 64, 3)


def kwargs(size):
    return tiny.unet_config(size=size, sample_size=32)
'''
CASE = """

class {title}(Compressed, unittest.TestCase):
    unet_kwargs = kwargs({size!r})
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--diffusers", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=["base", "small", "tiny"])
    parser.add_argument("-k", default="test")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tests = Path(scratch) / "tests"
        for name in COPIED:
            (tests / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(options.diffusers / "tests" / name, tests / name)
        text = MODULE.format(root=str(ROOT), folder=str(Path(scratch) / "text"))
        for size in options.sizes:
            text += CASE.format(title=size.title(), size=size)
        (tests / "lora/test_compressed.py").write_text(text)
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfEs"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [*words, "tests/lora/test_compressed.py", "-k", options.k], cwd=scratch, env=environment
        ).returncode


if __name__ == "__main__":
    raise SystemExit(main())
