"""Torch's side of the check: everything a model is asked, with its answers, and how far it is from itself one size up.

Torch answers first, so that its model may go before the graph is loaded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ..errors import Mismatch, quoted
from . import questions
from .experts import plain_experts
from .players import Arrays, Player, Torch
from .questions import Positions, Script
from .wide import widened

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
GREEDY = 20  # tokens
Say = Callable[[str], None]


@dataclass
class Answers:
    """What one side said.

    steps: outputs of each step of each script, only of real tokens.    tokens: of each greedy text (batch, count).
    margins: by how much each greedy token won.
    """

    steps: list[list[Arrays]]
    tokens: list[np.ndarray]
    margins: list[np.ndarray]


@dataclass
class Exam:
    """Questions to a model, with torch's answers."""

    kind: str
    scripts: list[Script]
    sources: list[Arrays]
    inputs: list[list[Arrays]]
    prompts: list[tuple[Script, Arrays, list[Arrays]]]
    tolerance: float
    positions: Positions | None
    room: int
    answers: Answers = field(default_factory=lambda: Answers([], [], []))
    noise: float | None = None

    def greedy(self, script: Script) -> int:
        """How many tokens a text is continued by."""
        return min(GREEDY, self.room - script.chunks[0])


def exam(model: nn.Module, kind: str, names: list[str], say: Say = print) -> Exam:
    """Ask torch's model everything. names: of the outputs that count.

    model: as it is to be exported, with whatever acts on it; it is only run.
    Raises Mismatch when torch does not run it, or what it says is no number.
    """
    say("asking torch")
    player, scripts = Torch(model, kind, names), questions.scripts(model, kind)
    made = Exam(
        kind,
        scripts,
        [questions.source(model, kind, s) for s in scripts],
        [questions.inputs(model, kind, s) for s in scripts],
        questions.prompts(model, kind),
        _tolerance(model),
        questions.positions(model) if kind == "decoder" else None,
        questions.room(model),
    )
    try:
        made.answers = ask(player, made)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as e:
        raise Mismatch(
            f"torch does not run the model here: {quoted(e)}", hint="--no-verify exports it unchecked"
        ) from e
    if not all(np.isfinite(v).all() for said in made.answers.steps for step in said for v in step.values()):
        dtype = str(model.dtype).removeprefix("torch.")
        hint = "are its weights sound?" if dtype == "float32" else "use --dtype float32"
        raise Mismatch(f"torch itself gives NaN or infinity for the model in {dtype}", hint=hint)
    made.noise = _noise(model, made, player)
    return made


def ask(player: Player, exam: Exam) -> Answers:
    """Everything that one side says."""
    said, every = list(steps(player, exam)), list(texts(player, exam))
    return Answers(said, [tokens for tokens, _ in every], [margins for _, margins in every])


def steps(player: Player, exam: Exam) -> Iterator[list[Arrays]]:
    """What a side says in each step of one script after the other."""
    for script, source, inputs in zip(exam.scripts, exam.sources, exam.inputs, strict=True):
        player.begin(len(script.pads), source)
        yield [_real(player.step(words), words) for words in inputs]


def texts(player: Player, exam: Exam) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens by which it continues each text, and their margins."""
    for script, source, inputs in exam.prompts:
        yield _continued(player, script, source, inputs[0], exam)


def _real(said: Arrays, words: Arrays) -> Arrays:
    """Outputs without those of padding, which mean nothing."""
    ids, mask = words.get("input_ids"), words.get("attention_mask")
    if ids is None or mask is None:
        return said
    seen = mask[:, -ids.shape[1] :].astype(bool)
    return {n: v[seen] if v.shape[:2] == ids.shape else v for n, v in said.items()}


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
        words = questions.following(words, tokens[-1], exam.positions)
    return np.stack(tokens, 1), np.stack(margins, 1)


def _noise(model: nn.Module, exam: Exam, player: Torch) -> float | None:
    """|torch - torch one size up| on one text without padding; None for a model whose code insists on its dtype."""
    script = Script((0,), exam.scripts[-1].chunks[:1])
    source, words = questions.source(model, exam.kind, script), questions.inputs(model, exam.kind, script)[0]
    said = []
    with contextlib.suppress(RuntimeError, NotImplementedError):
        for how in (contextlib.nullcontext(), _one_size_up(model)):
            with how:
                player.begin(1, source)
                said.append(player.step(words))
    found = apart(said[:1], said[1:]) if len(said) == 2 else math.nan
    return found if math.isfinite(found) else None


@contextlib.contextmanager
def _one_size_up(model: nn.Module) -> Iterator[None]:
    with plain_experts(model), widened(model):
        yield


def _tolerance(model: nn.Module) -> float:
    return TOLERANCE[next(p.dtype for p in model.parameters() if p.is_floating_point())]


def apart(some: list[Arrays], others: list[Arrays]) -> float:
    """The largest difference between any two numbers of the same steps; NaN where one is."""
    gaps = [0.0]
    for mine, theirs in zip(some, others, strict=True):
        gaps += [largest(mine[n] - theirs[n].astype(np.float64)) for n in theirs]
    return float(np.max(gaps))


def largest(values: np.ndarray) -> float:
    """The largest absolute value; 0 of none."""
    return float(np.abs(values).max(initial=0.0))
