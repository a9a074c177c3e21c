"""The 15 kinds as shapes in a unit square (x right, y down).

A sketch has body shapes, which carry the colour and the marking, and details on top.  ``f`` is
the look's feature factor.  A shape is ``(form, numbers, paint)``; forms are ``oval`` (centre and
radii), ``box`` (x0 y0 x1 y1), ``poly`` (points), ``ring`` (centre, radii, line width) and
``line`` (points, then width).  Paints: ``body``, ``dark`` and ``light`` shades of the body,
``mark``, or an RGB triple.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

INK = (30, 26, 28)
CREAM = (252, 244, 228)
STEEL = (198, 204, 212)

Shape = tuple[str, tuple[float, ...], str | tuple[int, ...]]


@dataclass(frozen=True)
class Sketch:
    """Shapes plus where a head, eyes and torso are, for hats, glasses and shirts."""

    body: tuple[Shape, ...]
    details: tuple[Shape, ...]
    head: tuple[float, float, float] = (0.5, 0.1, 0.2)  # centre x, top y, half width
    eyes: tuple[float, float] = (0.5, 0.33)
    neck: float = 0.52


def _eyes(y: float, gap: float, radius: float) -> tuple[Shape, ...]:
    return tuple(("oval", (0.5 + s * gap, y, radius, radius * 1.15), INK) for s in (-1, 1))


def dog(f: float) -> Sketch:
    ears = tuple(("oval", (0.5 + s * 0.25, 0.36, 0.09 * f, 0.19 * f), "dark") for s in (-1, 1))
    return Sketch(
        body=(
            ("line", (0.72, 0.8, 0.9, 0.66, 0.94, 0.52, 0.07), "body"),
            ("oval", (0.5, 0.74, 0.27, 0.25), "body"),
            ("oval", (0.5, 0.32, 0.24, 0.22), "body"),
            ("box", (0.3, 0.78, 0.44, 0.99), "body"),
            ("box", (0.56, 0.78, 0.7, 0.99), "body"),
        ),
        details=(
            *ears,
            ("oval", (0.5, 0.42, 0.12, 0.09), CREAM),
            ("oval", (0.5, 0.38, 0.05, 0.035), INK),
            ("oval", (0.5, 0.475, 0.03, 0.035), (220, 90, 110)),
            *_eyes(0.27, 0.1, 0.035),
        ),
        head=(0.5, 0.1, 0.2),
        eyes=(0.5, 0.27),
        neck=0.53,
    )


def cat(f: float) -> Sketch:
    ears = tuple(
        ("poly", (0.5 + s * 0.24, 0.3, 0.5 + s * 0.22, 0.22 - 0.2 * f, 0.5 + s * 0.05, 0.2), "body")
        for s in (-1, 1)
    )
    whiskers = tuple(
        ("line", (0.5 + s * 0.08, 0.41 + d, 0.5 + s * 0.3, 0.39 + 2 * d, 0.018), INK)
        for s in (-1, 1)
        for d in (-0.015, 0.02)
    )
    return Sketch(
        body=(
            ("line", (0.68, 0.93, 0.9, 0.88, 0.93, 0.66, 0.82, 0.52, 0.075), "body"),
            ("oval", (0.5, 0.76, 0.21, 0.24), "body"),
            *ears,
            ("oval", (0.5, 0.34, 0.25, 0.19), "body"),
        ),
        details=(
            *(("oval", (0.5 + s * 0.1, 0.31, 0.05, 0.05), (150, 220, 90)) for s in (-1, 1)),
            *(("oval", (0.5 + s * 0.1, 0.31, 0.018, 0.045), INK) for s in (-1, 1)),
            ("poly", (0.46, 0.385, 0.54, 0.385, 0.5, 0.43), (235, 120, 140)),
            *whiskers,
            *(("oval", (0.5 + s * 0.09, 0.97, 0.07, 0.04), "light") for s in (-1, 1)),
        ),
        head=(0.5, 0.15, 0.19),
        eyes=(0.5, 0.31),
        neck=0.54,
    )


def stuffed_animal(f: float) -> Sketch:
    limbs = tuple(
        ("oval", (0.5 + s * dx, y, rx, ry), "body")
        for s in (-1, 1)
        for dx, y, rx, ry in (
            (0.2, 0.12, 0.1 * f, 0.1 * f),
            (0.33, 0.6, 0.12, 0.1),
            (0.22, 0.9, 0.15, 0.1),
        )
    )
    return Sketch(
        body=(
            *limbs,
            ("oval", (0.5, 0.68, 0.26, 0.25), "body"),
            ("oval", (0.5, 0.28, 0.26, 0.22), "body"),
        ),
        details=(
            ("oval", (0.5, 0.7, 0.13, 0.14), CREAM),
            ("oval", (0.5, 0.36, 0.13, 0.09), CREAM),
            ("oval", (0.5, 0.33, 0.045, 0.03), INK),
            *_eyes(0.24, 0.11, 0.03),
            *(("oval", (0.5 + s * 0.22, 0.91, 0.07, 0.05), CREAM) for s in (-1, 1)),
        ),
    )


def toy(f: float) -> Sketch:
    return Sketch(
        body=(
            ("box", (0.28, 0.12, 0.72, 0.42), "body"),
            ("box", (0.2, 0.46, 0.8, 0.86), "body"),
            *(("box", (x, 0.5, x + 0.11, 0.76), "body") for x in (0.05, 0.84)),
        ),
        details=(
            ("line", (0.5, 0.12, 0.5, 0.12 - 0.1 * f, 0.03), INK),
            ("oval", (0.5, 0.1 - 0.09 * f, 0.045, 0.045), (230, 60, 50)),
            *(("oval", (0.5 + s * 0.1, 0.25, 0.06, 0.06), (250, 240, 120)) for s in (-1, 1)),
            *(("oval", (0.5 + s * 0.1, 0.25, 0.025, 0.025), INK) for s in (-1, 1)),
            ("box", (0.4, 0.34, 0.6, 0.38), INK),
            *(("oval", (x, 0.9, 0.1, 0.1), INK) for x in (0.3, 0.7)),
            *(("oval", (x, 0.9, 0.04, 0.04), STEEL) for x in (0.3, 0.7)),
        ),
    )


def cartoon(f: float) -> Sketch:
    return Sketch(
        body=(
            *(
                (
                    "poly",
                    (0.5 + s * 0.28, 0.22, 0.5 + s * 0.36, 0.2 - 0.18 * f, 0.5 + s * 0.12, 0.12),
                    "body",
                )
                for s in (-1, 1)
            ),
            ("oval", (0.5, 0.45, 0.36, 0.36), "body"),
            *(("line", (0.5 + s * 0.34, 0.5, 0.5 + s * 0.47, 0.64, 0.07), "body") for s in (-1, 1)),
            *(
                ("box", (0.5 + s * 0.14 - 0.05, 0.76, 0.5 + s * 0.14 + 0.05, 0.95), "body")
                for s in (-1, 1)
            ),
        ),
        details=(
            *(("oval", (0.5 + s * 0.13, 0.36, 0.12, 0.14), (255, 255, 255)) for s in (-1, 1)),
            *(("oval", (0.5 + s * 0.1, 0.38, 0.05, 0.06), INK) for s in (-1, 1)),
            ("oval", (0.5, 0.62, 0.16, 0.08), INK),
            ("box", (0.38, 0.55, 0.62, 0.6), (255, 255, 255)),
            *(("oval", (0.5 + s * 0.16, 0.96, 0.1, 0.04), INK) for s in (-1, 1)),
        ),
    )


def backpack(f: float) -> Sketch:
    return Sketch(
        body=(
            ("ring", (0.5, 0.14, 0.12 * f, 0.12, 0.05), "body"),
            ("oval", (0.5, 0.34, 0.33, 0.24), "body"),
            ("box", (0.17, 0.34, 0.83, 0.95), "body"),
            *(("box", (x, 0.5, x + 0.09, 0.88), "body") for x in (0.08, 0.83)),
        ),
        details=(
            ("line", (0.2, 0.42, 0.8, 0.42, 0.03), INK),
            ("box", (0.27, 0.58, 0.73, 0.9), "dark"),
            ("line", (0.27, 0.66, 0.73, 0.66, 0.025), INK),
            ("box", (0.47, 0.64, 0.53, 0.72), STEEL),
        ),
    )


def bowl(f: float) -> Sketch:
    return Sketch(
        body=(
            (
                "poly",
                (0.02, 0.42, 0.98, 0.42, 0.88, 0.68, 0.66, 0.85, 0.34, 0.85, 0.12, 0.68),
                "body",
            ),
            ("box", (0.5 - 0.2 * f, 0.83, 0.5 + 0.2 * f, 0.93), "body"),
        ),
        details=(
            ("oval", (0.5, 0.42, 0.48, 0.13), "light"),
            ("oval", (0.5, 0.43, 0.4, 0.095), "dark"),
        ),
    )


def can(f: float) -> Sketch:
    return Sketch(
        body=(("box", (0.25, 0.14, 0.75, 0.88), "body"), ("oval", (0.5, 0.88, 0.25, 0.08), "body")),
        details=(
            ("oval", (0.5, 0.14, 0.25, 0.08), STEEL),
            ("oval", (0.5, 0.14, 0.18, 0.05), (150, 156, 166)),
            ("oval", (0.55, 0.13, 0.06 * f, 0.022), INK),
            ("line", (0.25, 0.24, 0.75, 0.24, 0.025), STEEL),
            ("line", (0.25, 0.86, 0.75, 0.86, 0.025), STEEL),
            ("oval", (0.5, 0.55, 0.13, 0.12), CREAM),
        ),
    )


def candle(f: float) -> Sketch:
    return Sketch(
        body=(("box", (0.34, 0.32, 0.66, 0.88), "body"), ("oval", (0.5, 0.32, 0.16, 0.05), "body")),
        details=(
            ("oval", (0.5, 0.32, 0.13, 0.035), "light"),
            ("line", (0.5, 0.32, 0.5, 0.22, 0.02), INK),
            ("oval", (0.5, 0.16, 0.07 * f, 0.12 * f), (255, 150, 30)),
            ("oval", (0.5, 0.19, 0.035 * f, 0.07 * f), (255, 240, 150)),
            ("oval", (0.5, 0.9, 0.36, 0.07), STEEL),
            ("oval", (0.5, 0.885, 0.22, 0.035), (150, 156, 166)),
        ),
    )


def clock(f: float) -> Sketch:
    return Sketch(
        body=(
            *(("oval", (0.5 + s * 0.27, 0.14, 0.14 * f, 0.1 * f), "body") for s in (-1, 1)),
            *(("line", (0.5 + s * 0.24, 0.8, 0.5 + s * 0.34, 0.97, 0.08), "body") for s in (-1, 1)),
            ("oval", (0.5, 0.54, 0.4, 0.4), "body"),
        ),
        details=(
            ("oval", (0.5, 0.54, 0.27, 0.27), (255, 255, 250)),
            ("line", (0.5, 0.54, 0.5, 0.34, 0.04), INK),
            ("line", (0.5, 0.54, 0.64, 0.6, 0.04), INK),
            ("oval", (0.5, 0.54, 0.035, 0.035), (210, 40, 40)),
        ),
    )


def sneaker(f: float) -> Sketch:
    return Sketch(
        body=(
            (
                "poly",
                (0.04, 0.3, 0.14, 0.26, 0.36, 0.3, 0.6, 0.52, 0.92, 0.6, 0.98, 0.76, 0.03, 0.76),
                "body",
            ),
        ),
        details=(
            ("box", (0.02, 0.74, 1.0, 0.74 + 0.13 * f), (250, 250, 248)),
            ("line", (0.02, 0.76 + 0.1 * f, 1.0, 0.76 + 0.1 * f, 0.02), INK),
            *(
                (
                    "line",
                    (0.3 + 0.11 * i, 0.42 + 0.075 * i, 0.44 + 0.11 * i, 0.36 + 0.08 * i, 0.035),
                    (255, 255, 255),
                )
                for i in range(3)
            ),
            ("oval", (0.2, 0.28, 0.15, 0.05), "dark"),
        ),
    )


def boot(f: float) -> Sketch:
    return Sketch(
        body=(
            (
                "poly",
                (0.18, 0.05, 0.58, 0.05, 0.56, 0.55, 0.86, 0.66, 0.94, 0.86, 0.16, 0.86),
                "body",
            ),
        ),
        details=(
            ("box", (0.14, 0.04, 0.62, 0.04 + 0.1 * f), CREAM),
            ("poly", (0.14, 0.85, 0.96, 0.85, 0.96, 0.93, 0.42, 0.93, 0.4, 0.98, 0.14, 0.98), INK),
            ("line", (0.18, 0.5, 0.56, 0.5, 0.03), "dark"),
            ("box", (0.33, 0.46, 0.43, 0.55), (230, 200, 90)),
        ),
    )


def glasses(f: float) -> Sketch:
    r = 0.19 * (0.7 + 0.3 * f)
    return Sketch(
        body=(
            *(("oval", (0.5 + s * 0.26, 0.54, r + 0.075, r + 0.075), "body") for s in (-1, 1)),
            ("box", (0.42, 0.47, 0.58, 0.56), "body"),
            *(("line", (0.5 + s * 0.44, 0.48, 0.5 + s * 0.5, 0.3, 0.07), "body") for s in (-1, 1)),
        ),
        details=(
            *(("oval", (0.5 + s * 0.26, 0.54, r, r), (70, 84, 100)) for s in (-1, 1)),
            *(
                ("line", (0.45 + s * 0.26, 0.6, 0.53 + s * 0.26, 0.46, 0.035), (214, 232, 244))
                for s in (-1, 1)
            ),
        ),
    )


def teapot(f: float) -> Sketch:
    return Sketch(
        body=(
            ("ring", (0.16, 0.56, 0.13 * f, 0.17, 0.06), "body"),
            ("poly", (0.72, 0.62, 0.88, 0.36, 1.0, 0.3, 0.98, 0.4, 0.84, 0.74), "body"),
            ("oval", (0.5, 0.6, 0.33, 0.28), "body"),
            ("box", (0.34, 0.84, 0.66, 0.92), "body"),
        ),
        details=(
            ("oval", (0.5, 0.35, 0.2, 0.06), "dark"),
            ("oval", (0.5, 0.32, 0.17, 0.05), "light"),
            ("oval", (0.5, 0.25, 0.05, 0.05), INK),
        ),
    )


def vase(f: float) -> Sketch:
    n = 0.12 * f
    return Sketch(
        body=(
            ("poly", (0.42 - n, 0.04, 0.58 + n, 0.04, 0.6, 0.26, 0.4, 0.26), "body"),
            ("oval", (0.5, 0.56, 0.31, 0.34), "body"),
            ("poly", (0.34, 0.8, 0.66, 0.8, 0.7, 0.97, 0.3, 0.97), "body"),
        ),
        details=(
            ("oval", (0.5, 0.05, 0.08 + n, 0.035), INK),
            ("line", (0.4, 0.26, 0.6, 0.26, 0.03), "dark"),
        ),
    )


SKETCHES: dict[str, Callable[[float], Sketch]] = {
    "backpack": backpack, "stuffed animal": stuffed_animal, "bowl": bowl, "can": can,
    "candle": candle, "cat": cat, "clock": clock, "sneaker": sneaker, "dog": dog, "toy": toy,
    "boot": boot, "glasses": glasses, "cartoon": cartoon, "teapot": teapot, "vase": vase,
}  # fmt: skip
