"""Draw one picture: background, shadow, subject, what it wears, and what lies in front."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from subjects.illustrated.accessories import ACCESSORIES
from subjects.illustrated.looks import COLOURS, Look
from subjects.illustrated.scenes import LIQUID, SCENES, SIZE
from subjects.illustrated.sketches import INK, SKETCHES, Shape, Sketch

Fill = int | str | tuple[int, ...]
Pose = tuple[float, float, float]  # x0, y0, pixels per unit
SHEET = 112  # the subject is drawn upright on a sheet of this many pixels


@dataclass(frozen=True)
class Picture:
    """What is on a picture.  ``modifier`` is '', red, purple, shiny, wet or cube shaped."""

    look: Look
    scene: str
    accessory: str = ""
    modifier: str = ""


def _numbers(shape: Shape, pose: Pose, width: float, height: float) -> list[float]:
    form, numbers, _ = shape
    x0, y0, unit = pose
    points = numbers[:-1] if form in ("line", "ring") else numbers
    if form in ("oval", "ring"):
        cx, cy, rx, ry = points
        points = (cx - rx, cy - ry, cx + rx, cy + ry)
    placed = []
    for x, y in zip(points[::2], points[1::2], strict=True):
        placed += [x0 + unit * (0.5 + (x - 0.5) * width), y0 + unit * (1 - (1 - y) * height)]
    return placed


def draw_shape(
    pen: ImageDraw.ImageDraw, shape: Shape, pose: Pose, fill: Fill, width: float, height: float
) -> None:
    form, numbers, _ = shape
    xy = _numbers(shape, pose, width, height)
    stroke = max(1, round(numbers[-1] * pose[2])) if form in ("line", "ring") else 0
    if form == "oval":
        pen.ellipse(xy, fill=fill)
    elif form == "box":
        pen.rectangle(xy, fill=fill)
    elif form == "poly":
        pen.polygon(xy, fill=fill)
    elif form == "ring":
        pen.ellipse(xy, outline=fill, width=stroke)
    else:
        pen.line(xy, fill=fill, width=stroke, joint="curve")


def marking_layer(look: Look, colours: tuple[Fill, Fill]) -> Image.Image:
    """Body colour with the marking painted over the whole sheet; the body mask cuts it out."""
    base, mark = colours
    layer = Image.new("RGB", (SHEET, SHEET), base)
    pen = ImageDraw.Draw(layer)
    rng = np.random.default_rng(look.layout)
    step = SHEET / 6
    if look.marking == "spots":
        for gx in range(6):
            for gy in range(6):
                x, y = (gx + rng.uniform(0.2, 0.8)) * step, (gy + rng.uniform(0.2, 0.8)) * step
                r = step * rng.uniform(0.24, 0.36)
                pen.ellipse((x - r, y - r, x + r, y + r), fill=mark)
    elif look.marking == "stripes":
        slant, start = rng.uniform(-14, 14), rng.uniform(0, step)
        for y in np.arange(start - 20, SHEET + 20, 1.25 * step):
            pen.line((0, y - slant, SHEET, y + slant), fill=mark, width=round(step * 0.42))
    elif look.marking == "patches":
        for x, y in ((0.3, 0.25), (0.7, 0.35), (0.32, 0.68), (0.66, 0.82)):
            x, y = np.array((x, y)) * SHEET + rng.uniform(-0.08, 0.08, 2) * SHEET
            rx, ry = rng.uniform(0.08, 0.13, 2) * SHEET
            pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=mark)
    elif look.marking == "band":
        y, half = rng.uniform(0.52, 0.68) * SHEET, 0.075 * SHEET
        pen.rectangle((0, y - half, SHEET, y + half), fill=mark)
    elif look.marking == "checks":
        x0, y0 = rng.uniform(0, 18, 2)
        for gx in range(-1, 7):
            for gy in range(-1, 7):
                x, y = x0 + gx * 18, y0 + gy * 18
                pen.rectangle((x, y, x + 9, y + 9), fill=mark)
    return layer


def _shade(colour: tuple[int, int, int], factor: float) -> tuple[int, ...]:
    target = 255 if factor > 1 else 0
    amount = abs(factor - 1)
    return tuple(round(c + (target - c) * amount) for c in colour)


def _cube(sketch: Sketch) -> tuple[Shape, ...]:
    return (
        ("box", (0.12, 0.2, 0.8, 0.98), "body"),
        ("poly", (0.12, 0.2, 0.26, 0.06, 0.94, 0.06, 0.8, 0.2), "light"),
        ("poly", (0.8, 0.2, 0.94, 0.06, 0.94, 0.84, 0.8, 0.98), "dark"),
    )


def _body_mask(look: Look, shapes: tuple[Shape, ...], pose: Pose) -> Image.Image:
    mask = Image.new("L", (SHEET, SHEET), 0)
    pen = ImageDraw.Draw(mask)
    for shape in shapes:
        draw_shape(pen, shape, pose, 255, look.width, look.height)
    return mask


def draw_subject(picture: Picture, rng: np.random.Generator) -> Image.Image:
    """The subject upright on a transparent sheet, RGBA, SHEET x SHEET."""
    look, modifier = picture.look, picture.modifier
    base = COLOURS[modifier] if modifier in COLOURS else COLOURS[look.colour]
    palette = {"dark": _shade(base, 0.68), "light": _shade(base, 1.3), "body": base}
    sketch = SKETCHES[look.kind](look.feature)
    pose = (SHEET * 0.12, SHEET * 0.17, SHEET * 0.76)
    cube = _cube(sketch) if modifier == "cube shaped" else ()
    body = cube or sketch.body
    mask = _body_mask(look, body, pose)
    sheet = Image.new("RGBA", (SHEET, SHEET), (*INK, 0))
    sheet.paste(
        Image.new("RGBA", mask.size, (*INK, 255)), mask=mask.filter(ImageFilter.MaxFilter(5))
    )
    sheet.paste(marking_layer(look, (base, COLOURS[look.marking_colour])), mask=mask)
    pen = ImageDraw.Draw(sheet)
    small = (pose[0] - 4, pose[1] + 16, pose[2] * 0.8) if cube else pose
    for shape in cube[1:] + sketch.details if cube else sketch.details:
        fill = palette.get(shape[2], shape[2]) if isinstance(shape[2], str) else shape[2]
        place = pose if shape in cube else small
        draw_shape(pen, shape, place, fill, look.width, look.height)
    if modifier in ("shiny", "wet"):
        _gloss(sheet, mask, modifier, rng)
    for part in ACCESSORIES.get(picture.accessory, lambda s: ())(sketch):
        draw_shape(pen, part, small, part[2], look.width, look.height)
    return sheet


def _gloss(sheet: Image.Image, mask: Image.Image, modifier: str, rng: np.random.Generator) -> None:
    layer = Image.new("L", mask.size, 0)
    pen = ImageDraw.Draw(layer)
    for x, y in rng.uniform(0.2, 0.8, (3 if modifier == "shiny" else 14, 2)) * SHEET:
        if modifier == "shiny":
            pen.line((x - 9, y + 9, x + 9, y - 9), fill=230, width=7)
        else:
            pen.ellipse((x - 3, y - 4, x + 3, y + 4), fill=240)
    tint = (255, 255, 255, 255) if modifier == "shiny" else (96, 190, 250, 255)
    sheet.paste(Image.new("RGBA", mask.size, tint), mask=ImageChops.multiply(layer, mask))


def render(picture: Picture, rng: np.random.Generator, side: int = 64) -> Image.Image:
    """RGB picture of ``side`` x ``side`` pixels, drawn at 128 and reduced."""
    scene = SCENES[picture.scene](rng)
    canvas, pen = scene.image, scene.pen
    subject = draw_subject(picture, rng)
    if rng.random() < 0.5 and picture.look.kind not in ("clock",):
        subject = subject.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = rng.uniform(0.8, 1.0)
    subject = subject.rotate(rng.uniform(-7, 7), Image.Resampling.BILINEAR)
    extent = round(SHEET * scale)
    subject = subject.resize((extent, extent), Image.Resampling.BILINEAR)
    foot = rng.uniform(108, 122)
    x = round(64 - extent / 2 + rng.uniform(-13, 13))
    y = round(foot - extent * 0.93)
    liquid = LIQUID.get(picture.scene)
    if liquid is None and picture.scene != "on top of a mirror":
        pen.ellipse((x + extent * 0.14, foot - 6, x + extent * 0.86, foot + 5), fill=(60, 56, 60))
    canvas.paste(subject, (x, y), subject)
    if liquid is not None:
        pen.rectangle((0, foot - 9, SIZE, SIZE), fill=liquid)
        pen.ellipse((x + 2, foot - 13, x + extent - 2, foot - 5), outline=(236, 240, 246), width=2)
    light = rng.uniform(0.88, 1.08)
    canvas = canvas.point(lambda value: min(255, round(value * light)))
    return canvas.resize((side, side), Image.Resampling.BOX)
