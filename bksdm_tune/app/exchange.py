"""Models in and out of the library, through what ``export`` and ``adapter`` do."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path

from bksdm_tune.app.library import Model, slug
from bksdm_tune.artifacts import atomic_folder, sha256_file, write_manifest
from bksdm_tune.backbones import get_backbone
from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.files.export import DTYPES, FORMATS, export
from bksdm_tune.files.export_command import source_of
from bksdm_tune.files.write import write_adapter
from bksdm_tune.licences import OPENRAIL_NOTICE, POCKET_LICENCE, POCKET_NOTICE
from bksdm_tune.lora import fit
from bksdm_tune.resolve import ADAPTER, LORA_RUN, Parts, hash_parts, resolve, unet_config

HOURS = 24
LONGEST_TRIGGER = 100


def export_model(root: Path, model: Model, format: str, dtype: str) -> tuple[Path, str]:
    """A file in ``root`` to take home (a folder as a zip), and what is to be said of it.

    Raises:
        UsageError: there is no such format, or it is not for this model.
        DataError: the file reads back to something else.
    """
    if format not in FORMATS or dtype not in DTYPES:
        raise UsageError(f"The format is one of {', '.join(FORMATS)}; {', '.join(DTYPES)}.")
    drop_old(root)
    folder = root / uuid.uuid4().hex
    whole = FORMATS[format].folder
    out = folder / f"{slug(model.title)}-{format}{'' if whole else '.safetensors'}"
    source = source_of(str(model.folder), dtype=dtype)
    try:
        found = export(source, format, out)
        if whole:
            shutil.make_archive(str(out), "zip", out)
            shutil.rmtree(out)
            out = out.with_name(f"{out.name}.zip")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    worst = ", ".join(f"{name} {value:.2g}" for name, value in found.items())
    said = f"Read back and asked the same; largest difference, of the largest answer: {worst}."
    return out, f"{said}\n\n{notice(source.parts)}"


def notice(parts: Parts) -> str:
    """The licence that goes with the weights."""
    row = parts.backbone
    mine = row is not None and row.licence == POCKET_LICENCE
    return POCKET_NOTICE if mine else OPENRAIL_NOTICE


def drop_old(folder: Path) -> None:
    for path in folder.glob("*"):
        if time.time() - path.stat().st_mtime > HOURS * 3600:
            shutil.rmtree(path, ignore_errors=True)


def import_adapter(path: Path, folder: Path, backbone: str, trigger: str) -> None:
    """A LoRA file of any layout as a model of the library.

    Raises:
        UsageError, DataError: it is no LoRA, or is for another architecture.
    """
    words = " ".join(trigger.split())
    if len(words) > LONGEST_TRIGGER or not words.isprintable():
        raise UsageError(f"Trigger words have at most {LONGEST_TRIGGER} characters.")
    parts = resolve(get_backbone(backbone).name)
    config = unet_config(parts)
    try:
        whole = fit.check(path, config)
    except DataError as error:  # the person knows the file by its name alone
        raise DataError(str(error).replace(f"{path.parent}{os.sep}", "")) from None
    made_from = fit.provenance(parts, words, sha256_file(path))
    with atomic_folder(folder) as scratch:
        write_adapter(scratch / ADAPTER, whole, "diffusers", made_from)
        named = {"ref": parts.ref, "base": parts.base, "name": parts.name}
        named["architecture"] = made_from.architecture
        parents = {"backbone": {**named, **hash_parts(parts)}}
        results = {"trigger": words, "shape": made_from.shape, "imported": True}
        write_manifest(scratch, LORA_RUN, {"training": {}}, parents, results)
