"""Experts of a mixture computed by batched products, which every dtype and every exporter has. Grouped ones are faster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def plain_experts(model: Any) -> Iterator[None]:
    """Inside, a model's experts are computed in the plain way; nothing happens to a model that has none."""
    if not getattr(model, "_can_set_experts_implementation", lambda: False)():
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
