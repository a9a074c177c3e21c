"""Which words drew which pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bksdm_tune.attention import Recorder, attention_maps, words_of
from bksdm_tune.cli import main
from bksdm_tune.errors import UsageError
from bksdm_tune.pipeline import Shot, draw, load_pipeline
from bksdm_tune.resolve import resolve


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(resolve("pocket-tiny"), "cpu")


def test_looking_does_not_change_the_picture(pipe: Any) -> None:
    shot = Shot("a red dog in the snow", 5, 6)
    before = pipe.unet.attn_processors
    maps = attention_maps(pipe, shot)
    (plain,) = draw(pipe, [shot])
    assert np.abs(np.asarray(maps.picture).astype(int) - np.asarray(plain)).max() <= 1
    assert pipe.unet.attn_processors == before
    assert maps.words == ["a", "red", "dog", "in", "the", "snow"]
    assert maps.shares.shape == (6, 16, 16)
    np.testing.assert_allclose(maps.shares.sum(0), 1, atol=1e-5)
    assert maps.overlay(1).size == plain.size


def test_words_fall_where_they_are_drawn(pipe: Any) -> None:
    """ "dog" has more of the middle, where the dog is, than of the corners; "snow" less."""
    maps = attention_maps(pipe, Shot("a red dog in the snow", 5, 12))
    middle = (slice(5, 12), slice(6, 10))
    corners = np.r_[:3, 13:16]

    def focus(word: str) -> float:
        share = maps.shares[maps.words.index(word)]
        return float(share[middle].mean() / share[np.ix_(corners, corners)].mean())

    assert focus("dog") > 1.1 > 1.0 > focus("snow")


def test_a_map_is_the_mean_of_the_guided_half() -> None:
    """Two heads, one layer of 2 x 2, enlarged to 4 x 4; the batch's first picture is unguided."""
    recorder = Recorder(slice(1, 3))
    recorder.side = (4, 4)
    shares = torch.rand(4, 4, 7)
    recorder.add(shares)
    wanted = shares[2:].mean(0)[:, 1:3].T.reshape(1, 2, 2, 2)
    enlarged = torch.nn.functional.interpolate(wanted, (4, 4), mode="bilinear")[0]
    torch.testing.assert_close(recorder.total, enlarged)


def test_words_and_their_tokens(pipe: Any) -> None:
    words, counts = words_of("a sks11df dog, please", pipe.tokenizer)
    assert words == ["a", "sks11df", "dog,", "please"]
    whole = pipe.tokenizer("a sks11df dog, please", add_special_tokens=False).input_ids
    assert sum(counts) == len(whole)
    for prompt in ("", "word " * 200):
        with pytest.raises(UsageError, match="tokens"):
            words_of(prompt, pipe.tokenizer)
    with pytest.raises(UsageError, match="guidance"):
        attention_maps(pipe, Shot("a dog", 0, 2, 1.0))


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "new/maps.png"
    words = ["pocket-tiny", "pocket-small", "--prompt", "a dog", "--steps", "2", "--out", str(out)]
    assert main(["attention", *words]) == 0
    with Image.open(out) as sheet:
        assert sheet.width > 3 * 160 and sheet.height > 2 * 160
    assert main(["attention", "nobody", "--prompt", "a dog"]) == 2
    assert main(["attention", "pocket-tiny", "--prompt", "a {subject}"]) == 2
