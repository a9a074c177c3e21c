"""The catalogue against facts of the published dataset (counts, digests of its own text file)."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter

import pytest

from bksdm_tune.errors import UsageError
from subjects.catalogue import (
    LIVE_PROMPTS,
    OBJECT_PROMPTS,
    SUBJECTS,
    fill,
    get_subject,
    prompts_for,
)


def digest(lines: list[str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def test_thirty_subjects_of_fifteen_classes_nine_of_them_live() -> None:
    assert len(SUBJECTS) == 30
    assert len({subject.class_noun for subject in SUBJECTS.values()}) == 15
    assert Counter(subject.live for subject in SUBJECTS.values()) == {True: 9, False: 21}
    assert all(name == subject.name for name, subject in SUBJECTS.items())


def test_class_nouns_are_those_of_the_published_table() -> None:
    # sha256 of the "subject_name,class" lines in the dataset's prompts_and_classes.txt
    lines = [f"{subject.name},{subject.class_noun}" for subject in SUBJECTS.values()]
    assert digest(lines) == "0bdeb29d35e695500b8540b859820e5338e1cacdf226b205755358424bd3564b"


def test_158_photos_in_sets_of_four_five_and_six() -> None:
    sizes = Counter(len(subject.photos) for subject in SUBJECTS.values())
    assert sizes == {4: 2, 5: 18, 6: 10}
    hashes = {sha256 for subject in SUBJECTS.values() for _, sha256 in subject.photos}
    assert len(hashes) == 158 and {len(sha256) for sha256 in hashes} == {64}
    assert {name for name, _ in SUBJECTS["can"].photos} == {f"0{n}.jpg" for n in range(6)}


def test_photo_hashes_are_the_published_ones() -> None:
    photos = [(s.name, file, sha) for s in SUBJECTS.values() for file, sha in s.photos]
    lines = [f"{sha256}  {subject}/{file}" for subject, file, sha256 in sorted(photos)]
    assert digest(lines) == "2e4afae6bb74581509edcfe15bde598a7e86f6848da2284c874820fe5ca62162"


def test_two_lists_of_25_prompts_share_15() -> None:
    assert len(OBJECT_PROMPTS) == len(LIVE_PROMPTS) == 25
    assert len({*OBJECT_PROMPTS} & {*LIVE_PROMPTS}) == 15
    assert len({*OBJECT_PROMPTS} | {*LIVE_PROMPTS}) == 35


@pytest.mark.parametrize(
    ("prompts", "published"),
    [
        (OBJECT_PROMPTS, "858697f3d66bb26d5e6e3ca80673716ace2b28d1214f9c5704e6a35e9279f454"),
        (LIVE_PROMPTS, "aec1f7ed63d1ac54297f683e1be4afde19a815b0b772b5af633857f094fd3c00"),
    ],
)
def test_prompts_are_the_published_lines_in_order(prompts: list[str], published: str) -> None:
    # sha256 of the quoted templates in the dataset's prompts_and_classes.txt, one a line
    assert digest(list(prompts)) == published


def test_live_subjects_wear_outfits_and_objects_float() -> None:
    assert "a {0} {1} wearing a santa hat" in prompts_for(SUBJECTS["cat2"])
    assert "a {0} {1} floating on top of water" in prompts_for(SUBJECTS["wolf_plushie"])


def test_fill_leaves_no_gap_for_an_empty_identifier() -> None:
    template = "a {0} {1} in the snow"
    assert fill(template, "sks", "stuffed animal") == "a sks stuffed animal in the snow"
    assert fill(template, "", "dog") == "a dog in the snow"


def test_unknown_subject_is_refused_with_close_names() -> None:
    with pytest.raises(UsageError, match="'dog4'.*Did you mean dog"):
        get_subject("dog4")
    with pytest.raises(UsageError, match="duck_toy"):
        get_subject("duck-toy")


def test_listing_needs_no_heavy_import() -> None:
    code = "import sys, subjects.command; print({'torch', 'numpy', 'requests'} & {*sys.modules})"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.strip() == "set()", answer.stderr
