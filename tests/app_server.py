"""The app in a process of its own, as a person starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from subjects.illustrated.twins import twin_photos

PATIENCE = 120  # seconds


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Server:
    """``process``: of the app; ``url``: where it is."""

    def __init__(self, library: Path, *words: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = library.parent / f"app-{self.port}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bksdm_tune", "app", "--library", str(library),
                 "--port", str(self.port), *words],
                stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        until(self._answers)

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return requests.get(self.url, timeout=5).status_code in (200, 401)
        except requests.ConnectionError:
            return False

    def end(self, how: int = signal.SIGINT) -> None:
        self.process.send_signal(how)
        self.process.wait(PATIENCE)


def until(true: object, patience: float = PATIENCE) -> None:
    """Wait for ``true()``."""
    started = time.monotonic()
    while not true():  # type: ignore[operator]
        assert time.monotonic() - started < patience, true
        time.sleep(0.1)


@contextmanager
def serving(library: Path, *words: str) -> Iterator[Server]:
    server = Server(library, *words)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


def dog_photos(folder: Path) -> list[Path]:
    """Five pictures of the illustrated dog."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, picture in enumerate(twin_photos("dog")[:5]):
        paths.append(folder / f"dog{number}.png")
        picture.save(paths[-1])
    return paths
