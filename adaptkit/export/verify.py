"""Whether a graph computes what the model computes: |graph - torch| <= max(t * largest output, 4 * |torch - torch one size up|).

t: 1e-5 for float32, 1e-2 for float16, 1e-1 for bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..errors import AdaptKitError, Mismatch
from .exam import Exam, apart, largest, steps, texts
from .players import Arrays, Player

NOISE = 4  # times the model's own: two paths that both round


@dataclass
class Checked:
    """What comparing found. Differences are the largest between any two numbers.

    prefill, decode: of steps without and with a past.    noise: the model's own, one size up; None if not measured.
    bound: what was allowed.    greedy: tokens equal.    of: tokens compared.    ties: unlike, but as likely within bound.
    shapes: (batch, tokens) that were tried.    provider: of ONNX Runtime, where the graph really ran.
    """

    prefill: float
    decode: float
    noise: float | None
    bound: float
    largest: float
    greedy: int = 0
    of: int = 0
    ties: int = 0
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    provider: str = ""

    @property
    def ok(self) -> bool:
        """Whether the graph is the model."""
        return max(self.prefill, self.decode) <= self.bound and self.greedy + self.ties == self.of


def compared(exam: Exam, player: Player) -> Checked:
    """The other side's answers beside torch's."""
    truth, gaps = exam.answers, []
    for mine, theirs in zip(steps(player, exam), truth.steps, strict=True):  # one script's numbers at a time
        gaps.append((apart(mine[:1], theirs[:1]), apart(mine[1:], theirs[1:])))
    prefill, decode = (float(np.max(gap)) for gap in zip(*gaps, strict=True))  # NaN stays
    most = max(largest(v) for said in truth.steps for step in said for v in step.values())
    bound = max(exam.tolerance * max(most, 1.0), NOISE * (exam.noise or 0.0))
    found = Checked(prefill, decode, exam.noise, bound, most)
    for (mine, _), theirs, margins in zip(texts(player, exam), truth.tokens, truth.margins, strict=True):
        _count(found, mine, theirs, margins)
    found.shapes = list(dict.fromkeys(_size(words) for said in exam.inputs for words in said))
    found.provider = getattr(player, "provider", "")
    return found


@dataclass
class Likeness:
    """How much a quantised graph says what the model says. cosine, typical: the smallest and the median of output rows."""

    cosine: float
    typical: float
    difference: float
    largest: float
    greedy: int = 0
    of: int = 0


def likeness(exam: Exam, player: Player) -> Likeness:
    """A quantised graph's answers beside torch's. Raises Mismatch for answers that are no numbers."""
    truth, cosines, gaps, sizes = exam.answers, [], [], []
    for said, asked in zip(steps(player, exam), truth.steps, strict=True):
        for mine, theirs in ((a[n], b[n]) for a, b in zip(said, asked, strict=True) for n in b):
            cosines.append(_cosines(mine, theirs))
            gaps.append(largest(mine - theirs.astype(np.float64)))
            sizes.append(largest(theirs))
    every = np.concatenate(cosines)
    found = Likeness(float(every.min()), float(np.median(every)), float(np.max(gaps)), max(sizes))
    for (mine, _), theirs in zip(texts(player, exam), truth.tokens, strict=True):
        found.greedy, found.of = found.greedy + int((mine == theirs).sum()), found.of + mine.size
    if not np.isfinite(found.difference):
        raise Mismatch("the quantised graph gives NaN or infinity; nothing was published", hint="leave --quantize out")
    return found


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosine of each two rows that belong together."""
    a, b = (v.astype(np.float64).reshape(-1, v.shape[-1] if v.ndim > 1 else v.size) for v in (a, b))
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)


def refuse(checked: Checked, what: str) -> None:
    """Raises Mismatch when a graph is not the model."""
    worst = max(checked.prefill, checked.decode)
    if not worst <= checked.bound:  # NaN as well
        noise = "" if checked.noise is None else f", the model's own noise is {checked.noise:.1e}"
        raise _wrong(f"{what} differs from torch by {worst:.1e}, {checked.bound:.1e} is allowed{noise}")
    if not checked.ok:
        raise _wrong(f"{what} continues texts with other tokens: {checked.of - checked.greedy} of {checked.of} differ")


def _wrong(text: str) -> AdaptKitError:
    return Mismatch(f"{text}; nothing was published", hint="please report it; --no-verify exports it all the same")


def _count(found: Checked, mine: np.ndarray, theirs: np.ndarray, margins: np.ndarray) -> None:
    """Add up equal tokens; after a tie the texts are different ones, and their rest is not compared."""
    for row, other, won in zip(mine, theirs, margins, strict=True):
        unlike = np.flatnonzero(row != other)
        end = unlike[0] if len(unlike) else len(row)
        found.greedy += int(end)
        if end == len(row) or won[end] > 2 * found.bound:
            found.of += len(row)
        else:
            found.of, found.ties = found.of + int(end) + 1, found.ties + 1


def _size(words: Arrays) -> tuple[int, ...]:
    """(batch, tokens) of a step; an image counts as one."""
    return words["input_ids"].shape if "input_ids" in words else (len(words["pixel_values"]), 1)
