"""HRA, Yuan et al. 2024, https://arxiv.org/abs/2405.17484.

W' = W H_1 ... H_r     H_i = I - 2 u_i u_i^T     u_i: column i of U, at length 1     U: (in, r)
"""

from dataclasses import dataclass

import torch

from adaptkit import AdaptKitError, Tuner


@dataclass(frozen=True)
class HRA(Tuner):
    """W' = W H_1 ... H_r     H_i: reflections     https://arxiv.org/abs/2405.17484"""

    name = "hra"
    r: int = 8

    def __post_init__(self):
        if self.r < 2 or self.r % 2:
            raise AdaptKitError(f"r is {self.r}, HRA takes reflections in pairs", hint="give an even r")

    def init(self, base):
        half = torch.randn(base.weight.shape[1], self.r // 2, dtype=base.weight.dtype, device=base.weight.device)
        return {"U": half.repeat_interleave(2, dim=1)}  # a reflection done twice changes nothing

    def weight(self, W, p):
        for u in torch.nn.functional.normalize(p["U"], dim=0).T:
            W = W - 2 * torch.outer(W @ u, u)
        return W

    def fit(self, shape, shapes, square=False):
        if len(shape) != 2 or square or shapes["U"] != (shape[1], self.r):
            raise AdaptKitError(f"U is {list(shapes['U'])} at r = {self.r}, the model's weight is {list(shape)}")
        return self

    def inverse(self, p):
        return self, {"U": p["U"][:, list(range(self.r))[::-1]]}
