"""What every verb accepts: adapters as paths or as Adapter values, weights as numbers, sizes as people write them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..adapter import Adapter
from ..errors import AdaptKitError, Usage, quoted
from ..formats.base import read
from ..store.arrays import WORDS
from ..store.checkpoint import Checkpoint, open_checkpoint
from ..store.entry import Entry
from ..store.hub import Ref, called, origin, place, ref_of
from ..store.hub.ids import SCHEME

Source = str | Path | Adapter
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


Progress = Callable[[int, int], None]


class Counter:
    """Adds up bytes from all threads for a progress function."""

    def __init__(self, total: int, report: Progress | None):
        self.total, self.report, self.done = total, report, 0

    def __call__(self, n: int) -> None:
        self.done += n  # a lost update would only delay the bar
        if self.report:
            self.report(min(self.done, self.total), self.total)


def model_of(source: str | Path, progress: Progress | None = None) -> Checkpoint:
    """A model in a folder, a file or a repository of the Hub."""
    return opened(place(source, "model", progress=progress))


def opened(path: Path) -> Checkpoint:
    """A model on this machine; errors name the id that it has at the Hub."""
    with _by_id(path):
        return open_checkpoint(path)


def adapter_at(path: Path, base: Path | None = None, several: bool = False) -> Adapter:
    """An adapter on this machine, with its model where that is known; errors as above.

    several: whether it is one of several, so that errors have to say whose file they mean.
    """
    with _by_id(path):
        try:
            return read(path, base=base)
        except AdaptKitError as e:
            if several and e.where and not origin(path) and (path / e.where).is_file():
                e.where = path / e.where
            raise


@contextmanager
def _by_id(path: Path) -> Iterator[None]:
    """Say which repository a file is in: many have one of that name."""
    try:
        yield
    except AdaptKitError as e:
        if (ref := origin(path)) and e.where and not Path(e.where).is_absolute():
            e.where = f"hub: {Ref(ref.id, None, ref.sub)}/{e.where}"
        raise


def adapters_of(
    sources: Source | Sequence[Source],
    progress: Progress | None = None,
    base: str | Path | Adapter | Checkpoint | None = None,
) -> list[Adapter]:
    """Adapters, read where a path or a Hub id was given. base: their model; some formats need it to be read."""
    if isinstance(sources, (str, Path, Adapter)):
        sources = [sources]
    if not sources:
        raise Usage("no adapter was given", where="ADAPTER")
    here = base.path if isinstance(base, Checkpoint) else base
    known = Path(here) if isinstance(here, str | Path) and Path(here).exists() else None
    several = len(sources) > 1

    def one(source: str | Path) -> Adapter:
        return adapter_at(place(source, "adapter", progress=progress), known, several)

    return [s if isinstance(s, Adapter) else one(s) for s in sources]


def base_of(adapter: Adapter) -> str:
    """The base model that an adapter's settings name, with its revision. Raises Usage when nobody here can have it."""
    where = called(Path(adapter.meta.get("path", "adapter")))
    said, hint = adapter.meta.get("base") or "", "give the base: adaptkit merge BASE ADAPTER -o OUT"
    if not said:
        raise Usage("does not name its base model", where=where, hint=hint)
    if Path(said).exists():
        return said
    revision = adapter.about.get("revision")
    ref = ref_of(said, bare=True)
    if ref is None:
        words = f"names its base by a path of the machine it was trained on ({quoted(said)!r}), which is not here"
        raise Usage(words, where=where, hint=hint)
    text = f"{SCHEME}{said}@{revision}" if revision and not ref.revision else SCHEME + said
    if ref_of(text) is None:
        raise Usage(f"names its base at the revision {quoted(revision)!r}", where=where, hint=hint)
    return text


def files_of(adapter: Adapter) -> list[Path]:
    """The files that an adapter's numbers have not been read from yet."""
    values = [v for s in adapter.sites.values() for v in s.params.values()] + list(adapter.whole.values())
    return list(dict.fromkeys(v.file for v in values if isinstance(v, Entry)))


def weights_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """One finite weight for each adapter; 1 for all when none are given."""
    found = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(found) != count:
        raise Usage(f"{len(found)} weights for {count} adapters", where="--weights", hint="give one for each")
    if not all(math.isfinite(w) for w in found):
        raise Usage(f"{found} are not all numbers", where="--weights")
    return found


def dtype_of(dtype: str | None) -> str | None:
    """A dtype to write, None to keep each tensor's."""
    if dtype in (None, "keep"):
        return None
    if dtype not in WORDS or dtype == "float64":
        raise Usage(f"{quoted(dtype)!r} is not one of keep, float32, bfloat16, float16", where="--dtype")
    return dtype


def workers_of(workers: int | None) -> int:
    """A number of threads: of those that hold a large matrix each, one per core and no more than 8 when left out."""
    if workers is not None and workers < 1:
        raise Usage(f"{workers} workers cannot do anything", where="--workers")
    return workers or min(os.cpu_count() or 1, 8)


def size_of(text: str | int | None) -> int | None:
    """ "5GB" -> 5000000000."""
    if text is None:
        return None
    if isinstance(text, int):
        text = str(text)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in UNITS or float(found[1]) * UNITS[found[2].upper()] < 1:
        raise Usage(f"{quoted(text)!r} is not a size", where="--max-shard-size", hint="write it as 5GB")
    return int(float(found[1]) * UNITS[found[2].upper()])
