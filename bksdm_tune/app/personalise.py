"""The tab in which photos become a model."""

from __future__ import annotations

import base64
import html
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image

from bksdm_tune.app.forms import Form, native_pixels, recipe_of
from bksdm_tune.app.jobs import (
    DONE,
    FAILED,
    QUEUED,
    RUNNING,
    Job,
    progress,
)
from bksdm_tune.app.studio import Studio
from bksdm_tune.app.told import owner_of, told
from bksdm_tune.app.uploads import FEWEST, MOST, Verdict, examine
from bksdm_tune.backbones import BACKBONES
from bksdm_tune.errors import UsageError
from subjects.photos import decode_photo

THUMB = 160
PHOTOS = "photos"
"""Decoding large pictures takes memory: one request at a time."""
PULSE = 1.5  # seconds between looks at the run folder
Update = Any


def build(studio: Studio, backbone: str) -> None:
    """The tab's components and what they do."""
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            gr.Markdown("### 1 · Photos")
            photos = gr.File(
                label=f"{FEWEST} to {MOST} photos of one subject; 4 to 6 are best",
                file_count="multiple", file_types=["image"], elem_id="photos", height=140,
            )  # fmt: skip
            thumbs = gr.HTML(elem_id="thumbs")
            gr.Markdown("### 2 · What it is")
            with gr.Row():
                title = gr.Textbox(label="Name", placeholder="Rex", elem_id="title", max_lines=1)
                noun = gr.Textbox(
                    label="Class noun", placeholder="dog", elem_id="noun", max_lines=1,
                    info="What anyone would call it",
                )  # fmt: skip
            gr.Markdown("### 3 · Which model learns it")
            choice = gr.Dropdown(choices(), value=backbone, label="Backbone", elem_id="backbone")
            method = gr.Radio(
                [("LoRA: a small file on top", "lora"), ("Full: all weights", "full")],
                value="lora", label="Method", elem_id="method",
            )  # fmt: skip
            extra = advanced(backbone)
            with gr.Row():
                cost = gr.Button("What will it cost?", elem_id="cost")
                start = gr.Button("Start", variant="primary", elem_id="start")
            said = gr.Markdown(elem_id="said")
            with gr.Accordion("Show the command", open=False):
                command = gr.Code(language="shell", elem_id="command", show_label=False)
        with gr.Column(scale=6, min_width=320):
            gr.Markdown("### Trainings")
            which = gr.Dropdown([], label="Training", elem_id="job", interactive=True)
            status = gr.HTML(elem_id="status")
            with gr.Row():
                pause = gr.Button("Pause", min_width=60, elem_id="pause", size="sm")
                cancel = gr.Button("Cancel", min_width=60, elem_id="cancel", size="sm")
                resume = gr.Button("Resume", min_width=60, elem_id="resume", size="sm")
                forget = gr.Button("Remove", min_width=60, elem_id="forget", size="sm")
            plot = gr.LinePlot(
                pd.DataFrame({"step": [], "loss": []}), x="step", y="loss", height=200,
                label="Loss, averaged over 1/40 of the run", elem_id="loss",
            )  # fmt: skip
            samples = gr.Gallery(
                label="Previews: same prompts and noise, before and on the way", columns=4,
                height=520, elem_id="samples", interactive=False,
            )  # fmt: skip
    form = [title, noun, choice, method, *extra]
    seen = gr.State(())
    live = [which, status, plot, samples, seen]

    gr.on(
        [photos.change, choice.change], told(look_at), [photos, choice], [thumbs],
        api_visibility="private", concurrency_id=PHOTOS, concurrency_limit=1,
    )  # fmt: skip
    for chosen_ in (choice, method):
        chosen_.change(
            lambda *on: [gr.update(placeholder=hint) for hint in recipe_hints(*on)],
            [choice, method], extra[: len(NUMBERS)], queue=False,
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip

    def measure(files: Any, *values: Any) -> str:
        return studio.estimate(form_of(*values), paths(files))

    cost.click(
        told(measure), [photos, *form], said, api_visibility="private", concurrency_id="estimate",
        concurrency_limit=1,
    )  # fmt: skip

    def begin(files: Any, request: gr.Request, *values: Any) -> tuple[str, str, Update]:
        job = studio.train(form_of(*values), paths(files), owner_of(request))
        text = f"**{html.escape(job.title)}** is in the queue."
        return text, job.command, jobs_of(studio, request, job.id) | {"value": job.id}

    start.click(
        told(begin), [photos, *form], [said, command, which], api_visibility="private",
        concurrency_id=PHOTOS, concurrency_limit=1,
    ).then(told(lambda: ()), None, seen, api_visibility="private")  # fmt: skip

    def show(*values: Any) -> str:
        return studio.command(form_of(*values))

    for part in form:
        part.change(quietly(show), form, command, show_progress="hidden", api_visibility="private")

    def tick(job: str | None, before: Any, request: gr.Request) -> tuple[Update, ...]:
        return follow(studio, job, before, request)

    # Outside the queue, which drawings may fill.
    quiet: dict[str, Any] = {
        "show_progress": "hidden", "api_visibility": "private", "queue": False,
    }  # fmt: skip
    timer = gr.Timer(PULSE)
    timer.tick(told(tick), [which, seen], live, **quiet)

    def chosen(job: str | None, request: gr.Request) -> tuple[Update, ...]:
        return follow(studio, job, None, request)

    which.input(told(chosen), [which], live, **quiet)
    for button, act in (
        (pause, "pause"),
        (cancel, "cancel"),
        (resume, "resume"),
        (forget, "forget"),
    ):
        button.click(told(_acting(studio, act)), [which], live, **quiet)


def choices() -> list[tuple[str, str]]:
    """Backbones with their size, by name."""
    return [
        (f"{row.name} · {row.unet_parameters / 1e6:,.0f}M U-Net, {row.resolution} px", row.name)
        for row in BACKBONES.values()
    ]


NUMBERS = ("steps", "learning_rate", "rank", "batch_size", "resolution")


def advanced(backbone: str) -> list[Any]:
    """Empty means: what the recipe of ``bksdm-tune dreambooth`` says for the backbone."""
    labels = ("Steps", "Learning rate", "LoRA rank", "Batch size", "Resolution (px)")
    own, hints = "the recipe's own", recipe_hints(backbone, "lora")
    with gr.Accordion("Advanced (empty: the recipe's own)", open=False):
        with gr.Row():
            numbers = [
                gr.Textbox(label=label, min_width=110, elem_id=name, max_lines=1, placeholder=hint)
                for label, name, hint in zip(labels, NUMBERS, hints, strict=True)
            ]
        with gr.Row():
            prior = gr.Dropdown(
                [(own, ""), "prediction", "images", "none"], value="", label="Prior preservation"
            )
            text = gr.Dropdown(
                [(own, ""), ("yes", "true"), ("no", "false")], value="",
                label="Train the text encoder",
            )  # fmt: skip
        with gr.Row():
            word = gr.Textbox(label="Identifier", value="sks11df", max_lines=1)
            seed = gr.Number(label="Seed", precision=0, value=1234)
    return [*numbers, prior, text, word, seed]


def recipe_hints(backbone: str, method: str) -> list[str]:
    """The recipe's numbers, shown where nothing is filled in."""
    values = recipe_of(backbone, method) | {"resolution": native_pixels(backbone)}
    return [f"{values[name]:g}" for name in NUMBERS]


def form_of(
    title: str, noun: str, backbone: str, method: str, steps: str, rate: str, rank: str,
    batch: str, side: str, prior: str, text: str, word: str, seed: Any,
) -> Form:  # fmt: skip
    """From the components' values, in their order."""
    trained = {"": None, "true": True, "false": False}[text or ""]
    texts = (steps, rate, rank, batch, side)
    given: dict[str, Any] = {n: number(t) for n, t in zip(NUMBERS, texts, strict=True)}
    own: dict[str, Any] = {"method": method, "prior": prior or None, "identifier": word}
    first = 1234 if seed is None else seed
    return Form(
        title or "", noun or "", backbone, train_text_encoder=trained, seed=first, **given, **own
    )


def number(text: str | None) -> float | None:
    """Raises UsageError: it is none."""
    if not (text or "").strip():
        return None
    try:
        return float(str(text))
    except ValueError:
        raise UsageError(f"{text!r} is not a number.") from None


def quietly(function: Any) -> Any:
    """An unfinished form has no command yet."""

    def run(*values: Any) -> Any:
        try:
            return function(*values)
        except UsageError:
            return ""

    return run


def paths(files: Any) -> list[Path]:
    return [Path(file) for file in files or ()]


def look_at(files: Any, backbone: str) -> str:
    """Thumbnails with verdicts."""
    verdicts = examine(paths(files), native_pixels(backbone) // 2)
    return f'<div class="thumbs">{"".join(map(thumbnail, verdicts))}</div>' if verdicts else ""


def thumbnail(verdict: Verdict) -> str:
    kind = "bad" if verdict.bad else "warned" if verdict.warnings else "good"
    text = f"<b>{html.escape(verdict.name)}</b><br>{html.escape(verdict.text)}"
    picture = '<div class="broken">&#10005;</div>'
    if not verdict.bad:
        image, buffer = decode_photo(verdict.path), BytesIO()
        image.thumbnail((THUMB, THUMB))
        image.save(buffer, "JPEG", quality=85)
        data = base64.b64encode(buffer.getvalue()).decode()
        picture = f'<img alt="" src="data:image/jpeg;base64,{data}">'
    return f'<figure class="{kind}">{picture}<figcaption>{text}</figcaption></figure>'


def jobs_of(studio: Studio, request: gr.Request, chosen: str | None) -> Update:
    """The list of trainings; the running one, or else the newest, where none is chosen."""
    jobs = studio.mine(owner_of(request))
    ids = [job.id for job in jobs]
    listed = [(f"{job.title} · {job.state}", job.id) for job in jobs]
    if chosen in ids:  # not sent back: the person may have chosen another meanwhile
        return gr.update(choices=listed)
    running = [job.id for job in jobs if job.state == RUNNING]
    return gr.update(choices=listed, value=next(iter(running or ids), None))


def follow(studio: Studio, chosen: str | None, before: Any, request: gr.Request) -> tuple[Any, ...]:
    """What the run folder says now; nothing is sent where nothing is new."""
    listed = jobs_of(studio, request, chosen)
    shown = listed.get("value", chosen)
    if shown is None:
        empty = pd.DataFrame({"step": [], "loss": []})
        now: tuple[Any, ...] = ((), None, 0, ())
        if now == before:
            return (gr.skip(),) * 5
        return listed, "<p>No trainings yet.</p>", empty, [], now
    job = studio.my_job(shown, owner_of(request))
    told_ = progress(job)
    now = (tuple(listed["choices"]), job.id, told_.step, tuple(map(str, told_.pictures)), job.state)
    if now == before:
        return (gr.skip(),) * 5
    fresh = before is None or not before or before[1:2] + before[3:4] != now[1:2] + now[3:4]
    gallery = sample_rows(job, told_.pictures) if fresh else gr.skip()
    return listed, status_of(studio, job, told_), averaged(told_.losses), gallery, now


def status_of(studio: Studio, job: Job, told_: Any) -> str:
    share = 100 * told_.step / max(1, told_.steps)
    left = "" if told_.seconds_left is None else f", about {told_.seconds_left:.0f} s left"
    text = {
        RUNNING: f"Step {told_.step} of {told_.steps}{left}." if told_.step else "Getting ready.",
        QUEUED: f"Waiting; {studio.jobs.place(job)} before it.",
        DONE: "Done: it is in the library.",
        FAILED: f"It failed: {html.escape(job.error or '')}",
    }.get(job.state, f"{job.state.capitalize()} at step {told_.step} of {told_.steps}.")
    bar = f'<div class="bar"><div style="width:{share:.1f}%"></div></div>'
    return f'<p class="state-{job.state}"><b>{html.escape(job.title)}</b>: {text}</p>{bar}'


def averaged(losses: list[tuple[int, float]]) -> pd.DataFrame:
    frame = pd.DataFrame(losses, columns=["step", "loss"])
    return frame.groupby(frame.index // max(1, len(frame) // 40)).mean()


def sample_rows(job: Job, pictures: list[Path]) -> list[tuple[Image.Image, str]]:
    """The newest first; the picture's name says its step."""
    shown = []
    for path in sorted(pictures, key=lambda p: (-step_of(p), p.name))[:40]:
        with Image.open(path) as image:
            shown.append((image.convert("RGB"), f"step {step_of(path)}"))
    return shown


def step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def _acting(studio: Studio, act: str) -> Any:
    def run(job: str | None, request: gr.Request) -> tuple[Any, ...]:
        if job is not None:
            studio.act(job, act, owner_of(request))
        return follow(studio, None if act == "forget" else job, None, request)

    return run
