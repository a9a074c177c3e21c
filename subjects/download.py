"""One file over HTTP: resumed, verified, put in place atomically, never held in memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests
from tqdm import tqdm

from bksdm_tune.artifacts import sha256_file
from bksdm_tune.errors import DataError

CHUNK = 1 << 13  # bytes; at most this much is lost when a connection breaks
RETRIED_STATUSES = (408, 425, 429, 500, 502, 503, 504)
RANGE_NOT_SATISFIABLE = 416


@dataclass(frozen=True)
class Patience:
    """How long to try.

    ``attempts`` is how many in a row may bring no new bytes; ``timeout`` is the seconds of
    silence after which a connection has stalled; after k failures in a row ``sleep(2**k)``.
    """

    attempts: int = 4
    timeout: float = 30.0
    sleep: Callable[[float], None] = time.sleep


class _Unfinished(Exception):
    """The transfer stopped early in a way that another attempt may cure."""


def download(
    url: str, path: Path, sha256: str | None = None, patience: Patience | None = None
) -> None:
    """Fetch ``url`` into ``path``; a broken transfer goes on from ``<path>.part``.

    A file already there with the right hash is kept.  ``sha256`` None accepts any whole file.

    Raises:
        DataError: the server refuses or stays silent, the bytes are wrong (and removed), or
            the disk takes no more.
    """
    if sha256 and path.is_file() and sha256_file(path) == sha256:
        return
    part = path.with_name(path.name + ".part")
    resumed = part.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _transfer_patiently(url, part, patience or Patience())
        if sha256 and sha256_file(part) != sha256:
            part.unlink()
            if not resumed:
                raise DataError(f"{url} does not hold the expected bytes; they were removed.")
            return download(url, path, sha256, patience)  # the old part may have been the fault
        part.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from None


def _transfer_patiently(url: str, part: Path, patience: Patience) -> None:
    failures, most = 0, _size(part)
    while True:
        try:
            return _transfer(url, part, patience.timeout)
        except (requests.ConnectionError, requests.Timeout, _Unfinished) as error:
            reason = error
        except requests.RequestException as error:
            raise DataError(f"{url} cannot be fetched: {error}") from None
        failures = 0 if _size(part) > most else failures + 1
        most = max(most, _size(part))
        if failures >= patience.attempts:
            raise DataError(f"{url} cannot be fetched ({failures} attempts): {reason}")
        patience.sleep(2**failures)


def _transfer(url: str, part: Path, timeout: float) -> None:
    start = _size(part)
    headers = {"Accept-Encoding": "identity"}  # ranges and lengths then count the file's own bytes
    if start:
        headers["Range"] = f"bytes={start}-"
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if response.status_code == RANGE_NOT_SATISFIABLE and start:
            return _settle_full_part(response, part)
        if response.status_code in RETRIED_STATUSES:
            raise _Unfinished(f"the server answered {response.status_code} {response.reason}")
        response.raise_for_status()
        if response.status_code == requests.codes.partial and _range_start(response) != start:
            part.unlink(missing_ok=True)
            raise _Unfinished("the server sent another range than was asked for")
        _append(response, part, start if response.status_code == requests.codes.partial else 0)


def _settle_full_part(response: requests.Response, part: Path) -> None:
    """There is nothing after our part: it is either whole or not a part of this file."""
    if response.headers.get("Content-Range") != f"bytes */{_size(part)}":
        part.unlink()
        raise _Unfinished("the part on disk is longer than the file")


def _range_start(response: requests.Response) -> int | None:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _append(response: requests.Response, part: Path, start: int) -> None:
    """Write the body from byte ``start`` on; a server that ignored the range starts at 0."""
    length = response.headers.get("Content-Length")
    total = start + int(length) if length else None
    bar = tqdm(
        desc=part.stem, total=total, initial=start, unit="B", unit_scale=True,
        leave=False, disable=None,
    )  # fmt: skip
    with bar, open(part, "ab" if start else "wb") as file:
        try:
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        except requests.exceptions.ChunkedEncodingError as error:
            raise _Unfinished(error) from None
    if total is not None and _size(part) != total:
        raise _Unfinished(f"{_size(part)} of {total} bytes arrived")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
