"""Limits of the demo: what one visitor can use, and when a run has to stop.

The page adds that one image pair is generated at a time. Other checks of a visitor's settings are the library's own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

MAX_BODY = 64 * 1024
"""Bytes of one request. The page sends no files, and its largest request is a prompt."""


@dataclass(frozen=True)
class Limits:
    """What one visitor can use.

    Attributes:
        prompt_characters: the longest prompt.
        seconds: the longest run, from the prompt to both images. It is stopped then, and the rows so far stay.
        waiting: runs that may wait for the one that is generated.

    Raises:
        ValueError: a number below 1.
    """

    prompt_characters: int = 300
    seconds: float = 300
    waiting: int = 8

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value >= 1:  # NaN too
                raise ValueError(f"{name}={value} is out of range: give 1 or more")

    def check_prompt(self, prompt: object) -> str:
        """The prompt without spaces around it; raises ValueError if it is no text or too long."""
        if not isinstance(prompt, str):
            raise ValueError(f"the prompt is a {type(prompt).__name__}: give a text")
        if len(prompt) > self.prompt_characters:
            raise ValueError(
                f"the prompt has {len(prompt)} characters, and {self.prompt_characters} are the most: shorten it"
            )
        return prompt.strip()


class Run:
    """One run of a visitor. Other threads stop it; the generation checks `stop_reason` at every token."""

    def __init__(self, seconds: float):
        self._seconds, self._started, self._event = seconds, time.monotonic(), threading.Event()

    def stop(self) -> None:
        """Ask the generation to stop."""
        self._event.set()

    @property
    def stop_reason(self) -> str | None:
        """Why the run has to stop; None while it may go on."""
        if self._event.is_set():
            return "stopped"
        if time.monotonic() - self._started > self._seconds:
            return f"stopped after {self._seconds:g} seconds, the limit of one run"
        return None


class SmallBodies:
    """ASGI middleware that refuses a request whose body is larger than `MAX_BODY`, or of unknown length."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if _has_small_body(scope.get("headers", ())):
            await self.app(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})


def _has_small_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether every length that the headers give is at most `MAX_BODY`; a header may stand there twice."""
    for name, value in headers:
        if name == b"transfer-encoding":
            return False
        if name == b"content-length" and not (value.isdigit() and len(value) <= 20 and int(value) <= MAX_BODY):
            return False
    return True
