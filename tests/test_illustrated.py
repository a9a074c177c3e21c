"""The illustrated world: twins stay out of pre-training, every prompt can be drawn."""

from __future__ import annotations

import re

import numpy as np
import pytest

from subjects.catalogue import LIVE_PROMPTS, OBJECT_PROMPTS, SUBJECTS, fill, prompts_for
from subjects.illustrated.accessories import ACCESSORIES
from subjects.illustrated.captions import MODIFIERS, caption, random_picture, visible_paint
from subjects.illustrated.looks import COLOURS, KINDS, LIVE_KINDS, MARKINGS, random_look
from subjects.illustrated.render import Picture, draw_subject, render
from subjects.illustrated.scenes import DREAMBOOTH_SCENES, HOME_SCENES, SCENES
from subjects.illustrated.sketches import SKETCHES
from subjects.illustrated.twins import FORBIDDEN, TWINS, twin_photos

PROMPTS = tuple(dict.fromkeys(OBJECT_PROMPTS + LIVE_PROMPTS))


def test_every_subject_has_its_own_look() -> None:
    assert TWINS.keys() == SUBJECTS.keys() and len(TWINS) == 30
    assert {look.paint() for look in TWINS.values()} == FORBIDDEN and len(FORBIDDEN) == 30
    for name, look in TWINS.items():
        assert look.kind == SUBJECTS[name].class_noun
        assert look.colour in COLOURS and look.marking_colour in COLOURS
        assert look.marking in MARKINGS[1:] and look.colour != look.marking_colour


@pytest.fixture(scope="module")
def drawn() -> list[Picture]:
    rng = np.random.default_rng(0)
    return [random_picture(rng, FORBIDDEN) for _ in range(3000)]


def test_no_twin_is_ever_drawn_for_pre_training(drawn: list[Picture]) -> None:
    assert not {visible_paint(picture) for picture in drawn} & FORBIDDEN
    assert not {picture.look.paint() for picture in drawn} & FORBIDDEN


def test_twins_would_be_drawn_if_they_were_not_forbidden() -> None:
    """So that the test above can fail."""
    rng = np.random.default_rng(0)
    free = [visible_paint(random_picture(rng, frozenset())) for _ in range(3000)]
    assert len(set(free) & FORBIDDEN) > 1


def test_a_colour_modifier_cannot_paint_a_twin() -> None:
    """A green toy with yellow... painted red is a red one: the paint that shows counts."""
    twin = TWINS["red_cartoon"]
    rng = np.random.default_rng(0)
    others = [random_look(rng, "cartoon") for _ in range(4000)]
    painted = [Picture(look, "in a room", "", "red") for look in others]
    hits = [p for p in painted if visible_paint(p) == twin.paint()]
    assert len(hits) > 3 and any(p.look.colour != "red" for p in hits)
    assert all(visible_paint(p) in FORBIDDEN for p in hits)


def test_pre_training_sees_everything_else(drawn: list[Picture]) -> None:
    assert {picture.look.kind for picture in drawn} == set(KINDS) and len(KINDS) == 15
    assert {picture.scene for picture in drawn} == set(SCENES) and len(SCENES) == 24
    assert {picture.accessory for picture in drawn} == {"", *ACCESSORIES} and len(ACCESSORIES) == 10
    assert {picture.modifier for picture in drawn} == {"", *MODIFIERS} and len(MODIFIERS) == 5
    dressed = {picture.look.kind for picture in drawn if picture.accessory}
    assert dressed == set(LIVE_KINDS)


def test_the_drawn_kinds_are_the_class_nouns() -> None:
    assert set(KINDS) == {subject.class_noun for subject in SUBJECTS.values()} == set(SKETCHES)


def parts(template: str) -> tuple[str, str]:
    """What stands before and behind the subject in a DreamBooth prompt."""
    match = re.fullmatch(r"a (.*?) ?\{0\} \{1\} ?(.*)", template)
    assert match, template
    return match[1], match[2]


def test_every_prompt_has_its_drawer() -> None:
    before, behind = zip(*(parts(prompt) for prompt in PROMPTS), strict=True)
    assert len(PROMPTS) == 35
    assert set(before) - {""} == set(MODIFIERS)
    assert set(behind) - {""} == set(DREAMBOOTH_SCENES) | set(ACCESSORIES)
    assert len(set(behind) - {""}) == 30 and not set(HOME_SCENES) & set(behind)


def test_every_prompt_is_a_caption() -> None:
    """The grammar of the captions, with words left out at random, covers every class and prompt."""
    wanted = {
        (subject.class_noun, template): fill(template, "", subject.class_noun)
        for subject in SUBJECTS.values()
        for template in prompts_for(subject)
    }
    assert len(wanted) == 15 * 25
    rng = np.random.default_rng(1)
    for (kind, template), prompt in wanted.items():
        modifier, phrase = parts(template)
        scene, accessory = (phrase, "") if phrase in SCENES else ("in a room", phrase)
        picture = Picture(random_look(rng, kind), scene, accessory, modifier)
        captions = {caption(picture, rng, keep=0.2) for _ in range(120)}
        assert prompt in captions, prompt


def test_a_caption_tells_only_what_is_drawn(drawn: list[Picture]) -> None:
    rng = np.random.default_rng(2)
    for picture in drawn[:500]:
        text = caption(picture, rng, keep=1.0)
        kind, colour, marking, marking_colour = visible_paint(picture)
        assert kind in text and colour in text and text.endswith(picture.scene)
        assert picture.accessory in text and picture.modifier in text
        assert marking == "plain" or f"{marking_colour} {marking}" in text
        told = {name for name in COLOURS if re.search(rf"\b{name}\b", text)}
        allowed = f"{colour} {marking_colour} {picture.scene} {picture.accessory}"
        assert told <= set(allowed.split())


@pytest.mark.parametrize("name", ["dog", "teapot", "cat2"])
def test_photos_are_always_the_same(name: str) -> None:
    first, second = twin_photos(name), twin_photos(name)
    assert [a.tobytes() for a in first] == [b.tobytes() for b in second]
    assert len({photo.tobytes() for photo in first}) == len(first)
    assert {(photo.mode, photo.size) for photo in first} == {("RGB", (128, 128))}


def test_there_are_as_many_photos_as_of_the_real_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Picture] = []

    def record(picture: Picture, rng: np.random.Generator, side: int) -> None:
        taken.append(picture)

    monkeypatch.setattr("subjects.illustrated.twins.render", record)
    counts = [len(twin_photos(name)) for name in SUBJECTS]
    assert counts == [len(subject.photos) for subject in SUBJECTS.values()]
    assert sum(counts) == len(taken) == 158
    assert [counts.count(n) for n in (4, 5, 6)] == [2, 18, 10]
    assert {picture.scene for picture in taken} == set(HOME_SCENES)
    assert not any(picture.accessory or picture.modifier for picture in taken)


@pytest.mark.parametrize("side", [64, 128])
def test_a_seed_decides_the_picture(side: int) -> None:
    picture = Picture(TWINS["dog"], "on the beach", "wearing a red hat", "wet")

    def draw(seed: int) -> bytes:
        image = render(picture, np.random.default_rng(seed), side)
        assert image.mode == "RGB" and image.size == (side, side)
        return image.tobytes()

    assert draw(1) == draw(1) != draw(2)


def sheet(picture: Picture) -> bytes:
    return draw_subject(picture, np.random.default_rng(3)).tobytes()


def test_everything_that_is_asked_for_shows() -> None:
    """Each scene, accessory, modifier, kind, marking and colour changes the picture."""
    dog = TWINS["dog"]
    scenes = {render(Picture(dog, s), np.random.default_rng(3)).tobytes(): s for s in SCENES}
    worn = {sheet(Picture(dog, "in a room", a)) for a in ("", *ACCESSORIES)}
    modified = {sheet(Picture(dog, "in a room", "", m)) for m in ("", *MODIFIERS)}
    assert (len(scenes), len(worn), len(modified)) == (24, 11, 6)
    assert len({sheet(Picture(look, "in a room")) for look in TWINS.values()}) == 30
    rng = np.random.default_rng(4)
    looks = [random_look(rng, kind) for kind in KINDS for _ in range(4)]
    assert len({sheet(Picture(look, "in a room")) for look in looks}) == 60
