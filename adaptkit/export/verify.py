"""Whether a graph computes what the model computes: |graph - torch| <= max(t * largest output, 4 * |torch - torch one size up|).

t: 1e-5 for float32, 1e-2 for float16, 1e-1 for bfloat16. Sizes other than the traced ones, padded batches, a cache that grows
by one and by several tokens, and texts continued greedily. Torch answers first, so that its model may go before the
graph is loaded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import AdaptKitError, Mismatch, quoted
from . import build, virtual
from .experts import plain_experts
from .players import Arrays, Player, Torch
from .wide import widened

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
NOISE = 4  # times the model's own: two paths that both round
GREEDY = 20  # tokens
LONG = 10**9
Say = Callable[[str], None]
Positions = Callable[[np.ndarray], np.ndarray]


@dataclass
class Script:
    """A batch and what is said to it. pads: padding of each row.    chunks: tokens of each step, the first a prompt."""

    pads: tuple[int, ...]
    chunks: tuple[int, ...]


@dataclass
class Answers:
    """What one side said.

    steps: outputs of each step of each script, only of real tokens.    tokens: of each greedy text (batch, count).
    margins: by how much each greedy token won.
    """

    steps: list[list[Arrays]] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    margins: list[np.ndarray] = field(default_factory=list)


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


@dataclass
class Exam:
    """Questions to a model, with torch's answers."""

    kind: str
    scripts: list[Script]
    sources: list[Arrays]
    inputs: list[list[Arrays]]
    prompts: list[tuple[Script, Arrays, list[Arrays]]]
    answers: Answers
    noise: float | None
    tolerance: float
    positions: Positions | None
    room: int

    def greedy(self, script: Script) -> int:
        """How many tokens a text is continued by."""
        return min(GREEDY, self.room - script.chunks[0])


def exam(model: nn.Module, kind: str, names: list[str], say: Say = print) -> Exam:
    """Ask torch's model everything. names: of the outputs that count.

    model: as it is to be exported, with whatever acts on it; it is only run.
    Raises Mismatch when torch does not run it, or what it says is no number.
    """
    say("asking torch")
    player = Torch(model, kind, names)
    scripts = _scripts(model, kind)
    positions = _positions(model) if kind == "decoder" else None
    made = Exam(kind, scripts, [], [], [], Answers(), None, _tolerance(model), positions, _room(model))
    for script in scripts:
        made.sources.append(_source(model, kind, script))
        made.inputs.append(_inputs(model, kind, script))
    made.prompts = _prompts(model, kind)
    try:
        made.answers = ask(player, made)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as e:
        raise Mismatch(
            f"torch does not run the model here: {quoted(e)}", hint="--no-verify exports it unchecked"
        ) from e
    if not all(np.isfinite(v).all() for steps in made.answers.steps for step in steps for v in step.values()):
        dtype = str(model.dtype).removeprefix("torch.")
        hint = "are its weights sound?" if dtype == "float32" else "use --dtype float32"
        raise Mismatch(f"torch itself gives NaN or infinity for the model in {dtype}", hint=hint)
    made.noise = _noise(model, made, player)
    return made


def ask(player: Player, exam: Exam) -> Answers:
    """Everything that one side says."""
    texts = list(_texts(player, exam))
    return Answers(list(_steps(player, exam)), [tokens for tokens, _ in texts], [margins for _, margins in texts])


def _steps(player: Player, exam: Exam) -> Iterator[list[Arrays]]:
    """What a side says in each step of one script after the other."""
    for script, source, inputs in zip(exam.scripts, exam.sources, exam.inputs, strict=True):
        player.begin(len(script.pads), source)
        yield [_real(player.step(words), words) for words in inputs]


def _texts(player: Player, exam: Exam) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens by which it continues each text, and their margins."""
    for script, source, inputs in exam.prompts:
        yield _continued(player, script, source, inputs[0], exam)


def compared(exam: Exam, player: Player) -> Checked:
    """The other side's answers beside torch's."""
    truth, gaps = exam.answers, []
    for mine, theirs in zip(_steps(player, exam), truth.steps, strict=True):  # one script's numbers at a time
        gaps.append((_apart(mine[:1], theirs[:1]), _apart(mine[1:], theirs[1:])))
    prefill, decode = (float(np.max(gap)) for gap in zip(*gaps, strict=True))  # NaN stays
    largest = max(_abs(v) for steps in truth.steps for step in steps for v in step.values())
    bound = max(exam.tolerance * max(largest, 1.0), NOISE * (exam.noise or 0.0))
    found = Checked(prefill, decode, exam.noise, bound, largest)
    for (mine, _), theirs, margins in zip(_texts(player, exam), truth.tokens, truth.margins, strict=True):
        _count(found, mine, theirs, margins)
    found.shapes = list(dict.fromkeys((v.shape[:2]) for steps in exam.inputs for words in steps for v in _first(words)))
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
    truth, cosines, apart, largest = exam.answers, [], [], []
    for said, steps in zip(_steps(player, exam), truth.steps, strict=True):
        for mine, theirs in ((a[n], b[n]) for a, b in zip(said, steps, strict=True) for n in b):
            cosines.append(_cosines(mine, theirs))
            apart.append(_abs(mine - theirs.astype(np.float64)))
            largest.append(_abs(theirs))
    every = np.concatenate(cosines)
    found = Likeness(float(every.min()), float(np.median(every)), float(np.max(apart)), max(largest))
    for (mine, _), theirs in zip(_texts(player, exam), truth.tokens, strict=True):
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


def _apart(some: list[Arrays], others: list[Arrays]) -> float:
    gaps = [0.0]
    for mine, theirs in zip(some, others, strict=True):
        gaps += [_abs(mine[n] - theirs[n].astype(np.float64)) for n in theirs]
    return float(np.max(gaps))  # NaN stays


def _abs(values: np.ndarray) -> float:
    return float(np.abs(values).max(initial=0.0))


def _noise(model: nn.Module, exam: Exam, player: Torch) -> float | None:
    """|torch - torch one size up| on one text without padding; None for a model whose code insists on its dtype."""
    script = Script((0,), exam.scripts[-1].chunks[:1])
    source, words = _source(model, exam.kind, script), _inputs(model, exam.kind, script)[0]
    said = []
    with contextlib.suppress(RuntimeError, NotImplementedError):
        for how in (contextlib.nullcontext(), _one_size_up(model)):
            with how:
                player.begin(1, source)
                said.append(player.step(words))
    found = _apart(said[:1], said[1:]) if len(said) == 2 else math.nan
    return found if math.isfinite(found) else None


@contextlib.contextmanager
def _one_size_up(model: nn.Module) -> Iterator[None]:
    with plain_experts(model), widened(model):
        yield


def _tolerance(model: nn.Module) -> float:
    return TOLERANCE[next(p.dtype for p in model.parameters() if p.is_floating_point())]


def _scripts(model: nn.Module, kind: str) -> list[Script]:
    room = _room(model)
    if kind == "encoder":
        return [Script((0,), (2,)), Script((0, 3), (7,)), Script((0, 2, 5), (min(13, room),))]
    found = [Script((0,), (1, 1, 3)), Script((0, 3), (7, 1, 5)), Script((0, 2, 5), (13, 1, 3))]
    if kind == "seq2seq":
        found = [Script((0,), (1, 1, 3)), Script((0, 3), (4, 1, 2)), Script((0, 2, 5), (3, 1, 4))]
    return [s for s in found if sum(s.chunks) <= room] or [Script((0,), (1, 1))]


def _room(model: nn.Module) -> int:
    """How many tokens a model can hold, where it says so."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    room = min((v for n in names if isinstance(v := getattr(config, n, None), int) and v > 0), default=LONG)
    return room - virtual.count(model)


def _source(model: nn.Module, kind: str, script: Script) -> Arrays:
    if kind != "seq2seq":
        return {}
    heard = build.heard(model, len(script.pads), 6 + len(script.pads))
    if "attention_mask" in heard:
        for row, pad in enumerate(script.pads):
            _pad(model, heard, row, slice(len(heard["input_ids"][row]) - pad, None))
    return _arrays(heard)


def _inputs(model: nn.Module, kind: str, script: Script) -> list[Arrays]:
    batch = len(script.pads)
    if kind == "encoder":
        return [_arrays(_read(model, script))]
    if kind == "seq2seq":
        every = build.ids(model, batch, sum(script.chunks), 1).cpu().numpy()
        return [{"input_ids": part} for _, part in _split(every, script.chunks)]
    every = build.ids(model, batch, sum(script.chunks), 1)
    mask = torch.ones_like(every)
    for row, pad in enumerate(script.pads):
        _pad(model, {"input_ids": every, "attention_mask": mask}, row, slice(0, pad))
    whole, seen = every.cpu().numpy(), mask.cpu().numpy()
    return [_words(part, seen[:, : start + part.shape[1]], model) for start, part in _split(whole, script.chunks)]


def _words(ids: np.ndarray, mask: np.ndarray, model: nn.Module) -> Arrays:
    found = {"input_ids": ids, "attention_mask": mask}
    if positions := _positions(model):
        found["position_ids"] = positions(mask)[:, -ids.shape[1] :]
    return found


def _positions(model: nn.Module) -> Positions | None:
    """How a model's tokens are counted, given their mask: after a prompt padding counts as well, as PEFT trains it."""
    if not build.takes(model, "position_ids"):
        return None
    return _every if virtual.rows(model) else _real_ones


def _real_ones(mask: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... over real tokens, as generate counts."""
    return np.maximum(np.cumsum(mask, 1) - 1, 0)


def _every(mask: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... over all tokens."""
    return np.cumsum(np.ones_like(mask), 1) - 1


def _split(whole: np.ndarray, chunks: tuple[int, ...]) -> Iterator[tuple[int, np.ndarray]]:
    start = 0
    for n in chunks:
        yield start, np.ascontiguousarray(whole[:, start : start + n])
        start += n


def _read(model: nn.Module, script: Script) -> dict[str, Any]:
    """Inputs of an encoder, texts padded at their ends."""
    batch, length = len(script.pads), script.chunks[0]
    if model.main_input_name == "pixel_values":
        return build.images(model, batch, length)
    found = build.words(model, batch, length)
    for row, pad in enumerate(script.pads):
        if "pixel_values" not in inputs_of(model):
            _pad(model, found, row, slice(length - pad, None))
    if "pixel_values" in inputs_of(model):
        found |= build.images(model, batch + 1, length)
    return found


def inputs_of(model: nn.Module) -> tuple[str, ...]:
    """What a model that reads texts and images reads beside texts."""
    return ("pixel_values",) if build.takes(model, "pixel_values") else ()


def _pad(model: nn.Module, words: dict[str, Any], row: int, where: slice) -> None:
    token = getattr(model.config.get_text_config(), "pad_token_id", None)
    words["input_ids"][row, where] = token if isinstance(token, int) and token >= 0 else 0
    words["attention_mask"][row, where] = 0


def _real(said: Arrays, words: Arrays) -> Arrays:
    """Outputs without those of padding, which mean nothing."""
    ids, mask = words.get("input_ids"), words.get("attention_mask")
    if ids is None or mask is None:
        return said
    seen = mask[:, -ids.shape[1] :].astype(bool)
    return {n: v[seen] if v.shape[:2] == ids.shape else v for n, v in said.items()}


def _prompts(model: nn.Module, kind: str) -> list[tuple[Script, Arrays, list[Arrays]]]:
    """Texts to continue, one alone and three of different lengths."""
    if kind == "encoder" or _room(model) < 10:
        return []
    scripts = (
        [Script((0,), (5,)), Script((0, 2, 4), (9,))]
        if kind == "decoder"
        else [Script((0,), (1,)), Script((0, 1, 2), (1,))]
    )
    return [(s, _source(model, kind, s), _inputs(model, kind, s)) for s in scripts]


def _continued(
    player: Player, script: Script, source: Arrays, words: Arrays, exam: Exam
) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest next tokens, one after the other, and their margins."""
    player.begin(len(script.pads), source)
    tokens, margins = [], []
    for _ in range(exam.greedy(script)):
        logits = player.step(words)["logits"][:, -1]
        best = np.sort(logits, 1)[:, -2:]
        tokens.append(logits.argmax(1))
        margins.append(best[:, 1] - best[:, 0])
        words = _next(words, tokens[-1], exam.positions)
    return np.stack(tokens, 1), np.stack(margins, 1)


def _first(words: Arrays) -> list[np.ndarray]:
    """What tells the size of a step: its tokens, or the number of images."""
    return [words["input_ids"] if "input_ids" in words else words["pixel_values"][:, 0, 0, :1]]


def _next(words: Arrays, tokens: np.ndarray, positions: Positions | None) -> Arrays:
    found = {"input_ids": tokens[:, None]}
    if "attention_mask" in words:
        mask = np.concatenate([words["attention_mask"], np.ones_like(tokens[:, None])], 1)
        found["attention_mask"] = mask
        if positions:
            found["position_ids"] = positions(mask)[:, -1:]
    return found


def _arrays(words: dict[str, Any]) -> Arrays:
    return {n: v.float().cpu().numpy() if v.is_floating_point() else v.cpu().numpy() for n, v in words.items()}
