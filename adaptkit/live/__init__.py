"""Adapters on a live model: attach, run, train, switch, merge, detach. The algebra is the tuners' own."""

from .attach import adapted_modules, attach, attached, by_rows, detach, disabled, set_active
from .merge import absorb, merge, unmerge

__all__ = [
    "absorb", "adapted_modules", "attach", "attached", "by_rows", "detach", "disabled", "merge", "set_active", "unmerge",
]  # fmt: skip
