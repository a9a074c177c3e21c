"""The app in a real browser, from photos to a file that stock diffusers draws the same with."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from app_server import Server, dog_photos, serving, until

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
WAIT = 120_000  # milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Visitor:
    """A page of the app, and every request that wanted to leave this machine."""

    def __init__(self, browser: Any, server: Server) -> None:
        self.page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.page.set_default_timeout(WAIT)
        self.strangers: list[str] = []
        self.page.on("request", self._note)
        self.page.goto(server.url)
        self.page.wait_for_selector("#photos input[type=file]", state="attached")

    def _note(self, request: Any) -> None:
        local = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:")
        if not request.url.startswith(local):
            self.strangers.append(request.url)

    def tab(self, name: str) -> None:
        self.page.locator("button[role=tab]:visible", has_text=name).click()

    def ask_for(self, photos: list[Path], title: str, steps: int) -> None:
        """Fill in the form and start."""
        page = self.page
        page.set_input_files("#photos input[type=file]", [str(photo) for photo in photos])
        page.wait_for_selector(".thumbs figure >> nth=4")
        page.fill("#title input, #title textarea", title)
        page.fill("#noun input, #noun textarea", "dog")
        if not page.is_visible("#steps"):
            page.click("text=Advanced (empty")
        page.fill("#steps input, #steps textarea", str(steps))
        page.click("#start")

    def state(self, name: str) -> None:
        self.page.wait_for_selector(f".state-{name}")


def job_files(library: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (library / ".jobs").glob("*.json")]


def test_from_photos_to_a_file_that_draws_the_same(browser: Any, tmp_path: Path) -> None:
    library = tmp_path / "library"
    with serving(library) as server:
        visitor = Visitor(browser, server)
        page = visitor.page
        visitor.ask_for(dog_photos(tmp_path / "photos"), "My Rex", 12)
        visitor.state("running")
        page.reload()  # in the middle: the job is found again
        visitor.state("done")
        page.wait_for_selector("#samples img")
        visitor.tab("Create")
        page.click("text=a {subject} on the beach")
        page.click("#draw")
        page.wait_for_selector("#gallery img")
        assert "a picture" in page.inner_text("#drawn")
        visitor.tab("Compare")
        page.click("#compare button, #compare")
        page.wait_for_selector("#contest img >> nth=1")
        assert "seconds a picture" in page.inner_text("#compare-said")
        page.click("#attend")
        page.wait_for_selector("#maps img")
        visitor.tab("Library")
        page.wait_for_selector("#shelf >> text=My Rex")
        page.click("#export")
        page.wait_for_selector("#exported a")
        with page.expect_download() as download:
            page.click("#exported a")
        taken = tmp_path / "my-rex.safetensors"
        download.value.save_as(taken)
        assert visitor.strangers == []
        page.close()
    drawn = [path for path in (library / ".pictures").glob("*.png") if said(path)["n"] == "beach"]
    assert len(drawn) == 4
    for path in drawn:
        assert np.abs(stock(taken, said(path)["seed"]) - pixels(path)).max() <= 2


def said(path: Path) -> dict[str, Any]:
    settings = json.loads(Image.open(path).info["bksdm_tune"])
    return settings | {"n": "beach" if settings["prompt"].endswith("beach") else ""}


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def stock(adapter: Path, seed: int) -> Any:
    """What diffusers alone draws with the exported file."""
    from diffusers import StableDiffusionPipeline

    from bksdm_tune.resolve import resolve

    pipe = StableDiffusionPipeline.from_pretrained(resolve("pocket-base").root, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(adapter)
    (picture,) = pipe(
        "a sks11df dog on the beach", num_inference_steps=25, guidance_scale=7.5,
        generator=torch.Generator().manual_seed(seed),
    ).images  # fmt: skip
    return np.asarray(picture).astype(int)


def test_cancel_and_a_dead_app(browser: Any, tmp_path: Path) -> None:
    """Cancelling leaves a run that resumes; after kill -9 another app tells the truth."""
    library = tmp_path / "library"
    photos, log = dog_photos(tmp_path / "photos"), library / "rex/log.jsonl"
    with serving(library) as server:
        visitor = Visitor(browser, server)
        visitor.ask_for(photos, "Rex", 400)
        visitor.state("running")
        until(lambda: list((library / "rex").glob("checkpoint-*")))
        visitor.page.click("#cancel")
        visitor.state("cancelled")
        until(lambda: all(job["pid"] is None for job in job_files(library)))
        before = log.read_text().splitlines()
        visitor.page.click("#resume")
        visitor.state("running")
        until(lambda: len(log.read_text().splitlines()) > len(before) + 3)
        assert log.read_text().splitlines()[:30] == before[:30]  # seconds included: not begun again
        server.end(signal.SIGKILL)
        visitor.page.close()
    with serving(library) as server:
        visitor = Visitor(browser, server)
        visitor.state("running")  # the training outlives the app, and is found again
        (job,) = job_files(library)
        os.kill(job["pid"], signal.SIGKILL)
        visitor.state("failed")
        visitor.page.click("#resume")  # and the queue goes on
        visitor.state("running")
        visitor.page.click("#cancel")
        visitor.state("cancelled")
        until(lambda: job_files(library)[0]["pid"] is None)
        visitor.page.click("#forget")
        visitor.page.wait_for_selector("text=No trainings yet.")
        visitor.page.close()
    assert not (library / "rex").exists()
