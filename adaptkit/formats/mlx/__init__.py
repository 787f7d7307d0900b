"""MLX's format (mlx-lm): a folder with adapter_config.json and adapters.safetensors, factors the other way round.

    y = W x + scale ((x a) b)     a: (in, r)   b: (r, out)     DoRA's m: (out,)

The format: https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md
"""

from .format import Mlx

__all__ = ["Mlx"]
