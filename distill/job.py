"""Everything that is checked before anything expensive: teacher, data, layers, run folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bksdm_tune import processes
from bksdm_tune.artifacts import MANIFEST, content_key, read_manifest
from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.optim import check_training
from bksdm_tune.pipeline_folder import check_resolution, native_resolution
from bksdm_tune.resolve import Parts, hash_parts, hash_weights, resolve, unet_config
from bksdm_tune.runs import without_steps
from bksdm_tune.unet_configs import PLANS, check_teacher
from distill.cache import KIND as CACHE_KIND
from distill.cache import LatentCache
from distill.config import Config, Data
from distill.data import Source, Stream, open_source
from distill.surgery import feature_pairs

KIND = "distilled"
CROP = "centre"


@dataclass(frozen=True)
class Job:
    """A checked distillation.  ``data`` is read either as rows or from a cache."""

    config: Config
    parts: Parts
    data: Source | LatentCache
    resolution: int
    pairs: list[tuple[str, str]]
    device: str
    facts: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.config.output.out


def find_teacher(ref: str, base: str | None) -> Parts:
    """Raises UsageError, DataError: it cannot be had, or is no uncompressed Stable Diffusion."""
    parts = resolve(ref, base)
    if parts.adapter is not None:
        raise UsageError(f"{ref} is a LoRA run; name its backbone, {parts.ref}, or a full run.")
    return parts


def prepare(config: Config, device: str) -> Job:
    """Check and complete a config.

    Raises:
        UsageError, DataError: what is wrong, before any weights load.
    """
    models = config.models
    check_training(config.training)
    check_tracker(config.output.tracker)
    parts = find_teacher(models.teacher, models.base)
    check_teacher(unet_config(parts))
    resolution = config.data.resolution or native_resolution(parts)
    check_resolution(resolution, parts)
    config = replace(config, data=replace(config.data, resolution=resolution))
    data, identity = find_data(config.data, parts, resolution)
    pairs = choose_pairs(
        feature_pairs(unet_config(parts), PLANS[models.size]), config.loss.features
    )
    training = config.training
    facts = {
        "config": _identity(config),
        "data": identity,
        "order": "buffered" if isinstance(data, Stream) else "permuted",
        "teacher": hash_parts(parts),
        "pictures a step": training.batch_size * training.accumulation * processes.count(),
    }
    return Job(config, parts, data, resolution, pairs, device, facts)


def check_tracker(name: str) -> None:
    """Raises UsageError: the tracker's library is not installed."""
    if name != "none" and not find_spec(name):
        raise UsageError(
            f"--tracker {name} needs a library that is not installed. "
            f"Type: pip install {name}, or choose --tracker none."
        )


def cache_facts(parts: Parts, resolution: int, embeds: bool, data: Any) -> dict[str, Any]:
    """What a cache was made with, and what training asks of it."""
    return {
        "vae": hash_weights(parts.root / "vae"),
        "text_encoder": hash_weights(parts.root / "text_encoder") if embeds else None,
        "resolution": resolution,
        "crop": CROP,
        "data": content_key(data),
    }


def find_data(data: Data, parts: Parts, resolution: int) -> tuple[Source | LatentCache, str]:
    """The data and its content key.

    Raises:
        DataError: a cache was made with another VAE, text encoder, resolution or crop.
    """
    folder = Path(data.data).expanduser()
    if not (folder / MANIFEST).is_file() or read_manifest(folder)["kind"] != CACHE_KIND:
        source = open_source(data.data, data.image_column, data.caption_column)
        return source, content_key(source.facts)
    cache = LatentCache(folder)
    embeds = bool(cache.facts["text_encoder"])
    wanted = cache_facts(parts, resolution, embeds, None) | {"data": cache.facts["data"]}
    wrong = [name for name, value in wanted.items() if cache.facts[name] != value]
    if wrong:
        had = ", ".join(f"{name} {cache.facts[name]}" for name in wrong)
        raise DataError(
            f"{folder} was made with another {' and '.join(wrong)} ({had}) than this teacher and "
            f"--resolution {resolution} ask for. Make another: bksdm-tune cache --teacher "
            f"{parts.ref} --resolution {resolution} --data DATA --out FOLDER"
        )
    return cache, cache.facts["data"]


def choose_pairs(
    pairs: list[tuple[str, str]], wanted: tuple[str, ...] | None
) -> list[tuple[str, str]]:
    """The pairs (teacher layer, student layer) whose student layer is wanted.

    Raises:
        UsageError: a layer is in no pair of the plan.
    """
    if wanted is None:
        return pairs
    known = [student for _, student in pairs]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise UsageError(
            f"--features {' '.join(unknown)}: choose from {' '.join(known)}. "
            "To leave the features out, --lambda-feat 0."
        )
    return [pair for pair in pairs if pair[1] in wanted]


def _identity(config: Config) -> dict[str, Any]:
    """The config without what may change between a run and its resumption.

    A step's pictures may be spread over other numbers of micro-batches and processes.
    """
    facts: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    facts.pop("output")
    facts = without_steps(facts)
    for name in ("batch_size", "accumulation"):
        facts["training"].pop(name)
    for name in ("data", "workers", "max_broken"):
        facts["data"].pop(name)
    for name in ("teacher", "base"):
        facts["models"].pop(name)
    return facts


def describe(job: Job) -> str:
    size, cached = job.data.size, isinstance(job.data, LatentCache)
    rows = "a stream of pictures" if size is None else f"{size:,} pictures"
    kind = "cached latents" if cached else "decoded as they come"
    left_out = job.data.skipped if isinstance(job.data, LatentCache) else len(job.data.empty)
    skipped = (
        f"; {left_out} rows {'skipped' if cached else 'without a caption'}" if left_out else ""
    )
    return (
        f"Teacher: {job.parts.name}; student: {job.config.models.size}, "
        f"{job.config.models.init} start, on {job.device}, processes: {processes.count()}, "
        f"{job.facts['pictures a step']} pictures a step\n"
        f"Data: {rows}, {kind}, {job.resolution} px{skipped}\n"
        f"Run folder: {job.folder}"
    )
