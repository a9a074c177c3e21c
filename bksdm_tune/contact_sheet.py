"""One picture that shows a run: the photos, and the same prompts and seeds before and after."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, LABEL = 160, 6, 20
INK, PAPER, FAINT = (30, 30, 34), (255, 255, 255), (110, 110, 118)


def _fit(image: Image.Image) -> Image.Image:
    """A square cell; small pictures are enlarged without blurring."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    way = Image.Resampling.NEAREST if side < CELL else Image.Resampling.LANCZOS
    return image.resize((CELL, CELL), way)


def contact_sheet(path: Path, title: str, rows: list[tuple[str, list[Image.Image]]]) -> None:
    """Write a PNG with a labelled row of square cells for each of ``rows``."""
    columns = max(len(images) for _, images in rows)
    width = columns * (CELL + GAP) + GAP
    height = 2 * LABEL + len(rows) * (CELL + GAP + LABEL)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    pen.text((GAP, GAP), title, INK, ImageFont.load_default(16))
    y = 2 * LABEL - GAP
    for label, images in rows:
        pen.text((GAP, y), label, FAINT, font)
        for column, image in enumerate(images):
            sheet.paste(_fit(image), (GAP + column * (CELL + GAP), y + LABEL - 2))
        y += CELL + GAP + LABEL
    sheet.save(path)
