"""diffusers' format: one file of PEFT factors under the names of a pipeline's components, settings in its metadata.

keys.py knows the spellings since 2023, read.py and write.py do the rest.
The format: https://huggingface.co/docs/diffusers/tutorials/using_peft_for_inference
"""

from .format import Diffusers

__all__ = ["Diffusers"]
