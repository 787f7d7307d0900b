"""kohya's format (sd-scripts, LyCORIS' LoCon): one safetensors file with flattened module names and alpha tensors.

places.py knows the modules of the architectures, names.py flattens and finds them, read.py and write.py do the rest.
The format: https://github.com/kohya-ss/sd-scripts and https://github.com/KohakuBlueleaf/LyCORIS
"""

from .format import Kohya

__all__ = ["Kohya"]
