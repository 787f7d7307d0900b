"""Site, Adapter: what lies between the formats and the verbs. Free of any file format and of any model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .tuners.base import Tuner


@dataclass
class Site:
    """A place, with its tuner and numbers.

    params: by the paper's letters. A value is a NumPy array, a torch tensor, or a store Entry not read yet.
    """

    tuner: Tuner
    params: dict[str, Any]


@dataclass
class Adapter:
    """A set of sites.

    sites: by module path ("model.layers.0.self_attn.q_proj"), or parameter path where a bare parameter is adapted.
        The path "" is the whole model.
    whole: tensors replaced outright, by parameter path (a new lm_head.weight, trained biases).
    meta: where it came from, as text; leftovers of a format under a prefixed name ("kohya:ss_network_dim").
    """

    sites: dict[str, Site] = field(default_factory=dict)
    whole: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)  # the format's own settings, parsed
