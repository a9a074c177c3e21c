"""The illustrated twin of each of the 30 subjects, and its "photos".

No twin's look is ever drawn for pre-training (``FORBIDDEN``): it is what personalisation learns.
"""

from __future__ import annotations

import zlib

import numpy as np
from PIL import Image

from subjects.catalogue import SUBJECTS
from subjects.illustrated.looks import Look
from subjects.illustrated.render import Picture, render
from subjects.illustrated.scenes import HOME_SCENES

# name                 colour    marking    its colour
ROWS = """
backpack             | red     | checks   | black
backpack_dog         | brown   | patches  | white
bear_plushie         | orange  | band     | blue
berry_bowl           | white   | spots    | red
can                  | blue    | stripes  | yellow
candle               | pink    | stripes  | white
cat                  | orange  | stripes  | white
cat2                 | grey    | patches  | black
clock                | yellow  | spots    | blue
colorful_sneaker     | teal    | checks   | pink
dog                  | white   | spots    | red
dog2                 | brown   | band     | white
dog3                 | black   | patches  | orange
dog5                 | yellow  | stripes  | purple
dog6                 | grey    | spots    | teal
dog7                 | blue    | checks   | white
dog8                 | green   | band     | pink
duck_toy             | yellow  | band     | red
fancy_boot           | purple  | spots    | yellow
grey_sloth_plushie   | grey    | patches  | brown
monster_toy          | green   | spots    | purple
pink_sunglasses      | pink    | stripes  | black
poop_emoji           | brown   | stripes  | yellow
rc_car               | red     | stripes  | white
red_cartoon          | red     | spots    | yellow
robot_toy            | teal    | checks   | orange
shiny_sneaker        | white   | stripes  | green
teapot               | blue    | spots    | white
vase                 | purple  | stripes  | teal
wolf_plushie         | black   | band     | grey
"""


def _look(name: str, colour: str, marking: str, marking_colour: str) -> Look:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    width, height = (float(value) for value in rng.uniform(0.84, 1.16, 2))
    kind = SUBJECTS[name].class_noun
    feature = float(rng.choice([rng.uniform(0.75, 0.9), rng.uniform(1.15, 1.35)]))
    layout = int(rng.integers(1 << 30))
    return Look(kind, colour, marking, marking_colour, width, height, feature, layout)


TWINS: dict[str, Look] = {
    row[0]: _look(*row)
    for row in ([cell.strip() for cell in line.split("|")] for line in ROWS.split("\n") if line)
}
FORBIDDEN = frozenset(look.paint() for look in TWINS.values())


def twin_photos(name: str, side: int = 128) -> list[Image.Image]:
    """As many pictures of the twin as the real subject has photos, at home, always the same."""
    rng = np.random.default_rng(zlib.crc32(f"photos of {name}".encode()))
    scenes = rng.permutation(HOME_SCENES)
    count = len(SUBJECTS[name].photos)
    pictures = (Picture(TWINS[name], str(scenes[i % len(scenes)])) for i in range(count))
    return [render(picture, rng, side) for picture in pictures]
