"""What was asked of export-onnx: options that make sense together, and adapters sorted by what becomes of them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..engines import checks
from ..errors import AdaptKitError, Mismatch, Usage, quoted
from ..store.hub import called
from .inputs import Progress, adapters_of, weights_of

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
QUANTIZE = ("int8", "int8_weight_only", "int4")
# ONNX Runtime's int8 reads float32 activations
START = {"int8": (None, "float32")} | dict.fromkeys(QUANTIZE[1:], (None, "float32", "float16"))
DEVICES = ("auto", "cpu", "cuda")
VIRTUAL = ("prompt", "ptuning", "prefix")


@dataclass
class Wish:
    """What was asked for, checked.

    adapters: to be merged.    virtual: one of virtual tokens, or none.    kept: those that stay beside the graph.
    """

    output: Path
    adapters: list[Adapter]
    weights: Sequence[float] | None
    dtype: str | None
    quantize: str | None
    task: str | None
    device: str
    opset: int
    verify: bool
    overwrite: bool
    progress: Progress | None
    start: float
    virtual: list[Adapter] = field(default_factory=list)
    kept: Any = None

    @property
    def every(self) -> list[Adapter]:
        """All the adapters."""
        return [*self.adapters, *self.virtual, *(self.kept.adapters.values() if self.kept else ())]

    def say(self, text: str) -> None:
        """Tell a progress bar what is going on."""
        label = getattr(self.progress, "label", None)
        if label:
            label(text)


def wish_of(given: dict[str, Any]) -> Wish:
    """Raises Usage or Mismatch for options that make no sense, before anything is read."""
    opset = _options(given)
    adapters = () if given["adapters"] is None else given["adapters"]
    listed = [adapters] if isinstance(adapters, (str, Path, Adapter)) else list(adapters)
    read = adapters_of(listed, given["progress"]) if listed else []
    if given["weights"] is not None and not read:
        raise Usage("is about adapters, and there are none", where="--weights")
    for adapter in read:
        if given["swappable"] or "" in adapter.sites:
            _sound(adapter)
    wish = Wish(
        Path(given["output"]), read, given["weights"], given["dtype"], given["quantize"], given["task"], given["device"],
        opset, not given["no_verify"], given["overwrite"], given["progress"], time.monotonic(),
    )  # fmt: skip
    wish = _swapped(wish) if given["swappable"] else _parted(wish)
    runnable(wish, wish.dtype)
    return wish


def _options(given: dict[str, Any]) -> int:
    """The opset. Raises Usage for words that are none of an option's, Mismatch when a package is missing."""
    if given["output"] is None:
        raise Usage("no output was given", where="OUT", hint="give -o OUT")
    for name, known in (("dtype", tuple(DTYPES)), ("quantize", QUANTIZE), ("device", DEVICES)):
        if given[name] is not None and given[name] not in known:
            raise Usage(f"{quoted(given[name])!r} is not one of {', '.join(known)}", where=f"--{name}")
    from ..export import extra
    from ..export.trace import OPSET, OPSETS

    extra.need()
    opset = OPSET if given["opset"] is None else given["opset"]
    if opset not in OPSETS:
        raise Usage(f"{opset} is not between {OPSETS[0]} and {OPSETS[-1]}", where="--opset")
    return opset


def named(adapter: Adapter) -> str:
    """What messages and receipts call an adapter."""
    return called(Path(os.path.abspath(adapter.meta.get("path", "adapter"))))


def _sound(adapter: Adapter) -> None:
    """Raises Corrupt for numbers that are none, before a model is loaded."""
    try:
        checks.numbers(adapter)
    except AdaptKitError as e:
        raise e.at(named(adapter)) from None


def _swapped(wish: Wish) -> Wish:
    """The wish for a graph whose adapters stay beside it. Raises Mismatch for those that cannot."""
    if not wish.adapters:
        raise Usage("is about adapters, and there are none", where="--swappable", hint="name them, or leave it out")
    if wish.weights is not None:
        hint = "scale the adapter with adaptkit combine --method cat --weights"
        raise Usage("adapters beside a graph act whole", where="--weights", hint=hint)
    from ..export.kept import kept

    return replace(wish, adapters=[], kept=kept(wish.adapters))


def _parted(wish: Wish) -> Wish:
    """What is merged, its weights, and the virtual tokens. A head that was trained with these is merged.

    Raises Mismatch for virtual tokens that cannot be built in.
    """
    merged: list[tuple[Adapter, float]] = []
    virtual: list[Adapter] = []
    for adapter, weight in zip(wish.adapters, weights_of(wish.weights, len(wish.adapters)), strict=True):
        rest = adapter
        if "" in adapter.sites and adapter.sites[""].tuner.name in VIRTUAL:
            if weight != 1:
                raise Mismatch("virtual tokens are taken whole", where="--weights", hint="give them the weight 1")
            virtual.append(replace(adapter, sites={"": adapter.sites[""]}, whole={}))
            rest = replace(adapter, sites={p: s for p, s in adapter.sites.items() if p})
        if rest is adapter or rest.sites or rest.whole:
            merged.append((rest, weight))
    if len(virtual) > 1:
        raise Mismatch(f"{len(virtual)} sets of virtual tokens cannot act at once", hint="export one of them")
    weights = [w for _, w in merged] if wish.weights else None
    return replace(wish, adapters=[a for a, _ in merged], weights=weights, virtual=virtual)


def runnable(wish: Wish, dtype: str | None) -> None:
    """Raises Usage or Mismatch for numbers that the device has no operations for, or that quantising does not take.

    dtype: of the graph, None for the one that is written when nothing is said.
    """
    if wish.quantize and dtype not in START[wish.quantize]:
        text = f"{wish.quantize} does not start from {dtype}"
        raise Usage(text, where="--quantize", hint="leave --dtype out" if wish.dtype else "cast the model to float32")
    if dtype == "bfloat16" and (wish.verify or wish.device != "cuda"):
        from ..export.devices import has_cuda

        if wish.device == "cpu" or not has_cuda():
            raise Mismatch(
                "ONNX Runtime has no bfloat16 Add and Mul on a CPU, so such a graph does not run there",
                where="--dtype bfloat16" if wish.dtype else "MODEL",
                hint="use float16 or float32; for a GPU elsewhere, --device cuda --no-verify",
            )


def task_of(config: dict[str, Any], wish: Wish) -> Any:
    """What a model is exported for. Raises Usage or Mismatch when nothing says so, or adapters say something else."""
    from ..export import task as tasks

    trained = {named(a): str(a.about["task_type"]) for a in wish.every if a.about.get("task_type")}
    task = tasks.task_of(config, wish.task, trained)
    if wish.kept and task.kind == "seq2seq":
        hint = "leave it out: the adapter is merged"
        raise Mismatch(
            "an encoder-decoder has three graphs, and an adapter's file fits one", where="--swappable", hint=hint
        )
    return task
