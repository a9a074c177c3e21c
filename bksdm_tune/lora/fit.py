"""Which U-Net an adapter was made for: what its file says, else what its layers and shapes say."""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bksdm_tune.architecture import describe, fingerprint
from bksdm_tune.errors import DataError
from bksdm_tune.lora import layouts
from bksdm_tune.lora.adapter import TEXT, UNET, Adapter
from bksdm_tune.provenance import Provenance
from bksdm_tune.resolve import Parts, unet_config
from bksdm_tune.unet_configs import (
    PLANS,
    TEACHER_UNETS,
    recognise_plan,
    student_config,
    teacher_of,
)

# fmt: off
ARCHITECTURES: dict[str, tuple[str, str]] = {
    "sd-v1":        ("v1",     "teacher"),
    "bk-base":      ("v1",     "base"),
    "bk-small":     ("v1",     "small"),
    "bk-tiny":      ("v1",     "tiny"),
    "sd-v2":        ("v2",     "teacher"),
    "bk-v2-base":   ("v2",     "base"),
    "bk-v2-small":  ("v2",     "small"),
    "bk-v2-tiny":   ("v2",     "tiny"),
    "pocket-teacher": ("pocket", "teacher"),
    "pocket-base":  ("pocket", "base"),
    "pocket-small": ("pocket", "small"),
    "pocket-tiny":  ("pocket", "tiny"),
}
# fmt: on
Shape = tuple[int, ...]


def config_of(name: str) -> dict[str, Any]:
    unet, plan = ARCHITECTURES[name]
    return student_config(TEACHER_UNETS[unet], PLANS[plan])


def layer_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Path of every linear and convolutional layer of a U-Net -> shape of its weight."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config))
    return {
        path: tuple(module.weight.shape)
        for path, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


@functools.cache
def known_shapes(name: str) -> dict[str, Shape]:
    return layer_shapes(config_of(name))


def misfits(adapter: Adapter, shapes: Mapping[str, Shape]) -> list[str]:
    """Layers of the adapter that a U-Net with those layers, or its text encoder, has not, or of
    another size."""
    wrong = _text_misfits(adapter, shapes)
    for path, update in adapter.of(UNET).items():
        if path not in shapes:
            wrong.append(f"{path}: there is no such layer")
            continue
        wanted, found = shapes[path], update.shape
        flat = (wanted[0], math.prod(wanted[1:]))  # LyCORIS has 3 x 3 convolutions so
        if _numbers(wanted) != _numbers(found) and flat != found:
            wrong.append(f"{path}: {found}, the layer has {wanted}")
    return wrong


def _text_misfits(adapter: Adapter, shapes: Mapping[str, Shape]) -> list[str]:
    """The text encoder is as wide as what the U-Net attends to."""
    width = next((shape[1] for path, shape in shapes.items() if path.endswith("attn2.to_k")), None)
    return [
        f"{TEXT}.{path}: {update.shape}, the text is {width} wide"
        for path, update in adapter.of(TEXT).items()
        if ".self_attn." in path and width is not None and update.shape != (width, width)
    ]


def _numbers(shape: Shape) -> Shape:
    """A 1 x 1 convolution counts as a linear layer."""
    return shape[:2] if shape[2:] in ((), (1, 1)) else shape


def check(path: Path, config: Mapping[str, Any]) -> Adapter:
    """Read an adapter; refuse it if it was made for another architecture than the U-Net with this
    config.

    Such a file often loads without a word, half of it into the wrong layers.

    Raises:
        DataError: it was made for another one; the message says what to type.
    """
    wanted, adapter = fingerprint(config), layouts.read(path)
    made_from = adapter.made_from
    if made_from is not None:
        if made_from.architecture == wanted:
            return adapter
        name = name_of(made_from.architecture)
        shape = f"{made_from.backbone} ({made_from.shape})"
        raise DataError(_refusal(path, shape, name, config, made_from.backbone))
    own, shapes = name_of(wanted), layer_shapes(config)
    wrong = misfits(adapter, shapes)
    if not wrong and _all_layers(adapter, shapes):
        return adapter
    stated = said(adapter)
    others = [stated] if stated else inferred(adapter)
    kin = [] if own else relatives(adapter, config)
    if wrong or kin or (own is not None and own not in others):
        made_for = " or ".join(others or kin) or "no U-Net that this program knows"
        raise DataError(_refusal(path, made_for, others[0] if len(others) == 1 else None, config))
    return adapter


def _refusal(
    path: Path, made_for: str, name: str | None, config: Mapping[str, Any], ref: str | None = None
) -> str:
    here = name_of(fingerprint(config))
    text = (
        f"{path} was made for {made_for}; the backbone here is {describe(config)}. Its layers "
        "would land in the wrong places"
    )
    if ref or name:
        text += f". Use it with --backbone {ref or registered(name or '')}"
    if name and here and ARCHITECTURES[name][0] == ARCHITECTURES[here][0]:
        moved = path.with_name(f"{path.stem}-{here}.safetensors")
        words = ["port", str(path), "--from", name, "--to", here, "--out", str(moved)]
        text += f", or type: bksdm-tune {shlex.join(words)}"
    return text + "."


def relatives(adapter: Adapter, config: Mapping[str, Any]) -> list[str]:
    """In words, the U-Nets of these widths and other blocks that have exactly the adapter's layers;
    none where the blocks are no known plan's."""
    plan = recognise_plan(config)
    if plan is None:
        return []
    teacher = teacher_of(config, plan)
    return [
        f"the {other.name} U-Net of these widths"
        for other in PLANS.values()
        if not misfits(adapter, shapes := layer_shapes(student_config(teacher, other)))
        and _all_layers(adapter, shapes)
    ]


def provenance(parts: Parts, trigger: str, run: str) -> Provenance:
    """The record for an adapter made on a backbone."""
    named = parts.name if Path(parts.ref).is_absolute() else parts.ref
    return made_on(unet_config(parts), named, trigger, run)


def made_on(config: Mapping[str, Any], named: str, trigger: str, run: str) -> Provenance:
    return Provenance(named, fingerprint(config), describe(config), trigger, run)


def registered(name: str) -> str:
    """The registry row of an architecture's weights: sd-v1-4 for sd-v1."""
    return {"sd-v1": "sd-v1-4", "sd-v2": "sd-v2-1-base"}.get(name, name)


def name_of(wanted: str) -> str | None:
    """The known architecture with that fingerprint."""
    return next((n for n in ARCHITECTURES if fingerprint(config_of(n)) == wanted), None)


def _all_layers(adapter: Adapter, shapes: Mapping[str, Shape]) -> bool:
    """Whether it has every layer of its kinds that there is."""
    mine = set(adapter.of(UNET))
    ends = {_end(path) for path in mine}
    return {path for path in shapes if _end(path) in ends} == mine


def said(adapter: Adapter) -> str | None:
    """The architecture that the file's own metadata names.  Kohya's names the family alone: where
    exactly one member has exactly the adapter's layers, it is for that one."""
    if adapter.made_from is not None:
        return name_of(adapter.made_from.architecture)
    version = adapter.metadata.get("ss_base_model_version", "")
    stated = {"sd_v1": "sd-v1", "sd_v2": "sd-v2"}.get(version[:5])
    if stated is None:
        return None
    family = ARCHITECTURES[stated][0]
    own = [name for name in exactly(adapter) if ARCHITECTURES[name][0] == family]
    return own[0] if len(own) == 1 else stated


def inferred(adapter: Adapter) -> list[str]:
    """Architectures whose layers of the adapter's kinds are exactly the adapter's.

    Fitting is not enough: the layers of a compressed U-Net have names that the teacher has too.
    Where none has exactly these layers, those that fit at all.
    """
    return exactly(adapter) or fitting(adapter)


def fitting(adapter: Adapter) -> list[str]:
    return [name for name in ARCHITECTURES if not misfits(adapter, known_shapes(name))]


def exactly(adapter: Adapter) -> list[str]:
    """Of those that fit, those without other layers of the adapter's kinds."""
    return [name for name in fitting(adapter) if _all_layers(adapter, known_shapes(name))]


def _end(path: str) -> str:
    """What layers of one kind share: attn1.to_q of every block."""
    parts = path.split(".")
    return ".".join(part for part in parts[-4:] if not part.isdigit())


def architecture(adapter: Adapter) -> str:
    """One name.

    Raises:
        DataError: none fits, or several do; the message names them.
    """
    if not adapter.of(UNET):
        raise DataError("holds no U-Net layers, so nothing says which U-Net it is for")
    name = said(adapter)
    found = [name] if name else inferred(adapter)
    if len(found) == 1:
        return found[0]
    if not found:
        raise DataError("fits none of the known U-Nets: " + ", ".join(ARCHITECTURES))
    say = "bksdm-tune port FILE --from NAME --to NAME --out NEW"
    raise DataError(f"may be for {' or '.join(found)}; write down which: {say}")
