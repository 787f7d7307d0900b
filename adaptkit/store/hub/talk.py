"""Talking to the Hub: asking again where that helps, and its failures in words."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ...errors import AdaptKitError, Hub, System, Unsafe, Usage, quoted, some
from .. import disk
from .ids import Ref

T = TypeVar("T")
TRIES = 5
FIRST_WAIT = 0.5  # seconds, doubled each time
LONGEST_WAIT = 300.0  # seconds that a 429 may ask for
AGAIN = (408, 429, 500, 502, 503, 504)
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def api(token: str | bool | None = None) -> Any:
    """The client: endpoint and token as huggingface_hub finds them."""
    from huggingface_hub import HfApi

    _trusted(token)
    return HfApi(token=token, library_name="adaptkit")


def headers(token: str | bool | None = None) -> dict[str, str]:
    """The headers of a download; without compression, so that positions in the file are what they seem."""
    from huggingface_hub.utils import build_hf_headers

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


@contextmanager
def talking(ref: Ref | str, token: str | bool | None = None) -> Iterator[None]:
    """Turn what goes wrong at the Hub into a sentence about `ref`; keep the client's own bars and log lines down."""
    try:
        with _hushed():
            yield
    except Exception as e:
        raise explained(e, ref if isinstance(ref, Ref) else Ref(ref), token) from e


_mutex = threading.Lock()
_quiet: list[Callable[[], None]] = []  # one for each who is talking; the first holds what the last puts back


@contextmanager
def _hushed() -> Iterator[None]:
    """Without the client's progress bars and log lines, in all threads that talk."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    with _mutex:
        if not _quiet:
            log, shown = logging.getLogger("huggingface_hub"), not are_progress_bars_disabled()
            level = log.level
            _quiet.append(lambda: (log.setLevel(level), enable_progress_bars() if shown else None))
            log.setLevel(logging.CRITICAL)
            if shown:
                disable_progress_bars()
        _quiet.append(lambda: None)
    try:
        yield
    finally:
        with _mutex:
            _quiet.pop()
            if len(_quiet) == 1:
                _quiet.pop()()


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
    return asked if asked is not None else FIRST_WAIT * 2**k


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
    return (
        bool(homes & {"httpx", "httpx2", "requests", "urllib3"})
        or isinstance(e, ConnectionError | TimeoutError)
        or is_short(e)
    )


def is_short(e: BaseException) -> bool:
    """Whether the client got fewer bytes than it was told to expect."""
    return type(e) is OSError and "Consistency check failed" in str(e)


def explained(e: BaseException, ref: Ref, token: str | bool | None = None) -> AdaptKitError:
    """A failure in one sentence."""
    while type(e) is RuntimeError and e.__cause__ is not None:
        e = e.__cause__  # an upload that failed in a thread
    if isinstance(e, AdaptKitError):
        return e
    where = f"hub: {ref}"
    named = _named(e, ref, where, token)
    if named is not None:
        return named
    if status := status_of(e):
        return _by_status(status, e, where)
    if is_short(e):
        return Hub(
            f"{endpoint()} sends fewer bytes than it lists", where=where, hint="run the same command again later"
        )
    if is_network(e):
        return Hub(f"{endpoint()} {_broken(e)}", where=where, hint=_network_hint())
    if isinstance(e, OSError) and e.errno:
        return System(disk.why(e), where=e.filename or where, hint=disk.HINTS.get(e.errno))
    if isinstance(e, ValueError | KeyError | TypeError):
        return Hub(
            f"{endpoint()} gave an answer that is not the Hub's ({type(e).__name__}: {_first_line(e)})", where=where
        )
    return Hub(f"{type(e).__name__}: {_first_line(e)}", where=where)


def _named(e: BaseException, ref: Ref, where: str, token: str | bool | None) -> AdaptKitError | None:
    """What the client has classes for."""
    kinds = {c.__name__ for c in type(e).__mro__}
    if "OfflineModeIsEnabled" in kinds:
        return Hub("HF_HUB_OFFLINE is set", where=where, hint="unset it")
    if "GatedRepoError" in kinds:
        who = "with the account of your token" if has_token(token) else f"and {LOGIN}"
        return Hub("is gated", where=where, hint=f"accept its conditions at {endpoint()}/{ref.id} {who}")
    if "DisabledRepoError" in kinds:
        return Hub("has been disabled by the Hub (403)", where=where)
    if "RevisionNotFoundError" in kinds:
        return Hub(
            f"has no revision {quoted(ref.revision or 'main')!r}", where=f"hub: {ref.id}", hint=_revisions(ref, token)
        )
    if "RepositoryNotFoundError" in kinds:
        seen = "this token cannot see it" if has_token(token) else "it is private and you are not logged in"
        near = _near(ref, token) or ("check the name" if has_token(token) else f"check the name, or {LOGIN}")
        return Hub(f"not found, or {seen} ({status_of(e)})", where=f"hub: {ref.id}", hint=near)
    if "HFValidationError" in kinds:
        return Usage(f"{quoted(ref.id)!r} is not a Hub id", hint="write it as user/name")
    if "EntryNotFoundError" in kinds:
        return Hub(f"lacks a file that it listed ({_first_line(e)})", where=where, hint="run the same command again")
    return None


def _by_status(status: int, e: BaseException, where: str) -> Hub:
    said = quoted(getattr(e, "server_message", None) or "")
    said = f": {said}" if said else ""
    if status == 401:
        return Hub(f"the token was rejected (401){said}", where=where, hint=LOGIN)
    if status == 403:
        return Hub(f"this token may not do that (403){said}", where=where, hint="use a token with write access to it")
    if status == 412:
        return Hub("was changed by somebody else meanwhile (412)", where=where, hint="run the same command again")
    if status == 416:
        return Hub(f"has no such range of bytes (416){said}", where=where, hint="run the same command again")
    if status == 429:
        asked = asked_wait(e)
        wait = f", wait {asked:.0f} s" if asked is not None else ""
        return Hub(f"too many requests (429){wait}{said}", where=where, hint="run the same command again later")
    if status >= 500:
        return Hub(f"{endpoint()} fails ({status}){said}", where=where, hint="run the same command again later")
    return Hub(f"{endpoint()} refuses ({status}){said}", where=where)


def _broken(e: BaseException) -> str:
    name = type(e).__name__
    if "Timeout" in name:
        return "does not answer in time"
    if "Connect" in name and "Aborted" not in name:
        return f"cannot be reached ({_first_line(e)})"
    return f"broke the connection off ({_first_line(e) or name})"


def _network_hint() -> str:
    return "look at the network, and run the same command again; HF_HUB_OFFLINE=1 uses what is cached"


def _first_line(e: BaseException) -> str:
    return quoted(next(iter(str(e).strip().splitlines()), type(e).__name__))


def has_token(token: str | bool | None = None) -> bool:
    """Whether requests carry a token."""
    from huggingface_hub import get_token

    return isinstance(token, str) or (token is not False and bool(get_token()))


def _revisions(ref: Ref, token: str | bool | None) -> str | None:
    try:
        refs = api(token).list_repo_refs(ref.id)
        return f"it has {some([r.name for r in (*refs.branches, *refs.tags)], 6)}"
    except Exception:  # a hint that cannot be had is left out
        return None


def _near(ref: Ref, token: str | bool | None) -> str | None:
    """Did you mean: another kind of repository, or another spelling of the name."""
    import difflib

    client, (owner, _, name) = api(token), ref.id.rpartition("/")
    for kind in ("dataset", "space"):
        try:
            client.repo_info(ref.id, repo_type=kind)
            return f"there is a {kind} of that name; give a model"
        except Exception:  # as above
            continue
    try:
        ids = [m.id for m in client.list_models(author=owner or None, search=None if owner else name, limit=1000)]
    except Exception:  # as above
        return None
    folded = {i.casefold(): i for i in ids}
    near = difflib.get_close_matches(ref.id.casefold(), folded, 1, 0.8)
    return f"did you mean {quoted(folded[near[0]])}?" if near else None


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
