"""What goes wrong at the Hub, in one sentence each: where, what, and what to do."""

from __future__ import annotations

import difflib

from ...errors import AdaptKitError, Hub, System, Usage, quoted, some
from .. import disk
from . import talk
from .ids import Ref

CACHED = f"{talk.OFFLINE}=1 uses what is cached"
AGAIN, LATER = "run the same command again", "run the same command again later"
BY_STATUS = {
    401: ("the token was rejected (401)", talk.LOGIN),
    403: ("this token may not do that (403)", "use a token with write access to it"),
    412: ("was changed by somebody else meanwhile (412)", AGAIN),
    416: ("has no such range of bytes (416)", AGAIN),
}


def explained(e: BaseException, ref: Ref, token: str | bool | None = None) -> AdaptKitError:
    """A failure in one sentence. token: the one that was used, if it was given."""
    while type(e) is RuntimeError and e.__cause__ is not None:
        e = e.__cause__  # an upload that failed in a thread
    if isinstance(e, AdaptKitError):
        return e
    with talk.using(token):
        named = _named(e, ref)
        return named.at(f"hub: {ref}") if named else _unnamed(e).at(f"hub: {ref}")


def _named(e: BaseException, ref: Ref) -> AdaptKitError | None:
    """What the client has classes for."""
    kinds, at = {c.__name__ for c in type(e).__mro__}, f"hub: {ref.id}"
    if "OfflineModeIsEnabled" in kinds:
        return Hub("HF_HUB_OFFLINE is set", hint="unset it")
    if "GatedRepoError" in kinds:
        who = "with the account of your token" if talk.has_token() else f"and {talk.LOGIN}"
        return Hub("is gated", hint=f"accept its conditions at {talk.endpoint()}/{ref.id} {who}")
    if "DisabledRepoError" in kinds:
        return Hub("has been disabled by the Hub (403)")
    if "RevisionNotFoundError" in kinds:
        return Hub(f"has no revision {quoted(ref.revision or 'main')!r}", where=at, hint=_revisions(ref))
    if "RepositoryNotFoundError" in kinds:
        seen = "this token cannot see it" if talk.has_token() else "it is private and you are not logged in"
        hint = _near(ref) or ("check the name" if talk.has_token() else f"check the name, or {talk.LOGIN}")
        return Hub(f"not found, or {seen} ({talk.status_of(e)})", where=at, hint=hint)
    if "HFValidationError" in kinds:
        return Usage(f"{quoted(ref.id)!r} is not a Hub id", hint="write it as user/name")
    if "EntryNotFoundError" in kinds:
        return Hub(f"lacks a file that it listed ({_first_line(e)})", hint=AGAIN)
    return None


def _unnamed(e: BaseException) -> AdaptKitError:
    """By the status of the answer, or by what happened to the connection."""
    if status := talk.status_of(e):
        return _by_status(status, e)
    if isinstance(e, talk.Short):
        return Hub(f"{talk.endpoint()} sends fewer bytes than it lists", hint=LATER)
    if "xet-write-token" in str(e):
        return Hub(
            f"{talk.endpoint()} does not take uploads by Xet ({_first_line(e)})", hint="set HF_HUB_DISABLE_XET=1"
        )
    if talk.is_network(e):
        return Hub(f"{talk.endpoint()} {_broken(e)}", hint=f"look at the network, and {AGAIN}; {CACHED}")
    if isinstance(e, OSError) and e.errno:
        return System(disk.why(e), where=e.filename, hint=disk.HINTS.get(e.errno))
    what = f"{type(e).__name__}: {_first_line(e)}"
    if isinstance(e, ValueError | KeyError | TypeError):
        return Hub(f"{talk.endpoint()} gave an answer that is not the Hub's ({what})")
    return Hub(what)


def _by_status(status: int, e: BaseException) -> Hub:
    said = quoted(_discreet(str(getattr(e, "server_message", None) or "")))
    said = f": {said}" if said else ""
    if status in BY_STATUS:
        words, hint = BY_STATUS[status]
        return Hub(words + said, hint=hint)
    if status == 429:
        asked = talk.asked_wait(e)
        wait = f", wait {asked:.0f} s" if asked is not None else ""
        return Hub(f"too many requests (429){wait}{said}", hint=LATER)
    if status >= 500:
        return Hub(f"{talk.endpoint()} fails ({status}){said}", hint=LATER)
    return Hub(f"{talk.endpoint()} refuses ({status}){said}")


def _broken(e: BaseException) -> str:
    name = type(e).__name__
    if "Timeout" in name:
        return "does not answer in time"
    if "Connect" in name and "Aborted" not in name:
        return f"cannot be reached ({_first_line(e)})"
    return f"broke the connection off ({_first_line(e) or name})"


def _first_line(e: BaseException) -> str:
    return quoted(_discreet(next(iter(str(e).strip().splitlines()), type(e).__name__)))


def _discreet(text: str) -> str:
    """What others said, without a token that they repeat."""
    own = talk.own_token()
    return text.replace(own, "hf_...") if own else text


def _revisions(ref: Ref) -> str | None:
    try:
        refs = talk.api().list_repo_refs(ref.id)
        return f"it has {some([r.name for r in (*refs.branches, *refs.tags)], 6)}"
    except Exception:  # a hint that cannot be had is left out
        return None


def _near(ref: Ref) -> str | None:
    """Did you mean: another kind of repository, or another spelling of the name."""
    client, (owner, _, name) = talk.api(), ref.id.rpartition("/")
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
