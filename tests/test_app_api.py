"""The app's endpoints through the real client: right answers, clear refusals, nobody harmed."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from safetensors.torch import save_file

from app_server import Server, dog_photos, serving, until
from bksdm_tune.cli import main

FEW = {"steps": 2, "guidance": 2.0}
FORM = {"title": "Rex", "class_noun": "dog", "backbone": "pocket-tiny"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a library that holds one model, ``rex``."""
    folder = tmp_path_factory.mktemp("app")
    words = ["--photos", str(folder / "photos"), "--class-noun", "dog", "--steps", "2"]
    dog_photos(folder / "photos")
    out = folder / "library/rex"
    backbone = ["--backbone", "pocket-tiny", "--lora", "--preview-prompts"]
    assert main(["dreambooth", *words, *backbone, "--out", str(out)]) == 0
    return folder


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Server]:
    with serving(place / "library", "--preload", "pocket-tiny") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    return Client(server.url, verbose=False)


def draw(client: Client, **settings: Any) -> list[Path]:
    asked = {"prompt": "a {subject}", "model": "rex"} | FEW | settings
    pictures, _ = client.predict(asked, api_name="/draw")
    return [Path(path) for path in pictures]


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_every_endpoint_is_documented(client: Client) -> None:
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]  # type: ignore[index]
    wanted = {"models", "jobs", "job", "rename", "delete", "verdicts", "estimate", "train", "draw",
              "compare", "attention", "export", "import"}  # fmt: skip
    assert {name.strip("/") for name in named} == wanted
    text = (Path(__file__).parent.parent / "docs/app.md").read_text()
    assert all(f"`/{name}`" in text for name in wanted)


def test_from_photos_to_a_file(client: Client, place: Path, tmp_path: Path) -> None:
    photos = [handle_file(photo) for photo in sorted((place / "photos").iterdir())]
    verdicts = client.predict(photos, api_name="/verdicts")
    assert [v["verdict"] for v in verdicts] == ["good"] * 5
    assert "s a step" in client.predict(photos, FORM | {"steps": 4}, api_name="/estimate")
    job = client.predict(photos, FORM | {"title": "Tom", "steps": 4}, api_name="/train")
    until(lambda: client.predict(api_name="/jobs")[0]["state"] == "done")
    model = client.predict(api_name="/models")[0]
    assert (model["slug"], model["title"], model["trigger"]) == ("tom", "Tom", "sks11df dog")
    assert client.predict(job["id"], "forget", api_name="/job") == {}
    (picture,) = draw(client, model="tom", seed=4)
    said = json.loads(Image.open(picture).info["bksdm_tune"])
    assert (said["prompt"], said["seed"], said["model"]) == ("a sks11df dog", 4, "tom")
    settings = {"prompt": "a {subject}", "model": "tom"} | FEW
    pictures, told = client.predict(settings, "before and after", [], api_name="/compare")
    assert len(pictures) == 2 and [c["label"] for c in told["contenders"]][1] == "after: Tom"
    pictures, told = client.predict(settings, "backbones", [], api_name="/compare")
    assert len(pictures) == 4
    pictures, told = client.predict(settings, api_name="/attention")
    assert told["words"] == ["a", "sks11df", "dog"] and len(pictures) == 4
    file, notes = client.predict("tom", "kohya", "fp16", api_name="/export")
    assert "Apache-2.0" in notes
    name = client.predict(
        handle_file(file), "pocket-tiny", "Tim", "sks11df dog", api_name="/import"
    )
    assert (pixels(draw(client, model=name, seed=4)[0]) == pixels(picture)).all()
    assert client.predict("tim", "Timothy", api_name="/rename") == "tim"
    assert {m["title"] for m in client.predict(api_name="/models")} == {"rex", "Tom", "Timothy"}
    for slug in ("tim", "tom"):
        client.predict(slug, api_name="/delete")
    assert [m["slug"] for m in client.predict(api_name="/models")] == ["rex"]
    assert not (place / "library/.photos/tom").exists()


def test_first_come_first_served(client: Client) -> None:
    """Drawings end in the order in which they were asked for."""
    jobs, ended = [], list[int]()
    for seed in range(8):
        asked = {"prompt": "a {subject}", "model": "rex", "seed": seed, "steps": 20, "n": 4}
        jobs.append(client.submit(asked, api_name="/draw"))
        time.sleep(0.3)  # or the client's own threads may overtake each other
    while len(ended) < len(jobs):
        ended += [n for n, job in enumerate(jobs) if job.done() and n not in ended]
        time.sleep(0.01)
    assert ended == sorted(ended)


def test_twenty_at_once(server: Server, client: Client) -> None:
    """Everybody gets the pictures of their own seed; memory stays where it was."""
    alone = {seed: pixels(draw(client, seed=seed)[0]) for seed in range(20)}
    assert len({picture.tobytes() for picture in alone.values()}) == 20
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss

    def one(seed: int) -> bool:
        mine = Client(server.url, verbose=False)
        return all((pixels(draw(mine, seed=seed)[0]) == alone[seed]).all() for _ in range(2))

    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(one, range(20)))
    assert process.memory_info().rss - before < 500 * 2**20


def bad_files(folder: Path) -> list[Path]:
    """Everything that is no photo, or should not be opened."""
    folder.mkdir()
    whole = io.BytesIO()
    Image.new("RGB", (80, 80), (9, 99, 9)).save(whole, "PNG")
    files = {
        "empty.png": b"",
        "page.jpg": b"<html><script>alert(1)</script></html>",
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "bomb.png": png_header(20_000, 20_000, zlib.compress(bytes(20_000 * 2_501))),
        "lies.png": png_header(60_000, 60_000, b""),
        "script.jpg": b"#!/bin/sh\nrm -rf /\n",
        "pickle.png": pickle.dumps({"a": 1}),
        "text.webp": b"RIFF\x10\x00\x00\x00WEBPVP8 ",
        "zip.jpg": b"PK\x03\x04" + bytes(100),
        "tiny.png": tiny_png(),
    }
    files |= {f"cut{n}.png": whole.getvalue()[:n] for n in range(8, 40)}
    rng = np.random.default_rng(0)
    files |= {f"noise{n}.jpg": rng.bytes(200) for n in range(60)}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return sorted(folder.iterdir())


def png_header(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiny_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def bad_adapters(folder: Path) -> list[Path]:
    import torch

    folder.mkdir()
    (folder / "pickle.safetensors").write_bytes(pickle.dumps({"a": print}))
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "huge.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    (folder / "json.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")
    save_file({"x": torch.zeros(3)}, folder / "other.safetensors")
    return sorted(folder.iterdir())


def bad_settings() -> list[dict[str, Any]]:
    """What no drawing can have."""
    wrong: dict[str, list[Any]] = {
        "n": [0, -1, 17, 10**30, 2.5, "4", None, [], {}, True],
        "steps": [0, -5, 151, 10**400, "x", None, 1e99],
        "seed": [-1, 2**63, 10**100, "seed", 0.5, None, True],
        "guidance": [-1, 51, 1e300, "7", [], None],
        "strength": [-0.1, 3, "1", None, {}],
        "prompt": ["", "  ", "x" * 3000, None, 5, ["a"], "nul\0byte"],
        "negative_prompt": ["x" * 3000, 5, None],
        "model": ["../rex", "/etc/passwd", "rex/../../x", "", None, 7, "nobody", "rex\0"],
        "backbone": ["../../x", "/etc", "pocket-base", "nobody/there"],
        "unknown": [1],
    }
    whole = {"prompt": "a {subject}", "model": "rex"} | FEW
    return [whole | {key: value} for key, values in wrong.items() for value in values]


def bad_forms() -> list[dict[str, Any]]:
    wrong: dict[str, list[Any]] = {
        "title": ["", "!!!", "x" * 100, None, 5, "../../"],
        "class_noun": ["", "-rf", "--out", "a;b", "do\ng", "x" * 100, None, 3, "../x", "$(id)"],
        "backbone": ["nobody", "../x", "/etc", None, 5],
        "method": ["both", None, 1, "--lora"],
        "steps": [0, -1, 10**9, 2.5, "many", True],
        "learning_rate": [0, -1, "fast", [], "nan"],
        "rank": [0, 10**6, "x"],
        "batch_size": [0, -3, 10**6],
        "resolution": [1, 10**6, "big"],
        "prior": ["some", 5],
        "train_text_encoder": ["yes", 2],
        "identifier": ["", "two words", "--seed", "x" * 50, "a\0b", None],
        "seed": [-1, 2**64, "x", None],
        "nothing": [1],
    }
    return [FORM | {key: value} for key, values in wrong.items() for value in values]


def test_three_hundred_hostile_requests(
    server: Server, client: Client, place: Path, tmp_path: Path
) -> None:
    """A clear message for each; nothing new outside the library's own drawers; the app lives."""
    before = listing(place)
    refused = 0

    def refuses(*args: Any, api_name: str) -> None:
        nonlocal refused
        with pytest.raises(AppError) as error:
            client.predict(*args, api_name=api_name)
        text = str(error.value)
        assert 5 < len(text) < 600 and "Traceback" not in text, (args[-1:], text)
        assert "upstream Gradio app" not in text, (args[-1:], text)
        refused += 1

    photos = [handle_file(photo) for photo in sorted((place / "photos").iterdir())]
    for file in bad_files(tmp_path / "bad"):
        (verdict,) = client.predict([handle_file(file)], api_name="/verdicts")
        assert not verdict["usable"] and verdict["verdict"].startswith("not used: ")
        refused += 1
    mixed = [*photos[:2], *map(handle_file, sorted((tmp_path / "bad").iterdir())[:5])]
    refuses(mixed, FORM, api_name="/train")
    refuses([], FORM, api_name="/train")
    refuses(photos * 5, FORM, api_name="/train")
    for settings in bad_settings():
        refuses(settings, api_name="/draw")
    for form in bad_forms():
        refuses(photos[:3], form, api_name="/train")
    for value in (None, 5, "x", [], [1], {}):
        refuses(value, api_name="/draw")
        refuses(photos[:3], value, api_name="/train")
    for file in bad_adapters(tmp_path / "adapters"):
        refuses(handle_file(file), "pocket-tiny", "Bad", "x", api_name="/import")
    good = place / "library/rex/pytorch_lora_weights.safetensors"
    for backbone, title, trigger in (
        ("pocket-base", "X", "x"), ("nobody", "X", "x"), ("../x", "X", "x"),
        ("pocket-tiny", "", "x"), ("pocket-tiny", "X", "x" * 500), ("pocket-tiny", "..", "x"),
    ):  # fmt: skip
        refuses(handle_file(good), backbone, title, trigger, api_name="/import")
    for value in (5, None, [], {"a": 1}):
        refuses("rex", value, api_name="/rename")
        refuses(value, api_name="/delete")
        refuses("x", value, api_name="/job")
    refuses({"prompt": "a dog", "backbone": "sd-v1-4"} | FEW, api_name="/draw")
    copies = [*photos[:2], photos[0], photos[1]]
    refuses(copies, FORM, api_name="/train")
    found = client.predict(copies, api_name="/verdicts")
    assert [v["usable"] for v in found] == [True, True, False, False]
    refuses(handle_file(good), "pocket-tiny", "x" * 61, "x", api_name="/import")
    for name in ("", "../rex", "/", ".jobs", ".photos", "nobody", "rex/../rex", "x" * 5000):
        refuses(name, api_name="/delete")
        refuses(name, "Name", api_name="/rename")
        refuses(name, "kohya", "fp16", api_name="/export")
        refuses(name, "pause", api_name="/job")
    for title in ("", " ", "x" * 500):
        refuses("rex", title, api_name="/rename")
    for format, dtype in (("exe", "fp16"), ("kohya", "fp8"), ("../x", "fp16"), ("svd", "fp16")):
        refuses("rex", format, dtype, api_name="/export")
    for kind, names in (
        ("all", []), ("models", []), ("models", ["rex"]), ("models", ["../rex", "rex"]),
        ("backbones", ["/etc"]), ("backbones", [5]), ("backbones", "x"), ("models", None),
    ):  # fmt: skip
        refuses({"prompt": "a {subject}", "model": "rex"} | FEW, kind, names, api_name="/compare")
    refused += raw_requests(server, place)
    assert refused >= 300
    assert listing(place) == before
    assert len(draw(client)) == 1 and client.predict(api_name="/jobs") == []


def raw_requests(server: Server, place: Path) -> int:
    """Past the client: paths that were never uploaded, names that climb; how many were refused."""
    count = 0
    stranger = f"http://127.0.0.1:{server.port}/gradio_api/info"
    for path in ("/etc/passwd", "../../etc/passwd", f"{Path.home()}/.bashrc", stranger,
                 "http://example.com/x.png", "https://huggingface.co/x.png"):  # fmt: skip
        data = {"path": path, "meta": {"_type": "gradio.FileData"}}
        reply = requests.post(f"{server.url}/gradio_api/call/verdicts", json={"data": [[data]]})
        event = reply.json().get("event_id")
        text = reply.text
        if event:
            text = requests.get(f"{server.url}/gradio_api/call/verdicts/{event}").text
        assert "error" in text and "root:" not in text
        reply = requests.get(f"{server.url}/gradio_api/file={path}")
        assert reply.status_code in (403, 404, 422, 500) and "root:" not in reply.text
        count += 2
    outside = place.parent / "evil.png"
    for name in ("../../../evil.png", str(outside), "..\\evil.png", ".hidden"):
        files = {"files": (name, b"x", "image/png")}
        (kept,) = requests.post(f"{server.url}/gradio_api/upload", files=files).json()
        assert "/library/.uploads/" in kept and ".." not in Path(kept).parts
    assert not outside.exists()
    return count


def listing(place: Path) -> list[tuple[str, int]]:
    """All files but uploads, the drawn and the exported."""
    drawers = {".uploads", ".pictures", ".exports"}
    files = itertools.chain(place.rglob("*"), (place.parent).glob("*"))
    return sorted(
        (str(path), path.stat().st_size if path.is_file() else 0)
        for path in files
        if not drawers & {*path.parts} and path.suffix != ".log"
    )


def test_strangers_and_locks(place: Path, capsys: Any) -> None:
    library = ["--library", str(place / "other")]
    for words, hint in (
        (["--host", "0.0.0.0"], "--let-anyone-in"),
        (["--share"], "--let-anyone-in"),
        (["--auth", "nobody"], "user:password"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["app", *library, *words])
        assert end.value.code == 2 and hint in capsys.readouterr().err
    assert not (place / "other").exists()


def test_one_app_a_library(server: Server, place: Path, capsys: Any) -> None:
    assert main(["app", "--library", str(place / "library")]) == 2
    assert "Another" in capsys.readouterr().err


def test_everybody_sees_their_own_trainings(tmp_path: Path) -> None:
    photos = [handle_file(photo) for photo in dog_photos(tmp_path / "photos")]
    with serving(tmp_path / "library", "--auth", "ann:x1,bob:y2") as server:
        assert requests.get(f"{server.url}/config").status_code == 401
        ann, bob = (
            Client(server.url, auth=who, verbose=False) for who in (("ann", "x1"), ("bob", "y2"))
        )
        job = ann.predict(photos, FORM | {"steps": 300}, api_name="/train")
        assert [j["id"] for j in ann.predict(api_name="/jobs")] == [job["id"]]
        assert bob.predict(api_name="/jobs") == []
        with pytest.raises(AppError, match="There is no such job"):
            bob.predict(job["id"], "cancel", api_name="/job")
        ann.predict(job["id"], "cancel", api_name="/job")
        until(lambda: ann.predict(api_name="/jobs")[0]["state"] == "cancelled")
