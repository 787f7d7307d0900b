"""verify: whether a model is the merge it is said to be. Computes the merge again and compares."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..engines.blocks import ELEMENTS, Tensor
from ..engines.local import expected, single_threaded_blas
from ..engines.plan import Plan, Target
from ..engines.survival import Survival, share
from ..engines.workspace import Workspace
from ..errors import Mismatch, Usage, some
from ..store.arrays import FLOATS, NUMPY, WORDS, working
from ..store.checkpoint import Checkpoint
from ..store.entry import Entry
from ..store.safepaths import read_small
from .inputs import Source, adapters_of, model_of
from .merge import check_pickles, planned
from .receipt import inputs_of, receipt_of, strangers, weights_said

STEPS = 2.0  # roundings that a sound merge by another program may be away from ours


@dataclass
class Verified:
    """What a comparison found.

    equal: tensors with the same bytes.   close: tensors within STEPS roundings.   wrong: names, each with what is wrong.
    compared: tensors looked at, of `tensors`.     lost: share of the update's norm that rounding ate.
    others: files of the inputs whose sha256 is another than in the model's adaptkit.json.
    """

    ok: bool
    tensors: int
    compared: int
    equal: int
    close: int
    wrong: dict[str, str] = field(default_factory=dict)
    lost: float = 0.0
    others: list[str] = field(default_factory=list)


def verify(
    merged: str | Path,
    *,
    base: str | Path,
    adapters: Source | Sequence[Source],
    weights: Sequence[float] | None = None,
    sample: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verified:
    """Say whether a model is the merge of adapters into a base, by computing it again.

    merged: the model in question, by any program, a folder or a Hub id as are base and adapters.   weights: left out, those of its adaptkit.json, or 1.
    sample: compare only so many tensors, spread over the model; None compares all.

    Returns a Verified; a tensor that differs is a finding, not an error. Raises as merge does when the inputs do not fit.
    """
    if sample is not None and sample < 1:
        raise Usage(f"{sample} tensors cannot tell anything", where="--sample")
    found = model_of(merged, progress)
    check_pickles(found)
    original = model_of(base, progress)
    read = adapters_of(adapters, progress, original)
    weights = weights_said(found.root, len(read), "compared") if weights is None else weights
    plan = planned(original, read, weights=weights, dtype=_dtype(found, original), progress=progress)
    either = {t.name for t in plan.targets} | found.entries.keys()
    result = Verified(True, len(either), 0, 0, 0, others=_others(found, plan))
    for name in plan_difference(plan.targets, found):
        result.wrong[name] = "is missing" if name not in found.entries else "is not part of the merge"
    result.wrong |= _texts(plan.texts, found)
    names = _sampled(plan.targets, sample)
    total, done = sum(t.nbytes for t in plan.targets if t.name in names), 0
    space = Workspace()
    with tempfile.TemporaryDirectory(prefix="adaptkit-") as scratch, single_threaded_blas():
        for target, tensor in expected(plan, Path(scratch), names):
            if target.name in found.entries:
                _compare(target, tensor, found.entries[target.name], space, result)
                tensor.forget()
            done += target.nbytes
            if progress:
                progress(done, total)
    space.close()
    rounding = Survival.of(space.looks)
    result.lost, result.ok = share(rounding.lost, rounding.update), not result.wrong
    if not (result.equal + result.close) and not result.wrong:
        raise Mismatch("nothing was compared")
    return result


def _others(found: Checkpoint, plan: Plan) -> list[str]:
    """Inputs that are not the files which adaptkit.json names by their sha256."""
    recorded = receipt_of(found.root).get("inputs")
    return strangers(recorded, inputs_of(plan)) if isinstance(recorded, list) else []


def _dtype(found: Checkpoint, base: Checkpoint) -> str | None:
    """The dtype that the merge was written in, when all of its floats have one and the base's have not."""
    kinds = {e.dtype for e in found.entries.values() if e.dtype in FLOATS}
    before = {e.dtype for e in base.entries.values() if e.dtype in FLOATS}
    words = {v: k for k, v in WORDS.items()}
    return words[kinds.pop()] if len(kinds) == 1 and kinds != before and "F64" not in kinds else None


def _texts(texts: dict[str, bytes], found: Checkpoint) -> dict[str, str]:
    """Files beside the weights that are not what a soft prompt makes of them."""
    there = {name: found.root / name for name in texts}
    wrong = {name: "is missing" for name, file in there.items() if not file.is_file()}
    differ = [n for n, file in there.items() if n not in wrong and read_small(file, 1 << 30) != texts[n]]
    return wrong | dict.fromkeys(differ, "is not what merging writes")


def plan_difference(targets: Sequence[Target], found: Checkpoint) -> list[str]:
    """Names that only one of the two has."""
    return sorted({t.name for t in targets} ^ found.entries.keys())


def _sampled(targets: Sequence[Target], sample: int | None) -> set[str]:
    """Names spread evenly over the tensors that change, and then over the others."""
    changed = [t.name for t in targets if t.changes or t.replaced]
    others = [t.name for t in targets if not (t.changes or t.replaced)]
    if sample is None or sample >= len(targets):
        return {*changed, *others}
    picked = _spread(changed, min(len(changed), max(1, sample - sample // 4)))
    return {*picked, *_spread(others, sample - len(picked))}


def _spread(names: list[str], n: int) -> list[str]:
    return [names[i * len(names) // n] for i in range(n)] if n else []


def _compare(target: Target, tensor: Tensor, entry: Entry, space: Workspace, result: Verified) -> None:
    result.compared += 1
    if (entry.shape, entry.dtype) != (target.shape, target.dtype):
        result.wrong[target.name] = (
            f"is {entry.dtype} {list(entry.shape)}, {target.dtype} {list(target.shape)} expected"
        )
        return
    if not entry.plain:
        raise Mismatch(
            "verifying a compressed or strided PyTorch file is not supported", where=entry.file.name, hint="convert it"
        )
    tally = _Tally(target)
    tensor.observe = tally.exactly
    step = ELEMENTS * NUMPY[target.dtype].itemsize if target.dtype in NUMPY else ELEMENTS
    for at in range(0, target.nbytes, step):
        length = min(step, target.nbytes - at)
        ours, theirs = bytearray(length), bytearray(length)
        tensor.fill(memoryview(ours), at, space)
        space.read(entry.file, memoryview(theirs), entry.offset + at)
        tally.look(ours, theirs, at, space)
    if reason := tally.reason():
        result.wrong[target.name] = reason
    elif tally.different:
        result.close += 1
    else:
        result.equal += 1


class _Tally:
    """Differences of one tensor, counted over its blocks.

    A number may be STEPS roundings away. That alone would pass a model without the update, where the update is smaller
    than a rounding; so what is there of the update is measured too: <theirs - base, D> / <D, D>, free of rounding noise.
    """

    def __init__(self, target: Target):
        self.target, self.different, self.far, self.largest = target, 0, 0, 0.0
        self.along, self.norm, self.noise = 0.0, 0.0, 0.0
        self._before: np.ndarray | None = None
        self._after: np.ndarray | None = None

    def exactly(self, first: int, before: np.ndarray, after: np.ndarray) -> None:
        """Called with the block just computed, before its rounding."""
        self._before, self._after = before.copy(), after.copy()

    def look(self, ours: bytearray, theirs: bytearray, at: int, space: Workspace) -> None:
        """Compare one block."""
        if self.target.copied or self.target.dtype not in FLOATS:
            if ours != theirs:
                self.far += int((np.frombuffer(ours, "u1") != np.frombuffer(theirs, "u1")).sum())
            return
        dtype = working(self.target.dtype)
        a, b = (np.frombuffer(x, NUMPY[self.target.dtype]).astype(dtype) for x in (ours, theirs))
        if ours != theirs:
            self._distances(a, b)
        self._update(a, b, at, space)

    def _distances(self, a: np.ndarray, b: np.ndarray) -> None:
        eps = EPS[self.target.dtype]
        distance = np.abs(a - b)
        distance[np.isnan(a) & np.isnan(b) | (a == b)] = 0
        # a sum made in float32 differs by more than its last bit where terms cancel: a floor at the tensor's own scale
        noise = max((c.tuner.noise for c in self.target.changes), default=1.0)
        floor = np.abs(a).mean() * max(eps, noise * EPS["F32"])
        far = ~(distance <= STEPS * (np.maximum(np.abs(a), np.abs(b)) * eps + floor))
        self.different += int((distance != 0).sum())
        self.far += int(far.sum())
        self.largest = max(self.largest, float(np.nan_to_num(distance[far], nan=np.inf).max(initial=0.0)))

    def _update(self, a: np.ndarray, b: np.ndarray, at: int, space: Workspace) -> None:
        before, after = self._before, self._after if self._after is not None else a
        self._before = self._after = None
        source = self.target.source
        if before is None and isinstance(source, Entry) and source.plain and source.shape == self.target.shape:
            raw = bytearray(len(a) * NUMPY[source.dtype].itemsize)
            space.read(
                source.file,
                memoryview(raw),
                source.offset + at // NUMPY[self.target.dtype].itemsize * NUMPY[source.dtype].itemsize,
            )
            before = np.frombuffer(raw, NUMPY[source.dtype]).astype(a.dtype)
        if before is None or not (np.isfinite(before).all() and np.isfinite(b).all()):
            return
        update = (after - before).astype("f8")
        self.along += float(np.dot(b - before, update))
        self.norm += float(np.dot(update, update))
        self.noise += float(np.dot((a - after).astype("f8") ** 2, update**2))

    def reason(self) -> str | None:
        """What is wrong with the tensor, None when it is sound."""
        if self.far and (self.target.copied or self.target.dtype not in FLOATS):
            return f"differs from the base in {self.far:,} of {self.target.nbytes:,} bytes"
        if self.far:
            return f"has {self.far:,} wrong numbers of {self.target.nbytes // NUMPY[self.target.dtype].itemsize:,}, by up to {self.largest:.3g}"
        if self.different and self.norm:
            share = self.along / self.norm
            if abs(share - 1) > 0.05 + 6 * self.noise**0.5 / self.norm:
                return f"holds {share:.0%} of the update"
        return None


EPS = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23, "F64": 2.0**-52}


def described(result: Verified) -> str:
    """The findings in a sentence."""
    if result.ok:
        close = f", {result.close} within {STEPS:g} roundings" if result.close else ""
        return f"this is that merge: {result.equal} of {result.compared} tensors equal{close}{_aside(result)}"
    first = next(iter(result.wrong.items()))
    return f"not that merge: {len(result.wrong)} of {result.tensors} tensors differ ({some(result.wrong)}); {first[0]} {first[1]}{_aside(result)}"


def _aside(result: Verified) -> str:
    return f"; {some(result.others)}: other bytes than adaptkit.json names" if result.others else ""
