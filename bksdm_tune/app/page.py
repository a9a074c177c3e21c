"""The page: four tabs over one studio."""

from __future__ import annotations

from typing import Any

import gradio as gr

from bksdm_tune import __version__
from bksdm_tune.app import api, compare, create, personalise, shelf
from bksdm_tune.app.studio import Studio

TITLE = "bksdm-tune"
MOST_WAITING = 64
KEPT = (3600, 86_400)  # seconds: how often copies of files are looked through, how old they get
CSS = """
.gradio-container {max-width: min(1280px, 100vw) !important; margin: 0 auto !important}
.bar {height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden}
.bar div {height: 100%; background: var(--color-accent); transition: width .5s}
.state-failed b, .warned {color: #b3261e}
.wide {overflow-x: auto; max-width: min(1240px, calc(100vw - 48px))}
table.shelf {width: 100%; border-collapse: collapse; font-size: 14px}
table.shelf td, table.shelf th {text-align: left; padding: 6px 10px; white-space: nowrap;
  border-bottom: 1px solid var(--border-color-primary)}
.thumbs {display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: 10px}
.thumbs figure {margin: 0; font-size: 12px; line-height: 1.35; overflow-wrap: anywhere}
.thumbs img, .thumbs .broken {width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 6px}
.thumbs .broken {display: flex; align-items: center; justify-content: center; font-size: 40px;
  color: #b3261e; background: var(--background-fill-secondary)}
.thumbs .bad figcaption {color: #b3261e}
.thumbs .warned figcaption {color: #9a6700}
#command {overflow-x: auto}
@media (max-width: 500px) {
  .tab-container button {padding: 0 7px !important; font-size: 14px !important}
}
"""


def theme() -> Any:
    """Fonts that every machine has: nothing is fetched."""
    return gr.themes.Default(
        primary_hue="teal",
        font=["system-ui", "Segoe UI", "Helvetica", "Arial", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )


def build(studio: Studio, backbone: str, warning: str = "") -> gr.Blocks:
    """The whole app; ``warning``: what stands in red above it."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=KEPT) as page:
        gr.Markdown(
            f"# {TITLE}\nFour to six photos in, a small Stable Diffusion that knows your subject "
            "out. Everything stays on this machine."
        )
        if warning:
            gr.HTML(f'<p class="warned"><b>{warning}</b></p>')
        with gr.Tabs():
            with gr.Tab("Personalise", id="personalise"):
                personalise.build(studio, backbone)
            with gr.Tab("Create", id="create") as drawing:
                chosen = create.build(studio)
            with gr.Tab("Compare", id="compare") as comparing:
                compared = compare.build(studio, backbone)
            with gr.Tab("Library", id="library") as keeping:
                kept = shelf.build(studio, backbone)
        api.build(studio)
        gr.Markdown(f"<small>{TITLE} {__version__}</small>")

        def lists(count: int, *values: Any) -> Any:
            """Dropdowns of models with what is there now; a first choice where none was made."""
            found = create.models(studio)
            slugs = [slug for _, slug in found]
            told = []
            for value in values:
                if isinstance(value, list):
                    told.append(gr.update(choices=found, value=[v for v in value if v in slugs]))
                else:
                    first = slugs[0] if slugs else None
                    told.append(gr.update(choices=found, value=value if value in slugs else first))
            return told if count > 1 else told[0]

        quiet: dict[str, Any] = {
            "show_progress": "hidden", "api_visibility": "private", "queue": False,
        }  # fmt: skip
        for event in (page.load, drawing.select):
            event(lambda value: lists(1, value), chosen, chosen, **quiet)
        for event in (page.load, comparing.select):
            event(lambda *values: lists(2, *values), compared, compared, **quiet)
        for event in (page.load, keeping.select):
            event(lambda value: (lists(1, value), shelf.table_of(studio)), kept[:1], kept, **quiet)
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=4)
    return page
