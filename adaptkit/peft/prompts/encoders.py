"""PromptEmbedding, PromptEncoder, PrefixEncoder: PEFT's constructors, names and numbers over `live.encoders`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import AdaptKitWarning, Mismatch, Usage, quoted
from ...live.encoders import Rows, mlp
from .config import (
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    PromptTuningInit,
)


class PromptEmbedding(Rows):
    """The rows of prompt tuning: random, or those of words.

    word_embeddings: of the model, (vocabulary, token_dim).
    """

    def __init__(self, config: PromptTuningConfig, word_embeddings: nn.Module):
        total = config.num_virtual_tokens * config.num_transformer_submodules
        super().__init__(total, config.token_dim)
        if config.inference_mode or config.prompt_tuning_init is PromptTuningInit.RANDOM:
            return
        by_text = config.prompt_tuning_init is PromptTuningInit.TEXT
        ids = _of_text(config, total) if by_text else torch.randint(0, word_embeddings.num_embeddings, (total,))
        with torch.no_grad():
            words = word_embeddings(ids.to(word_embeddings.weight.device))
        self.embedding.weight = nn.Parameter(words.detach().clone().float())


class PromptEncoder(Rows):
    """The rows of P-tuning, and the network on them."""

    def __init__(self, config: PromptEncoderConfig):
        width, hidden = config.token_dim, config.encoder_hidden_size
        super().__init__(config.num_virtual_tokens * config.num_transformer_submodules, width)
        if config.inference_mode:
            return
        if config.encoder_reparameterization_type is PromptEncoderReparameterizationType.MLP:
            if config.encoder_num_layers != 2:
                warnings.warn("encoder_num_layers is not used: the MLP has always the same layers", AdaptKitWarning)
            self.mlp_head = mlp(width, hidden)
            return
        more = {"num_layers": config.encoder_num_layers, "dropout": config.encoder_dropout}
        self.lstm_head = nn.LSTM(width, hidden, **more, bidirectional=True, batch_first=True)
        self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))


class PrefixEncoder(Rows):
    """The keys and values of prefix tuning: (tokens, 2 layers width), projected from (tokens, width) if so configured."""

    def __init__(self, config: PrefixTuningConfig):
        n, width, hidden = config.num_virtual_tokens, config.token_dim, config.encoder_hidden_size
        flat = 2 * config.num_layers * width
        projected = config.prefix_projection and not config.inference_mode
        super().__init__(n, width if projected else flat)
        self.prefix_projection = projected
        if projected:
            self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, flat))
        if config.init_weights == "zero":
            for p in (self.transform[-1] if projected else self.embedding).parameters():
                nn.init.zeros_(p)

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Take the rows of a saved prefix. Raises Mismatch for a projected one, whose network was not saved."""
        if self.prefix_projection:
            raise Mismatch("a projected prefix cannot be turned back into the rows that it came from")
        if prompt_embeddings.shape != self.embedding.weight.shape:
            raise Mismatch(
                f"prompt_embeddings is {list(prompt_embeddings.shape)}, the model has {list(self.embedding.weight.shape)}"
            )
        with torch.no_grad():
            self.embedding.weight.copy_(prompt_embeddings)


def encoder(config: Any, word_embeddings: nn.Module) -> Rows:
    """The module for settings."""
    if isinstance(config, PromptTuningConfig):
        return PromptEmbedding(config, word_embeddings)
    return PrefixEncoder(config) if isinstance(config, PrefixTuningConfig) else PromptEncoder(config)


def _of_text(config: PromptTuningConfig, total: int) -> Tensor:
    """The tokens of a text, again and again until there are enough."""
    from transformers import AutoTokenizer

    options = {k: v for k, v in (config.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}  # runs code
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
    except (OSError, ValueError, KeyError) as e:
        name = quoted(config.tokenizer_name_or_path)
        raise Usage(f"cannot be read as a tokenizer ({quoted(e)})", where=f"tokenizer_name_or_path {name}") from None
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise Usage("prompt_tuning_init_text has no tokens", hint="give some text, or another prompt_tuning_init")
    return torch.tensor([ids[i % len(ids)] for i in range(total)])
