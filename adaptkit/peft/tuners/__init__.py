"""The layers by the names that code written for PEFT imports them from."""

from . import ia3, lora

__all__ = ["ia3", "lora"]
