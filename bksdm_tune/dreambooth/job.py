"""Everything that is checked before anything expensive: the job, its identity, its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bksdm_tune import architecture
from bksdm_tune.artifacts import content_key
from bksdm_tune.doctor import try_xformers
from bksdm_tune.dreambooth.config import Config, Output
from bksdm_tune.dreambooth.photos import photo_folder
from bksdm_tune.dreambooth.recipes import default_backbone, filled, recipe_name
from bksdm_tune.errors import UsageError
from bksdm_tune.optim import check_training
from bksdm_tune.pipeline_folder import check_resolution, native_resolution
from bksdm_tune.resolve import Parts, hash_parts, resolve, unet_config
from bksdm_tune.runs import without_steps
from subjects.catalogue import fill, get_subject, prompts_of_class
from subjects.photos import PhotoSet, read_photos

KINDS = {True: "dreambooth-lora", False: "dreambooth-full"}
DEFAULT_PREVIEWS = (0, 1, 2, 6)  # jungle, snow, beach, city


@dataclass(frozen=True)
class Job:
    """A checked run.  ``config`` has no unset recipe flag left."""

    config: Config
    recipe: str
    parts: Parts
    photos: PhotoSet
    """Those it learns from."""
    held_out: PhotoSet
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
        """Content key of all that decides the result; of the number of steps, where a schedule
        without an end makes them decide only where it stops."""
        return content_key(self.facts)

    @property
    def trigger(self) -> str:
        """What ``{subject}`` in a prompt stands for."""
        return f"{self.config.prompts.identifier} {self.class_noun}"

    @property
    def kind(self) -> str:
        return KINDS[self.config.model.lora]

    @property
    def method(self) -> str:
        return "lora" if self.config.model.lora else "full"


def prepare(config: Config, device: str) -> Job:
    """Check and complete a config.

    Raises:
        UsageError, DataError: one report of what is wrong, before any weights load.
    """
    if config.who.photos is not None and not config.who.photos.is_dir():
        read_photos(config.who.photos, minimum_side=1)  # says so before anything is downloaded
    noun = class_noun(config)
    ref = config.model.backbone or default_backbone(device)
    parts = resolve(ref, config.model.base)
    if parts.adapter is not None:
        raise UsageError(
            f"{ref} is a LoRA run. Tune its backbone, --backbone {parts.ref}, or a full run."
        )
    resolution = native_resolution(parts)
    name = recipe_name(config.model.recipe, resolution)
    who, model = config.who, config.model
    config = replace(  # as it can be typed from anywhere
        config,
        who=replace(who, photos=_absolute(who.photos), data_root=_absolute(who.data_root)),
        model=replace(model, backbone=parts.ref, base=parts.base),
    )
    config = filled(config, name, "lora" if config.model.lora else "full", resolution)
    check_training(config.training)
    check_attention(config.training.attention, device)
    assert config.training.resolution is not None
    check_resolution(config.training.resolution, parts)
    folder, source = photo_folder(config, resolution)
    found = read_photos(folder, minimum_side=(config.training.resolution or resolution) // 2)
    photos, held_out = held_apart(found, who.holdout)
    prompts = config.prompts
    previews = config.output.preview_prompts
    shown = default_previews(noun) if previews is None else previews
    instance = prompts.instance_prompt or fill("a {0} {1}", prompts.identifier, noun)
    if prompts.identifier not in instance:
        raise UsageError(
            f"--instance-prompt {instance!r} does not hold the identifier {prompts.identifier!r}, "
            "by which the subject is called later. Say which word it is: --identifier WORD."
        )
    facts = {
        "config": _identity(config),
        "photos": [photo.sha256 for photo in photos.photos],
        "backbone": hash_parts(parts),
        "previews": [*shown, config.output.preview_images],
        "selection": _selection(config.output),
    }
    return Job(
        config=config,
        recipe=name,
        parts=parts,
        photos=photos,
        held_out=held_out,
        photo_source=source,
        class_noun=noun,
        instance_prompt=instance,
        class_prompt=prompts.class_prompt or fill("a {0} {1}", "", noun),
        preview_prompts=shown,
        device=device,
        folder=config.output.out or default_folder(config, parts),
        facts=facts,
    )


def with_training(job: Job, **changes: Any) -> Job:
    """The job with other training flags."""
    config = replace(job.config, training=replace(job.config.training, **changes))
    return replace(job, config=config, facts=job.facts | {"config": _identity(config)})


def held_apart(found: PhotoSet, count: int) -> tuple[PhotoSet, PhotoSet]:
    """The photos to learn from, and the last ``count``.

    Raises:
        UsageError: none would be left to learn from.
    """
    left = len(found.photos) - count
    if left < 1:
        raise UsageError(
            f"--holdout {count} leaves no photo to learn from; there are {len(found.photos)}."
        )
    return replace(found, photos=found.photos[:left]), replace(found, photos=found.photos[left:])


def _selection(output: Output) -> list[Any] | None:
    """What decides which step is delivered, if not the last."""
    if not (output.keep_best or output.patience):
        return None
    return [output.score_every, output.keep_best, output.patience]


def check_attention(name: str, device: str) -> None:
    """Raises UsageError: xformers does not load, or cannot attend."""
    if name != "xformers":
        return
    try:
        try_xformers(device)
    except Exception as error:  # kernels built for another torch raise what they like
        raise UsageError(
            f"--attention xformers does not load here ({error}); use --attention sdpa."
        ) from None


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.expanduser().absolute()


def _identity(config: Config) -> dict[str, Any]:
    """The config without what may change between a run and its resumption."""
    facts = without_steps(json.loads(json.dumps(asdict(config), default=str)))
    facts.pop("output")
    for saving in ("memory", "gradient_checkpointing"):
        facts["training"].pop(saving)
    for place in ("data_root", "photos"):  # the photos' hashes stand for where they lie
        facts["who"].pop(place)
    return facts


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
    return Path("runs") / f"{subject_name(config)}-{parts.name.replace('/', '-')}-{method}"


def default_previews(noun: str) -> tuple[str, ...]:
    templates = prompts_of_class(noun)
    return tuple(templates[i].replace("{0} {1}", "{subject}") for i in DEFAULT_PREVIEWS)


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
