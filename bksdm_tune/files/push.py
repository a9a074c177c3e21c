"""``bksdm-tune push``: a finished run as a repository on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from bksdm_tune.artifacts import MANIFEST, read_manifest, verify_manifest
from bksdm_tune.config import parse
from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.resolve import HUB_ID

CARD = "README.md"
# In the run for whoever made it; the contact sheet shows what matters of the pictures.
LEFT_OUT = ("samples/", "log.jsonl", "score/", "generated/", "tracker/")


@dataclass(frozen=True)
class Config:
    """Upload a finished run: weights, card with its scores, contact sheet, configuration."""

    run: Positional[Path]
    """Run folder."""
    repo: str
    """user/name on the Hub; made if it is not there."""
    private: bool = False
    """Make it a private one."""
    dry_run: bool = False
    """List what would be uploaded, and stop."""

    def __post_init__(self) -> None:
        if not HUB_ID.fullmatch(self.repo):
            raise UsageError(f"--repo {self.repo} is no Hub id; write user/name.")


def main(argv: list[str]) -> int:
    config = parse(Config, argv, "bksdm-tune push")
    verify_manifest(config.run)
    files = contents(config.run)
    if config.dry_run:
        sizes = {name: size_of(what) for name, what in files.items()}
        for name, size in sizes.items():
            print(f"{size:>12,}  {name}")
        total = sum(sizes.values()) / 1e6
        print(f"{len(files)} files, {total:.1f} MB, would go to {config.repo}. Nothing was sent.")
        return 0
    print(f"Uploaded {len(files)} files: {upload(config, files)}")
    return 0


def contents(run: Path) -> dict[str, bytes | Path]:
    """What goes up by name: what the manifest lists without the pictures on the way, the card with
    its scores, and a manifest of just these, by which a copy can be verified."""
    manifest = read_manifest(run)
    names = [name for name in sorted(manifest["files"]) if not name.startswith(LEFT_OUT)]
    files: dict[str, bytes | Path] = {name: run / name for name in names}
    listed = {name: manifest["files"][name] for name in names}
    if CARD in listed:
        card = card_with_scores(run)
        files[CARD] = card
        listed[CARD] = {"bytes": len(card), "sha256": hashlib.sha256(card).hexdigest()}
    text = json.dumps(manifest | {"files": listed}, indent=2, sort_keys=True) + "\n"
    return files | {MANIFEST: text.encode()}


def size_of(what: bytes | Path) -> int:
    return len(what) if isinstance(what, bytes) else what.stat().st_size


def upload(config: Config, files: dict[str, bytes | Path]) -> str:
    """The address of the commit.

    Raises:
        DataError: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    operations = [CommitOperationAdd(name, what) for name, what in files.items()]
    try:
        api.create_repo(config.repo, private=config.private, exist_ok=True)
        commit = api.create_commit(
            config.repo, operations, commit_message="Upload by bksdm-tune", num_threads=2
        )
    except Exception as error:  # whichever HTTP library the Hub client uses raises its own
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{config.repo} cannot be uploaded: {reason}\nA token with write access is needed: "
            "type `hf auth login`, or set HF_TOKEN. The same command tries again."
        ) from None
    return str(commit.commit_url)


def card_with_scores(run: Path) -> bytes:
    text = (run / CARD).read_text("utf-8")
    scores = run / "score" / "scores.json"
    return (text + (scores_section(scores) if scores.is_file() else "")).encode()


def scores_section(path: Path) -> str:
    result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    protocol = result["protocol"]
    lines = [
        "\n## Scores\n",
        f"Protocol `{protocol['name']}` ({protocol['dino']['name']}, {protocol['clip']['name']}), "
        f"{result['counts']['generated']} pictures, fingerprint `{result['fingerprint'][:16]}`.\n",
        "| | score | untuned | photos |",
        "|---|---|---|---|",
    ]
    for name, metric in result["metrics"].items():
        if metric["macro"] is not None:
            top = (metric["ceiling"] or {}).get("without_self")
            cells = [_figure(v) for v in (metric["macro"], metric["floor"], top)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    if protocol["name"] == "pocket":
        lines.append("\nThe pocket encoders know the illustrated world only: no published figures.")
    return "\n".join(lines) + "\n"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
