"""``report.html``: one file that opens offline: tables, a plot, the worst pictures first."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from bksdm_tune.artifacts import write_text_atomic
from subjects.photos import open_photo

THUMBNAIL, WORST = 112, 24
Point = tuple[str, float, float]
"""Label, CLIP-T, DINO."""


def write_report(
    path: Path,
    rows: list[dict[str, Any]],
    result: dict[str, Any],
    folder: Path,
    steps: Sequence[Point] = (),
) -> None:
    """``folder``: where the rows' paths begin; ``steps``: scores on the way of a training."""
    points = [
        (name, figures["clip_t"], figures["dino"])
        for name, figures in result["per_subject"].items()
        if None not in (figures["clip_t"], figures["dino"])
    ]
    plot = scatter(points, "each point a subject") if len(points) > 1 else ""
    if steps:
        plot += scatter(steps, "steps of training, on a smaller grid", joined=True)
    text = template("report.html.j2").render(
        result=result, plot=plot, sheets=sheets(rows, folder), worst=WORST
    )
    write_text_atomic(path, text)


def template(name: str) -> Any:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["figure"] = lambda v: "" if v is None else f"{v:.3f}"
    text = resources.files("bksdm_tune.evaluate").joinpath(name).read_text("utf-8")
    return environment.from_string(text)


def sheets(rows: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """Subject -> its photos, and its generated pictures with the least DINO similarity first; the
    subjects in that order too."""
    found: dict[str, dict[str, Any]] = defaultdict(lambda: {"photos": [], "pictures": []})
    generated = [row for row in rows if row["role"] == "generated"]
    for row in rows:
        if row["role"] == "reference":
            found[row["subject_id"]]["photos"].append(thumbnail(folder / row["path"]))
    for row in sorted(generated, key=lambda row: (row["dino"], row["path"])):
        pictures = found[row["subject_id"]]["pictures"]
        if len(pictures) < WORST or row["black"] or row["copied"]:
            pictures.append(row | {"image": thumbnail(folder / row["path"])})
    scores: dict[str, list[float]] = defaultdict(list)
    for row in generated:
        scores[row["subject_id"]].append(row["dino"])
    worst_first = sorted(scores, key=lambda name: (sum(scores[name]) / len(scores[name]), name))
    return {name: found[name] for name in worst_first}


def thumbnail(path: Path) -> str:
    """A data URL."""
    image = open_photo(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    image.save(data, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def scatter(points: Sequence[Point], note: str, joined: bool = False) -> str:
    """DINO against CLIP-T as SVG; ``joined``: the points follow each other."""
    text = io.StringIO()
    _figure(points, note, "o-" if joined else "o").savefig(
        text, format="svg", bbox_inches="tight", metadata={"Date": None}
    )
    return text.getvalue()[text.getvalue().index("<svg") :]


def write_curve(path: Path, points: Sequence[Point]) -> None:
    """DINO against CLIP-T over the steps of a run as PNG."""
    _figure(points, "steps of training", "o-").savefig(path, dpi=110, bbox_inches="tight")


def _figure(points: Sequence[Point], note: str, style: str) -> Any:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "bksdm-tune", "svg.fonttype": "none"})
    figure = Figure(figsize=(6, 4))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    across, up = [p[1] for p in points], [p[2] for p in points]
    axes.plot(across, up, style, color="#2f6f8f", markersize=4, linewidth=1)
    for label, x, y in points:
        axes.annotate(
            label.replace("$", r"\$"), (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points"
        )
    axes.set(xlabel="CLIP-T: picture and words", ylabel="DINO: picture and photos", title=note)
    axes.title.set_fontsize(9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
