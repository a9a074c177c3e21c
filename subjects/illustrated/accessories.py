"""What the live prompts put on a cat or a dog: shapes placed by the sketch's head, eyes, neck."""

from __future__ import annotations

from collections.abc import Callable

from subjects.illustrated.sketches import INK, Shape, Sketch

WHITE = (250, 250, 250)
RED = (214, 30, 36)


def _shirt(sketch: Sketch, colour: tuple[int, int, int]) -> tuple[Shape, ...]:
    top = sketch.neck
    return (("poly", (0.28, top + 0.03, 0.72, top + 0.03, 0.78, 0.9, 0.22, 0.9), colour),)


def _buttons(sketch: Sketch, colour: tuple[int, int, int]) -> tuple[Shape, ...]:
    return tuple(("oval", (0.5, sketch.neck + dy, 0.03, 0.03), colour) for dy in (0.12, 0.21, 0.3))


def _cap(sketch: Sketch, colour: tuple[int, int, int], height: float) -> tuple[Shape, ...]:
    x, y, w = sketch.head
    return (
        ("box", (x - w * 0.85, y - height, x + w * 0.85, y + 0.06), colour),
        ("box", (x - w * 1.35, y + 0.02, x + w * 1.35, y + 0.08), colour),
    )


def red_hat(s: Sketch) -> tuple[Shape, ...]:
    return _cap(s, RED, 0.12)


def santa_hat(s: Sketch) -> tuple[Shape, ...]:
    x, y, w = s.head
    return (
        ("poly", (x - w, y + 0.04, x + w, y + 0.04, x + w * 1.3, y - 0.2), RED),
        ("box", (x - w * 1.15, y, x + w * 1.15, y + 0.08), WHITE),
        ("oval", (x + w * 1.3, y - 0.18, 0.06, 0.06), WHITE),
    )


def rainbow_scarf(s: Sketch) -> tuple[Shape, ...]:
    colours = ((228, 40, 40), (250, 160, 30), (250, 230, 60), (60, 180, 70), (50, 90, 220))
    y = s.neck - 0.03
    wrap = [
        ("box", (0.26, y + 0.025 * i, 0.74, y + 0.025 * (i + 1)), c) for i, c in enumerate(colours)
    ]
    tail = [
        ("box", (0.56, y + 0.1 + 0.05 * i, 0.68, y + 0.15 + 0.05 * i), c)
        for i, c in enumerate(colours)
    ]
    return (*wrap, *tail)


def top_hat_and_monocle(s: Sketch) -> tuple[Shape, ...]:
    ring = ("ring", (s.eyes[0] + 0.1, s.eyes[1], 0.085, 0.085, 0.028), (240, 200, 70))
    return (*_cap(s, INK, 0.2), ring, ("line", (0.68, s.eyes[1], 0.72, 0.5, 0.02), (240, 200, 70)))


def chef(s: Sketch) -> tuple[Shape, ...]:
    x, y, w = s.head
    puffs = tuple(("oval", (x + d * w * 0.7, y - 0.08, 0.1, 0.09), WHITE) for d in (-1, 0, 1))
    return (
        *_shirt(s, WHITE),
        *_buttons(s, INK),
        *puffs,
        ("box", (x - w * 0.9, y - 0.06, x + w * 0.9, y + 0.06), WHITE),
    )


def firefighter(s: Sketch) -> tuple[Shape, ...]:
    band = ("box", (0.24, 0.76, 0.76, 0.82), (250, 230, 60))
    badge = ("oval", (s.head[0], s.head[1] - 0.02, 0.05, 0.05), (250, 210, 60))
    return (*_shirt(s, (196, 60, 20)), band, *_cap(s, (200, 30, 30), 0.11), badge)


def police(s: Sketch) -> tuple[Shape, ...]:
    star = ("oval", (0.6, s.neck + 0.14, 0.05, 0.05), (250, 210, 60))
    return (
        *_shirt(s, (24, 40, 110)),
        star,
        *_cap(s, (24, 40, 110), 0.1),
        ("oval", (s.head[0], s.head[1] - 0.02, 0.045, 0.045), (250, 210, 60)),
    )


def pink_glasses(s: Sketch) -> tuple[Shape, ...]:
    rings = tuple(
        ("ring", (0.5 + d * 0.11, s.eyes[1], 0.105, 0.095, 0.04), (250, 90, 170)) for d in (-1, 1)
    )
    return (*rings, ("line", (0.46, s.eyes[1], 0.54, s.eyes[1], 0.04), (250, 90, 170)))


def yellow_shirt(s: Sketch) -> tuple[Shape, ...]:
    return _shirt(s, (252, 222, 40))


def wizard(s: Sketch) -> tuple[Shape, ...]:
    x, y, w = s.head
    purple = (112, 40, 170)
    hat = ("poly", (x - w * 1.2, y + 0.07, x + w * 1.2, y + 0.07, x + 0.03, y - 0.24), purple)
    stars = tuple(
        ("oval", (sx, sy, 0.03, 0.03), (252, 226, 80))
        for sx, sy in ((x, y), (0.4, 0.7), (0.58, 0.8))
    )
    return (*_shirt(s, purple), hat, *stars)


ACCESSORIES: dict[str, Callable[[Sketch], tuple[Shape, ...]]] = {
    "wearing a red hat": red_hat,
    "wearing a santa hat": santa_hat,
    "wearing a rainbow scarf": rainbow_scarf,
    "wearing a black top hat and a monocle": top_hat_and_monocle,
    "in a chef outfit": chef,
    "in a firefighter outfit": firefighter,
    "in a police outfit": police,
    "wearing pink glasses": pink_glasses,
    "wearing a yellow shirt": yellow_shirt,
    "in a purple wizard outfit": wizard,
}
