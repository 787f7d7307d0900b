"""PEFT's format: a folder with adapter_config.json and adapter_model.safetensors or .bin.

config.py reads the settings, keys.py the tensor names, format.py puts the two together.
The format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from .format import Peft

__all__ = ["Peft"]
