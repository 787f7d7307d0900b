"""The numbers that a fresh adapter starts from: at one seed, PEFT's.

PEFT makes torch layers, which draw A, B and the bias; then it starts A again and sets B to zero. All of it on the CPU.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..errors import Usage
from ..tuners.lora import LoRA
from .config import LoraConfig

Params = dict[str, Any]
LINEAR = 5**0.5  # the slope with which torch starts linear layers and convolutions


def start(config: LoraConfig, tuner: LoRA, module: Any) -> Params:
    """The params of a fresh LoRA, DoRA, PiSSA or OLoRA on a module. A: (r, in, ...)   B: (out, r, ...)"""
    shapes = _shapes(tuner, module)
    loose = loosely(*shapes, bias=config.lora_bias, plain=not tuner.embedding)
    spectral = tuner.name in ("pissa", "olora")
    with torch.random.fork_rng(devices=[], enabled=not spectral):  # what it draws is replaced
        params = dict(tuner.init(module))
    if not spectral:
        factors = begun(config.init_lora_weights, loose, tuner)
        params |= {k: v.to(params["A"].device, torch.float32) for k, v in factors.items()}
    return params


def loosely(A: tuple[int, ...], B: tuple[int, ...], bias: bool = False, plain: bool = True) -> Params:
    """Factors of these shapes as torch starts layers; on an embedding, normal numbers."""
    if not plain:
        return {"A": torch.randn(A), "B": torch.randn(B)}
    made = {k: nn.init.kaiming_uniform_(torch.empty(shape), a=LINEAR) for k, shape in (("A", A), ("B", B))}
    if bias:
        made["c"] = nn.init.uniform_(torch.empty(B[0]), -(B[1] ** -0.5), B[1] ** -0.5)
    return made


def begun(how: bool | str, loose: Params, tuner: LoRA) -> Params:
    """Factors as init_lora_weights wants them."""
    if how is False:
        return loose
    A, B = loose["A"], loose["B"]
    bias = {"c": torch.zeros_like(loose["c"])} if "c" in loose else {}
    if how == "orthogonal":
        return _orthogonal(tuner.r, A, B) | bias
    if getattr(tuner, "embedding", False):
        return {"A": torch.zeros_like(A), "B": nn.init.normal_(B)} | bias
    if how == "gaussian":
        nn.init.normal_(A, std=1 / tuner.r)
    else:
        nn.init.kaiming_uniform_(A, a=LINEAR)
    return {"A": A, "B": torch.zeros_like(B)} | bias


def _orthogonal(r: int, A: torch.Tensor, B: torch.Tensor) -> Params:
    """Factors whose product is zero though neither is: their rows and columns span different halves of r dimensions."""
    if r % 2 or A.ndim > 2:
        raise Usage(f"orthogonal starts need an even rank and a linear layer, not rank {r} and {A.ndim} dimensions")
    Q = torch.linalg.qr(torch.randn(r, r))[0]
    first, second = torch.randn(A.shape[1], r // 2) @ Q[0::2], torch.randn(r // 2, B.shape[0]).T @ Q[1::2]
    return {"A": (first.T / 10).contiguous(), "B": (second / 10).contiguous()}


def _shapes(tuner: LoRA, module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of A and B on a module."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        weight = torch.empty(module.weight.shape)
        groups = {"groups": module.groups} if hasattr(module, "groups") else {}
        found = LoRA.init(tuner, SimpleNamespace(weight=weight, **groups))
    return tuple(found["A"].shape), tuple(found["B"].shape)


def twice(tuner: LoRA) -> LoRA:
    """PEFT adds the update of an attention's output projection twice, in forward as in merge.

    What was trained there, and reads what is trained here, has it so.
    """
    return replace(tuner, alpha=2 * tuner.alpha)
