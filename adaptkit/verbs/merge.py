"""merge: adapters into a base model's files. Copying a checkpoint with a change."""

from __future__ import annotations

import gc
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..engines import checks, layout
from ..engines.device import checked
from ..engines.draft import draft
from ..engines.local import Local
from ..engines.plan import Plan
from ..engines.survival import Survival, share
from ..errors import AdaptKitError, AdaptKitWarning, Mismatch, Usage, quoted
from ..store.checkpoint import Checkpoint, stamps, unchanged
from ..store.disk import write_all
from ..store.entry import Entry
from ..store.hub import Ref, called
from ..store.hub.ids import repo_of
from ..store.output import Output
from .inputs import (
    Counter,
    Progress,
    Source,
    adapters_of,
    base_of,
    dtype_of,
    files_of,
    model_of,
    size_of,
    weights_of,
    workers_of,
)
from .push import Wish, push_folder, writable
from .receipt import Known, receipt

MUCH_LOST = 0.1  # of the update's norm: worth a warning


@dataclass
class Merged:
    """What a merge did.

    output: the folder, None when it went to the Hub shard by shard.     pushed: where it is at the Hub.
    changed: names of the tensors that changed.    bytes: of weights written.    seconds: it took.
    virtual: ids of the tokens that a soft prompt became.
    lost: share of the update's norm that rounding to the stored dtype ate, for each adapter.
    """

    output: Path | None
    changed: list[str]
    tensors: int
    bytes: int
    seconds: float
    lost: list[float] = field(default_factory=list)
    resumed: int = 0
    virtual: list[int] = field(default_factory=list)
    pushed: str | None = None


def merge(
    base: str | Path | Adapter,
    adapters: Source | Sequence[Source] | None = None,
    output: str | Path | None = None,
    *,
    push: str | None = None,
    private: bool = False,
    streaming: bool = False,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    device: str = "auto",
    max_shard_size: str | int | None = None,
    engine: str = "local",
    workers: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Merge adapters into a base model, on files.

    base: a model folder or weight file, or a Hub id.   adapters: folders, files, Hub ids or Adapter values, in order.
    Without adapters, base is one, and the model that its settings name is the base.
    output: a folder that appears when it is complete.      push: Hub id to push it to; private: if that is new.
    streaming: shard by shard from the Hub to the Hub, without an output.      weights: how much of each update is taken, 1 when left out.
    dtype: "float32", "bfloat16" or "float16"; None keeps each tensor's.       max_shard_size: "5GB"; None keeps the files.
    device: where sums are made, "auto", "cpu" or "cuda".    workers: threads.    progress: called with (bytes, of bytes).

    Raises Usage, Corrupt, Mismatch, Unsafe, System or Hub, before a byte is written wherever that can be known.
    """
    start = time.monotonic()
    sensible(output, push, streaming, private)
    if output is None and not streaming:
        hint = "give -o OUT" + (", or --streaming to push shard by shard" if push else "")
        raise Usage("no output was given", where="OUT", hint=hint)
    base, adapters = pair(base, adapters, progress)
    how = {"weights": weights, "dtype": dtype, "max_shard_size": max_shard_size}
    said = {"allow_nonfinite": allow_nonfinite, "device": "cpu" if device == "auto" else device}
    if streaming:
        from .streaming import stream

        possible(engine, workers)
        return stream(base, adapters, push, how, said, private=private, workers=workers, progress=progress)
    target = writable(push) if push else None  # before the work: a name that is refused is no use at its end
    plan = planned(base, adapters, **how, progress=progress)
    plan.options |= said
    merged = execute(plan, Path(output), start, device, engine, workers, overwrite, progress)
    if target:
        merged.pushed = _push(Path(output), target, private, progress)
        merged.seconds = time.monotonic() - start
    return merged


def _push(output: Path, target: Ref, private: bool, progress: Progress | None) -> str:
    try:
        return push_folder(output, target, Wish(private), progress).url
    except AdaptKitError as e:
        e.hint = f"{e.hint or 'the merge is done'}; then: adaptkit push {output} {target}"
        raise


def sensible(output: str | Path | None, push: str | None, streaming: bool, private: bool) -> None:
    """Raises Usage for options that do not go together."""
    if streaming and (not push or output is not None):
        raise Usage("goes from the Hub to the Hub", where="--streaming", hint="give --push user/name and no -o OUT")
    if private and not push:
        raise Usage("is about a repository of the Hub", where="--private", hint="give --push user/name")
    if push:
        repo_of(push, "--push")


def pair(
    base: str | Path | Adapter, adapters: Source | Sequence[Source] | None, progress: Progress | None = None
) -> tuple[str | Path, list[Source]]:
    """The base and the adapters of a command; the base is the one that a lone adapter names."""
    if isinstance(adapters, (str, Path, Adapter)):
        adapters = [adapters]
    if adapters:
        return base, list(adapters)
    lone = adapters_of(base, progress)
    return base_of(lone[0]), lone


Turn = Callable[[list[Adapter], list[float]], tuple[list[Adapter], list[float]]]


def planned(
    base: str | Path | Checkpoint,
    adapters: Source | Sequence[Source],
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    verb: str = "merge",
    turn: Turn | None = None,
    progress: Progress | None = None,
) -> Plan:
    """The plan of a merge, with everything checked that can be known without writing.

    turn: makes of the adapters and weights those that are really applied; unmerge gives their inverses, last one first.
    """
    wanted, limit = dtype_of(dtype), size_of(max_shard_size)
    read = adapters_of(adapters, progress, base)
    with unhurried():
        checkpoint = base if isinstance(base, Checkpoint) else model_of(base, progress)
        return _planned(checkpoint, read, weights, wanted, limit, verb, turn)


def _planned(
    checkpoint: Checkpoint,
    read: list[Adapter],
    weights: Sequence[float] | None,
    wanted: str | None,
    limit: int | None,
    verb: str,
    turn: Turn | None,
) -> Plan:
    taken = stamps(checkpoint.files)
    taken |= stamps(file for a in read for file in files_of(a))
    factors = weights_of(weights, len(read))
    for adapter in read:
        try:
            checks.numbers(adapter)
        except AdaptKitError as e:
            raise e.at(called(Path(adapter.meta.get("path", "adapter")))) from None
    applied = turn(read, factors) if turn else (read, factors)
    plan = draft(checkpoint, *applied, dtype=wanted, max_shard_size=limit)
    plan.adapters = [Path(a.meta["path"]) for a in read if "path" in a.meta]
    plan.stamps = taken | stamps(file for file, _ in plan.extras)
    plan.options = {"verb": verb, "weights": factors, "dtype": wanted, "max_shard_size": limit}
    return plan


@contextmanager
def unhurried() -> Iterator[None]:
    """Without the cyclic garbage collector, whose rounds over a growing heap make planning quadratic."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def execute(
    plan: Plan,
    output: Path,
    start: float,
    device: str = "auto",
    engine: str = "local",
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Write what a plan says."""
    possible(engine, workers)
    where = checked(device)
    checkpoint, total = plan.checkpoint, plan.nbytes
    done = Counter(total, progress)
    local = Local(workers, done, plan.options.get("allow_nonfinite", False), where)
    inputs = [checkpoint.path, *plan.adapters]
    out = Output(
        output, plan=plan.fingerprint(), need=plan.need, inputs=inputs, overwrite=overwrite, files=len(plan.files)
    )
    check_pickles(checkpoint, later=[t.source for t in plan.targets if t.copied])
    with out:
        local.write(plan, out)
        _beside(plan, out)
        unchanged(plan.stamps)
        merged = Merged(output, [t.name for t in plan.changed], len(plan.targets), total, 0.0, resumed=out.resumed)
        merged.virtual = list(plan.virtual)
        survived(plan, local.survival, merged)
        out.publish(said_of(plan, local.survival, merged))
    for text in local.warnings:
        warnings.warn(text, AdaptKitWarning, stacklevel=2)
    merged.seconds = time.monotonic() - start
    return merged


def possible(engine: str, workers: int | None) -> None:
    """Raises Mismatch for an engine that is not there, Usage for workers that are none."""
    if engine != "local":
        raise Mismatch(f"engine {engine!r} is not installed", where="--engine", hint="use local")
    workers_of(workers)


def check_pickles(checkpoint: Checkpoint, later: Sequence[Entry] = ()) -> None:
    """Verify the checksums of PyTorch files, since nothing else would notice a flipped bit.

    later: entries that are copied whole, which are checked on the way.
    """
    from ..store import pickles

    for file in checkpoint.files:
        if file.suffix != ".safetensors" and pickles.is_pickle(file):
            pickles.check_crc(file, {e.offset for e in later if e.file == file and e.crc})


def _beside(plan: Plan, out: Output) -> None:
    """Write what goes beside the weights."""
    for name, value in beside(plan):
        if isinstance(value, bytes):
            write_text(out, name, value)
        elif not out.done(name):
            out.copy(value, name)


def write_text(out: Output, name: str, raw: bytes) -> None:
    """Write a small file of an output, if it is not there already."""
    if out.done(name):
        return
    with out.file(name, len(raw), sha256=hashlib.sha256(raw).hexdigest()) as fd:
        write_all(fd, raw, 0)


def beside(plan: Plan) -> Iterator[tuple[str, Path | bytes]]:
    """Config, index and the files that go with the model: as they are, or as text."""
    for source, name in plan.extras:
        if not (name == "config.json" and plan.config is not None):
            yield name, source
    if plan.config is not None:
        yield "config.json", as_text(plan.config)
    yield from plan.texts.items()
    if table := layout.index(plan.files):
        yield layout.index_name(plan.checkpoint), as_text(table)


def as_text(value: dict[str, Any]) -> bytes:
    """JSON as it is written beside weights."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def said_of(plan: Plan, found: Survival, merged: Merged, known: Known | None = None) -> dict[str, Any]:
    """adaptkit.json of a merge."""
    return {**receipt(plan, found.tensors, known), "lost_to_rounding": [round(x, 4) for x in merged.lost]}


def survived(plan: Plan, found: Survival, merged: Merged) -> None:
    """Fill in what rounding ate, and warn when it was much."""
    if not found.update:
        return
    count = len(plan.options.get("weights") or [1])
    sums = [found.adapters.get(str(k), [0.0, 0.0]) for k in range(count)]
    merged.lost = [share(lost, update) for update, lost in sums]
    for k, lost in enumerate(merged.lost):
        if lost > MUCH_LOST:
            name = called(plan.adapters[k]) if k < len(plan.adapters) else f"adapter {k + 1}"
            worst = quoted(found.worst[0][0])
            text = f"rounding ate {lost:.0%} of the update of {name} (worst in {worst}); --dtype float32 keeps it"
            warnings.warn(text, AdaptKitWarning, stacklevel=2)
    if found.zero:
        text = "every base weight that was looked at is zero; is the base damaged?"
        warnings.warn(text, AdaptKitWarning, stacklevel=2)
