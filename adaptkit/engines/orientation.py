"""How a square weight is stored, when its shape cannot tell: as (out, in), or as (in, out)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..adapter import Adapter
from ..store.checkpoint import warn
from ..tuners.base import Tuner

CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}  # transformers' Conv1D stores (in, out)
CONV1D_LEAVES = {"c_attn", "c_proj", "c_fc", "q_attn"}
TURNED_EXPERTS = {"gpt_oss", "aria", "aria_text", "openai_privacy_filter"}  # modules whose is_transposed is true


def square(tuner: Tuner, parameter: str, config: Mapping[str, Any], adapter: Adapter) -> bool:
    """Whether a square weight is (in, out), by what is known of the model; never asked when the shape tells."""
    kind = config.get("model_type")
    if tuner.name == "experts":
        return _experts(kind, str(adapter.about.get("peft_version") or ""))
    leaf = parameter.removesuffix(".weight").rpartition(".")[2]
    turned = kind in CONV1D and leaf in CONV1D_LEAVES
    if not turned and adapter.about.get("fan_in_fan_out") and kind not in CONV1D:
        warn(
            f"fan_in_fan_out is on, but {kind or 'this model'} stores its weights as (out, in); taken as off, as PEFT does"
        )
    # embeddings come with their orientation; nothing else does unless the settings say so
    return turned or (getattr(tuner, "transposed", False) and not adapter.about.get("fan_in_fan_out"))


def _experts(kind: str | None, version: str) -> bool:
    """PEFT changed how it packs experts twice, in 0.19.0 and 0.19.1; older files do not name their version."""
    way, turned = packing(version), kind in TURNED_EXPERTS
    return way == 0 or turned == (way == 2)


def packing(version: str) -> int:
    """Which of its three ways of packing experts a version of PEFT has: 0 up to 0.18, 1 in 0.19.0, 2 since then."""
    numbers = tuple(int(n) for n in version.split("@")[0].split(".")[:3] if n.isdecimal())
    return (numbers >= (0, 19)) + (numbers >= (0, 19, 1))
