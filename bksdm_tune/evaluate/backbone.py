"""``bksdm-tune evaluate``: zero-shot scores of a backbone (BK-SDM, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from bksdm_tune import processes
from bksdm_tune.artifacts import cached, content_key, locked, sha256_file
from bksdm_tune.errors import DataError, ProtocolError
from bksdm_tune.evaluate import encoders, metrics
from bksdm_tune.evaluate.config import Config
from bksdm_tune.evaluate.encoders import Encoder
from bksdm_tune.evaluate.metrics import Gaussian
from bksdm_tune.evaluate.pictures import captions_hash, draw_all, files_of, read_captions
from bksdm_tune.evaluate.results import Metric, read_results, read_rows, write_results
from bksdm_tune.evaluate.statistics import block_interval, bootstrap_mean
from bksdm_tune.pipeline import Shot, load_for_drawing
from bksdm_tune.resolve import Parts, hash_model, resolve
from bksdm_tune.runs import occupy

KIND = "backbone"
FRECHET_RESAMPLES, SPLITS = 30, 10
Features = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Extractors:
    """``frechet``: for FID and KID; ``clip``: for the CLIP score and CMMD."""

    frechet: Encoder
    clip: Encoder
    dino: Encoder | None = None

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "frechet": self.frechet.facts,
            "clip": self.clip.facts,
            "dino": self.dino.facts if self.dino else None,
        }


def load_extractors(config: Config, device: str) -> Extractors:
    if config.extractors == "pocket":
        return Extractors(encoders.pocket_looks(device), encoders.pocket_clip(device))
    return Extractors(
        encoders.inception(config.inception_weights, device),
        encoders.open_clip_encoder(config.clip_model, config.clip_weights, device),
        encoders.dino(config.dino, device) if config.dino else None,
    )


def evaluate(config: Config, device: str) -> Path | None:
    """Draw, encode, score; the path of results.json (None in all processes but the first).

    Raises:
        UsageError, DataError: what is wrong with the request or its files.
    """
    pairs = read_captions(config.captions, config.n)
    parts = resolve(config.backbone, config.base)
    shots = [
        Shot(text, config.seed + i, config.steps, config.guidance)
        for i, (_, text) in enumerate(pairs)
    ]
    drawing = {
        "captions": captions_hash(pairs),
        "n": len(pairs),
        "sampler": "PNDM",
        "steps": config.steps,
        "guidance_scale": config.guidance,
        "seed": config.seed,
    }
    if processes.rank():
        processes.wait()  # until the first one found the folder to be this evaluation's
        draw_all(pipeline(parts, device), shots, config.out / "pictures", config.batch_size)
        return None
    extractors = load_extractors(config, device)  # before hours of drawing
    real_key = real_facts(config)
    real = read_real(config, real_key, extractors, device) if config.real else None
    weights = hash_model(parts)
    with locked(config.out):
        other = "pictures of another backbone, caption list or sampling"
        occupy(config.out, drawing | weights, "evaluation", other)
        processes.wait()
        pipe = pipeline(parts, device)
        pictures = draw_all(pipe, shots, config.out / "pictures", config.batch_size)
        del pipe
        features = all_features(extractors, pictures, device, config.out)
        texts = captions_features(extractors.clip, [text for _, text in pairs])
        protocol = drawing | {"extractors": extractors.facts, "real": real_key}
        rows: dict[str, list[Any]] = {"key": [key for key, _ in pairs]}
        scores = score(features, texts, real, rows)
        scores |= against_teacher(config, protocol, extractors.frechet, features, rows)
        counts = {"generated": len(pictures), "real": real["count"] if real else 0}
        name = config.backbone if parts.adapter else parts.name
        model = content_key(weights)
        return write_results(config.out, KIND, name, model, protocol, counts, scores, rows)


def pipeline(parts: Parts, device: str) -> Any:
    """With PNDM, whatever sampler the backbone ships with."""
    from diffusers import PNDMScheduler

    pipe = load_for_drawing(parts, device)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    return pipe


def all_features(extractors: Extractors, pictures: list[Path], device: str, out: Path) -> Features:
    """Features of each extractor, from disk if they were computed before."""
    sides: dict[str, tuple[Encoder, Callable[..., Any] | None]] = {
        "frechet": (extractors.frechet, extractors.frechet.images),
        "classes": (extractors.frechet, extractors.frechet.classes),
        "clip": (extractors.clip, extractors.clip.images),
    }
    if extractors.dino:
        sides["dino"] = (extractors.dino, extractors.dino.images)
    found: Features = {}
    for name, (encoder, apply) in sides.items():
        if apply is None:
            continue
        path = features_path(out, name, encoder, len(pictures))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(".tmp")
            save_file({"features": encoders.encode(apply, encoder, pictures, device)}, scratch)
            scratch.replace(path)
        found[name] = load_file(path)["features"]
    return found


def features_path(out: Path, name: str, encoder: Encoder, pictures: int) -> Path:
    key = content_key([name, encoder.facts, pictures])[:16]
    return out / "features" / f"{name}-{key}.safetensors"


@torch.inference_mode()
def captions_features(clip: Encoder, texts: list[str]) -> NDArray[Any]:
    assert clip.texts is not None
    parts = [clip.texts(texts[i : i + 256]).float().cpu() for i in range(0, len(texts), 256)]
    return torch.cat(parts).numpy()


def read_real(
    config: Config, key: str | None, extractors: Extractors, device: str
) -> dict[str, Any]:
    """Statistics of the real side; from pictures also their features.

    Raises:
        DataError: the file is no statistics, or of another width.
    """
    assert config.real is not None
    if config.real.is_dir():
        pictures = files_of(config.real)
        facts = {"pictures": key, "extractors": extractors.facts}
        folder = cached("features", facts, lambda f: _store(extractors, pictures, device, f))
        features = all_features(extractors, pictures, device, folder)
        return {"gaussian": Gaussian.of(features["frechet"]), "count": len(pictures)} | {
            "features": features
        }
    try:
        with np.load(config.real, allow_pickle=False) as file:
            gaussian = Gaussian(file["mu"].astype(np.float64), file["sigma"].astype(np.float64))
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise DataError(
            f"{config.real} is no folder of pictures and no .npz with mu and sigma: {error}"
        ) from None
    width = gaussian.mean.size
    if gaussian.mean.shape != (width,) or gaussian.covariance.shape != (width, width):
        shapes = f"{gaussian.mean.shape} and {gaussian.covariance.shape}"
        raise DataError(f"{config.real}: mu and sigma have the shapes {shapes}, not (d,), (d, d).")
    if not (np.isfinite(gaussian.mean).all() and np.isfinite(gaussian.covariance).all()):
        raise DataError(f"{config.real} holds numbers that are not finite.")
    return {"gaussian": gaussian, "count": 0, "features": None}


def _store(extractors: Extractors, pictures: list[Path], device: str, folder: Path) -> None:
    all_features(extractors, pictures, device, folder)


def real_facts(config: Config) -> str | None:
    if config.real is None:
        return None
    if config.real.is_file():
        return sha256_file(config.real)
    return content_key([sha256_file(path) for path in files_of(config.real)])


def score(
    features: Features, texts: NDArray[Any], real: dict[str, Any] | None, rows: dict[str, list[Any]]
) -> dict[str, Metric]:
    clip = metrics.cosine(features["clip"], texts)
    rows["clip_score"] = clip.tolist()
    scores = {
        "clip_score": Metric(float(clip.mean()), bootstrap_mean(clip)),
        "inception_score": inception_metric(features.get("classes")),
    }
    none = "--real was not given"
    if real is None:
        return scores | {
            name: Metric(None, reason=none, better="lower") for name in ("frechet", "kid", "cmmd")
        }
    scores["frechet"] = frechet_metric(features["frechet"], real["gaussian"])
    others = real["features"]
    if others is None:
        only = "--real holds statistics alone; pictures are needed"
        scores |= {name: Metric(None, reason=only, better="lower") for name in ("kid", "cmmd")}
    else:
        scores["kid"] = distance_metric(metrics.kid, features["frechet"], others["frechet"])
        scores["cmmd"] = distance_metric(metrics.cmmd, features["clip"], others["clip"])
        if "dino" in features:
            scores["frechet_dino"] = frechet_metric(features["dino"], Gaussian.of(others["dino"]))
    return scores


def inception_metric(probabilities: NDArray[Any] | None) -> Metric:
    """The mean over splits, and 1.96 standard errors of that mean."""
    if probabilities is None:
        return Metric(None, reason="the extractor classifies nothing")
    if len(probabilities) < SPLITS:
        return Metric(None, reason=f"{SPLITS} splits need {SPLITS} pictures or more")
    mean, spread = metrics.inception_score(probabilities, SPLITS)
    half = 1.96 * spread / (SPLITS - 1) ** 0.5
    return Metric(mean, (mean - half, mean + half))


def distance_metric(
    distance: Callable[..., float], features: NDArray[Any], real: NDArray[Any]
) -> Metric:
    value = distance(features, real)
    interval = block_interval(value, lambda part: distance(part, real), features)
    return Metric(value, interval, better="lower")


def frechet_metric(features: NDArray[Any], real: Gaussian) -> Metric:
    """The distance, and 1.96 standard deviations of it over resampled pictures.

    Not percentiles: repeated pictures in a resample make the distance larger, so they would not
    even hold the value itself.
    """
    value = metrics.frechet(Gaussian.of(features), real)
    rng = np.random.default_rng(0)
    again = [
        metrics.frechet(
            Gaussian.of(features[rng.integers(len(features), size=len(features))]), real
        )
        for _ in range(FRECHET_RESAMPLES)
    ]
    half = 1.96 * float(np.std(again, ddof=1))
    return Metric(value, (value - half, value + half), better="lower")


def against_teacher(
    config: Config,
    protocol: dict[str, Any],
    encoder: Encoder,
    features: Features,
    rows: dict[str, list[Any]],
) -> dict[str, Metric]:
    """Mean cosine distance between pictures of the same caption and noise.

    Raises:
        ProtocolError: the teacher's pictures were drawn or encoded in another way.
        DataError: its results or features cannot be read.
    """
    if config.teacher is None:
        return {}
    folder = config.teacher if config.teacher.is_dir() else config.teacher.parent
    theirs = read_results(folder)
    same = ("captions", "n", "sampler", "steps", "guidance_scale", "seed", "extractors")
    unlike = [name for name in same if theirs["protocol"].get(name) != protocol[name]]
    if unlike:
        raise ProtocolError(
            f"--teacher {config.teacher} was evaluated with another {', '.join(unlike)}. "
            "Evaluate both with the same flags."
        )
    assert read_rows(folder)["key"] == rows["key"]
    path = features_path(folder, "frechet", encoder, len(rows["key"]))
    if not path.is_file():
        raise DataError(f"{path} is not there. Evaluate --teacher {folder} again.")
    distance = 1 - metrics.cosine(features["frechet"], load_file(path)["features"])
    rows["paired_distance"] = distance.tolist()
    mean, interval = float(distance.mean()), bootstrap_mean(distance)
    return {"paired_distance": Metric(mean, interval, "lower", against=theirs["model"])}
