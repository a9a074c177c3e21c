"""Sources of pairs, decoding in workers, and the latent cache."""

from __future__ import annotations

import functools
import http.server
import itertools
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bksdm_tune import processes
from bksdm_tune.artifacts import MANIFEST
from bksdm_tune.diffusion import crop
from bksdm_tune.errors import DataError, UsageError
from distill.cache import Encoders, LatentCache, Writer, shard_paths
from distill.data import Row, find_shards, open_source
from distill.loading import Item, Skipped, decode, passing, training_items, without_gaps
from pairs import image_folder, picture, shards, table
from tiny import make_text_encoder, make_tokenizer, make_vae

COUNT = 7
CAPTIONS = [f"picture {n}" for n in range(COUNT)]


def make_source(kind: str, tmp_path: Path) -> str:
    """Write the data set in one layout; what to say after ``--data``."""
    where = tmp_path / kind
    if kind == "folder":
        return str(image_folder(where))
    if kind in ("tars", "tars-json"):
        return str(shards(where, as_json=kind == "tars-json"))
    if kind == "tar-pattern":
        return f"{shards(where)}/{{000..002}}.tar"
    where.mkdir()
    data: Any = table()
    if kind == "parquet":
        data.to_parquet(where / "part.parquet")
    else:
        data.save_to_disk(where)
    return str(where)


LAYOUTS = ("folder", "tars", "tars-json", "tar-pattern", "parquet", "arrow")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_pairs(layout: str, tmp_path: Path) -> None:
    source = open_source(make_source(layout, tmp_path))
    rows = list(source.once())
    assert [row.caption for row in rows] == CAPTIONS
    (pictures,) = decode(passing(rows, COUNT), 32, workers=0)
    assert pictures.bad == []
    for number, pixels in enumerate(pictures.pixels):
        expected = torch.from_numpy(crop(picture(number), 32)).permute(2, 0, 1)
        assert torch.equal(pixels, expected)


@pytest.mark.parametrize("layout", ["folder", "tars", "arrow"])
def test_a_run_can_start_anywhere_in_the_shuffled_order(layout: str, tmp_path: Path) -> None:
    source = open_source(make_source(layout, tmp_path))
    order = [row.caption for row in itertools.islice(source.endless(3), 20)]
    assert sorted(order[:COUNT]) == CAPTIONS and sorted(order[COUNT : 2 * COUNT]) == CAPTIONS
    assert order[:COUNT] != order[COUNT : 2 * COUNT]
    for start in (4, 7, 12):
        rest = itertools.islice(source.endless(3, start), 20 - start)
        assert [row.caption for row in rest] == order[start:]
    assert [row.caption for row in source.once(5)] == CAPTIONS[5:]


def test_captions_that_are_empty_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data")
    lines = (folder / "metadata.csv").read_text().splitlines()
    lines[3] = "2.png,  "
    (folder / "metadata.csv").write_text("\n".join(lines))
    source = open_source(str(folder))
    assert source.size == COUNT - 1 and source.empty == ["2.png"]
    assert "picture 2" not in [row.caption for row in source.once()]


def test_jsonl_and_parquet_metadata(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"file_name": f"{n}.png", "text": f"picture {n}"} for n in range(3)]
    (tmp_path / "a").mkdir()
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a/metadata.jsonl").write_text(lines)
    (tmp_path / "b").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b/metadata.parquet")
    for name in ("a", "b"):
        read = list(open_source(str(tmp_path / name)).once())
        assert read[2] == Row("2.png", tmp_path / name / "2.png", "picture 2")


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no data set"):
        open_source(str(tmp_path))
    (tmp_path / "metadata.csv").write_text("image,words\na.png,dog\n")
    with pytest.raises(DataError, match="--caption-column"):
        open_source(str(tmp_path))
    (tmp_path / "metadata.csv").write_text("image,text\na.png,dog\n")
    with pytest.raises(DataError, match="file_name"):
        open_source(str(tmp_path))


def test_ranges_of_shards() -> None:
    assert find_shards("http://host/a-{08..11}.tar") == [
        f"http://host/a-{n}.tar" for n in ("08", "09", "10", "11")
    ]


def items(folder: Path, count: int = COUNT) -> list[Item]:
    return [Item(row, False) for row in open_source(str(folder)).once()][:count]


def test_workers_keep_the_order_and_mirror(tmp_path: Path) -> None:
    rows = items(image_folder(tmp_path / "data"))
    flipped = [Item(item.row, True) for item in rows]
    plain = list(decode([rows[:4], rows[4:]], 32, workers=2))
    mirrored = list(decode([flipped[:4], flipped[4:]], 32, workers=2))
    assert [p.captions for p in plain] == [CAPTIONS[:4], CAPTIONS[4:]]
    for a, b in zip(plain, mirrored, strict=True):
        assert torch.equal(a.pixels.flip(-1), b.pixels) and not torch.equal(a.pixels, b.pixels)


def test_broken_images_are_replaced_counted_and_listed(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", broken=(1, 2))
    (pictures,) = decode([items(folder, 4)], 32, workers=0)
    assert pictures.captions == ["picture 0", "picture 3"] and pictures.places == [0, 3]
    source = open_source(str(folder))
    source.empty = ["9.png"]
    skipped = Skipped(tmp_path / "skipped.jsonl", 0.5, source)
    skipped.note(4, pictures.bad)
    skipped.note(4, pictures.bad)  # the same ones in the next epoch
    lines = [json.loads(line) for line in skipped.path.read_text().splitlines()]
    assert [line["name"] for line in lines] == ["1.png", "2.png", "9.png"]
    assert "truncated" in lines[0]["reason"] and lines[2]["reason"] == "the caption is empty"
    assert Skipped(skipped.path, 0.5, source).names == {"1.png", "2.png", "9.png"}
    with pytest.raises(DataError, match="--max-broken"):
        Skipped(tmp_path / "other.jsonl", 0.2, source).note(4, pictures.bad)
    with pytest.raises(DataError, match="--max-broken"):
        Skipped(tmp_path / "none.jsonl", 0, source).note(4, pictures.bad[:1])


def test_the_share_of_a_stream_is_of_what_this_call_saw(tmp_path: Path) -> None:
    """A hundred listed before a resumption do not count again; few rows are no share yet."""
    source = open_source(str(shards(tmp_path / "tars")))
    path = tmp_path / "skipped.jsonl"
    old = [json.dumps({"name": f"old{n}", "reason": "cut"}) for n in range(100)]
    path.write_text("\n".join(old) + "\n")
    skipped = Skipped(path, 0.01, source)
    skipped.note(4, [("old5", "cut"), ("new1", "cut"), ("new2", "cut")])
    assert len(path.read_text().splitlines()) == 102
    skipped.note(4, [(f"more{n}", "cut") for n in range(8)])  # ten of at least a thousand
    with pytest.raises(DataError, match="11 of 1000 rows"):
        skipped.note(4, [("last", "cut")])


def test_processes_share_the_empty_captions(tmp_path: Path, monkeypatch: Any) -> None:
    """All of them read all captions; each counts and lists its own."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    listed = []
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        source = open_source(str(shards(tmp_path / f"tars{rank}")))
        source.empty = ["a", "b", "c"]
        skipped = Skipped(tmp_path / f"skipped-{rank}.jsonl", 0.5, source)
        skipped.note(4, [])
        listed.append(skipped.names)
    assert listed == [{"a", "c"}, {"b"}]


def test_bad_rows_take_the_next_good_one() -> None:
    batches = [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]]
    whole = without_gaps(iter(batches), lambda b: [i for i, ok in enumerate(b) if ok], 4)
    assert list(whole) == [
        (batches[0], [0, 1, 1, 1]),
        (batches[3], [0, 0, 0, 0]),
        (batches[3], [0, 0, 0, 0]),
        (batches[3], [0, 0, 1, 1]),
    ]


def test_half_of_the_pictures_are_mirrored(tmp_path: Path) -> None:
    source = open_source(str(image_folder(tmp_path / "data")))
    batches = list(itertools.islice(training_items(source, 10, seed=1, start=0), 40))
    flips = [item.flip for batch in batches for item in batch]
    assert 0.4 < np.mean(flips) < 0.6
    assert list(itertools.islice(training_items(source, 10, seed=1, start=3), 2)) == batches[3:5]
    straight = next(training_items(source, 10, seed=1, start=0, flip=False))
    assert not any(item.flip for item in straight)


def encoders(text: bool = True) -> Encoders:
    torch.manual_seed(0)
    return Encoders(make_vae(), 0.3, make_tokenizer(), make_text_encoder() if text else None)


def fill(folder: Path, data: Path, facts: dict[str, Any], **changes: Any) -> dict[str, int]:
    settings = {"resolution": 32, "batch_size": 2, "workers": 0, "max_broken": 0.5, "shard_rows": 3}
    source = open_source(str(data))
    return Writer(folder, source, changes.pop("using", encoders()), **settings | changes).run(facts)


FACTS = {"vae": "v", "text_encoder": "t"}


def test_a_cache_holds_what_the_encoders_give(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data", broken=(4,))
    assert fill(tmp_path / "cache", data, FACTS) == {"rows": 6, "skipped": 1}
    cache, using = LatentCache(tmp_path / "cache"), encoders()
    kept = [0, 1, 2, 3, 5, 6]
    assert cache.captions == [f"picture {n}" for n in kept]
    pixels = torch.stack([torch.from_numpy(crop(picture(n), 32)) for n in kept]).permute(0, 3, 1, 2)
    order = np.array([5, 0, 3, 2])
    flips = [True, False, True, False]
    chosen = zip(pixels[order], flips, strict=True)
    expected = [using.latents((p.flip(-1) if flip else p)[None]) for p, flip in chosen]
    assert torch.equal(cache.latents(order, flips), torch.cat(expected))
    embeds = cache.embeds(order)
    assert embeds is not None
    assert torch.equal(embeds, using.embeds([cache.captions[n] for n in order]))


def test_a_truncated_shard_is_found_and_redone(tmp_path: Path) -> None:
    data, folder = image_folder(tmp_path / "data"), tmp_path / "cache"
    fill(folder, data, FACTS)
    before = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
    assert len(before) == 6
    damaged, _ = shard_paths(folder, 1)
    damaged.write_bytes(before[damaged.name][:-10])
    with pytest.raises(DataError, match="shard-00001.*damaged"):
        LatentCache(folder)
    made: list[int] = []
    using = encoders()
    real = using.vae.encode
    using.vae.encode = lambda *a, **k: made.append(1) or real(*a, **k)  # type: ignore[func-returns-value]
    fill(folder, data, FACTS, using=using)
    assert len(made) == 2 * 3  # one shard of three pictures and their mirror images
    assert {path.name: path.read_bytes() for path in folder.glob("shard-*")} == before
    LatentCache(folder)


def test_an_interrupted_cache_goes_on_and_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data")
    fill(tmp_path / "whole", data, FACTS)
    using = encoders()
    real, calls = using.vae.encode, itertools.count()

    def fail(*args: Any, **options: Any) -> Any:
        if next(calls) == 9:
            raise KeyboardInterrupt
        return real(*args, **options)

    using.vae.encode = fail
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "cut", data, FACTS, using=using)
    assert not (tmp_path / "cut" / MANIFEST).exists()
    with pytest.raises(DataError, match="not a finished folder"):
        LatentCache(tmp_path / "cut")
    fill(tmp_path / "cut", data, FACTS)
    for path in (tmp_path / "whole").glob("shard-*"):
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()


def test_a_cache_folder_takes_no_other_cache(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data")
    fill(tmp_path / "cache", data, FACTS)
    with pytest.raises(UsageError, match="other data, model"):
        fill(tmp_path / "cache", data, FACTS | {"vae": "another"})


def test_a_stream_caches_like_a_folder(tmp_path: Path) -> None:
    fill(tmp_path / "a", image_folder(tmp_path / "data"), FACTS)
    fill(tmp_path / "b", shards(tmp_path / "tars"), FACTS)
    a, b = LatentCache(tmp_path / "a"), LatentCache(tmp_path / "b")
    everything = np.arange(COUNT)
    flips = [False] * COUNT
    assert a.captions == b.captions
    assert torch.equal(a.latents(everything, flips), b.latents(everything, flips))


def test_shards_stream_from_a_url(tmp_path: Path) -> None:
    folder = shards(tmp_path / "tars")
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/{{000..002}}.tar"
        source = open_source(url)
        assert [row.caption for row in source.once()] == CAPTIONS
        with pytest.raises(DataError, match="cannot be read"):
            list(open_source(url.replace("002", "005")).once())
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_missing_shards_of_a_range_are_named(tmp_path: Path) -> None:
    folder = shards(tmp_path / "tars")
    (folder / "001.tar").unlink()
    with pytest.raises(DataError, match="1 of 3 shards are not there.*001.tar"):
        find_shards(f"{folder}/{{000..002}}.tar")


def test_a_shard_that_breaks_off_is_one_data_error(tmp_path: Path) -> None:
    folder = shards(tmp_path / "tars")
    cut = folder / "002.tar"
    cut.write_bytes(cut.read_bytes()[:700])
    with pytest.raises(DataError, match="cannot be read"):
        list(open_source(str(folder)).once())


@pytest.mark.parametrize("line", ["[1, 2]", '{"text": "a dog"}'])
def test_bad_rows_of_a_table_are_named(line: str, tmp_path: Path) -> None:
    good = '{"file_name": "a.png", "text": "a dog"}'
    (tmp_path / "metadata.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match="object|row 2 has no file_name"):
        open_source(str(tmp_path))
