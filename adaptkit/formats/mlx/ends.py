"""Tied ends: where a model's head is its embedding, mlx-lm adds an embedding's update to the head as well, PEFT does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...adapter import Site
from ...errors import Mismatch, quoted
from .names import settings

UNKNOWN = "mlx-lm adds it to the head as well, where that is the embedding (tie_word_embeddings); --base tells"


def doubtful(sites: Mapping[str, Site], base: Path | None, hint: str) -> list[str]:
    """The embeddings whose update may be added to the head too. Raises Mismatch where the base says that it is."""
    found = [p for p, s in sites.items() if s.tuner.embedding and p.rpartition(".")[2] != "wpe"]
    ends = tied(base) if found else False
    if ends:
        text = (
            f"mlx-lm adds the update of {quoted(found[0])} to the head as well, since the model's head is its embedding"
        )
        raise Mismatch(text, hint=hint)
    return found if ends is None and "lm_head" not in sites else []


def tied(base: Path | None) -> bool | None:
    """What the base says of its ends; None where there is no base."""
    config = settings(base)
    if not config:
        return None
    kind = str(config.get("model_type"))
    return bool(config.get("tie_word_embeddings", kind == "gpt2" or kind.startswith("gemma")))
