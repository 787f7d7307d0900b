"""Tensors that cannot be computed by rows: all of one at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import registry
from ..errors import AdaptKitError
from ..store.arrays import load, working
from ..store.entry import Entry
from .blocks import blend
from .plan import Change, Target


def whole(target: Target, device: Any = None) -> np.ndarray:
    """A tensor that cannot be computed by rows, all of it, as a working-precision array of its shape."""
    if not target.changes and isinstance(target.source, Entry) and target.source.dtype == target.dtype:
        return load(target.source)  # only laid out anew: no number may pass through another type
    dtype = working(target.dtype)
    W = started(target, dtype).reshape(target.view).copy()
    for change in target.changes:
        start, stop = change.rows
        part = W[start:stop].reshape(change.shape)
        try:
            with registry.blamed("tuners", change.tuner.name):
                changed = _by(change, device)(part.copy(), change.loaded(dtype))
        except AdaptKitError as e:
            raise e.at(target.name) from None
        blend(W[start:stop], np.asarray(changed).reshape(stop - start, -1), change.weight)
    return W.reshape(target.shape)


def started(target: Target, dtype: np.dtype) -> np.ndarray:
    """A tensor before its changes: the source, and zeros in the rows that are appended to it."""
    source = load(target.source, dtype)
    if not target.appended:
        return source
    return np.concatenate([source, np.zeros((target.appended, *source.shape[1:]), dtype)])


def _by(change: Change, device: Any) -> Callable:
    """The tuner's function, for NumPy arrays: a tuner that needs torch gets tensors, and its answer is taken back."""
    function = getattr(change.tuner, change.what)
    if device is None and (change.what == "bias" or change.tuner.arrays == "any"):
        return function
    from .tensors import on_device

    return on_device(function, device or "cpu")
