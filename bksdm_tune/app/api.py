"""The app's named endpoints, for ``gradio_client`` and REST: docs/app.md.

Plain values go through ``gr.api``; what takes or gives files goes through components that nobody
sees, so that a file can only be one that was uploaded, or one that the app made.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from bksdm_tune.app.create import DRAWING
from bksdm_tune.app.forms import Form
from bksdm_tune.app.jobs import Job, progress
from bksdm_tune.app.personalise import PHOTOS
from bksdm_tune.app.studio import Studio
from bksdm_tune.app.told import owner_of, told
from bksdm_tune.errors import UsageError


def build(studio: Studio) -> None:
    """Every endpoint."""

    def models() -> list[dict]:  # type: ignore[type-arg]
        """The library: slug, title, trigger, method, backbone, bytes of every model."""
        return [
            {"slug": m.slug, "title": m.title, "trigger": m.trigger, "method": m.method,
             "backbone": m.backbone, "bytes": m.bytes}
            for m in studio.library.models()
        ]  # fmt: skip

    def jobs(request: gr.Request) -> list[dict]:  # type: ignore[type-arg]
        """Your trainings, the newest first: id, title, state, step, steps, model, error."""
        return [facts(job) for job in studio.mine(owner_of(request))]

    def job(id: str, act: str, request: gr.Request) -> dict:  # type: ignore[type-arg]
        """Tell a training to pause, cancel, resume or forget; what became of it."""
        studio.act(text_of(id), text_of(act), owner_of(request))
        return {} if act == "forget" else facts(studio.jobs.get(id))

    def rename(model: str, title: str) -> str:
        """Change a model's title; its slug stays."""
        studio.library.rename(text_of(model), text_of(title))
        return model

    def delete(model: str) -> str:
        """Delete a model for good, and the photos it was taught with."""
        studio.delete(text_of(model))
        return model

    for function in (models, jobs, job, rename, delete):
        gr.api(told(function), api_name=function.__name__, queue=False)
    with gr.Group(visible=False):
        _files(studio)


def _files(studio: Studio) -> None:
    def verdicts(photos: Any) -> list[dict[str, Any]]:
        found = studio.examine(_paths(photos))
        return [{"name": v.name, "usable": v.bad is None, "verdict": v.text} for v in found]

    def estimate(photos: Any, form: Any) -> str:
        return studio.estimate(form_from(form), _paths(photos))

    def train(photos: Any, form: Any, request: gr.Request) -> dict[str, Any]:
        return facts(studio.train(form_from(form), _paths(photos), owner_of(request)))

    def draw(settings: Any) -> tuple[list[str], dict[str, Any]]:
        request = request_from(settings)
        drawn, paths = studio.drawing.draw(request, lambda share: None)
        seeds = [shot.seed for shot in drawn.shots]
        told_ = {"seeds": seeds, "seconds": drawn.seconds, "withheld": drawn.withheld}
        return [str(path) for path in paths], told_

    def compare(settings: Any, kind: str, names: Any) -> tuple[list[str], dict[str, Any]]:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UsageError("Names are a list of slugs or backbones; [] where none are needed.")
        shown, note = studio.drawing.compare(
            kind, request_from(settings), names, lambda share: None
        )
        told_ = {"contenders": [one._asdict() | {"path": None} for one in shown], "note": note}
        return [str(one.path) for one in shown if one.path], told_

    def attention(settings: Any) -> tuple[list[str], dict[str, Any]]:
        maps = studio.drawing.attention(request_from(settings), lambda share: None)
        pictures = [maps.picture, *(maps.overlay(i) for i in range(len(maps.words)))]
        paths = [studio.drawing.pictures / f"{uuid.uuid4().hex}.png" for _ in pictures]
        for path, picture in zip(paths, pictures, strict=True):
            picture.save(path)
        studio.drawing.prune()
        return [str(path) for path in paths], {"words": maps.words}

    def export(model: str, format: str, dtype: str) -> tuple[str, str]:
        path, said = studio.export(text_of(model), text_of(format), text_of(dtype))
        return str(path), said

    def import_(file: str, backbone: str, title: str, trigger: str) -> str:
        words = (text_of(title), text_of(backbone), text_of(trigger))
        return studio.import_adapter(Path(file or ""), *words)

    many = lambda: gr.File(file_count="multiple")  # noqa: E731
    text, free = gr.Textbox, gr.JSON
    photos = {"concurrency_id": PHOTOS, "concurrency_limit": 1}
    one = {"concurrency_id": DRAWING, "concurrency_limit": 1}
    _endpoint(verdicts, {"photos": many()}, [free()], **photos)
    _endpoint(
        estimate, {"photos": many(), "form": free()}, [text()], concurrency_id="estimate",
        concurrency_limit=1,
    )  # fmt: skip
    _endpoint(train, {"photos": many(), "form": free()}, [free()], **photos)
    _endpoint(draw, {"settings": free()}, [many(), free()], **one)
    _endpoint(
        compare, {"settings": free(), "kind": text(), "names": free()}, [many(), free()], **one
    )
    _endpoint(attention, {"settings": free()}, [many(), free()], **one)
    _endpoint(
        export, {"model": text(), "format": text("kohya"), "dtype": text("fp16")},
        [gr.File(), text()], concurrency_id="export", concurrency_limit=1,
    )  # fmt: skip
    _endpoint(
        import_,
        {"file": gr.File(), "backbone": text(), "title": text(), "trigger": text()},
        [text()],
    )


def _endpoint(
    function: Callable[..., Any], inputs: dict[str, Any], outputs: list[Any], **more: Any
) -> None:
    name = function.__name__.strip("_")
    gr.Button().click(
        told(function), list(inputs.values()), outputs, api_name=name,
        api_description=DESCRIPTIONS[name], **more,
    )  # fmt: skip


DESCRIPTIONS = {
    "verdicts": "What the program thinks of each photo.",
    "estimate": "Time, memory and disk of a training, from two measured steps.",
    "train": "Put a training into the queue; form: title, class_noun, backbone, and the rest of "
    "the app's fields where they should differ from the recipe.",
    "draw": "Pictures; settings: prompt, model (a slug) or backbone, negative_prompt, n, seed, "
    "steps, guidance, strength.",
    "compare": "The same prompt and noise by several models; kind: before and after, models, "
    "backbones, strengths.",
    "attention": "The picture, then what each word of the prompt drew.",
    "export": "A model as a file for other tools, and what is to be said of it.",
    "import": "A LoRA file of any tool as a model of the library; its slug.",
}


def facts(job: Job) -> dict[str, Any]:
    """What an endpoint says of a training."""
    return {
        "id": job.id, "title": job.title, "state": job.state, "step": progress(job).step,
        "steps": job.steps, "model": job.run.name, "error": job.error, "command": job.command,
    }  # fmt: skip


def text_of(value: Any) -> str:
    """Raises UsageError: it is none; ``gr.api`` lets anything through."""
    if not isinstance(value, str):
        raise UsageError(f"Text is wanted, not {str(value)[:40]!r}.")
    return value


def form_from(values: Any) -> Form:
    """Raises UsageError: a field is unknown, missing or wrong."""
    form: Form = _made(Form, values)
    return form


def request_from(values: Any) -> Any:
    """As ``form_from``."""
    from bksdm_tune.app.engine import Request

    return _made(Request, values)


def _made(kind: type, values: Any) -> Any:
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    if not isinstance(values, dict) or not values.keys() <= known.keys():
        raise UsageError(f"Wanted is an object with some of: {', '.join(known)}.")
    try:
        return kind(**values)
    except TypeError as error:
        missing = str(error).partition("argument")[2].lstrip("s: ")
        raise UsageError(f"Missing: {missing}.") from None


def _paths(files: Any) -> list[Path]:
    return [Path(file) for file in files or ()]
