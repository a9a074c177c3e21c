"""The tab in which models draw."""

from __future__ import annotations

import secrets
import uuid
from pathlib import Path
from typing import Any

import gradio as gr

from bksdm_tune.app.forms import MOST_DENOISING, MOST_GUIDANCE, MOST_PICTURES, MOST_STRENGTH
from bksdm_tune.app.studio import Studio
from bksdm_tune.app.told import told
from subjects.catalogue import fill, prompts_of_class

DRAWING = "drawing"
"""One at a time, in the order in which they were asked for."""
SEEDS = 2**31
DEFAULT_PROMPT = "a {subject} in the snow"
Update = Any


def build(studio: Studio) -> list[Any]:
    """The tab's components and what they do; the model's dropdown, to be kept up to date."""
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            model = gr.Dropdown([], value=None, label="Model", elem_id="model", interactive=True)
            prompt = gr.Textbox(
                DEFAULT_PROMPT, label="Prompt", lines=2, elem_id="prompt",
                info="{subject} stands for what the model learned",
            )  # fmt: skip
            with gr.Row():
                go = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Cancel", elem_id="stop")
            negative = gr.Textbox(label="Negative prompt", max_lines=1)
            with gr.Row():
                seed = gr.Number(label="Seed", value=0, precision=0, elem_id="seed")
                chance = gr.Checkbox(label="Another seed each time", value=False)
                count = gr.Slider(1, MOST_PICTURES, 4, step=1, label="Pictures", elem_id="count")
            with gr.Row():
                steps = gr.Slider(
                    1, MOST_DENOISING, 25, step=1, label="Steps", elem_id="draw-steps"
                )
                guidance = gr.Slider(0, MOST_GUIDANCE, 7.5, step=0.5, label="Guidance scale")
                strength = gr.Slider(0, MOST_STRENGTH, 1, step=0.05, label="Adapter strength")
        with gr.Column(scale=6, min_width=320):
            gallery = gr.Gallery(
                label="Pictures; each PNG carries its settings", columns=2, format="png",
                elem_id="gallery", interactive=False, height=660,
            )  # fmt: skip
            said = gr.Markdown(elem_id="drawn")
            scenes = gr.Dataset(
                components=[gr.Textbox(visible=False)], samples=scenes_of("object"), type="values",
                label="Scenes", samples_per_page=25, elem_id="scenes",
            )  # fmt: skip
            dropped = gr.File(
                label="Drop a PNG from here to get its settings back", file_types=[".png"],
                elem_id="restore", height=110,
            )  # fmt: skip
    ticket = gr.State("")
    fields = [model, prompt, negative, seed, steps, guidance, strength, count]

    def draw(
        ticket: str,
        chance: bool,
        *values: Any,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> tuple[list[tuple[Path, str]], str, int]:
        from bksdm_tune.app.engine import Request

        model, prompt, negative, seed, steps, guidance, strength, count = values
        seed = secrets.randbelow(SEEDS) if chance else seed
        request = Request(
            prompt or "", model, None, negative or "", count, 0 if seed is None else seed, steps,
            guidance, strength,
        )  # fmt: skip
        progress(0, desc="loading")
        drawn, paths = studio.drawing.draw(
            request, lambda share: progress(share, desc="drawing"), ticket
        )
        shown = [(p, f"seed {s.seed}") for p, s in zip(paths, drawn.shots, strict=True)]
        return shown, report(drawn), request.seed

    go.click(lambda: uuid.uuid4().hex, None, ticket, queue=False, api_visibility="private").then(
        told(draw), [ticket, chance, *fields], [gallery, said, seed], api_name="draw_here",
        concurrency_id=DRAWING, concurrency_limit=1, api_visibility="private",
    )  # fmt: skip
    stop.click(studio.drawing.cancel, ticket, None, queue=False, api_visibility="private")
    scenes.click(
        lambda row: row[0], scenes, prompt, queue=False, show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip
    model.change(
        told(lambda name: about(studio, name)), model, [scenes, said], show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip
    dropped.upload(
        told(lambda file: restored(studio, file)), dropped,
        [model, prompt, negative, seed, steps, guidance, strength, chance],
        api_visibility="private",
    )  # fmt: skip
    return [model]


def report(drawn: Any) -> str:
    text = f"{drawn.seconds:.2f} s a picture."
    if drawn.withheld:
        text += f" **{drawn.withheld} withheld by the safety checker** of the backbone."
    return text


def models(studio: Studio) -> list[tuple[str, str]]:
    return [(f"{m.title} · {m.method} on {m.backbone}", m.slug) for m in studio.library.models()]


def scenes_of(noun: str) -> list[list[str]]:
    """The 25 prompts of the class as buttons."""
    return [[fill(template, "{subject}", "")] for template in prompts_of_class(noun)]


def about(studio: Studio, name: str | None) -> tuple[Update, str]:
    """Scenes for the model's class, and what its safety checker does."""
    if not name:
        return gr.skip(), ""
    from bksdm_tune.app import safety
    from bksdm_tune.resolve import resolve

    model = studio.library.get(name)
    noun = model.trigger.partition(" ")[2]
    shipped = safety.shipped(resolve(str(model.folder)).root)
    state = "on" if shipped else "none: the backbone ships none"
    text = f"{{subject}} is *{model.trigger}*. Safety checker: {state}."
    return gr.update(samples=scenes_of(noun)), text


def restored(studio: Studio, file: str | None) -> tuple[Any, ...]:
    """The fields from a PNG's own settings; the model too, where the library has it."""
    from bksdm_tune.app.engine import settings_of

    found = settings_of(Path(file or ""))
    here = found.model in {slug for _, slug in models(studio)}
    model = found.model if here else gr.skip()
    settings = found.negative_prompt, found.seed, found.steps, found.guidance, found.strength
    return (model, found.prompt, *settings, False)
