"""The tab in which models are held side by side."""

from __future__ import annotations

import uuid
from typing import Any

import gradio as gr

from bksdm_tune.app.create import DEFAULT_PROMPT, DRAWING
from bksdm_tune.app.studio import Studio
from bksdm_tune.app.told import told
from bksdm_tune.backbones import BACKBONES

WAYS = [
    ("Before and after", "before and after"),
    ("Strengths 0 to 1", "strengths"),
    ("Several models", "models"),
    ("Teacher, Base, Small, Tiny", "backbones"),
]
STEPS, GUIDANCE = 25, 7.5


def build(studio: Studio, backbone: str) -> list[Any]:
    """The tab's components and what they do; the dropdowns of models, to be kept up to date."""
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            kind = gr.Radio(WAYS, value="before and after", label="Compare", elem_id="kind")
            model = gr.Dropdown([], value=None, label="Model", elem_id="compared")
            several = gr.Dropdown(
                [], label="Models", multiselect=True, visible=False, elem_id="several"
            )
            names = gr.Dropdown(
                list(BACKBONES), label="Backbones (empty: the model's family)", multiselect=True,
                visible=False, elem_id="backbones",
            )  # fmt: skip
            prompt = gr.Textbox(DEFAULT_PROMPT, label="Prompt", lines=2, elem_id="compare-prompt")
            with gr.Row():
                seed = gr.Number(label="Seed", value=0, precision=0)
                steps = gr.Slider(1, 100, STEPS, step=1, label="Steps", elem_id="compare-steps")
            with gr.Row():
                go = gr.Button("Compare", variant="primary", elem_id="compare")
                stop = gr.Button("Cancel")
            gr.Markdown("#### Which words drew which pixels")
            extra = gr.Dropdown(
                [("nothing", ""), *((name, name) for name in BACKBONES)], value=backbone,
                label="Beside the model", elem_id="beside",
            )  # fmt: skip
            look = gr.Button("Show attention", elem_id="attend")
        with gr.Column(scale=7, min_width=320):
            gallery = gr.Gallery(
                label="Same prompt, same noise", columns=3, format="png", elem_id="contest",
                interactive=False, height=430,
            )  # fmt: skip
            said = gr.Markdown(elem_id="compare-said")
            maps = gr.Gallery(
                label="Attention, word by word", columns=6, format="png", elem_id="maps",
                interactive=False, height=300,
            )  # fmt: skip
    ticket = gr.State("")

    def compare(
        ticket: str, kind: str, model: str | None, several: Any, names: Any, prompt: str,
        seed: Any, steps: int, progress: Any = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, str]:  # fmt: skip
        request = asked(model, prompt, seed, steps, needs_model=kind not in ("models", "backbones"))
        if kind == "models":
            model = None
            request = asked((several or [None])[0], prompt, seed, steps, needs_model=True)
        chosen = several if kind == "models" else names
        progress(0, desc="loading")
        shown, note = studio.drawing.compare(
            kind, request, chosen or [], lambda x: progress(x, desc="drawing"), ticket
        )
        pictures = [(one.path, one.label) for one in shown if one.path]
        return gr.update(value=pictures, columns=max(1, min(4, len(pictures)))), table(shown, note)

    def attend(
        ticket: str, model: str | None, beside: str, prompt: str, seed: Any, steps: int,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Any:  # fmt: skip
        progress(0, desc="loading")
        mine = asked(model, prompt, seed, steps, needs_model=False)
        shown = studio.drawing.attend(mine, beside, lambda x: progress(x, desc="looking"), ticket)
        return gr.update(value=shown, columns=len(shown) // (2 if beside else 1))

    kind.change(
        lambda way: [gr.update(visible=way != "models"), gr.update(visible=way == "models"),
                     gr.update(visible=way == "backbones")],
        kind, [model, several, names], queue=False, api_visibility="private",
    )  # fmt: skip
    one = {"concurrency_id": DRAWING, "concurrency_limit": 1, "api_visibility": "private"}
    fields = [kind, model, several, names, prompt, seed, steps]
    for button, function, inputs, outputs in (
        (go, compare, fields, [gallery, said]),
        (look, attend, [model, extra, prompt, seed, steps], [maps]),
    ):
        button.click(
            lambda: uuid.uuid4().hex, None, ticket, queue=False, api_visibility="private"
        ).then(
            told(function), [ticket, *inputs], outputs, api_name=f"{function.__name__}_here", **one
        )
    stop.click(studio.drawing.cancel, ticket, None, queue=False, api_visibility="private")
    return [model, several]


def table(shown: list[Any], note: str) -> str:
    """Seconds and scores below the pictures."""
    rows = []
    for one in shown:
        label = one.label.replace("|", "\\|")
        label += "" if one.path else " (**withheld by the safety checker**)"
        rows.append(f"| {label} | {one.seconds:.2f} | {score(one.dino)} | {score(one.clip_t)} |")
    head = ["| | seconds a picture | DINO | CLIP-T |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, "", note])


def score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def asked(model: str | None, prompt: str, seed: Any, steps: Any, needs_model: bool) -> Any:
    """A request of one picture, with a model, or else the smallest backbone."""
    from bksdm_tune.app.engine import Request

    backbone = None if model or needs_model else "pocket-base"
    first = 0 if seed is None else seed
    return Request(prompt or "", model or None, backbone, "", 1, first, steps, GUIDANCE)
