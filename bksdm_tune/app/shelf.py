"""The tab with all models: looked at, renamed, deleted, taken home, brought in."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from bksdm_tune.app.create import models
from bksdm_tune.app.library import Model
from bksdm_tune.app.studio import Studio
from bksdm_tune.app.told import told
from bksdm_tune.backbones import BACKBONES

SHEET = "contact-sheet.png"
FORMATS = [
    ("kohya: ComfyUI, A1111, sd-scripts", "kohya"),
    ("diffusers LoRA", "diffusers"),
    ("PEFT folder", "peft"),
    ("single file: whole checkpoint for ComfyUI, A1111", "single-file"),
    ("merged: whole diffusers folder", "merged"),
    ("ONNX", "onnx"),
    ("Core ML", "coreml"),
    ("svd: a LoRA out of a full run", "svd"),
]
NO_MODELS = "<p>Nothing here yet: personalise a model, or bring one in.</p>"


def build(studio: Studio, backbone: str) -> list[Any]:
    """The tab's components and what they do; the dropdown and the table, to be kept up to date."""
    table = gr.HTML(table_of(studio), elem_id="shelf")
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            model = gr.Dropdown([], value=None, label="Model", elem_id="shelf-model")
            with gr.Accordion("Take home", open=True):
                format = gr.Dropdown(FORMATS, value="kohya", label="Format", elem_id="format")
                dtype = gr.Radio(["fp16", "bf16", "fp32"], value="fp16", elem_id="dtype",
                                 label="Precision of whole models")  # fmt: skip
                export = gr.Button("Export", variant="primary", elem_id="export")
                file = gr.File(label="The file", interactive=False, elem_id="exported")
                said = gr.Markdown(elem_id="export-said")
            with gr.Accordion("Score", open=False):
                gr.Markdown("DINO, CLIP-I, CLIP-T over the 25 prompts, as `bksdm-tune score`.")
                judge = gr.Button("Score it", elem_id="score")
                judged = gr.Markdown(elem_id="judged")
            with gr.Accordion("Rename or delete", open=False):
                title = gr.Textbox(label="New name", max_lines=1, elem_id="new-name")
                rename = gr.Button("Rename", elem_id="rename")
                sure = gr.Checkbox(label="Yes, delete it for good", elem_id="sure")
                delete = gr.Button("Delete", variant="stop", elem_id="delete")
            with gr.Accordion("Bring in a LoRA file", open=False):
                given = gr.File(label=".safetensors", file_types=[".safetensors"], elem_id="import")
                on = gr.Dropdown(list(BACKBONES), value=backbone, label="For the backbone")
                name = gr.Textbox(label="Name", max_lines=1)
                words = gr.Textbox(label="Trigger words ({subject})", max_lines=1)
                bring = gr.Button("Bring in", elem_id="bring")
        with gr.Column(scale=7, min_width=320):
            sheet = gr.Image(
                label="Contact sheet", show_label=False, interactive=False, elem_id="sheet",
                buttons=["download", "fullscreen"],
            )  # fmt: skip
            with gr.Accordion("Card", open=False):
                card = gr.Markdown(elem_id="card")

    def taken(name: str | None, format: str, dtype: str) -> tuple[str, str]:
        path, text = studio.export(name or "", format, dtype)
        return str(path), text

    def renamed(name: str | None, title: str) -> Any:
        studio.library.rename(name or "", title)
        return gr.update(choices=models(studio)), table_of(studio), ""

    def deleted(name: str | None, sure: bool) -> Any:
        if not sure:
            raise gr.Error("Tick the box first: a deleted model does not come back.", duration=6)
        studio.delete(name or "")
        return gr.update(choices=models(studio), value=None), table_of(studio), False

    def brought(file: str | None, on: str, name: str, words: str) -> Any:
        if file is None:
            raise gr.Error("Drop a .safetensors file first.", duration=6)
        slug = studio.import_adapter(Path(file), name or "", on, words or "")
        return gr.update(choices=models(studio), value=slug), table_of(studio)

    def scored(name: str | None) -> tuple[str, str]:
        studio.score(name or "")
        return summary(studio.library.get(name or "")), table_of(studio)

    quiet: dict[str, Any] = {"api_visibility": "private"}
    model.change(told(lambda name: shown(studio, name)), model, [sheet, card], **quiet)
    export.click(told(taken), [model, format, dtype], [file, said], concurrency_id="export",
                 concurrency_limit=1, **quiet)  # fmt: skip
    judge.click(told(scored), model, [judged, table], concurrency_id="score", concurrency_limit=1,
                **quiet)  # fmt: skip
    rename.click(told(renamed), [model, title], [model, table, title], **quiet)
    delete.click(told(deleted), [model, sure], [model, table, sure], **quiet)
    bring.click(told(brought), [given, on, name, words], [model, table], **quiet)
    return [model, table]


def shown(studio: Studio, name: str | None) -> tuple[Image.Image | None, str]:
    """Contact sheet and card."""
    if not name:
        return None, ""
    folder, image = studio.library.get(name).folder, None
    if (folder / SHEET).is_file():
        with Image.open(folder / SHEET) as opened:
            image = opened.convert("RGB")
    try:
        card = (folder / "README.md").read_text("utf-8").split("\n---\n", 1)[-1]
    except OSError:
        card = "This model has no card."
    return image, "\n".join(line for line in card.splitlines() if not line.startswith("!["))


def table_of(studio: Studio) -> str:
    found = studio.library.models()
    if not found:
        return NO_MODELS
    head = ("Name", "Subject", "Method", "Backbone", "DINO", "CLIP-T", "Size")
    rows = "".join(row_of(model) for model in found)
    cells = "".join(f"<th>{name}</th>" for name in head)
    return f'<div class="wide"><table class="shelf"><tr>{cells}</tr>{rows}</table></div>'


def row_of(model: Model) -> str:
    cells = (
        model.title, model.trigger, model.method, model.backbone,
        score(model, "dino"), score(model, "clip_t"), f"{model.bytes / 1e6:.1f} MB",
    )  # fmt: skip
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def summary(model: Model) -> str:
    """A line a metric; the rest is in the report."""
    names = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "pres": "PRES"}
    lines = [f"* {title}: **{score(model, name)}**" for name, title in names.items()]
    protocol = (model.scores or {}).get("protocol", {}).get("name", "")
    where = f"{model.slug}/score/report.html"
    return "\n".join([*lines, "", f"Protocol {protocol}; pictures and floors in `{where}`."])


def score(model: Model, metric: str) -> str:
    """With its interval; empty where the model was not scored."""
    found = ((model.scores or {}).get("metrics") or {}).get(metric) or {}
    if found.get("macro") is None:
        return ""
    low, high = found.get("ci95") or (None, None)
    spread = f" [{low:.3f}, {high:.3f}]" if low is not None else ""
    return f"{found['macro']:.3f}{spread}"
