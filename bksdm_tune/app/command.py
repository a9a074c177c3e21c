"""``bksdm-tune app``: personalise, draw, compare and keep models in a browser."""

from __future__ import annotations

import ipaddress
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from bksdm_tune.artifacts import locked
from bksdm_tune.config import check_range, parse
from bksdm_tune.errors import UsageError

LARGEST_UPLOAD = "1gb"  # adapters; photos have a limit of their own
UPLOADS = ".uploads"
DEFAULT_LIBRARY = Path("library")
OPEN = "Everybody who can reach this address can use this app and see what is in its library."


@dataclass(frozen=True)
class Config:
    """Open the app: train on your photos, draw, compare, take models home."""

    library: Path = DEFAULT_LIBRARY
    """Folder of the models."""
    host: str = "127.0.0.1"
    """Address to listen on; this machine alone by default."""
    port: int = 7860
    """Port to listen on."""
    auth: str | None = None
    """Whom to let in: user:password, several with commas; everybody sees their own trainings."""
    share: bool = False
    """A public address through Gradio's servers."""
    let_anyone_in: bool = False
    """Listen beyond this machine, or --share, without --auth."""
    preload: str | None = None
    """Backbone to load at the start; default: the one that dreambooth takes here."""

    def __post_init__(self) -> None:
        check_range("--port", self.port, 1, 65535)
        if self.auth is not None:
            users(self.auth)
        if self.beyond and self.auth is None and not self.let_anyone_in:
            what = "--share" if self.share else f"--host {self.host}"
            raise UsageError(
                f"{what} opens the app to others. Say who may come in, --auth user:password, or "
                "that anyone may: --let-anyone-in."
            )

    @property
    def beyond(self) -> bool:
        """Whether others than this machine can reach it."""
        return self.share or not is_loopback(self.host)


def users(text: str) -> list[tuple[str, str]]:
    """
    Raises:
        UsageError: a pair lacks a name or a password.
    """
    pairs = [pair.partition(":")[::2] for pair in text.split(",")]
    if not all(name and password for name, password in pairs):
        raise UsageError("--auth wants user:password, several with commas: ann:x1,bob:y2.")
    return [(name, password) for name, password in pairs]


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(argv: list[str]) -> int:
    config = parse(Config, argv, "bksdm-tune app")
    root = config.library.expanduser().absolute()
    # Before Gradio is imported: nothing is told to anybody, uploads lie in the library.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_TEMP_DIR"] = str(root / UPLOADS)
    with locked(root / ".app"):
        serve(config, root)
    return 0


def stay_here() -> None:
    """Keep Gradio from fetching addresses that a request names instead of a file."""
    import gradio.processing_utils
    import safehttpx

    async def refuse(host: str) -> str:
        raise ValueError(f"This app fetches nothing; {host} was not asked.")

    safehttpx.async_validate_url = refuse
    gradio.processing_utils.PUBLIC_HOSTNAME_WHITELIST.clear()


def tidy(root: Path) -> None:
    """Remove what an app that was killed left behind."""
    for name in (UPLOADS, ".estimate-*", ".deleted-*"):
        for path in root.glob(name):
            shutil.rmtree(path, ignore_errors=True)


def serve(config: Config, root: Path) -> None:
    """Until Ctrl-C."""
    stay_here()
    tidy(root)
    from bksdm_tune.app.drawing import PICTURES
    from bksdm_tune.app.page import CSS, build, theme
    from bksdm_tune.app.studio import EXPORTS, Studio

    studio = Studio(root)
    studio.jobs.start()
    backbone = config.preload or default()
    warning = OPEN if config.beyond and config.auth is None else ""
    if warning:
        red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
        print(f"{red}{warning}{plain}", file=sys.stderr)
    page = build(studio, backbone, warning)
    studio.drawing.preload(backbone)
    try:
        page.launch(
            server_name=config.host, server_port=config.port, share=config.share,
            auth=users(config.auth) if config.auth else None, theme=theme(), css=CSS,
            allowed_paths=[str(root / PICTURES), str(root / EXPORTS)],
            max_file_size=LARGEST_UPLOAD, footer_links=["api"], show_error=False, ssr_mode=False,
            prevent_thread_lock=True, quiet=True, strict_cors=True, run_history=False,
        )  # fmt: skip
        print(f"bksdm-tune is at {page.local_url} (Ctrl-C ends it; trainings go on)", flush=True)
        page.block_thread()
    except OSError as error:
        raise UsageError(f"{config.host}:{config.port} cannot be used: {error}") from None
    finally:
        studio.jobs.stop()


def default() -> str:
    """As ``bksdm-tune dreambooth`` has it."""
    from bksdm_tune.device import best_device
    from bksdm_tune.dreambooth.recipes import default_backbone

    return default_backbone(best_device())
