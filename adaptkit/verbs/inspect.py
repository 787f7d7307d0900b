"""inspect: what an adapter is, from its settings and headers; of several, how far they overlap, from their factors.

No torch. Numbers are read only to compare or to draw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..errors import AdaptKitError, Usage
from ..select import layer
from ..store.arrays import dtype_of, shape_of
from ..store.checkpoint import warn
from ..store.entry import BITS, Entry
from ..store.hub.ghost import glance
from . import heatmap
from .inputs import Source, adapter_at, adapters_of, opened
from .similarity import Compared, compared, norms, unknown


@dataclass
class Inspected:
    """What an adapter, or a model, is.

    targets: module endings, with how many sites each has.   rank, alpha: a number, or a list when sites differ.
    settings: what else of its configuration changes the numbers.
    """

    path: str
    kind: str
    format: str
    sites: int
    targets: dict[str, int]
    rank: int | list[int] | None
    alpha: float | list[float] | None
    whole: list[str]
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    base: str | None
    layers: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def inspect(
    paths: Source | Sequence[Source], *, base: str | Path | None = None, plot: str | Path | None = None
) -> Inspected | Compared:
    """Say what an adapter is: kind, rank, alpha, targets, tensors, dtype, size, base model.

    paths: an adapter's folder or file, or a Hub id; of a model, its tensors are summed up, and of one at the Hub only the
    headers are fetched. Of two or more adapters, how far their
    updates overlap: cosines, norms and principal angles, site by site and in all, from the factors alone.
    base: the model it is for, or its config.json's folder, for formats whose files do not say enough by themselves (gguf).
    plot: a picture to draw, layers by modules: the norm of the update, or, of several adapters, the cosine of each pair.

    Raises as reading the format does; Usage and Mismatch when the picture cannot be drawn.
    """
    given = [paths] if isinstance(paths, str | Path | Adapter) else list(paths)
    if not given:
        raise Usage("no adapter was given", where="PATH")
    file = heatmap.checked(plot) if plot is not None else None
    with nullcontext() if base is None else glance(base, "model") as model:
        if model is not None and not model.exists():
            raise Usage("not found", where="--base")
        return _compared(adapters_of(given, base=model), file) if len(given) > 1 else _alone(given[0], model, file)


def _alone(given: Source, model: Path | None, file: Path | None) -> Inspected:
    if isinstance(given, Adapter):
        return _one(Path(given.meta.get("path", "")), given, file)
    with glance(given) as folder:
        try:
            found = _one(folder, adapter_at(folder, model), file)
        except AdaptKitError as e:
            if "this is a model" not in e.message or file is not None:
                raise
            found = _model(folder)
    found.path = str(given)
    return found


def _one(path: Path, adapter: Adapter, file: Path | None) -> Inspected:
    if file is not None:
        _drawn(adapter, file)
    return _adapter(path, adapter)


def _compared(adapters: list[Adapter], file: Path | None) -> Compared:
    found = compared(adapters)
    if file is not None:
        panels = [(f"{Path(p.adapters[0]).name} and {Path(p.adapters[1]).name}", {s.name: s.cosine for s in p.sites}) for p in found.pairs]  # fmt: skip
        if not any(values for _, values in panels):
            lost = [p.uncompared for p in found.pairs if p.uncompared]
            why = unknown(lost[0]) if lost else "they change no module in common"
            raise Usage(f"there is nothing to draw: {why}", where="--plot")
        heatmap.draw([p for p in panels if p[1]], file, signed=True)
    return found


def _drawn(adapter: Adapter, file: Path) -> None:
    found, lost = norms(adapter)
    if lost:
        warn(f"drawn without what has no update of its own: {unknown(lost)}")
    if not found:
        raise Usage("no site of the adapter can be drawn", where="--plot")
    heatmap.draw([(f"|D| of {Path(adapter.meta.get('path', 'adapter')).name}", found)], file, signed=False)


def _adapter(path: Path, adapter: Adapter) -> Inspected:
    values = [v for s in adapter.sites.values() for k, v in s.params.items() if k != "index"]
    values = list({v if isinstance(v, Entry) else id(v): v for v in [*values, *adapter.whole.values()]}.values())
    kinds = Counter(s.tuner.name for s in adapter.sites.values())
    implied = adapter.about.get("implied_heads") or []
    about = dict(adapter.about)
    about["modules_to_save"] = [m for m in about.get("modules_to_save") or [] if m not in implied]
    return Inspected(
        path=str(path),
        kind=" + ".join(kinds) or "whole tensors",
        format=adapter.meta.get("format", "?"),
        sites=len(adapter.sites),
        targets=dict(Counter(map(_ending, adapter.sites)).most_common()),
        rank=_common([s.tuner.r for s in adapter.sites.values() if hasattr(s.tuner, "r")]),
        alpha=_common([s.tuner.alpha for s in adapter.sites.values() if hasattr(s.tuner, "alpha")]),
        whole=sorted(adapter.whole),
        layers=_layers(adapter),
        base=adapter.meta.get("base") or None,
        settings={k: about[k] for k in sorted(about) if k in TELLING and about[k] not in (None, False, [], {}, "none")},
        **_sums(values),
    )


TELLING = {
    "use_rslora", "use_dora", "lora_bias", "bias", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
    "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "ensure_weight_tying", "task_type",
    "peft_version", "feedforward_modules", "num_virtual_tokens", "init_lora_weights", "use_bdlora", "kasa_config", "revision",
    "fan_in_fan_out",
}  # fmt: skip


def _ending(path: str) -> str:
    """The last word of a module's path, with the number behind it: to_out.0."""
    home, _, leaf = path.rpartition(".")
    return f"{_ending(home)}.{leaf}" if home and leaf.isdecimal() else leaf or "the whole model"


def _layers(adapter: Adapter) -> list[int]:
    return sorted({i for n in adapter.sites if (i := layer(n)) is not None})


def _model(path: Path) -> Inspected:
    found = opened(path)
    kind = (found.config.get("architectures") or [found.config.get("model_type") or "model"])[0]
    files = f"{len(found.files)} file{'s' if len(found.files) > 1 else ''}"
    return Inspected(
        path=str(path), kind=f"model ({kind})", format=f"{'pytorch' if found.pickled else 'safetensors'}, {files}", sites=0,
        targets={}, rank=None, alpha=None, whole=[], base=None, **_sums(list(found.entries.values())),
    )  # fmt: skip


def _sums(values: list[Any]) -> dict[str, Any]:
    dtypes: Counter[str] = Counter()
    for v in values:
        dtypes[dtype_of(v)] += 1
    numbers = sum(_count(v) for v in values)
    nbytes = sum(_count(v) * BITS[dtype_of(v)] // 8 for v in values)
    return {"tensors": len(values), "parameters": numbers, "bytes": nbytes, "dtypes": dict(dtypes)}


def _count(value: Any) -> int:
    n = 1
    for size in shape_of(value):
        n *= size
    return n


def _common(values: list) -> Any:
    """The one value that all sites have, or all that occur."""
    found = sorted(set(values))
    return found[0] if len(found) == 1 else found or None
