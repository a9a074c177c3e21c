"""The app's four tabs as PNG files, wide and as on a phone, after a real training on pocket.

    python scripts/app_screenshots.py --out docs/images [--subject dog] [--steps 600]

Needs playwright and a Chromium on the PATH (Debian: apt install chromium).  The photos are those of
the subject's illustrated twin.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from playwright.sync_api import sync_playwright

from subjects.catalogue import get_subject
from subjects.illustrated.twins import twin_photos

TABS = ("Personalise", "Create", "Compare", "Library")
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PORT, PATIENCE = 7878, 600_000  # milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--subject", default="dog")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        words = ["app", "--library", f"{scratch}/library", "--port", str(PORT)]
        process = subprocess.Popen([sys.executable, "-m", "bksdm_tune", *words])
        try:
            wait_for(PORT)
            with sync_playwright() as driver:
                browser = driver.chromium.launch(
                    executable_path=shutil.which("chromium"), args=["--no-sandbox"]
                )
                page = browser.new_page(viewport=WIDE)
                page.set_default_timeout(PATIENCE)
                page.goto(f"http://127.0.0.1:{PORT}")
                use(page, photos(options.subject, Path(scratch)), options)
                for size, name in ((WIDE, "app"), (PHONE, "app-phone")):
                    page.set_viewport_size(size)
                    for tab in TABS:
                        page.locator("button[role=tab]:visible", has_text=tab).click()
                        page.wait_for_timeout(1500)
                        path = options.out / f"{name}-{tab.lower()}.png"
                        page.screenshot(path=path, full_page=True)
        finally:
            process.terminate()
            process.wait()


def wait_for(port: int) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.3)


def photos(subject: str, folder: Path) -> list[str]:
    paths = []
    for number, photo in enumerate(twin_photos(subject)):
        paths.append(folder / f"photo-{number + 1}.png")
        photo.save(paths[-1])
    return [str(path) for path in paths]


def use(page: Any, files: list[str], options: Any) -> None:
    """Train, draw, compare, look at the attention, export."""
    page.set_input_files("#photos input[type=file]", files)
    page.wait_for_selector(".thumbs figure")
    page.fill("#title input, #title textarea", "Rex")
    page.fill("#noun input, #noun textarea", get_subject(options.subject).class_noun)
    page.click("text=Advanced (empty")
    page.fill("#steps input, #steps textarea", str(options.steps))
    page.click("text=Advanced (empty")
    page.click("#start")
    page.wait_for_selector(".state-done")
    page.wait_for_timeout(3000)
    for tab, button, done in (
        ("Create", "#draw", "#gallery img"),
        ("Compare", "#compare", "#contest img"),
        ("Compare", "#attend", "#maps img"),
        ("Library", "#score", "#judged li"),
        ("Library", "#export", "#exported a"),
    ):
        page.locator("button[role=tab]:visible", has_text=tab).click()
        page.wait_for_timeout(1500)
        if button == "#score":
            page.locator("button:visible", has_text="Score").first.click()
        page.click(button)
        page.wait_for_selector(done)


if __name__ == "__main__":
    main()
