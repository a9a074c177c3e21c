"""Everything that is checked before anything expensive: the job, its identity, its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bksdm_tune import architecture
from bksdm_tune.artifacts import MANIFEST, content_key, read_manifest, write_text_atomic
from bksdm_tune.config import save_toml
from bksdm_tune.dreambooth.config import Config
from bksdm_tune.dreambooth.photos import photo_folder
from bksdm_tune.dreambooth.recipes import filled, recipe_name
from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.resolve import Parts, hash_weights, read_json, resolve, unet_config
from subjects.catalogue import LIVE_CLASSES, LIVE_PROMPTS, OBJECT_PROMPTS, fill, get_subject
from subjects.photos import PhotoSet, read_photos

KINDS = {True: "dreambooth-lora", False: "dreambooth-full"}
IDENTITY = ".run.json"  # there from the first step on; the manifest only from the last
DEFAULT_PREVIEWS = (0, 1, 2, 6)  # jungle, snow, beach, city


@dataclass(frozen=True)
class Job:
    """A checked run.  ``config`` has no unset recipe flag left."""

    config: Config
    recipe: str
    parts: Parts
    photos: PhotoSet
    photo_source: str
    class_noun: str
    instance_prompt: str
    class_prompt: str
    preview_prompts: tuple[str, ...]
    device: str
    folder: Path
    facts: dict[str, Any]

    @property
    def key(self) -> str:
        """Content key of all that decides the result, beside the number of steps."""
        return content_key(self.facts)

    @property
    def trigger(self) -> str:
        """What ``{subject}`` in a prompt stands for."""
        return f"{self.config.prompts.identifier} {self.class_noun}"

    @property
    def method(self) -> str:
        return "lora" if self.config.model.lora else "full"


def default_backbone(device: str) -> str:
    return "pocket-base" if device == "cpu" else "bk-base"


def native_resolution(parts: Parts) -> int:
    """Pixels: the U-Net's latent size times the VAE's downsampling."""
    return int(unet_config(parts)["sample_size"]) * vae_factor(parts)


def vae_factor(parts: Parts) -> int:
    """Pixels per latent, along one side."""
    blocks = read_json(parts.root / "vae" / "config.json")["block_out_channels"]
    return 2 ** (len(blocks) - 1)


def prepare(config: Config, device: str) -> Job:
    """Check and complete a config.

    Raises:
        UsageError, DataError: one report of what is wrong, before any weights load.
    """
    noun = class_noun(config)
    ref = config.model.backbone or default_backbone(device)
    parts = resolve(ref, config.model.base)
    if parts.adapter is not None:
        raise UsageError(
            f"{ref} is a LoRA run. Tune its backbone, --backbone {parts.ref}, or a full run."
        )
    resolution = native_resolution(parts)
    name = recipe_name(config.model.recipe, resolution)
    config = replace(config, model=replace(config.model, backbone=parts.ref, base=parts.base))
    config = filled(config, name, "lora" if config.model.lora else "full", resolution)
    check_resolution(config, parts)
    folder, source = photo_folder(config, resolution)
    photos = read_photos(folder, minimum_side=(config.training.resolution or resolution) // 2)
    prompts = config.prompts
    previews = config.output.preview_prompts
    instance = prompts.instance_prompt or fill("a {0} {1}", prompts.identifier, noun)
    facts = {
        "config": _identity(config),
        "photos": [photo.sha256 for photo in photos.photos],
        "backbone": {
            part: hash_weights(folder)
            for part, folder in (
                ("unet", parts.unet),
                ("vae", parts.root / "vae"),
                ("text_encoder", parts.root / "text_encoder"),
            )
        },
    }
    return Job(
        config=config,
        recipe=name,
        parts=parts,
        photos=photos,
        photo_source=source,
        class_noun=noun,
        instance_prompt=instance,
        class_prompt=prompts.class_prompt or fill("a {0} {1}", "", noun),
        preview_prompts=default_previews(noun) if previews is None else previews,
        device=device,
        folder=config.output.out or default_folder(config, parts),
        facts=facts,
    )


def _identity(config: Config) -> dict[str, Any]:
    """The config without what may change between a run and its resumption."""
    facts = json.loads(json.dumps(asdict(config), default=str))
    facts["training"].pop("steps")
    facts.pop("output")
    for place in ("data_root", "photos"):  # the photos' hashes stand for where they lie
        facts["who"].pop(place)
    return facts


def check_resolution(config: Config, parts: Parts) -> None:
    stages = len(unet_config(parts)["block_out_channels"])
    multiple = vae_factor(parts) * 2 ** (stages - 1)
    side = config.training.resolution
    assert side is not None
    if side % multiple:
        nearest = max(multiple, round(side / multiple) * multiple)
        raise UsageError(
            f"--resolution {side} does not divide by {multiple}; try --resolution {nearest}."
        )


def class_noun(config: Config) -> str:
    if config.who.class_noun is not None:
        return config.who.class_noun.strip()
    assert config.who.subject is not None
    return get_subject(config.who.subject).class_noun


def subject_name(config: Config) -> str:
    who = config.who
    if who.subject is not None:
        return who.subject
    assert who.photos is not None
    name = who.name or who.photos.resolve().name
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)


def default_folder(config: Config, parts: Parts) -> Path:
    method = "lora" if config.model.lora else "full"
    return Path("runs") / f"{subject_name(config)}-{parts.name}-{method}"


def default_previews(noun: str) -> tuple[str, ...]:
    templates = LIVE_PROMPTS if noun in LIVE_CLASSES else OBJECT_PROMPTS
    return tuple(templates[i].replace("{0} {1}", "{subject}") for i in DEFAULT_PREVIEWS)


def claim(job: Job) -> bool:
    """Make ``job.folder`` this job's own; True if the run is finished already.

    Raises:
        UsageError: it holds another run, or something that is no run.
    """
    identity = job.folder / IDENTITY
    if identity.is_file():
        theirs = json.loads(identity.read_text())
        if theirs != job.facts:
            raise UsageError(
                f"{job.folder} holds another run ({', '.join(differences(theirs, job.facts))} "
                "differ). Choose another folder with --out, or delete this one."
            )
        return finished(job)
    strangers = [path.name for path in job.folder.iterdir() if path.name != ".lock"]
    if strangers:
        raise UsageError(
            f"{job.folder} is not empty and is no run ({strangers[0]} lies there). "
            "Choose another folder with --out."
        )
    write_text_atomic(identity, json.dumps(job.facts, indent=2, sort_keys=True) + "\n")
    save_toml(job.folder / "config.toml", job.config)
    return False


def finished(job: Job) -> bool:
    """A finished run with fewer steps than asked for is opened again; its checkpoints go on."""
    if not (job.folder / MANIFEST).is_file():
        return False
    done = read_manifest(job.folder, KINDS[job.config.model.lora])["results"]["steps"]
    wanted = job.config.training.steps
    if done > wanted:
        raise DataError(
            f"{job.folder} was trained for {done} steps, more than --steps {wanted}. "
            "Choose another folder with --out."
        )
    if done == wanted:
        return True
    (job.folder / MANIFEST).unlink()
    save_toml(job.folder / "config.toml", job.config)
    return False


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Names of what differs between two JSON values."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{path}.{k}".strip("."))]
    return [] if a == b else [path]


def describe(job: Job) -> str:
    """The first lines of output: what will be tuned, on what, with which photos."""
    shape = architecture.describe(unet_config(job.parts))
    ignored = f"; {len(job.photos.ignored)} other files ignored" if job.photos.ignored else ""
    where = "no accelerator found" if job.device == "cpu" else f"on {job.device}"
    return (
        f"Backbone: {job.parts.name} ({shape}), {where}, recipe {job.recipe}\n"
        f"Photos: {len(job.photos.photos)} of {job.photo_source}{ignored}\n"
        f"Prompts: {job.instance_prompt!r}, class {job.class_prompt!r}\n"
        f"Run folder: {job.folder}"
    )
