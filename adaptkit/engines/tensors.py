"""Functions for NumPy arrays that run on torch tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def on_device(function: Callable, device: Any) -> Callable:
    """A tuner's function for NumPy arrays, run on torch tensors."""
    import torch

    def run(W: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)).to(device) for k, v in p.items()}
        return function(torch.from_numpy(W).to(device), tensors).detach().cpu().numpy()

    return run
