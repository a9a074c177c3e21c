"""From what a user types after ``--backbone`` to folders on disk.

A registry name, a diffusers pipeline folder, a Hub id, a run folder, or a U-Net-only folder or
repository combined with a base for the other parts.  Never torch: only the headers of weights are
read, and the Hub client is imported only when a Hub id has to be looked up.
"""

from __future__ import annotations

import errno
import functools
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bksdm_tune.artifacts import IDENTITY, MANIFEST, content_key, read_manifest, sha256_file
from bksdm_tune.backbones import (
    BACKBONES,
    EMBEDDED,
    Backbone,
    by_source,
    close_matches,
)
from bksdm_tune.errors import DataError, UsageError

INDEX = "model_index.json"
ADAPTER = "pytorch_lora_weights.safetensors"
PEFT_PARTS = (".", "unet", "text_encoder")
"""Where a PEFT folder has its files: one for all, or one for each part."""
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA_RUN = "dreambooth-lora"
REQUIRED_PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
HUB_ID = re.compile(r"(?!runs/)\w[\w.-]*/\w[\w.-]*")  # runs/x is a folder of ours, gone or mistyped
# Weights in the root of a pipeline repository are single-file copies of what the folders hold; only
# a U-Net repository has its own there.
WANTED = ["*.json", "*.txt", "*/*.safetensors", "diffusion_pytorch_model*.safetensors", "LICENSE*"]
UNWANTED = ["*.fp16.*", "*.non_ema.*", "*/*/*"]


@dataclass(frozen=True)
class Parts:
    """Where the parts of a text-to-image model lie."""

    name: str
    """For people: a registry name, a Hub id or a folder's name."""
    ref: str
    """Resolves to the same parts from any working directory: a name, a Hub id, a full path."""
    base: str | None
    """As ``ref``, for the parts beside the U-Net, where they come from elsewhere."""
    unet: Path
    """Folder with the U-Net's config.json and safetensors."""
    root: Path
    """Pipeline folder with the other parts."""
    backbone: Backbone | None
    """The registry row, where the U-Net is that row's own."""
    adapter: Path | None = None
    """LoRA file, or PEFT folder; the other fields then describe the backbone it goes on."""


def resolve(ref: str, base: str | None = None) -> Parts:
    """Find (for a Hub id: download once) the parts that ``ref`` names, without loading any.

    Args:
        base: where the parts beside the U-Net come from; needed for a U-Net alone.  For a LoRA run
            it stands for the backbone that its manifest names.

    Raises:
        UsageError: ``ref`` is no name, folder or Hub id, or a U-Net alone came without ``base``.
        DataError: the folder or repository lacks something, or cannot be reached.
    """
    if ref in BACKBONES:
        row = BACKBONES[ref]
        return _from_folder(_registered_folder(row), ref, ref, base, row)
    path = Path(ref).expanduser()
    if path.exists():
        return _from_path(path.resolve(), base)
    if HUB_ID.fullmatch(ref):
        return _from_folder(hub_folder(ref), ref, ref, base, by_source(ref))
    raise UsageError(
        f"{ref!r} is neither a registered backbone, nor a folder, nor a Hub id (user/name). "
        f"{close_matches(ref)}"
    )


def unet_config(parts: Parts) -> dict[str, Any]:
    """The U-Net's config.json."""
    return read_json(parts.unet / "config.json")


def hash_weights(folder: Path) -> str:
    """Content key of a model folder: names and bytes of its safetensors and config.json."""
    files = [*folder.glob("*.safetensors"), folder / "config.json"]
    return content_key({path.name: _digest(path, path.stat().st_ctime_ns) for path in files})


@functools.cache
def _digest(path: Path, changed: int) -> str:
    """Gigabytes that are read once, however many subjects are taught to them."""
    return sha256_file(path)


def hash_parts(parts: Parts) -> dict[str, str]:
    """Content keys of the models that decide what a run learns."""
    return {
        "unet": hash_weights(parts.unet),
        "vae": hash_weights(parts.root / "vae"),
        "text_encoder": hash_weights(parts.root / "text_encoder"),
    }


def hash_model(parts: Parts) -> dict[str, str | None]:
    """Content keys of all that decides what a model draws, an adapter included."""
    adapter = None if parts.adapter is None else hash_adapter(parts.adapter)
    return {**hash_parts(parts), "adapter": adapter}


def hash_adapter(path: Path) -> str:
    """Content key of an adapter file, or of a PEFT folder or its file, with the configuration."""
    path = adapter_place(path)
    if path.is_file():
        return sha256_file(path)
    names = [f"{part}/{file}" for part in PEFT_PARTS for file in (PEFT_FILE, PEFT_CONFIG)]
    return content_key({n: sha256_file(path / n) for n in names if (path / n).is_file()})


def adapter_place(path: Path) -> Path:
    """The PEFT folder, where its file is named; what the file means stands beside it."""
    inside = path.name == PEFT_FILE and (path.parent / PEFT_CONFIG).is_file()
    return path.parent if inside else path


def is_adapter(path: Path) -> bool:
    """Whether it looks like an adapter: a file, a PEFT folder, or one with a folder for each
    part."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return any((path / part / PEFT_CONFIG).is_file() for part in PEFT_PARTS)


def tuned_from(run: Path) -> Parts | None:
    """The backbone that a run's manifest names; None where there is none."""
    if not (run / MANIFEST).is_file():
        return None
    named = read_manifest(run)["parents"].get("backbone")
    return resolve(named["ref"], named.get("base")) if named else None


def _registered_folder(row: Backbone) -> Path:
    if row.source != EMBEDDED:
        return hub_folder(row.source)
    from bksdm_tune.pocket import materialise

    return materialise(row.name)


def _from_path(path: Path, base: str | None) -> Parts:
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        if manifest["kind"] == LORA_RUN:
            return _from_lora_run(path, manifest, base)
    elif (path / IDENTITY).is_file():
        raise DataError(
            f"{path} is a run that has not finished. Type the command that began it again: it goes "
            "on from the last checkpoint."
        )
    return _from_folder(path, path.name, str(path), base, None)


def _from_lora_run(run: Path, manifest: dict[str, Any], base: str | None) -> Parts:
    if not (run / ADAPTER).is_file():
        raise DataError(f"{run} is a LoRA run without {ADAPTER}; type its command again.")
    trained_on = manifest["parents"]["backbone"]
    try:
        parts = resolve(base) if base else resolve(trained_on["ref"], trained_on.get("base"))
    except (UsageError, DataError) as error:
        raise DataError(
            f"{run} was trained on {trained_on['ref']}, which cannot be used: {error}\n"
            "If it lies elsewhere now, name it with --base."
        ) from None
    return replace(parts, adapter=run / ADAPTER)


def _from_folder(
    folder: Path, name: str, ref: str, base: str | None, row: Backbone | None
) -> Parts:
    unet = next((path for path in (folder / "unet", folder) if _is_unet(path)), None)
    if unet is None:
        raise DataError(
            f"{name} cannot be used as a backbone: {folder} has no {INDEX} with a unet folder (a "
            f"diffusers pipeline), no {MANIFEST} of a run, and no config.json of a U-Net."
        )
    root, other = folder, None
    if base is not None:
        beside = resolve(base)
        root, other = beside.root, beside.ref
    elif not (folder / INDEX).is_file():
        raise UsageError(
            f"{name} holds a U-Net alone. Say where the other parts come from: "
            "--base NAME, folder or Hub id, such as --base sd-v1-4."
        )
    check_weights(unet, ref)
    check_pipeline(root, other or ref)
    return Parts(name, ref, other, unet, root, row)


def _is_unet(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and "up_block_types" in read_json(config)


def check_pipeline(root: Path, ref: str) -> None:
    """Raise DataError, naming each, if a pipeline folder lacks parts or safetensors weights."""
    index = read_json(root / INDEX)
    missing = [part for part in REQUIRED_PARTS if part not in index or not (root / part).is_dir()]
    if missing:
        raise DataError(
            f"{root} is not a complete Stable Diffusion pipeline: it lacks {', '.join(missing)}. "
            "Copy or download it again."
        )
    for part in index:
        if (root / part / "config.json").is_file():
            check_weights(root / part, ref)


def check_weights(folder: Path, ref: str) -> None:
    """Raise DataError unless a model folder has plain safetensors, saying how to make them."""
    found = sorted(path.name for path in folder.iterdir() if path.is_file())
    weights = [name for name in found if name.endswith(".safetensors")]
    for name in weights:
        check_whole(folder / name)
    if any(".fp16." not in name for name in weights):
        return
    others = weights or [name for name in found if name.endswith(PICKLES)]
    loader = "DiffusionPipeline" if (folder.parent / INDEX).is_file() else "UNet2DConditionModel"
    variant = ", variant='fp16'" if weights else ""
    raise DataError(
        f"{folder} has {', '.join(others) or 'no weights'}; plain safetensors are needed. Copy or "
        "download it again, or, if pickles or an fp16 variant are all there is, convert once and "
        "name the new folder:\n"
        f'  python -c "from diffusers import {loader} as M; '
        f"M.from_pretrained('{ref}'{variant}).save_pretrained('FOLDER')\""
    )


def check_whole(path: Path) -> None:
    """Raise DataError if a safetensors file is shorter than its header says, or none at all."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy"):
            return
    except SafetensorError as error:
        raise DataError(f"{path} is damaged ({error}). Copy or download it again.") from None


def hub_folder(hub_id: str) -> Path:
    """The local snapshot of a Hub repository, downloaded if it is not there or incomplete.

    Raises:
        DataError: it is not on disk and the Hub cannot be reached, or refuses.
    """
    local = local_snapshot(hub_id)
    if local is not None:
        return local
    print(f"Downloading {hub_id} from the Hugging Face Hub.", file=sys.stderr)
    try:
        return _snapshot(hub_id, local_files_only=False)
    except Exception as error:  # whichever HTTP library the Hub client uses raises its own
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{hub_id} is not on this disk and cannot be downloaded: {reason}\n"
            "Connect to the network (a gated model also needs `hf auth login`), or name a folder "
            "that holds it, or pocket-base, which needs no download."
        ) from None


def local_snapshot(hub_id: str) -> Path | None:
    """The snapshot in the Hub cache, without network; None if absent or partly downloaded."""
    try:
        folder = _snapshot(hub_id, local_files_only=True)
    except OSError:
        return None
    return folder if _has_weights(folder) else None


def _snapshot(hub_id: str, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            hub_id,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
            local_files_only=local_files_only,
        )
    )


def _has_weights(folder: Path) -> bool:
    """False for what an interrupted download, or one of the texts alone, left behind."""
    if not (folder / INDEX).is_file():
        return any(folder.glob("*.safetensors"))
    try:
        check_pipeline(folder, ref="")
    except DataError:
        return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DataError: the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} does not hold a JSON object.")
    return value
