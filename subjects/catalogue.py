"""The 30 DreamBooth subjects and their prompts, as data.

Source: the public dataset of Ruiz et al., "DreamBooth", CVPR 2023 (github.com/google/dreambooth,
photos under CC-BY 4.0).  ``photos_sha256.txt`` beside this file is in the format of ``sha256sum``.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import resources

from bksdm_tune.errors import UsageError

LIVE_CLASSES = ("cat", "dog")

CLASS_NOUNS = {
    "backpack": "backpack",
    "backpack_dog": "backpack",
    "bear_plushie": "stuffed animal",
    "berry_bowl": "bowl",
    "can": "can",
    "candle": "candle",
    "cat": "cat",
    "cat2": "cat",
    "clock": "clock",
    "colorful_sneaker": "sneaker",
    "dog": "dog",
    "dog2": "dog",
    "dog3": "dog",
    "dog5": "dog",
    "dog6": "dog",
    "dog7": "dog",
    "dog8": "dog",
    "duck_toy": "toy",
    "fancy_boot": "boot",
    "grey_sloth_plushie": "stuffed animal",
    "monster_toy": "toy",
    "pink_sunglasses": "glasses",
    "poop_emoji": "toy",
    "rc_car": "toy",
    "red_cartoon": "cartoon",
    "robot_toy": "toy",
    "shiny_sneaker": "sneaker",
    "teapot": "teapot",
    "vase": "vase",
    "wolf_plushie": "stuffed animal",
}

_SHARED_SCENES = (
    "a {0} {1} in the jungle",
    "a {0} {1} in the snow",
    "a {0} {1} on the beach",
    "a {0} {1} on a cobblestone street",
    "a {0} {1} on top of pink fabric",
    "a {0} {1} on top of a wooden floor",
    "a {0} {1} with a city in the background",
    "a {0} {1} with a mountain in the background",
    "a {0} {1} with a blue house in the background",
    "a {0} {1} on top of a purple rug in a forest",
)
_OBJECT_SCENES = (
    "a {0} {1} with a wheat field in the background",
    "a {0} {1} with a tree and autumn leaves in the background",
    "a {0} {1} with the Eiffel Tower in the background",
    "a {0} {1} floating on top of water",
    "a {0} {1} floating in an ocean of milk",
    "a {0} {1} on top of green grass with sunflowers around it",
    "a {0} {1} on top of a mirror",
    "a {0} {1} on top of the sidewalk in a crowded street",
    "a {0} {1} on top of a dirt road",
    "a {0} {1} on top of a white rug",
)
_LIVE_OUTFITS = (
    "a {0} {1} wearing a red hat",
    "a {0} {1} wearing a santa hat",
    "a {0} {1} wearing a rainbow scarf",
    "a {0} {1} wearing a black top hat and a monocle",
    "a {0} {1} in a chef outfit",
    "a {0} {1} in a firefighter outfit",
    "a {0} {1} in a police outfit",
    "a {0} {1} wearing pink glasses",
    "a {0} {1} wearing a yellow shirt",
    "a {0} {1} in a purple wizard outfit",
)
_SHARED_LOOKS = (
    "a red {0} {1}",
    "a purple {0} {1}",
    "a shiny {0} {1}",
    "a wet {0} {1}",
    "a cube shaped {0} {1}",
)
OBJECT_PROMPTS = _SHARED_SCENES + _OBJECT_SCENES + _SHARED_LOOKS
LIVE_PROMPTS = _SHARED_SCENES + _LIVE_OUTFITS + _SHARED_LOOKS


@dataclass(frozen=True)
class Subject:
    """One subject; ``photos`` are (file name, sha256) pairs in the order of the dataset."""

    name: str
    class_noun: str
    live: bool
    photos: tuple[tuple[str, str], ...]


def _published_hashes() -> dict[str, list[tuple[str, str]]]:
    text = resources.files("subjects").joinpath("photos_sha256.txt").read_text(encoding="ascii")
    photos: dict[str, list[tuple[str, str]]] = {}
    for line in text.splitlines():
        sha256, path = line.split("  ")
        subject, file_name = path.split("/")
        photos.setdefault(subject, []).append((file_name, sha256))
    return photos


def _read_catalogue() -> dict[str, Subject]:
    photos = _published_hashes()
    assert photos.keys() == CLASS_NOUNS.keys()
    return {
        name: Subject(name, noun, noun in LIVE_CLASSES, tuple(photos[name]))
        for name, noun in CLASS_NOUNS.items()
    }


SUBJECTS: dict[str, Subject] = _read_catalogue()


def get_subject(name: str) -> Subject:
    """The subject of exactly that name.

    Raises:
        UsageError: there is none; the message names the closest ones.
    """
    if name in SUBJECTS:
        return SUBJECTS[name]
    close = difflib.get_close_matches(name.lower(), SUBJECTS, n=4)
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    raise UsageError(
        f"There is no subject {name!r}.{hint} `bksdm-tune subjects list` shows all "
        f"{len(SUBJECTS)}; for photos of your own use --photos DIR --class-noun NOUN."
    )


def prompts_for(subject: Subject) -> tuple[str, ...]:
    """The 25 DreamBooth templates for this subject: {0} is the identifier, {1} the class noun."""
    return prompts_of_class(subject.class_noun)


def group_of(class_noun: str) -> str:
    """``live`` or ``object``: which list of prompts a class has."""
    return "live" if class_noun in LIVE_CLASSES else "object"


def prompts_of_class(class_noun: str) -> tuple[str, ...]:
    """As ``prompts_for``, for anyone's subject."""
    return LIVE_PROMPTS if group_of(class_noun) == "live" else OBJECT_PROMPTS


def prompt_type(template: str) -> str:
    """scene (recontextualisation), outfit (accessorisation), look (property) or other."""
    if template in _SHARED_SCENES + _OBJECT_SCENES:
        return "scene"
    return (
        "outfit" if template in _LIVE_OUTFITS else "look" if template in _SHARED_LOOKS else "other"
    )


def fill(template: str, identifier: str, class_noun: str) -> str:
    """A template as a prompt; an empty identifier leaves no double space behind."""
    return " ".join(template.format(identifier, class_noun).split())
