"""LoRA layers under PEFT's names: lora.Linear and its kin, which are wrappers with names and settings, no algebra."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...adapter import Site
from ...live.adapted import Read
from ...live.attach import is_read, turned
from ...tuners.experts import ExpertLoRA
from ...tuners.lora import LoRA
from ..starts import twice
from .slots import Settings, Slotted, linear

FACTORS = {"A": ("lora_A", "weight"), "B": ("lora_B", "weight"), "c": ("lora_B", "bias")}
MAGNITUDE = {"m": ("lora_magnitude_vector", "weight")}


class LoraLayer(Slotted):
    """A module with LoRA, rsLoRA or DoRA adapters.

    base_layer: the module.    adapter_name, config, r, lora_alpha, settings: a first adapter, fresh and active.
    """

    slots: ClassVar[dict[str, tuple[str, str]]] = {**FACTORS, **MAGNITUDE}

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str | None = None,
        config: Any = None,
        r: int | None = None,
        lora_alpha: float | None = None,
        *,
        parameter: str = "weight",
        **settings: Any,
    ):
        super().__init__(base_layer, parameter)
        if adapter_name is not None:
            self.update_layer(adapter_name, r, lora_alpha, config, **settings)
            self.set_adapter(adapter_name)

    def update_layer(
        self,
        adapter_name: str,
        r: int | None = None,
        lora_alpha: float | None = None,
        config: Any = None,
        **settings: Any,
    ) -> None:
        """Put one more adapter on, fresh and inactive."""
        from ..config import LoraConfig
        from ..sites import lora

        given = {k: v for k, v in {"r": r, "lora_alpha": lora_alpha}.items() if v is not None}
        config = replace(config, **given, **settings) if config is not None else LoraConfig(**given, **settings)
        self.add(adapter_name, lora(config, "", self.bare()))

    def holder(self, letter: str, value: Tensor) -> nn.Module:
        if letter == "m":
            return nn.Module()
        if value.ndim == 2:
            return linear(value)
        base: Any = self.bare()
        if letter == "B":
            return type(base)(value.shape[1], value.shape[0], 1, bias=False, device="meta")
        how = {k: getattr(base, k) for k in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        return type(base)(value.shape[1], value.shape[0], bias=False, device="meta", **how)

    def shaped(self, letter: str, value: nn.Parameter) -> nn.Parameter:
        ndim = self.bare().weight.ndim if letter == "m" else 2
        if ndim == 2:
            return value
        return nn.Parameter(value.reshape(1, -1, *[1] * (ndim - 2)), requires_grad=value.requires_grad)

    @property
    def r(self) -> Mapping[str, int]:
        """Ranks by adapter name."""
        return Settings(self.tuners, lambda t: t.r)

    @property
    def lora_alpha(self) -> Mapping[str, float]:
        """Alphas by adapter name."""
        return Settings(self.tuners, lambda t: t.alpha)

    @property
    def scaling(self) -> Mapping[str, float]:
        """What the product of the factors is multiplied by, by adapter name; may be set."""
        return Settings(self.tuners, lambda t: t.scale, lambda t, s: replace(t, alpha=s / (t.scale / t.alpha)))

    @property
    def use_rslora(self) -> Mapping[str, bool]:
        """Whether alpha is divided by the root of the rank."""
        return Settings(self.tuners, lambda t: t.rslora)

    @property
    def use_dora(self) -> Mapping[str, bool]:
        """Whether an adapter has a magnitude."""
        return Settings(self.tuners, lambda t: t.name == "dora")

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the weight is stored as (in, out)."""
        return turned(self.bare()) and not isinstance(self.bare(), nn.Embedding)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return _features(self.bare())[0]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return _features(self.bare())[1]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply an adapter's own scale, alpha / r, by a factor."""
        if adapter in self.tuners:
            tuner = self.tuners[adapter]
            own = self.__dict__.setdefault("_alphas", {}).setdefault(adapter, tuner.alpha)
            self.tuners[adapter] = replace(tuner, alpha=own * scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale that the active adapters have now."""
        for name in self.active:
            self.scaling[name] = self.scaling[name] * scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale that the active adapters have now; without a number, their own scale again."""
        for name in self.active:
            if scale is None:
                self.set_scale(name, 1.0)
            else:
                self.scaling[name] = self.scaling[name] / scale

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s B A in the shape of the stored weight, float32 at least. DoRA's magnitude is not in it."""
        tuner, p = self.tuners[adapter], self.of(adapter)
        with torch.no_grad():
            if isinstance(tuner, ExpertLoRA):
                stored = getattr(self.bare(), self.parameter)
                return tuner.weight(torch.zeros_like(stored, dtype=p["A"].dtype), p)
            L, R, s = LoRA.factors(tuner, p)
            return (s * (L @ R)).reshape(getattr(self.bare(), self.parameter).shape)


class Linear(LoraLayer):
    """LoRA on nn.Linear and transformers' Conv1D."""


class Embedding(LoraLayer):
    """LoRA on nn.Embedding."""

    slots: ClassVar = {"A": ("lora_embedding_A", ""), "B": ("lora_embedding_B", ""), **MAGNITUDE}


class Conv1d(LoraLayer):
    """LoRA on nn.Conv1d."""


class Conv2d(LoraLayer):
    """LoRA on nn.Conv2d."""


class Conv3d(LoraLayer):
    """LoRA on nn.Conv3d."""


class MultiheadAttention(LoraLayer):
    """LoRA on the joint projection of nn.MultiheadAttention; its output projection is a layer of its own."""

    def __init__(self, base_layer: nn.Module, adapter_name: str | None = None, config: Any = None, r: int | None = None,
                 lora_alpha: float | None = None, *, parameter: str = "in_proj_weight", **settings: Any):  # fmt: skip
        super().__init__(base_layer, parameter=parameter)
        if adapter_name is not None:
            out = base_layer.out_proj if isinstance(base_layer.out_proj, Slotted) else _ReadLinear(base_layer.out_proj)
            base_layer._modules["out_proj"] = out
            for layer in (out, self):
                layer.update_layer(adapter_name, r, lora_alpha, config, **settings)
                layer.set_adapter(adapter_name)
            out.tuners[adapter_name] = twice(out.tuners[adapter_name])


class ParamWrapper(LoraLayer):
    """LoRA on a bare parameter, such as a stack of experts."""


class _ReadLinear(Read, Linear):
    """LoRA on a layer whose weight is read, never called."""


class TokenAdapter(Slotted):
    """Rows of an embedding that train; `token_adapter` holds them, as in PEFT."""

    slots: ClassVar = {"rows": ("token_adapter.trainable_tokens_delta", "")}


LAYERS: dict[type[nn.Module], type[LoraLayer]] = {
    nn.Embedding: Embedding, nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d,
    nn.MultiheadAttention: MultiheadAttention,
}  # fmt: skip


def wrap(module: nn.Module, parameter: str, site: Site) -> Slotted:
    """The layer for a module, as PEFT chooses it."""
    if site.tuner.name == "tokens":
        return TokenAdapter(module)
    if parameter not in ("weight", "in_proj_weight") or site.tuner.name == "experts":
        return ParamWrapper(module, parameter=parameter)
    inner = module.bare() if isinstance(module, Slotted) else module
    if is_read(inner):
        return _ReadLinear(module)
    kind = next((layer for base, layer in LAYERS.items() if isinstance(inner, base)), Linear)
    return kind(module, parameter=parameter)


def _features(module: Any) -> tuple[int, int]:
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, 3 * module.embed_dim
    W = module.weight
    return (W.shape[0], W.shape[1]) if turned(module) else (W.shape[1], W.shape[0])
