"""Talking to the Hub: who asks, and asking again where that helps."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ...errors import Hub, Unsafe, Usage, quoted

T = TypeVar("T")
TRIES = 5
FIRST_WAIT = 0.5  # seconds, doubled each time; ADAPTKIT_RETRY_WAIT says another
LONGEST_WAIT = 300.0  # seconds that a 429 may ask for
AGAIN = (408, 429, 500, 502, 503, 504)
OFFLINE = "HF_HUB_OFFLINE"
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


_given: ContextVar[str | bool | None] = ContextVar("token", default=None)


@contextmanager
def using(token: str | bool | None) -> Iterator[None]:
    """Talk with a token that was given, if one was, instead of the one that huggingface_hub finds."""
    was = _given.set(_given.get() if token is None else token)
    try:
        yield
    finally:
        _given.reset(was)


def api(token: str | bool | None = None) -> Any:
    """The client: endpoint and token as huggingface_hub finds them."""
    from huggingface_hub import HfApi

    token = _given.get() if token is None else token
    _trusted(token)
    return HfApi(token=token, library_name="adaptkit")


def headers(token: str | bool | None = None) -> dict[str, str]:
    """The headers of a download; without compression, so that positions in the file are what they seem."""
    from huggingface_hub.utils import build_hf_headers

    token = _given.get() if token is None else token
    _trusted(token)
    return {**build_hf_headers(token=token, library_name="adaptkit"), "Accept-Encoding": "identity"}


def _trusted(token: str | bool | None) -> None:
    """Raises Unsafe when a token would travel in the clear."""
    found = urlsplit(endpoint())
    if found.scheme != "https" and found.hostname not in ("127.0.0.1", "::1", "localhost") and has_token(token):
        words = f"{quoted(endpoint())} would get your token unencrypted"
        raise Unsafe(
            words, where="HF_ENDPOINT", hint="use https, or log out with `hf auth logout` and without HF_TOKEN"
        )


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids asking."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def endpoint() -> str:
    """Where the Hub is."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def retried(ask: Callable[[], T], tries: int = TRIES) -> T:
    """Ask, and ask again after what passes by itself: cut connections, 429 (as long as it says), 5xx."""
    for k in range(tries):
        try:
            return ask()
        except Exception as e:
            if k == tries - 1 or not passing(e) or (k and "Connect" in type(e).__name__):  # nobody is there
                raise
            pause(e, k)
    raise AssertionError("unreachable")


on_wait: list[Callable[[str], None]] = []  # told what is waited for; a progress bar listens


def pause(e: BaseException, k: int) -> None:
    """Wait before try k + 1, and say so."""
    seconds = wait_of(e, k)
    asked = "as the Hub asks" if asked_wait(e) is not None else "before asking again"
    for listener in on_wait:
        listener(f"waiting {seconds:.0f} s, {asked}")
    time.sleep(seconds)


def passing(e: BaseException) -> bool:
    """Whether a failure may pass by itself."""
    return status_of(e) in AGAIN if status_of(e) else is_network(e) and not is_offline_error(e)


def wait_of(e: BaseException, k: int) -> float:
    """Seconds before the next try. Raises the failure when the Hub asks for more than LONGEST_WAIT."""
    asked = asked_wait(e)
    if asked is not None and asked > LONGEST_WAIT:
        raise e
    return asked if asked is not None else _first_wait() * 2**k


def _first_wait() -> float:
    text = os.environ.get("ADAPTKIT_RETRY_WAIT")
    try:
        return min(max(0.0, float(text)), LONGEST_WAIT) if text else FIRST_WAIT
    except ValueError:
        raise Usage(f"{quoted(text)!r} is not a number of seconds", where="ADAPTKIT_RETRY_WAIT") from None


def asked_wait(e: BaseException) -> float | None:
    """The seconds that an answer asks for: Retry-After, or "t" of a RateLimit header with nothing left."""
    response = getattr(e, "response", None)
    if response is None:
        return None
    said = response.headers.get("RateLimit", "")
    limited = re.search(r"\bt=(\d+)", said) if status_of(e) == 429 and re.search(r"\br=0\b", said) else None
    text = response.headers.get("Retry-After") or (limited[1] if limited else None)
    try:
        return max(0.0, float(text)) if text is not None else None
    except ValueError:
        return None


def status_of(e: BaseException) -> int:
    """The HTTP status behind a failure, 0 when there was no answer."""
    response = getattr(e, "response", None)
    return int(getattr(response, "status_code", 0) or 0)


def is_offline_error(e: BaseException) -> bool:
    return type(e).__name__ == "OfflineModeIsEnabled"


def is_network(e: BaseException) -> bool:
    """Whether a failure is the connection's: by the libraries that huggingface_hub has been built on."""
    homes = {c.__module__.partition(".")[0] for c in type(e).__mro__}
    return bool(homes & {"httpx", "httpx2", "requests", "urllib3"}) or isinstance(e, ConnectionError | TimeoutError)


class Short(ConnectionError):
    """Fewer bytes came than the Hub lists."""


def own_token(token: str | bool | None = None) -> str | None:
    """The token that requests carry: the one that was given, or the one that huggingface_hub finds."""
    from huggingface_hub import get_token

    token = _given.get() if token is None else token
    return token if isinstance(token, str) else None if token is False else get_token()


def has_token(token: str | bool | None = None) -> bool:
    """Whether requests carry a token."""
    return bool(own_token(token))


def checked_hash(name: str, found: str, expected: str) -> None:
    """Raise Hub when bytes are not those that the Hub lists."""
    if found != expected:
        kind = "sha256" if len(expected) == 64 else "git hash"
        raise Hub(
            f"arrived with {kind} {found[:12]}..., the Hub lists {expected[:12]}...",
            where=name,
            hint="run the same command again",
        )


def cache() -> Path:
    """The folder that huggingface_hub keeps repositories in."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def home() -> Path:
    """The folder that huggingface_hub keeps everything in."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME).expanduser()
