"""What the app draws, for its views and endpoints alike.

Everything heavy (torch, diffusers) is imported on first use, so that the page is there at once.
"""

from __future__ import annotations

import sys
import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bksdm_tune.app.library import Library
from bksdm_tune.backbones import EMBEDDED, get_backbone
from bksdm_tune.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from bksdm_tune.app.contest import Grader
    from bksdm_tune.app.engine import Drawn, Engine, Request
    from bksdm_tune.attention import Maps

PICTURES = ".pictures"
MOST_KEPT = 500  # on disk
MOST_CANCELLED = 1_000
OnStep = Callable[[float], None]


class Compared(NamedTuple):
    """A contender; ``path`` None: the safety checker withheld the picture."""

    label: str
    path: Path | None
    seconds: float
    dino: float | None
    clip_t: float | None


class Drawing:
    """A library's models at work; pictures are kept as files for a while."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.pictures = library.root / PICTURES
        self.pictures.mkdir(exist_ok=True)
        self.cancelled: dict[str, None] = {}
        """Tickets of drawings that nobody waits for any more."""
        self._engine: Engine | None = None
        self._grader: Grader | None = None
        self._lock = threading.Lock()

    @property
    def engine(self) -> Engine:
        from bksdm_tune.app.engine import Engine

        with self._lock:
            if self._engine is None:
                self._engine = Engine(self.library)
        return self._engine

    def release(self) -> None:
        """Before a training starts."""
        if self._engine is not None:
            self._engine.release()

    def preload(self, backbone: str) -> threading.Thread:
        """Load a backbone in the background, so that the first picture need not wait for it."""

        def load() -> None:
            try:
                self.engine.preload(backbone)
            except (UsageError, DataError) as error:  # said again when it is asked for
                print(f"{backbone} was not preloaded: {error}", file=sys.stderr)

        thread = threading.Thread(target=load, daemon=True, name="preload")
        thread.start()
        return thread

    def draw(self, request: Request, on_step: OnStep, ticket: str = "") -> tuple[Drawn, list[Path]]:
        """Pictures, and the PNG files with their settings.

        Raises:
            UsageError, DataError: what is wrong with the request.
            Cancelled: ``cancel(ticket)`` was called.
        """
        check_backbone(request)
        drawn = self.engine.draw(request, self.watched(on_step, ticket))
        return drawn, self.keep(drawn, request)

    def watched(self, on_step: OnStep, ticket: str) -> OnStep:
        """``on_step``, ended by ``cancel(ticket)``."""
        from bksdm_tune.app.engine import Cancelled

        def step(share: float) -> None:
            if ticket and ticket in self.cancelled:
                self.cancelled.pop(ticket, None)
                raise Cancelled
            on_step(share)

        step(0.0)
        return step

    def cancel(self, ticket: str) -> None:
        self.cancelled[ticket] = None
        while len(self.cancelled) > MOST_CANCELLED:  # drawings that had ended already
            self.cancelled.pop(next(iter(self.cancelled)))

    def keep(self, drawn: Drawn, request: Request) -> list[Path]:
        """As PNG files; the oldest ones go."""
        from bksdm_tune.pipeline import save_png

        paths = []
        for picture, shot in zip(drawn.pictures, drawn.shots, strict=True):
            paths.append(self.pictures / f"{uuid.uuid4().hex}.png")
            model = request.model or request.backbone or ""
            save_png(paths[-1], picture, shot, model=model, strength=str(request.strength))
        self.prune()
        return paths

    def prune(self) -> None:
        """Drop the oldest pictures."""
        files = sorted(self.pictures.glob("*.png"), key=lambda p: p.stat().st_mtime)
        for old in files[: max(0, len(files) - MOST_KEPT)]:
            old.unlink(missing_ok=True)

    def attention(self, request: Request, on_step: OnStep, ticket: str = "") -> Maps:
        """Which words drew which pixels."""
        check_backbone(request)
        return self.engine.attention(request, self.watched(on_step, ticket))

    def attend(
        self, request: Request, beside: str, on_step: OnStep, ticket: str = ""
    ) -> list[tuple[Image, str]]:
        """Each word's part of the picture, captioned; then the same by the backbone ``beside``."""
        requests = [request]
        if beside:
            words = self.library.get(request.model).trigger if request.model else ""
            prompt = request.prompt.replace("{subject}", words) if words else request.prompt
            requests.append(replace(request, model=None, backbone=beside, prompt=prompt))
            check_backbone(requests[-1])
        shown: list[tuple[Image, str]] = []
        for number, one in enumerate(requests):

            def step(share: float, number: int = number) -> None:
                on_step((number + share) / len(requests))

            maps = self.attention(one, step, ticket)
            name = one.backbone or self.library.get(str(one.model)).title
            shown.append((maps.picture, name))
            shown += [(maps.overlay(i), word) for i, word in enumerate(maps.words)]
        return shown

    def compare(
        self, kind: str, request: Request, names: list[str], on_step: OnStep, ticket: str = ""
    ) -> tuple[list[Compared], str]:
        """A picture of each contender, and who gave the scores."""
        from bksdm_tune.app import contest

        check_backbone(request)
        listed = contest.entries(self.library, kind, replace(request, n=1), names)
        for entry in listed:
            check_backbone(entry.request)
        if self._grader is None:
            self._grader = contest.Grader()
        model, shown = self.library.get(request.model) if request.model else None, list[Compared]()
        for number, entry in enumerate(listed):

            def step(share: float, number: int = number) -> None:
                on_step((number + share) / len(listed))

            drawn = self.engine.draw(entry.request, self.watched(step, ticket))
            own = self.library.get(entry.request.model) if entry.request.model else model
            path = next(iter(self.keep(drawn, entry.request)), None)
            scores = self._grader.grade(drawn, own)
            shown.append(Compared(entry.label, path, drawn.seconds, *scores))
        return shown, self._grader.note


def check_backbone(request: Request) -> None:
    """
    Raises:
        UsageError: the backbone is none of the registry (folders must not come from outside), or is
            not on this disk: drawing fetches nothing.
    """
    if request.backbone is not None:
        check_here(request.backbone)


def check_here(name: str) -> None:
    """As ``check_backbone``."""
    from bksdm_tune.resolve import local_snapshot

    row = get_backbone(name)
    if row.source != EMBEDDED and local_snapshot(row.source) is None:
        raise UsageError(
            f"{name} is not on this disk. Train with it, or fetch it: "
            f"bksdm-tune generate {name} --prompt 'a dog'."
        )
