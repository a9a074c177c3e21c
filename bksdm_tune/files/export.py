"""Export a run or an adapter; every file is loaded again by another reader and asked the same.

A format is a writer and a reader: the writer fills a scratch place, the reader loads from there
with code that did not write it, one forward pass of both is compared; only then the file gets its
name.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.files import coreml_format, ldm, onnx_format
from bksdm_tune.files.answers import Answers, apart, ask
from bksdm_tune.files.write import check_free, write_adapter
from bksdm_tune.lora import fit, layouts
from bksdm_tune.lora.adapter import TEXT, UNET, Adapter, Update, resized
from bksdm_tune.lora.fold import fold
from bksdm_tune.pipeline import load_part, load_pipeline
from bksdm_tune.pipeline_folder import copy_other_parts
from bksdm_tune.provenance import Provenance
from bksdm_tune.resolve import Parts, unet_config
from bksdm_tune.weights import LEVEL, fill, save_part

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-2, "bf16": 2e-1}
PALETTISED = 0.25  # 64 values a matrix: 0.04 was seen on pocket, 0.12 on random full-size ones
APPROXIMATE = float("inf")  # only reported


@dataclass(frozen=True)
class Source:
    """What is exported: the parts with an adapter, or a full run and what it was tuned from."""

    parts: Parts
    before: Parts
    """The same without the adapter, or the backbone of a full run."""
    trigger: str | None
    dtype: str = "fp32"
    rank: int = 16

    @property
    def adapter(self) -> Path:
        if self.parts.adapter is None:
            raise UsageError("This format is for LoRAs; this run is a full one. Try --format svd.")
        return self.parts.adapter


class Format(NamedTuple):
    """``write(source, target)`` fills a file or folder; ``read(source, target)`` gives answers."""

    write: Callable[[Source, Path], None]
    read: Callable[[Source, Path], Answers]
    folder: bool
    tolerance: float | None = 1e-5
    """Relative to the largest answer; None: what the dtype allows."""


def export(source: Source, name: str, out: Path) -> dict[str, float]:
    """Write ``out``; the largest difference of each answer, relative to the largest answer.

    Raises:
        UsageError: ``out`` is there already, or the format is not for this source.
        DataError: the file answers differently; nothing is left.
    """
    check_free(out)
    made = FORMATS[name]
    if not made.folder and out.suffix != ".safetensors":
        raise UsageError(f"--out {out} is a safetensors file here; its name must end so.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        target = Path(scratch) / out.name
        if made.folder:
            target.mkdir()
        made.write(source, target)
        expected = answers_of(source.parts)
        found = apart(expected, made.read(source, target))
        share = {k: v / float(expected[k].abs().max()) for k, v in found.items()}
        limit = made.tolerance or TOLERANCE[source.dtype]
        if not max(share.values()) <= limit:  # nor NaN
            raise DataError(
                f"The {name} file answers differently from what was exported ({share}); "
                "nothing was written."
            )
        target.rename(out)
    return share


def answers_of(parts: Parts) -> Answers:
    pipe = load_pipeline(parts, "cpu")
    return ask(pipe.unet, pipe.text_encoder, pipe.tokenizer, pipe.vae)


def record(source: Source, adapter: Adapter | None) -> Provenance:
    """The adapter's own, with the words that call it; of what other tools made, what is known."""
    if adapter is not None and adapter.made_from is not None:
        return replace(adapter.made_from, trigger=source.trigger or adapter.made_from.trigger)
    return fit.provenance(source.before, source.trigger or "", "exported")


def write_diffusers(source: Source, target: Path) -> None:
    adapter = layouts.read(source.adapter)
    adapter.check_plain("The layout diffusers")
    write_adapter(target, adapter, "diffusers", record(source, adapter))


def write_kohya(source: Source, target: Path) -> None:
    """Every layer with the same alpha: diffusers' reader knows one for the whole file."""
    adapter = layouts.read(source.adapter)
    adapter.check_plain("The layout kohya")
    adapter = adapter.with_alpha(adapter.common_alpha)
    more = kohya_metadata(source, adapter)
    write_adapter(target, adapter, "kohya", record(source, adapter), **more)


def kohya_metadata(source: Source, adapter: Adapter) -> dict[str, str]:
    """What kohya's readers and model managers look for."""
    ranks = [update.rank for update in adapter.updates.values()]
    v2 = is_v2(source.parts)
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(adapter.common_alpha),
        "ss_base_model_version": "sd_v2" if v2 else "sd_v1",
        "ss_v2": str(v2),
        "ss_sd_model_name": source.before.name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-v{2 if v2 else 1}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": source.trigger or "",
        "modelspec.trigger_phrase": source.trigger or "",
    }


def is_v2(parts: Parts) -> bool:
    """SD-v2's text width; its files are laid out otherwise."""
    return bool(unet_config(parts).get("cross_attention_dim") == 1024)


def read_lora(source: Source, target: Path) -> Answers:
    """Through diffusers' own loader, into a fresh pipeline."""
    pipe = load_pipeline(source.before, "cpu")
    pipe.load_lora_weights(target.parent, weight_name=target.name)
    return ask(pipe.unet, pipe.text_encoder, pipe.tokenizer)


def write_peft(source: Source, target: Path) -> None:
    """A PEFT folder for each part."""
    adapter = layouts.read(source.adapter)
    adapter.check_plain("A PEFT folder")
    metadata = json.loads(layouts.diffusers_metadata(adapter)["lora_adapter_metadata"])
    ours = record(source, adapter).metadata()
    for part in (UNET, TEXT):
        if not adapter.of(part):
            continue
        (target / part).mkdir()
        tensors = {}
        for path, update in adapter.of(part).items():
            name = f"base_model.model.{path.removeprefix(LEVEL)}"
            tensors[f"{name}.lora_A.weight"] = update.factors["down"].contiguous()
            tensors[f"{name}.lora_B.weight"] = update.factors["up"].contiguous()
        save_file(tensors, target / part / layouts.PEFT_FILE, {"format": "pt", **ours})
        config = {k.partition(".")[2]: v for k, v in metadata.items() if k.startswith(part)}
        config["peft_type"] = "LORA"
        text = json.dumps(config, indent=2, sort_keys=True)
        (target / part / layouts.PEFT_CONFIG).write_text(text + "\n")


def read_peft(source: Source, target: Path) -> Answers:
    from peft import PeftModel

    models = {}
    for part in (UNET, TEXT):
        models[part] = load_part(source.before, part)
        if (target / part).is_dir():
            models[part] = PeftModel.from_pretrained(models[part], target / part).eval()
    return ask(models[UNET], models[TEXT], load_part(source.before, "tokenizer"))


def merged_parts(source: Source) -> dict[str, Any]:
    """U-Net and text encoder with the adapter folded in, float32."""
    models = {part: load_part(source.parts, part) for part in (UNET, TEXT)}
    if source.parts.adapter is None:
        return models
    whole = fit.check(source.parts.adapter, models[UNET].config)
    fold(models, whole, source.parts.adapter)
    return models


def write_merged(source: Source, target: Path) -> None:
    """A whole pipeline folder."""
    models = merged_parts(source)
    copy_other_parts(source.parts.root, target, tuple(models))
    for part, model in models.items():
        save_part(model.to(DTYPES[source.dtype]), target / part)


def read_merged(source: Source, target: Path) -> Answers:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(target, safety_checker=None)
    pipe.to(torch.float32)
    return ask(pipe.unet, pipe.text_encoder, pipe.tokenizer, pipe.vae)


def write_single_file(source: Source, target: Path) -> None:
    """One checkpoint in LDM's layout, the VAE as it is."""
    models = merged_parts(source) | {"vae": load_part(source.parts, "vae")}
    dtype = DTYPES[source.dtype]
    tensors = {
        name: {key: value.to(dtype) for key, value in model.state_dict().items()}
        for name, model in models.items()
    }
    whole = ldm.to_ldm(
        (models[UNET].config, tensors[UNET]),
        (models["vae"].config, tensors["vae"]),
        tensors[TEXT],
        is_v2(source.parts),
    )
    title = source.trigger or source.parts.name
    save_file(whole, target, {"format": "pt", "modelspec.title": title})


def read_single_file(source: Source, target: Path) -> Answers:
    """All three models through diffusers' converters."""
    from diffusers.loaders import single_file_utils as convert

    tensors = load_file(target)
    models = {part: load_part(source.parts, part) for part in (UNET, TEXT, "vae")}
    unet, text, vae = models.values()
    fill(unet, convert.convert_ldm_unet_checkpoint(dict(tensors), dict(unet.config)))
    if is_v2(source.parts):
        fill(text, convert.convert_open_clip_checkpoint(text, dict(tensors)))
    else:
        fill(text, convert.convert_ldm_clip_checkpoint(dict(tensors)))
    found = convert.convert_ldm_vae_checkpoint(dict(tensors), dict(vae.config))
    before = {key: value.to(DTYPES[source.dtype]) for key, value in vae.state_dict().items()}
    fill(vae, {key: value.reshape(before[key].shape) for key, value in found.items()})
    for key, value in vae.state_dict().items():
        if not torch.equal(value, before[key].float()):
            raise DataError(f"The VAE's {key} reads back differently; nothing was written.")
    check_way_back(tensors, unet, vae, text)
    return ask(unet, text, load_part(source.parts, "tokenizer"), vae)


def check_way_back(tensors: dict[str, Tensor], *models: Any) -> None:
    """Our own reader of the one file (U-Net, VAE, text encoder) says the same, bit for bit."""
    unet, vae, _ = models
    keys = list(unet.state_dict()), list(vae.state_dict())
    back = ldm.from_ldm(tensors, unet.config, keys[0], vae.config, keys[1])
    for model, mine in zip(models, back, strict=True):
        for key, value in model.state_dict().items():
            found = mine.get(key.removeprefix(LEVEL))
            if found is None or not torch.equal(found.float(), value):
                raise DataError(f"{key} reads back differently; nothing was written.")


def write_onnx(source: Source, target: Path) -> None:
    models = merged_parts(source) | {"vae": load_part(source.parts, "vae")}
    onnx_format.write(models, load_part(source.parts, "tokenizer"), source.parts, target)


def read_onnx(source: Source, target: Path) -> Answers:
    return onnx_format.read(load_part(source.parts, "tokenizer"), unet_config(source.parts), target)


def write_coreml(source: Source, target: Path) -> None:
    models = merged_parts(source) | {"vae": load_part(source.parts, "vae")}
    coreml_format.write(models, load_part(source.parts, "tokenizer"), target)


def read_coreml(source: Source, target: Path) -> Answers:
    models = {part: load_part(source.parts, part) for part in (UNET, TEXT, "vae")}
    return coreml_format.read(models, load_part(source.parts, "tokenizer"), target)


def write_svd(source: Source, target: Path) -> None:
    """A LoRA of chosen rank nearest to what full tuning changed."""
    if source.parts.adapter is not None:
        raise UsageError("svd is for full runs; resize a LoRA with `bksdm-tune adapter resize`.")
    updates: dict[str, Update] = {}
    for part in (UNET, TEXT):
        tuned, before = (load_part(p, part).state_dict() for p in (source.parts, source.before))
        for key, value in tuned.items():
            change = value.float() - before[key].float()
            if value.ndim < 2 or "embeddings." in key or not key.endswith(".weight"):
                continue
            if float(change.abs().max()) == 0:
                continue
            whole = Update("lora", {"down": _eye(change), "up": change.flatten(1)})
            path = key.removesuffix(".weight")
            level = LEVEL if part == TEXT and not path.startswith(LEVEL) else ""
            updates[f"{part}.{level}{path}"] = resized(whole, source.rank)[0]
    if not updates:
        raise DataError("Nothing was changed by the tuning; there is nothing to extract.")
    adapter = Adapter(dict(sorted(updates.items())), "diffusers")
    write_adapter(target, adapter, "diffusers", record(source, None))


def _eye(change: Tensor) -> Tensor:
    inner = change[0].numel()
    return torch.eye(inner).reshape(inner, *change.shape[1:])


FORMATS = {
    "diffusers": Format(write_diffusers, read_lora, folder=False),
    "peft": Format(write_peft, read_peft, folder=True),
    "kohya": Format(write_kohya, read_lora, folder=False),
    "merged": Format(write_merged, read_merged, True, tolerance=None),
    "single-file": Format(write_single_file, read_single_file, False, tolerance=None),
    "onnx": Format(write_onnx, read_onnx, folder=True, tolerance=1e-4),
    "coreml": Format(write_coreml, read_coreml, folder=True, tolerance=PALETTISED),
    "svd": Format(write_svd, read_lora, folder=False, tolerance=APPROXIMATE),
}


def energy(source: Source, target: Path) -> float:
    """Share of the squared change of all matrices that a LoRA keeps."""
    adapter, kept, total = layouts.read(target), 0.0, 0.0
    for part in (UNET, TEXT):
        tuned, before = (load_part(p, part).state_dict() for p in (source.parts, source.before))
        updates = adapter.of(part)
        for key, value in tuned.items():
            if value.ndim < 2 or not key.endswith(".weight"):
                continue
            change = value.float() - before[key].float()
            path = key.removesuffix(".weight")
            update = updates.get(path) or updates.get(f"{LEVEL}{path}")
            total += float(change.square().sum())
            if update is not None:
                kept += float(update.delta().square().sum())
    return kept / total if total else 1.0
