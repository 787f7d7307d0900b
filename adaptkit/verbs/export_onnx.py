"""export-onnx: a model, with adapters merged into it on the way, as graphs that ONNX Runtime runs. Checked against torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..engines.plan import Plan
from ..errors import AdaptKitError, Mismatch, Usage
from ..store.arrays import shape_of
from ..store.checkpoint import Checkpoint, Stamps, stamps, unchanged
from ..store.hub import called
from ..store.output import Output
from ..store.quantised import refuse_quantised
from .export_job import Exported, Job, receipt
from .export_wish import DTYPES, Wish, runnable, task_of, wish_of
from .inputs import Source, files_of, model_of
from .merge import merge, planned

__all__ = ["Exported", "export_onnx"]
OVERHEAD = 20_000_000  # bytes of graphs and files beside them
FILES = {
    "decoder": ["model"], "encoder": ["model"],
    "seq2seq": ["encoder_model", "decoder_model", "decoder_with_past_model"],
}  # fmt: skip


def export_onnx(
    model: str | Path | Any,
    adapters: Source | Sequence[Source] = (),
    output: str | Path | None = None,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    task: str | None = None,
    swappable: bool = False,
    device: str = "auto",
    opset: int | None = None,
    no_verify: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Export a model as ONNX graphs, with adapters merged into it on the way.

    model: a folder, a Hub id, or a live transformers model.    adapters: folders, files, Hub ids or Adapter values, in order.
    output: a folder that appears when it is complete.      weights: how much of each update is taken, 1 when left out.
    dtype: "float32" (the default), "float16" or "bfloat16"; a live model keeps its own.     quantize: "int8", "int8_weight_only" or
    "int4".
    task: a name of the Hub's, such as "text-generation"; read from config.json when left out.
    device: where the graphs are tried, "auto", "cpu" or "cuda".      opset: of ONNX, 18 to 23; 20 when left out.
    no_verify: do not compare the graphs with torch.      dry_run: say what would be made, and write nothing.
    swappable: adapters beside the graph, to be changed while it runs.      progress: called with (bytes, of bytes).

    Raises Usage, Corrupt, Mismatch, Unsafe, System or Hub; nothing is published then.
    """
    wish = wish_of(locals())
    if _is_live(model):
        return _live(model, wish, dry_run)
    checkpoint = model_of(model, progress)
    if not checkpoint.path.is_dir():
        raise Usage(
            "is a weight file, and its settings are needed as well", where=model, hint="give the model's folder"
        )
    try:
        refuse_quantised(checkpoint)
    except Mismatch as e:
        e.hint = "export the 16-bit model it was made from, with --quantize"
        raise
    chosen = task_of(checkpoint.config, wish)
    if dry_run:
        return _rehearsed(checkpoint, chosen, wish)
    return _exported(checkpoint, chosen, wish)


def _is_live(model: Any) -> bool:
    return not isinstance(model, (str, Path))


def _exported(checkpoint: Checkpoint, task: Any, wish: Wish) -> Exported:
    taken = _taken(checkpoint, wish)
    plan = _planned(checkpoint, wish)
    out = _output(checkpoint, wish, _fingerprint(taken, plan, wish))
    with out:
        from ..export.load import unload

        source = _merged(checkpoint, out, wish)
        wish.say("loading")
        job = Job(out, task, wish, wish.dtype or "float32", source.config, list(source.extras()))
        module = _loaded(source, checkpoint, job, plan.changed if plan and not wish.kept else [])
        made = job.done(module, lambda: unload(module))
        unchanged(taken)
        out.publish(receipt(called(Path(os.path.abspath(checkpoint.path))), made, wish))
    made.adapters, made.seconds = len(wish.adapters), time.monotonic() - wish.start
    return made


def _rehearsed(checkpoint: Checkpoint, task: Any, wish: Wish) -> Exported:
    """What an export would make, with everything checked that needs no numbers."""
    _output(checkpoint, wish, _fingerprint(_taken(checkpoint, wish), _planned(checkpoint, wish), wish))
    if wish.kept:
        _slotted(checkpoint, wish)
    return _promised(task, wish.dtype or "float32", _need(checkpoint, wish), wish)


def _taken(checkpoint: Checkpoint, wish: Wish) -> Stamps:
    """What is read, as it is now."""
    return stamps([*checkpoint.files, *(f for a in wish.every for f in files_of(a))])


def _slotted(checkpoint: Checkpoint, wish: Wish) -> None:
    """Raises Mismatch for adapters that no slot takes, by the model without its numbers; nothing where that says nothing."""
    from ..store.metamodel import meta_model

    try:
        model = meta_model(checkpoint.config)
    except Mismatch:
        return
    if wish.task is None:
        wish.kept.fitted(model)


def _promised(task: Any, dtype: str, need: int, wish: Wish) -> Exported:
    made = Exported(wish.output, task.name, dtype, wish.opset, wish.quantize, adapters=len(wish.adapters))
    made.files = {f"{n}.onnx": 0 for n in FILES[task.kind]}
    made.bytes, made.written = need, False
    made.swapped = {name: {} for name in (wish.kept.adapters if wish.kept else ())}
    made.files |= {f"{name}.onnx_adapter": 0 for name in made.swapped}
    made.virtual = sum(a.sites[""].tuner.tokens for a in wish.virtual)
    return made


def _planned(checkpoint: Checkpoint, wish: Wish) -> Plan | None:
    """The merge of the adapters, or what it would be. Raises Mismatch for an adapter that does not fit the model's files."""
    weighty = list(wish.kept.adapters.values()) if wish.kept else wish.adapters
    if not weighty:
        return None
    return planned(checkpoint, weighty, weights=wish.weights, dtype=wish.dtype or "float32")


def _output(checkpoint: Checkpoint, wish: Wish, plan: str) -> Output:
    inputs = list(dict.fromkeys([checkpoint.path, *(Path(a.meta["path"]) for a in wish.every if "path" in a.meta)]))
    return Output(wish.output, plan=plan, need=_need(checkpoint, wish), inputs=inputs, overwrite=wish.overwrite)


def _graph(checkpoint: Checkpoint, wish: Wish) -> int:
    """Bytes of the graph's numbers, about."""
    return sum(e.numel for e in checkpoint.entries.values()) * DTYPES[wish.dtype or "float32"]


def _need(checkpoint: Checkpoint, wish: Wish) -> int:
    """Bytes of disk: the graphs, the adapters beside them, and on the way the merged model."""
    times = 1 + bool(wish.adapters or checkpoint.pickled) + 2 * bool(wish.quantize)  # the quantiser writes copies
    kept = wish.kept.adapters.values() if wish.kept else ()
    beside = sum(math.prod(shape_of(p)) for a in kept for site in a.sites.values() for p in site.params.values())
    return _graph(checkpoint, wish) * times + beside * DTYPES[wish.dtype or "float32"] + OVERHEAD


def _loaded(source: Checkpoint, base: Checkpoint, job: Job, changed: Sequence[Any]) -> Any:
    """The module of a folder, with virtual tokens acting on it.    changed: what adapters changed. Errors name the base."""
    from .. import live
    from ..export.load import load

    try:
        model = load(source.path, job.task, job.dtype, {target.name for target in changed})
    except AdaptKitError as e:
        e.where = base.path if e.where == source.path else e.where
        raise
    for adapter in job.wish.virtual:
        live.attach(model, adapter, freeze=False)
    return model


def _fingerprint(taken: Stamps, plan: Plan | None, wish: Wish) -> str:
    """What a later run must have in common with this one to go on with its merge."""
    from ..export.trace import versions

    said: list[Any] = [sorted((str(f), s) for f, s in taken.items()), versions(), version("adaptkit")]
    said += [wish.dtype, wish.quantize, wish.task, wish.opset, wish.verify]
    said.append([*wish.kept.adapters] if wish.kept else [])
    said.append(plan.fingerprint() if plan else None)
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()


def _merged(checkpoint: Checkpoint, out: Output, wish: Wish) -> Checkpoint:
    """The model to trace: the base itself, or its merge in a folder that goes when the export is done.

    Merged on files, so that its numbers are mapped, not held, while they become a graph's.
    """
    if not wish.adapters and not checkpoint.pickled:
        return checkpoint
    folder = out.part("merged")
    if not (folder / "adaptkit.json").exists():
        wish.say("merging")
        how = {"weights": wish.weights, "dtype": wish.dtype or "float32"}
        if wish.adapters:
            merge(checkpoint.path, wish.adapters, folder, **how, progress=wish.progress)
        else:
            from .convert import convert

            convert(checkpoint.path, folder, "safetensors", progress=wish.progress)
    if wish.progress:
        wish.progress(0, _graph(checkpoint, wish))  # the merge was the way there
    return model_of(folder)


def _live(model: Any, wish: Wish, dry_run: bool) -> Exported:
    """A live module: its adapters act while it is traced, and it is afterwards what it was."""
    from ..export import lent

    config = lent.config_of(model)
    task, dtype = task_of(config, wish), lent.dtype_of(model, wish.dtype)
    lent.suited(model, task)
    runnable(wish, dtype)
    need = sum(p.numel() * p.element_size() for p in model.parameters()) * (1 + 2 * bool(wish.quantize)) + OVERHEAD
    plan = hashlib.sha256(os.urandom(16)).hexdigest()  # nobody knows whether the module is still the same
    inputs = [Path(a.meta["path"]) for a in wish.every if "path" in a.meta]
    out = Output(wish.output, plan=plan, need=need, inputs=inputs, overwrite=wish.overwrite)
    acting = lent.lent(model, [*wish.adapters, *wish.virtual], wish.weights)
    if dry_run:
        with acting as module:
            if wish.kept:
                wish.kept.fitted(module)
        return _promised(task, dtype, need, wish)
    with out, acting as module:
        made = Job(out, task, wish, dtype, config, []).done(module)
        out.publish(receipt(type(model).__name__, made, wish))
    made.adapters, made.seconds = len(wish.adapters), time.monotonic() - wish.start
    return made
