"""One picture that shows a run: the photos, and the same prompts and seeds before and after."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, LABEL, CAPTION = 160, 6, 22, 32
INK, PAPER, FAINT = (30, 30, 34), (255, 255, 255), (96, 96, 104)


@dataclass(frozen=True)
class Row:
    """Pictures with a label above all and, if any, a caption below each."""

    label: str
    images: list[Image.Image]
    captions: tuple[str, ...] = ()

    @property
    def height(self) -> int:
        return LABEL + CELL + (CAPTION if self.captions else 0) + GAP


def _fit(image: Image.Image) -> Image.Image:
    """A square cell; small pictures are enlarged without blurring."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    way = Image.Resampling.NEAREST if side < CELL else Image.Resampling.LANCZOS
    return image.resize((CELL, CELL), way)


def contact_sheet(path: Path, title: str, rows: list[Row]) -> None:
    """Write a PNG with the rows one below the other."""
    width = max(len(row.images) for row in rows) * (CELL + GAP) + GAP
    sheet = Image.new("RGB", (width, 2 * LABEL + sum(row.height for row in rows)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), title, INK, ImageFont.load_default(16))
    y = 2 * LABEL - GAP
    for row in rows:
        _draw_row(sheet, pen, row, y)
        y += row.height
    sheet.save(path)


def _draw_row(sheet: Image.Image, pen: ImageDraw.ImageDraw, row: Row, y: int) -> None:
    pen.text((GAP, y), row.label, INK, ImageFont.load_default(13))
    for column, image in enumerate(row.images):
        x = GAP + column * (CELL + GAP)
        sheet.paste(_fit(image), (x, y + LABEL - 2))
        if row.captions:
            text = "\n".join(textwrap.wrap(row.captions[column], 27)[:2])
            pen.multiline_text((x, y + LABEL + CELL), text, FAINT, ImageFont.load_default(11))
