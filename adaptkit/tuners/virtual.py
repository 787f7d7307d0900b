"""Virtual tokens: prompt tuning, P-tuning and prefix tuning. They act on activations, so no weight holds them.

Prompt tuning, Lester et al. 2021, https://arxiv.org/abs/2104.08691     P: (tokens, width), put before the embeddings
P-tuning, Liu et al. 2021, https://arxiv.org/abs/2103.10385            P: (tokens, width), the output of a trained encoder
Prefix tuning, Li and Liang 2021, https://arxiv.org/abs/2101.00190     P: (tokens, 2 layers width), keys and values
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import Mismatch
from .base import Params, Tuner


@dataclass(frozen=True)
class PromptTuning(Tuner):
    """x' = [P; x]     P: (tokens, width)"""

    name = "prompt"
    embeds: ClassVar[bool] = True  # P can be rows of the embedding, whose ids a tokenizer puts in front

    tokens: int = 8

    def inverse(self, p: Params) -> tuple[Tuner, Params]:
        raise Mismatch(
            f"{self.name} cannot be taken out: its rows became a part of the vocabulary", hint="keep the base model"
        )


@dataclass(frozen=True)
class PTuning(PromptTuning):
    """x' = [P; x]     P: (tokens, width), the output of a trained encoder"""

    name = "ptuning"


@dataclass(frozen=True)
class PrefixTuning(PromptTuning):
    """K' = [P_k; K], V' = [P_v; V]     P: (tokens, 2 layers width)"""

    name = "prefix"
    embeds: ClassVar[bool] = False  # keys and values of every layer, which no row of a checkpoint holds
