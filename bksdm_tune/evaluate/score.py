"""A manifest of pictures -> scores: decode, encode each picture once, tabulate, sum up, write.

``scores.json`` (``scores.schema.json`` beside this file), ``images.parquet`` and ``images.csv``
with a row a picture, ``report.html``.  The order of the manifest's lines changes no byte of them.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from bksdm_tune.artifacts import sha256_file, versions, write_text_atomic
from bksdm_tune.errors import DataError, ProtocolError
from bksdm_tune.evaluate import subject_scores as scores
from bksdm_tune.evaluate.encoders import features
from bksdm_tune.evaluate.manifest import Pictures, read_pictures
from bksdm_tune.evaluate.protocols import Judges
from bksdm_tune.evaluate.report import Point, write_report
from bksdm_tune.evaluate.results import (
    IMAGES,
    SCORES,
    SCORES_SCHEMA,
    SUBJECTS,
    fingerprint,
    read_results,
)
from bksdm_tune.evaluate.subject_scores import MEASURES, Table
from subjects.photos import decode_photo, open_photo

BLACK = 8  # of 255: no channel of any pixel is lighter
ONE_EACH = "no prompt has two pictures"
Space = dict[str, NDArray[Any]]


def score(
    manifest: Path,
    judges: Judges,
    out: Path,
    name: str,
    batch_size: int = 32,
    partial: bool = False,
    floor: Path | None = None,
    device: str = "cpu",
    steps: Sequence[Point] = (),
) -> dict[str, Any]:
    """Score and write; the content of ``scores.json``.

    Args:
        partial: score what is there, and list what is not; else that is an error.
        floor: scores of the untuned backbone's pictures, by the same protocol.
        steps: scores on the way of the training, for the report.

    Raises:
        DataError: every fault of the manifest and its pictures; nothing was written.
        ProtocolError: the floor was scored in another way.
    """
    facts: dict[str, dict[str, Any]] = {}

    def look(path: Path) -> None:
        pixels = np.asarray(decode_photo(path))
        name = path.relative_to(manifest.parent).as_posix()
        facts[name] = {"sha256": sha256_file(path), "black": bool(pixels.max() <= BLACK)}

    pictures = read_pictures(manifest, look)
    below = read_floor(floor, judges.facts, pictures)
    if pictures.missing and not partial:
        shown = "\n  ".join(map(str, pictures.missing))
        raise DataError(
            f"{len(pictures.missing)} pictures or cells of {manifest} are missing:\n  {shown}\n"
            "Draw them, or score what is there with --on-missing partial."
        )
    dino, clip = encode(pictures, judges, batch_size, device)
    texts = encode_texts(judges, sorted({row.clip_text for row in pictures.generated}))
    rows = scores.table(pictures, dino, clip, texts, facts, diversity(pictures, judges))
    result = summarise(rows, judges.facts, name, pictures.exclusions, below, judges.no_lpips)
    write(out, rows, result, pictures.folder, steps)
    return result


def kind(column: str) -> str:
    """Of a column of images.parquet, to Arrow; seeds of some tools need all 64 bits."""
    kinds = {"seed": "uint64", "sample_idx": "int64", "references": "int64", "nearest": "float64"}
    kinds |= {"black": "bool", "copied": "bool"} | dict.fromkeys(MEASURES, "float64")
    return kinds.get(column, "string")


def encode(pictures: Pictures, judges: Judges, batch_size: int, device: str) -> tuple[Space, Space]:
    """DINO and CLIP features of every file, decoded once for both: path -> unit row."""
    paths = sorted({row.path for row in pictures.rows})
    found: tuple[Space, Space] = {}, {}
    starts = tqdm(range(0, len(paths), batch_size), "encoding", unit="batch", disable=None)
    for start in starts:
        part = paths[start : start + batch_size]
        images = [open_photo(pictures.folder / path) for path in part]
        for encoder, space in zip((judges.dino, judges.clip), found, strict=True):
            rows = scores.unit(features(encoder.images, encoder, images, device))
            space.update(zip(part, rows, strict=True))
    return found


@torch.inference_mode()
def encode_texts(judges: Judges, texts: list[str]) -> Space:
    assert judges.clip.texts is not None
    rows = scores.unit(judges.clip.texts(texts).float().cpu().numpy())
    return dict(zip(texts, rows, strict=True))


def diversity(pictures: Pictures, judges: Judges) -> dict[str, float]:
    """Path -> mean LPIPS to the other pictures of its prompt; empty without the network."""
    if judges.lpips is None:
        return {}
    cells: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in pictures.generated:
        cells[row.subject_id, row.prompt_id].append(row.path)
    found: dict[str, float] = {}
    for paths in tqdm(cells.values(), "LPIPS", unit="prompt", disable=None):
        if len(paths) > 1:
            values = judges.lpips.to_the_others([pictures.folder / path for path in paths])
            found |= dict(zip(paths, values.tolist(), strict=True))
    return found


def read_floor(
    path: Path | None, protocol: dict[str, Any], pictures: Pictures
) -> dict[str, Any] | None:
    """
    Raises:
        ProtocolError: it was scored in another way, or is of other subjects or prompts.
    """
    if path is None:
        return None
    result = read_results(path)
    if result["kind"] != SUBJECTS or result["fingerprint"] != fingerprint(protocol):
        raise ProtocolError(
            f"--floor {path} was scored by another protocol. Score those pictures with these flags."
        )
    mine = {f"{row.group}/{row.prompt_id}" for row in pictures.generated}
    subjects = {row.subject_id for row in pictures.generated}
    if set(result["per_prompt"]) != mine or set(result["per_subject"]) != subjects:
        raise ProtocolError(f"--floor {path} is of other subjects or prompts than these pictures.")
    return result


def summarise(
    rows: Table,
    protocol: dict[str, Any],
    name: str,
    missing: Sequence[str],
    floor: dict[str, Any] | None,
    no_div: str | None,
) -> dict[str, Any]:
    """All of ``scores.json``.  ``no_div``: why DIV was not measured, if it was not."""
    typed = scores.with_types(rows)
    generated = [row for row in rows if row["role"] == "generated"]
    subjects = sorted({row["subject_id"] for row in generated})
    metrics = {
        metric: scores.with_floor(
            scores.summary(rows, metric, (no_div or ONE_EACH) if metric == "div" else None),
            floor["metrics"][metric]["macro"] if floor else None,
        )
        for metric in MEASURES
    }
    drawn = tuple(m for m in MEASURES if MEASURES[m].role == "generated")
    roles = Counter(row["role"] for row in rows)
    return {
        "schema": SCORES_SCHEMA,
        "kind": SUBJECTS,
        "name": name,
        "protocol": protocol,
        "fingerprint": fingerprint(protocol),
        "complete": not missing,
        "counts": {
            "subjects": len(subjects),
            "references": roles["reference"],
            "generated": roles["generated"],
            "class_prior": roles["class_prior"],
            "cells": len({(row["subject_id"], row["prompt_id"]) for row in generated}),
            "black": sum(bool(row["black"]) for row in generated),
            "copied": sum(row["copied"] for row in generated),
        },
        "metrics": metrics,
        "per_subject": per_subject(rows, scores.per(rows, ["subject_id"], drawn)),
        "per_prompt": with_templates(rows, scores.per(rows, ["group", "prompt_id"], drawn)),
        "per_type": scores.per(typed, ["type"], drawn),
        "per_group": scores.per(rows, ["group"], drawn),
        "exclusions": list(missing),
        "versions": versions(),
    }


def with_templates(rows: Table, found: dict[str, Any]) -> dict[str, Any]:
    of = {f"{r['group']}/{r['prompt_id']}": r["prompt_template"] for r in rows if r["prompt_id"]}
    return {prompt: metrics | {"prompt_template": of[prompt]} for prompt, metrics in found.items()}


def per_subject(rows: Table, found: dict[str, Any]) -> dict[str, Any]:
    prior = scores.by_subject(scores.rows_of(rows, "pres"), "pres")
    of = {row["subject_id"]: row for row in rows if row["role"] == "generated"}
    return {
        subject: metrics
        | {"pres": prior.get(subject), "group": of[subject]["group"]}
        | {"class_noun": of[subject]["class_noun"], "references": of[subject]["references"]}
        for subject, metrics in found.items()
    }


def write(
    out: Path, rows: Table, result: dict[str, Any], folder: Path, steps: Sequence[Point] = ()
) -> None:
    """All files; ``scores.json`` last."""
    import pyarrow
    import pyarrow.parquet

    written = json.dumps(result, indent=2, sort_keys=True, allow_nan=False)
    out.mkdir(parents=True, exist_ok=True)
    listed = pyarrow.Table.from_pylist(rows, pyarrow.schema([(n, kind(n)) for n in scores.COLUMNS]))
    (out / SCORES).unlink(missing_ok=True)
    scratch = out / f".{IMAGES}.tmp"
    pyarrow.parquet.write_table(listed, scratch)
    scratch.replace(out / IMAGES)
    text = io.StringIO()
    writer = csv.DictWriter(text, scores.COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic((out / IMAGES).with_suffix(".csv"), text.getvalue())
    write_report(out / "report.html", rows, result, folder, steps)
    write_text_atomic(out / SCORES, written + "\n")
