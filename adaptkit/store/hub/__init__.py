"""Models and adapters of the Hugging Face Hub: ids, what of a repository matters, and folders of it on this machine.

huggingface_hub does the talking. It is imported when something is asked of the Hub, and not before.
"""

from __future__ import annotations

from .ids import Ref, called, origin, ref_of
from .place import place

__all__ = ["Ref", "called", "origin", "place", "ref_of"]
