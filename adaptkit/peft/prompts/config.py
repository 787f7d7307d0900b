"""PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig: PEFT's fields and defaults, and what models fill in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn

from ...errors import Usage, quoted
from ...live.dimensions import dimensions
from ..config import PeftConfig
from ..kinds import PeftType, TaskType


class PromptTuningInit(str, Enum):
    """What the rows of prompt tuning start as."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class PromptEncoderReparameterizationType(str, Enum):
    """The network of P-tuning."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptLearningConfig(PeftConfig):
    """What virtual tokens have in common. Dimensions that are left out are the model's."""

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        n = self.num_virtual_tokens
        if n is not None and (type(n) is not int or n < 1):
            raise Usage(f"num_virtual_tokens is {n!r}, it is a whole number from 1")

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the adapter is made of virtual tokens."""
        return True

    def fit(self, model: nn.Module) -> None:
        """Fill in what was left out."""
        if self.num_virtual_tokens is None:
            raise Usage("num_virtual_tokens is not given", hint="say how many virtual tokens there shall be")
        size = dimensions(model)
        self.num_layers = self.num_layers or size.layers
        self.token_dim = self.token_dim or size.width
        self.num_attention_heads = self.num_attention_heads or size.heads
        parts = 2 if self.task_type is TaskType.SEQ_2_SEQ_LM else 1
        self.num_transformer_submodules = self.num_transformer_submodules or parts
        if getattr(self, "encoder_hidden_size", 0) is None:
            self.encoder_hidden_size = self.token_dim


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning."""

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PROMPT_TUNING
        self.prompt_tuning_init = _one_of(PromptTuningInit, self.prompt_tuning_init, "prompt_tuning_init")
        by_text = self.prompt_tuning_init is PromptTuningInit.TEXT
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if by_text and not getattr(self, name):
                raise Usage(f"prompt_tuning_init='TEXT' needs {name}")
        if self.tokenizer_kwargs and not by_text:
            raise Usage("tokenizer_kwargs goes with prompt_tuning_init='TEXT'")


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning."""

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.P_TUNING
        name = "encoder_reparameterization_type"
        self.encoder_reparameterization_type = _one_of(PromptEncoderReparameterizationType, getattr(self, name), name)


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning. token_dim and num_attention_heads are those of keys and values."""

    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    init_weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING
        if self.init_weights not in (None, "zero"):
            raise Usage(f"init_weights is {quoted(self.init_weights)!r}, it is None or 'zero'")

    def fit(self, model: nn.Module) -> None:
        """Fill in what was left out; what the cache is shaped like is the model's to say."""
        size = dimensions(model)
        self.num_attention_heads, self.token_dim = size.kv_heads, size.kv_heads * size.head_width
        super().fit(model)


CONFIGS = {
    PeftType.PROMPT_TUNING: PromptTuningConfig,
    PeftType.P_TUNING: PromptEncoderConfig,
    PeftType.PREFIX_TUNING: PrefixTuningConfig,
}


def _one_of(kind: type[Enum], value: Any, name: str) -> Any:
    if value not in kind.__members__.values() and value not in kind.__members__:
        raise Usage(f"{name} is {quoted(value)!r}, there are {', '.join(kind.__members__)}")
    return kind(value)
