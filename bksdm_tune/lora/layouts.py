"""Key layouts of adapter files: which names a file has, and which layer each means.

diffusers    unet.<path>.lora.down.weight | .lora_A.weight, text_encoder.<path>.lora_linear_layer...
diffusers-old    <path>.processor.to_q_lora.down.weight, also without the unet. in front
peft         base_model.model.<path>.lora_A.weight, with adapter_config.json beside it
kohya        lora_unet_<path with _>.lora_down.weight, lora_te_..., with .alpha; LyCORIS' hada, lokr
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bksdm_tune.adapters import adapter_metadata
from bksdm_tune.errors import DataError
from bksdm_tune.lora.adapter import TEXT, UNET, Adapter, Update
from bksdm_tune.provenance import provenance_in
from bksdm_tune.resolve import PEFT_CONFIG, PEFT_FILE, PEFT_PARTS, adapter_place, read_json
from bksdm_tune.weights import LEVEL

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_BYTES = 4 * 2**30
KOHYA = {"lora_unet_": UNET, "lora_te_": TEXT, "lora_te1_": TEXT}
# What stands after a layer's name -> kind and factor.
ENDINGS: dict[str, tuple[str, str]] = {
    "lora_down.weight": ("lora", "down"), "lora_up.weight": ("lora", "up"),
    "lora_mid.weight": ("lora", "mid"), "lora.down.weight": ("lora", "down"),
    "lora.up.weight": ("lora", "up"), "lora_A.weight": ("lora", "down"),
    "lora_B.weight": ("lora", "up"), "lora_A.default.weight": ("lora", "down"),
    "lora_B.default.weight": ("lora", "up"), "lora_linear_layer.down.weight": ("lora", "down"),
    "lora_linear_layer.up.weight": ("lora", "up"), "hada_w1_a": ("loha", "w1_a"),
    "hada_w1_b": ("loha", "w1_b"), "hada_w2_a": ("loha", "w2_a"), "hada_w2_b": ("loha", "w2_b"),
    "hada_t1": ("loha", "t1"), "hada_t2": ("loha", "t2"), "lokr_w1": ("lokr", "w1"),
    "lokr_w1_a": ("lokr", "w1_a"), "lokr_w1_b": ("lokr", "w1_b"), "lokr_w2": ("lokr", "w2"),
    "lokr_w2_a": ("lokr", "w2_a"), "lokr_w2_b": ("lokr", "w2_b"), "lokr_t2": ("lokr", "t2"),
    "alpha": ("", "alpha"), "dora_scale": ("", "magnitude"),
    "lora_magnitude_vector": ("", "magnitude of outputs"),
    "lora_magnitude_vector.weight": ("", "magnitude of outputs"),
}  # fmt: skip
# The oldest diffusers names of attention layers; the text encoder's layers are named otherwise.
OLD = re.compile(r"(.*?)\.(?:processor\.)?to_(q|k|v|out)_lora\.(down|up)\.weight")
OLD_UNET = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
OLD_TEXT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
NEEDED = {"lora": ("down", "up"), "loha": ("w1_a", "w1_b", "w2_a", "w2_b"), "lokr": ()}


def read(path: Path) -> Adapter:
    """An adapter file, or a PEFT folder.

    Raises:
        DataError: it is missing, damaged, no safetensors, or no adapter of a Stable Diffusion.
    """
    path = adapter_place(path)
    if path.is_dir():
        return _peft_folder(path)
    tensors, metadata = _tensors(path)
    try:
        return _adapter(tensors, metadata, said_by(metadata))
    except DataError as error:
        raise DataError(f"{path} {error}") from None


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise DataError(f"{path} is not there.")
    if path.stat().st_size > MOST_BYTES:
        raise DataError(f"{path} has {path.stat().st_size / 1e9:.1f} GB; that is no adapter.")
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        if path.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
            raise DataError(
                f"{path} is a pickle, which can run code; ask its maker for safetensors."
            ) from None
        raise DataError(f"{path} is damaged or no safetensors file: {error}") from None
    for key, tensor in tensors.items():
        if key.endswith(".alpha") and not tensor.is_floating_point():
            tensors[key] = tensor = tensor.float()  # diffusers' converter writes the rank as it is
        if tensor.dtype not in FLOATS:
            raise DataError(f"{path}: {key} holds {str(tensor.dtype)[6:]}; floats are wanted.")
        if not torch.isfinite(tensor).all():
            raise DataError(f"{path}: {key} holds numbers that are not finite.")
    return tensors, metadata


def _adapter(
    tensors: dict[str, Tensor], metadata: dict[str, str], alphas: dict[str, Said]
) -> Adapter:
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    kinds: dict[str, str] = {}
    layouts, strange = set(), []
    for key, tensor in tensors.items():
        found = _place(key)
        if found is None:
            strange.append(key)
            continue
        layout, layer, kind, factor = found
        layouts.add(layout)
        if factor == "magnitude of outputs":  # PEFT's, for convolutions of the shape (1, out, 1, 1)
            factor, tensor = "magnitude", tensor.flatten()
        parts[layer][factor] = tensor
        if kind:
            kinds[layer] = kind
    if strange or not parts:
        names = ", ".join(strange[:3]) or "nothing"
        raise DataError(f"is no adapter that this program knows: it holds {names}.")
    updates = {
        layer: _update(layer, kinds.get(layer), factors, alphas) for layer, factors in parts.items()
    }
    made_from = provenance_in(metadata)
    return Adapter(dict(sorted(updates.items())), "+".join(sorted(layouts)), metadata, made_from)


def _update(
    layer: str, kind: str | None, factors: dict[str, Tensor], alphas: dict[str, Said]
) -> Update:
    alpha, magnitude = factors.pop("alpha", None), factors.pop("magnitude", None)
    lacking = [name for name in NEEDED.get(kind or "", ()) if name not in factors]
    if kind is None or lacking or (kind == "lokr" and not _whole_lokr(factors)):
        raise DataError(f"lacks {', '.join(lacking) or 'factors'} of the layer {layer}.")
    try:
        update = Update(kind, factors, None if alpha is None else float(alpha.float()), magnitude)
        assert update.rank > 0
        assert update.shape
    except (RuntimeError, IndexError, ValueError, TypeError, KeyError, AssertionError,
            ZeroDivisionError):  # fmt: skip
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in factors.items())
        raise DataError(f"has factors of {layer} that do not fit each other: {shapes}.") from None
    part, path = layer.split(".", 1)
    if alpha is None and part in alphas:
        return Update(kind, factors, alphas[part].alpha_of(path, update.rank), magnitude)
    return update


def _whole_lokr(factors: dict[str, Tensor]) -> bool:
    return all(n in factors or {f"{n}_a", f"{n}_b"} <= factors.keys() for n in ("w1", "w2"))


def _place(key: str) -> tuple[str, str, str, str] | None:
    """(layout, layer, kind, factor) of a file's key."""
    old = OLD.fullmatch(key)
    if old and not key.startswith("lora_"):
        path, name, side = old.groups()
        text = "text_model" in path
        layer = f"{path}.{(OLD_TEXT if text else OLD_UNET)[name]}"
        return "diffusers-old", _layer(layer), "lora", side
    ending = next((ending for ending in ENDINGS if key.endswith(f".{ending}")), None)
    if ending is None:
        return None
    name, (kind, factor) = key.removesuffix(f".{ending}"), ENDINGS[ending]
    for prefix, part in KOHYA.items():
        if name.startswith(prefix):
            path = dotted(name.removeprefix(prefix))
            return None if path is None else ("kohya", f"{part}.{path}", kind, factor)
    if name.startswith("base_model.model."):
        return "peft", _layer(name.removeprefix("base_model.model.")), kind, factor
    if "." not in name:
        return None
    return "diffusers", _layer(name), kind, factor


def _layer(name: str) -> str:
    """With the part in front and, in the text encoder, the level that transformers 5 dropped."""
    if not name.startswith((f"{UNET}.", f"{TEXT}.")):
        text = name.startswith((LEVEL, "encoder.layers.", "embeddings."))
        name = f"{TEXT if text else UNET}.{name}"
    name = name.replace(".processor.", ".").replace(".text_encoder.", ".")
    if name.startswith(f"{TEXT}.") and ".text_model." not in name:
        name = name.replace(f"{TEXT}.", f"{TEXT}.text_model.", 1)
    return re.sub(r"\.to_out$", ".to_out.0", name)


# Words of layer names that hold an underscore; longest first.
WORDS = (
    "transformer_blocks", "time_embedding", "time_emb_proj", "conv_shortcut", "final_layer_norm",
    "token_embedding", "position_embedding", "text_projection", "down_blocks", "layer_norm1",
    "layer_norm2", "text_model", "self_attn", "mid_block", "up_blocks", "conv_out", "proj_out",
    "out_proj", "linear_1", "linear_2", "conv_in", "proj_in", "q_proj", "k_proj", "v_proj",
    "to_out", "to_q", "to_k", "to_v",
)  # fmt: skip
LDM_STAGES = re.compile(r"(input_blocks|middle_block|output_blocks)_")


def dotted(name: str) -> str | None:
    """``down_blocks_0_attentions_0_..._to_out_0`` with dots; None for LDM's own block names."""
    if LDM_STAGES.match(name):
        return None
    parts = []
    while name:
        word = next((w for w in WORDS if name == w or name.startswith(f"{w}_")), None)
        word = word or name.partition("_")[0]
        parts.append(word)
        name = name[len(word) + 1 :]
    return ".".join(parts)


@dataclass(frozen=True)
class Said:
    """What metadata says of the alphas of a part: one for all, others by pattern, and whether the
    scale is alpha / sqrt(rank) (rank-stabilised, Kalajdzievski 2023) in place of alpha / rank."""

    alpha: float | None = None
    patterns: tuple[tuple[str, float], ...] = ()
    stabilised: bool = False

    @staticmethod
    def of(config: dict[str, Any], prefix: str = "") -> Said:
        """
        Raises:
            DataError: the fields are not what PEFT writes.
        """
        alpha = config.get(f"{prefix}lora_alpha", config.get(f"{prefix}alpha"))
        pattern = config.get(f"{prefix}alpha_pattern") or {}
        try:
            pairs = tuple((str(name), float(value)) for name, value in pattern.items())
            whole = None if alpha is None else float(alpha)
            if not all(map(math.isfinite, [whole or 0.0, *(value for _, value in pairs)])):
                raise ValueError
            for name, _ in pairs:
                re.compile(name)
        except (AttributeError, TypeError, ValueError, re.error, RecursionError):
            raise DataError(f"has alphas that are none: {alpha!r:.40}, {pattern!r:.80}.") from None
        return Said(whole, pairs, bool(config.get(f"{prefix}use_rslora")))

    def alpha_of(self, path: str, rank: int) -> float | None:
        """That which makes alpha / rank the scale; PEFT matches the ends of names."""
        found = self.alpha
        for pattern, value in self.patterns:
            names = (path, path.removeprefix(LEVEL))
            if any(re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) for name in names):
                found = value
                break
        return found * rank**0.5 if self.stabilised and found is not None else found


def said_by(metadata: dict[str, str]) -> dict[str, Said]:
    """From diffusers' ``lora_adapter_metadata``, by part."""
    try:
        said = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        raise DataError("has a lora_adapter_metadata that is no JSON.") from None
    if not isinstance(said, dict):
        raise DataError("has a lora_adapter_metadata that is no object.")
    return {part: Said.of(said, f"{part}.") for part in (UNET, TEXT)}


def _peft_folder(folder: Path) -> Adapter:
    """A folder of PEFT, or with one for each part below it (``unet``, ``text_encoder``)."""
    places = [folder / part for part in PEFT_PARTS if (folder / part / PEFT_FILE).is_file()]
    if not places:
        raise DataError(f"{folder} holds no {PEFT_FILE}.")
    updates: dict[str, Update] = {}
    said: dict[str, str] = {}
    for place in places:
        tensors, metadata = _tensors(place / PEFT_FILE)
        config = read_json(place / PEFT_CONFIG)
        try:
            found = _adapter(tensors, metadata, {part: Said.of(config) for part in (UNET, TEXT)})
            said |= metadata
            updates |= {path: _of_peft(path, u, config) for path, u in found.updates.items()}
        except DataError as error:
            raise DataError(f"{place / PEFT_FILE} {error}") from None
    return Adapter(dict(sorted(updates.items())), "peft", said, provenance_in(said))


def _of_peft(path: str, update: Update, config: dict[str, Any]) -> Update:
    """LoKr by two whole factors has PEFT's scale alpha / r, where LyCORIS has none."""
    if update.kind != "lokr" or not {"w1", "w2"} <= update.factors.keys():
        return update
    said = {"alpha": config.get("r"), "alpha_pattern": config.get("rank_pattern")}
    rank = Said.of(said).alpha_of(path.partition(".")[2], 1)
    if not rank or update.alpha is None:
        raise DataError("is a LoKr whose configuration lacks alpha or r.")
    scale = update.alpha / rank
    return replace(update, factors=update.factors | {"w1": scale * update.factors["w1"].float()})


def diffusers_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """diffusers' keys; the alphas go into ``diffusers_metadata``."""
    adapter.check_plain("The diffusers layout")
    tensors: dict[str, Tensor] = {}
    for layer, update in adapter.updates.items():
        for factor, side in (("down", "lora_A"), ("up", "lora_B")):
            tensors[f"{layer}.{side}.weight"] = update.factors[factor].contiguous()
    return tensors


def diffusers_metadata(adapter: Adapter) -> dict[str, str]:
    """``lora_adapter_metadata`` as it must be."""
    from peft import LoraConfig

    found: dict[str, Any] = {}
    for part in (UNET, TEXT):
        # Without the level that transformers 5 dropped: PEFT matches the ends of names.
        own = {p.removeprefix(LEVEL): update for p, update in adapter.of(part).items()}
        if not own:
            continue
        ranks = {path: update.rank for path, update in own.items()}
        alphas = {p: u.rank if u.alpha is None else u.alpha for p, u in own.items()}
        rank, alpha = (max(set(v.values()), key=list(v.values()).count) for v in (ranks, alphas))
        config = LoraConfig(
            r=int(rank),
            lora_alpha=alpha,
            target_modules=sorted(own),
            rank_pattern={path: r for path, r in ranks.items() if r != rank},
            alpha_pattern={path: a for path, a in alphas.items() if a != alpha},
        )
        found |= adapter_metadata(part, config)
    return {"format": "pt", "lora_adapter_metadata": json.dumps(found, sort_keys=True)}


# Of each factor the first name, which is kohya's or LyCORIS'.
KOHYA_ENDINGS = {place: ending for ending, place in reversed(ENDINGS.items())}


def kohya_name(layer: str) -> str:
    part, path = layer.split(".", 1)
    prefix = "lora_unet_" if part == UNET else "lora_te_"
    return prefix + path.replace(".", "_")


def kohya_tensors(updates: Iterable[tuple[str, Update]]) -> dict[str, Tensor]:
    """Kohya's keys, and LyCORIS' for other kinds, with alpha, which every reader knows."""
    tensors: dict[str, Tensor] = {}
    for layer, update in updates:
        name = kohya_name(layer)
        for factor, value in update.factors.items():
            tensors[f"{name}.{KOHYA_ENDINGS[update.kind, factor]}"] = value.contiguous()
        if update.magnitude is not None:
            size = update.magnitude
            along_outputs = size.reshape(-1, 1) if size.ndim == 1 else size
            tensors[f"{name}.dora_scale"] = along_outputs.contiguous()
        alpha = update.rank if update.alpha is None else update.alpha
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors
