"""What goes wrong, said in the browser as on the command line."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from typing import Any

import gradio as gr

from bksdm_tune.errors import DataError, UsageError

SHORT = {
    "Cancelled": "Cancelled.",
    "OutOfMemoryError": "The memory of the graphics card is full; a training may be running.",
}


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose errors become a message to the person."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (UsageError, DataError) as error:
            raise gr.Error(str(error), duration=12, print_exception=False) from None
        except FileNotFoundError:
            raise gr.Error("It is gone; somebody deleted it meanwhile.") from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise gr.Error("The disk is full: free some space.", print_exception=False) from None
        except Exception as error:
            text = SHORT.get(type(error).__name__)  # their modules load torch
            if text is None:
                raise
            raise gr.Error(text, duration=6, print_exception=False) from None

    return run


def owner_of(request: gr.Request | None) -> str | None:
    """Who asks, where --auth is on."""
    return getattr(request, "username", None)
