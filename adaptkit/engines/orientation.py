"""How a square weight is stored, when its shape cannot tell: as (out, in), or as (in, out)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..adapter import Adapter
from ..store.checkpoint import warn
from ..tuners.base import Tuner
from ..tuners.experts import is_turned

CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}  # transformers' Conv1D stores (in, out)
CONV1D_LEAVES = {"c_attn", "c_proj", "c_fc", "q_attn"}
TURNED_EXPERTS = {"gpt_oss", "aria", "aria_text", "openai_privacy_filter"}  # modules whose is_transposed is true


def square(tuner: Tuner, parameter: str, config: Mapping[str, Any], adapter: Adapter) -> bool:
    """Whether a square weight is (in, out), by what is known of the model; never asked when the shape tells."""
    kind = config.get("model_type")
    if tuner.name == "experts":
        return is_turned(str(adapter.about.get("peft_version") or ""), kind in TURNED_EXPERTS)
    leaf = parameter.removesuffix(".weight").rpartition(".")[2]
    turned = kind in CONV1D and leaf in CONV1D_LEAVES
    if not turned and adapter.about.get("fan_in_fan_out") and kind not in CONV1D:
        warn(
            f"fan_in_fan_out is on, but {kind or 'this model'} stores its weights as (out, in); taken as off, as PEFT does"
        )
    # embeddings come with their orientation; nothing else does unless the settings say so
    return turned or (getattr(tuner, "transposed", False) and not adapter.about.get("fan_in_fan_out"))
