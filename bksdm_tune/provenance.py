"""What this program says in the metadata of an adapter file about what it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from bksdm_tune.errors import DataError

KEY = "bksdm_tune"


@dataclass(frozen=True)
class Provenance:
    """What an adapter was made from; all fields are text."""

    backbone: str
    """Registry name or Hub id; of a folder its name alone, for files are given away."""
    architecture: str
    """Fingerprint of the U-Net's config (bksdm_tune.architecture)."""
    shape: str
    """The architecture in words."""
    trigger: str
    """What the adapter means in a prompt; empty: nothing says so."""
    run: str
    """Content key of the run, as in its manifest; else in words how it was made."""

    def metadata(self) -> dict[str, str]:
        return {KEY: json.dumps(asdict(self), sort_keys=True)}


def provenance_in(metadata: Mapping[str, str]) -> Provenance | None:
    """The record in a file's metadata; None: it was made by another tool.

    Raises:
        DataError: it cannot be read.
    """
    if KEY not in metadata:
        return None
    try:
        found = json.loads(metadata[KEY])
        if not all(isinstance(value, str) for value in found.values()):
            raise TypeError
        return Provenance(**found)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise DataError("has metadata of this program that it cannot read.") from None
