"""LoRA on a stack of expert matrices, one pair of factors each, packed in two matrices as PEFT packs them.

W'[e] = W[e] + s B_e A_e      A: (r E, a), A_e = A[e r : (e + 1) r]      B: (b, r E), B_e = B[:, e :: E]

PEFT 0.17 to 0.18 and 0.19.0 packed some of them transposed; the shapes tell, and a square one needs the version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import Mismatch
from .base import Array, Params
from .lora import LoRA

# how the parameters of known expert modules are registered; PEFT wraps them in this order, the first innermost
REGISTERED = (
    "gate_up_proj",
    "gate_up_proj_bias",
    "gate_proj",
    "up_proj",
    "down_proj",
    "down_proj_bias",
    "weight",
    "bias",
)

LAYOUT = "0.19.1"  # the first version of PEFT that packs experts as is done here


def packing(version: str) -> int:
    """Which of its three ways of packing experts a version of PEFT has: 0 up to 0.18, 1 in 0.19.0, 2 since then."""
    numbers = tuple(int(n) for n in version.split("@")[0].split(".")[:3] if n.isdecimal())
    return (numbers >= (0, 19)) + (numbers >= (0, 19, 1))


def is_turned(version: str, transposed: bool) -> bool:
    """Whether a square stack is to be read as (in, out).    version: of PEFT, empty for old files, which name none.

    transposed: what the module says of itself; gpt_oss does.
    """
    way = packing(version)
    return way == 0 or transposed == (way == 2)


@dataclass(frozen=True)
class ExpertLoRA(LoRA):
    """W'[e] = W[e] + s B_e A_e     A: (r E, a)   B: (b, r E)"""

    name = "experts"
    inside = True
    noise = 4.0  # a stack's products are rounded to float32 before and after they are scaled

    def weight(self, W: Array, p: Params) -> Array:
        stack = W.reshape(-1, *W.shape[-2:])
        if hasattr(W, "requires_grad"):  # torch's: gradients flow through one product
            E = stack.shape[0]
            A, B = p["A"].reshape(E, self.r, -1), p["B"].reshape(-1, self.r, E).permute(2, 0, 1)
            D = B @ A
            return W + self.scale * (D.mT if self.transposed else D).reshape(W.shape)
        parts = [self.one(p, e, stack.shape[0]) for e in range(stack.shape[0])]
        changed = [LoRA.weight(self, stack[e], parts[e]) for e in range(stack.shape[0])]
        for e, matrix in enumerate(changed):
            stack[e] = matrix
        return stack.reshape(W.shape)

    def one(self, p: Params, e: int, experts: int) -> Params:
        """The factors of expert e, as LoRA has them. A: (r, a)   B: (b, r)"""
        return {"A": p["A"][e * self.r : (e + 1) * self.r], "B": p["B"][:, e::experts]}

    def factors(self, p: Params) -> tuple[Array, Array, float] | None:
        return super().factors(p) if p["A"].shape[0] == self.r else None

    def fit(self, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], square: bool = False) -> LoRA:
        experts = shape[0] if len(shape) == 3 else 1
        A, B = shapes["A"], shapes["B"]
        if A[0] != self.r * experts or B[1] != A[0]:
            raise Mismatch(f"A {list(A)} and B {list(B)} are not {experts} experts of rank {self.r}")
        square = square and len(shape) == 3  # a bare matrix is (out, in) to PEFT, whatever its module thinks of it
        return replace(super().fit(shape[-2:], {"A": (self.r, A[1]), "B": (B[0], self.r)}, square), r=self.r)
