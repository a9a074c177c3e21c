"""Stage ``pack``: the trained parts as fp16 safetensors and cards in ``bksdm_tune/pocket``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bksdm_tune.weights import save_part
from scripts.pocket import clip, looks, students, unet, vae
from scripts.pocket.common import training
from scripts.pocket.data import REAL_HELDOUT

POCKET = Path(__file__).resolve().parents[2] / "bksdm_tune/pocket"
SIZES = ("teacher", *students.SIZES)
LIMIT = 32_000_000  # bytes, everything together
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save_half(model: Any, folder: Path) -> None:
    """A model folder in fp16; its config says float32, which it becomes when it is used."""
    model.half()
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    save_part(model, folder)
    config = json.loads((folder / "config.json").read_text())
    if "dtype" in config:  # transformers loads in the dtype that its config names
        (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2))


def run(work: Path) -> None:
    for path in POCKET.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    shared = POCKET / "shared"
    teacher, text_encoder = unet.load(work)
    save_half(teacher, POCKET / "unet-teacher")
    for size in students.SIZES:
        save_half(students.load(work, size), POCKET / f"unet-{size}")
    save_half(text_encoder, shared / "text_encoder")
    save_half(vae.load(work), shared / "vae")
    shutil.copytree(work / "data/tokenizer", shared / "tokenizer")
    unet.scheduler().save_pretrained(shared / "scheduler")
    (shared / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    for encoder in (clip, looks):  # for scoring; packed once they are trained
        name = encoder.__name__.rpartition(".")[2]
        if (work / name / "final").exists():
            save_half(encoder.load(work), POCKET / name)
    total = sum(path.stat().st_size for path in POCKET.rglob("*.safetensors"))
    print(f"packed: {total:,} bytes of weights")
    if total > LIMIT:
        raise SystemExit(f"{total:,} bytes are more than {LIMIT:,}")
    write_cards(work)


def facts(work: Path) -> dict[str, Any]:
    stages = ("vae", "clip", "looks", "probe", "family")
    known = {
        stage: json.loads((work / stage / "report.json").read_text())
        for stage in stages
        if (work / stage / "report.json").exists()
    }
    trained = [path.parent for path in sorted(work.glob("*/log.jsonl"))]
    return known | {"training": {folder.name: training(folder) for folder in trained}}


def write_cards(work: Path) -> None:
    known = facts(work)
    for size in SIZES:
        stage = "unet" if size == "teacher" else f"student-{size}"
        seen = known["training"][stage]
        rows = known.get("family", {}).get(size, {})
        score = ", ".join(f"{key} {value:.1%}" for key, value in rows.items())
        (POCKET / f"card-{size}.md").write_text(
            CARD.format(
                size=size,
                how=TEACHER_HOW if size == "teacher" else STUDENT_HOW.format(size=size),
                steps=seen["steps"],
                hours=seen["hours"],
                score=score or "not measured",
                psnr=known["vae"]["psnr_real_heldout"],
                linear=known["vae"]["psnr_real_linear_4_of_48"],
                renders=known["vae"]["psnr_renders_heldout"],
                real=", ".join(json.loads((work / "data/real-train.json").read_text())),
                heldout=", ".join(REAL_HELDOUT),
                probe=", ".join(
                    f"{k} {known['probe'][k]:.1%}" for k in ("kind", "colour", "scene")
                ),
            )
        )
    for name, text in ENCODER_CARDS.items():
        seen = known["training"][name]
        (POCKET / f"card-{name}.md").write_text(text.format(**known[name], **seen))
    (POCKET / "facts.json").write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


TEACHER_HOW = "U-Net and text encoder trained together from random weights, min-SNR weights, EMA"
STUDENT_HOW = "BK-SDM {size} surgery on pocket-teacher, then distillation (lambda 1/1/1), EMA"
CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# pocket-{size}

A Stable Diffusion in miniature (64 x 64 pixels, SD-v1 topology, epsilon-prediction), made by
bksdm-tune to show and test personalisation without a GPU. It draws the illustrated world of this
project and nothing else, and says nothing about the full-size models.

| | |
|---|---|
| how | {how} |
| steps, batch | {steps}, 32 |
| step time in all | {hours:.2f} h on two CPU cores |

Data: 60,000 pictures of 15,000 looks drawn by `subjects/illustrated`, captions in the grammar of
the DreamBooth prompts, 10 % of them empty, and 30 pictures of each of 200 looks whose captions tell
a name in place of the paint; the looks of the 30 illustrated twins left out.

VAE: f = 4, 4 latent channels, trained on those pictures and on crops of photos of real DreamBooth
subjects (CC-BY 4.0): {real}. Held out: {heldout}. {psnr:.1f} dB on photos of the held-out subjects
(PCA 4 of 48 fitted on those photos themselves: {linear:.1f} dB), {renders:.1f} dB on held-out
pictures.

Attributes right in 500 captions, by the probe classifier: {score}. The probe itself is right on
held-out renders in {probe}.

Reproduce: `python scripts/pretrain_pocket.py all --photos DIR`. Licence: Apache-2.0; it contains
no Stable Diffusion weights.
"""
ENCODER = """\
---
license: apache-2.0
library_name: transformers
---
# pocket-{name}

{what}, made by bksdm-tune to score pictures of its illustrated world without a network. It says
nothing about real photographs.

| | |
|---|---|
| how | {how} |
| steps, step time in all | {{steps}}, {{hours:.2f}} h on two CPU cores |
| parameters | {{parameters:,}} |
| how good | {good} |

Data: the pictures and captions that the pocket family was trained on; the looks of the 30
illustrated twins left out. Reproduce: `python scripts/pretrain_pocket.py data vae {name} pack`.
Licence: Apache-2.0.
"""
ENCODER_CARDS = {
    "clip": ENCODER.format(
        name="clip",
        what="A CLIP pair (pictures and captions into one space)",
        how="symmetric contrastive loss on pictures and their captions, batch 96",
        good="the caption of a held-out picture is among the nearest 10 of 1,000 in "
        "{caption_in_top_10_of_1000:.1%}",
    ),
    "looks": ENCODER.format(
        name="looks",
        what="A self-supervised encoder that tells subjects of one class apart",
        how="NT-Xent on pairs of pictures of one look in two scenes, half of them through the VAE; "
        "no labels",
        good="same subject against another of its class: AUC {auc_unseen_looks:.4f} on looks it "
        "never saw, {auc_unseen_looks_through_the_vae:.4f} with the pictures through the VAE, "
        "{auc_twins:.4f} on the twins",
    ),
}
