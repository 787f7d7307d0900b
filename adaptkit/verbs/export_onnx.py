"""export-onnx: a model, with adapters merged into it on the way, as graphs that ONNX Runtime runs. Checked against torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..engines import checks
from ..errors import AdaptKitError, AdaptKitWarning, Mismatch, Usage, quoted
from ..store.checkpoint import Checkpoint, stamps, unchanged
from ..store.hub import called
from ..store.output import Output
from ..store.quantised import refuse_quantised
from .inputs import Progress, Source, adapters_of, files_of, model_of, weights_of
from .merge import merge, planned, write_text

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
QUANTIZE = ("int8", "int4")
START = {
    "int8": (None, "float32"),
    "int4": (None, "float32", "float16"),
}  # ONNX Runtime's int8 reads float32 activations
DEVICES = ("auto", "cpu", "cuda")
OVERHEAD = 20_000_000  # bytes of graphs and files beside them
VIRTUAL = ("prompt", "ptuning", "prefix")


@dataclass
class Exported:
    """What was exported.

    files: bytes of each graph with its numbers.    route: which exporter traced it.    checked: what comparing with torch
    found, None when it was not done.    quantized: the same for the quantised graph, against the one before.
    bytes: of everything.    seconds: it took.    written: False for a rehearsal.
    swapped: what there is to say of each adapter beside the graph.    virtual: tokens that are built into it.
    """

    output: Path
    task: str
    dtype: str
    opset: int
    quantize: str | None = None
    files: dict[str, int] = field(default_factory=dict)
    route: str = ""
    checked: Any = None
    quantized: Any = None
    adapters: int = 0
    bytes: int = 0
    seconds: float = 0.0
    written: bool = True
    swapped: dict[str, dict[str, Any]] = field(default_factory=dict)
    virtual: int = 0


@dataclass
class _Wish:
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
    dtype: "float32" (the default), "float16" or "bfloat16"; a live model keeps its own.     quantize: "int8" or "int4".
    task: a name of the Hub's, such as "text-generation"; read from config.json when left out.
    device: where the graphs are tried, "auto", "cpu" or "cuda".      opset: of ONNX, 18 to 23; 20 when left out.
    no_verify: do not compare the graphs with torch.      dry_run: say what would be made, and write nothing.
    swappable: adapters beside the graph, to be changed while it runs.      progress: called with (bytes, of bytes).

    Raises Usage, Corrupt, Mismatch, Unsafe, System or Hub; nothing is published then.
    """
    wish = _wish(locals())
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
    chosen = _task(checkpoint.config, wish)
    if dry_run:
        return _rehearsed(checkpoint, chosen, wish)
    return _exported(checkpoint, chosen, wish)


def _wish(given: dict[str, Any]) -> _Wish:
    """Raises Usage or Mismatch for options that make no sense, before anything is read."""
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
    if given["quantize"] and given["dtype"] not in START[given["quantize"]]:
        text = f"{given['quantize']} does not start from {given['dtype']}"
        raise Usage(text, where="--quantize", hint="leave --dtype out")
    listed = [given["adapters"]] if isinstance(given["adapters"], (str, Path, Adapter)) else list(given["adapters"])
    read = adapters_of(listed, given["progress"]) if listed else []
    if given["weights"] is not None and not read:
        raise Usage("is about adapters, and there are none", where="--weights")
    for adapter in read:
        if given["swappable"] or "" in adapter.sites:
            _sound(adapter)
    if given["swappable"]:
        return _swapped(given, read, opset)
    merged, weights, virtual = _parted(read, given["weights"])
    wish = _Wish(
        Path(given["output"]), merged, weights, given["dtype"], given["quantize"], given["task"], given["device"],
        opset, not given["no_verify"], given["overwrite"], given["progress"], time.monotonic(), virtual,
    )  # fmt: skip
    _runnable(wish)
    return wish


def _sound(adapter: Adapter) -> None:
    """Raises Corrupt for numbers that are none, before a model is loaded."""
    try:
        checks.numbers(adapter)
    except AdaptKitError as e:
        raise e.at(called(Path(adapter.meta.get("path", "adapter")))) from None


def _swapped(given: dict[str, Any], read: list[Adapter], opset: int) -> _Wish:
    """The wish for a graph whose adapters stay beside it. Raises Mismatch for those that cannot."""
    if not read:
        raise Usage("is about adapters, and there are none", where="--swappable", hint="name them, or leave it out")
    if given["weights"] is not None:
        hint = "scale the adapter with adaptkit combine --method cat --weights"
        raise Usage("adapters beside a graph act whole", where="--weights", hint=hint)
    from ..export.kept import kept

    wish = _Wish(
        Path(given["output"]), [], None, given["dtype"], given["quantize"], given["task"], given["device"], opset,
        not given["no_verify"], given["overwrite"], given["progress"], time.monotonic(), kept=kept(read),
    )  # fmt: skip
    _runnable(wish)
    return wish


def _parted(
    read: list[Adapter], weights: Sequence[float] | None
) -> tuple[list[Adapter], list[float] | None, list[Adapter]]:
    """What is merged, its weights, and the virtual tokens. A head that was trained with these is merged.

    Raises Mismatch for virtual tokens that cannot be built in.
    """
    merged: list[tuple[Adapter, float]] = []
    virtual: list[Adapter] = []
    for adapter, weight in zip(read, weights_of(weights, len(read)), strict=True):
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
    return [a for a, _ in merged], [w for _, w in merged] if weights else None, virtual


def _runnable(wish: _Wish) -> None:
    """Raises Mismatch for numbers that the device has no operations for."""
    if wish.dtype == "bfloat16" and (wish.verify or wish.device != "cuda"):
        from ..export.devices import has_cuda

        if wish.device == "cpu" or not has_cuda():
            raise Mismatch(
                "ONNX Runtime has no bfloat16 Add and Mul on a CPU, so such a graph does not run there",
                where="--dtype bfloat16",
                hint="use float16 or float32; for a GPU elsewhere, --device cuda --no-verify",
            )


def _is_live(model: Any) -> bool:
    return not isinstance(model, (str, Path))


def _task(config: dict[str, Any], wish: _Wish) -> Any:
    from ..export.task import task_of

    task = task_of(config, wish.task)
    if wish.kept and task.kind == "seq2seq":
        hint = "leave it out: the adapter is merged"
        raise Mismatch(
            "an encoder-decoder has three graphs, and an adapter's file fits one", where="--swappable", hint=hint
        )
    return task


def _rehearsed(checkpoint: Checkpoint, task: Any, wish: _Wish) -> Exported:
    """What an export would make, with everything checked that needs no numbers."""
    if weighty := wish.kept.adapters.values() if wish.kept else wish.adapters:
        planned(checkpoint, list(weighty), weights=wish.weights, dtype=wish.dtype or "float32")
    need = _need(checkpoint, wish)
    Output(wish.output, plan="", need=need, inputs=[checkpoint.path], overwrite=wish.overwrite)
    names = {f"{n}.onnx": 0 for n in FILES[task.kind]}
    dtype = wish.dtype or "float32"
    made = Exported(wish.output, task.name, dtype, wish.opset, wish.quantize, names, adapters=len(wish.adapters))
    made.bytes, made.written = need, False
    made.swapped = {name: {} for name in (wish.kept.adapters if wish.kept else ())}
    made.virtual = sum(a.sites[""].tuner.tokens for a in wish.virtual)
    return made


FILES = {
    "decoder": ["model"], "encoder": ["model"],
    "seq2seq": ["encoder_model", "decoder_model", "decoder_with_past_model"],
}  # fmt: skip


def _need(checkpoint: Checkpoint, wish: _Wish) -> int:
    """Bytes of disk: the graphs, and on the way the merged model."""
    graph = sum(e.numel for e in checkpoint.entries.values()) * DTYPES[wish.dtype or "float32"]
    times = 1 + bool(wish.adapters or checkpoint.pickled) + 2 * bool(wish.quantize)  # the quantiser writes copies
    return graph * times + OVERHEAD


def _exported(checkpoint: Checkpoint, task: Any, wish: _Wish) -> Exported:
    taken = stamps([*checkpoint.files, *(f for a in wish.every for f in files_of(a))])
    inputs = list(dict.fromkeys([checkpoint.path, *(Path(a.meta["path"]) for a in wish.every if "path" in a.meta)]))
    plan = _fingerprint(checkpoint, taken, wish)
    out = Output(wish.output, plan=plan, need=_need(checkpoint, wish), inputs=inputs, overwrite=wish.overwrite)
    with out:
        from ..export.load import unload

        source = _merged(checkpoint, out, wish)
        wish.say("loading")
        job = _Job(out, task, wish, wish.dtype or "float32", source.config, list(source.extras()))
        module = _loaded(source.path, task, job.dtype, wish.virtual)
        made = job.done(module, lambda: unload(module))
        unchanged(taken)
        out.publish(_receipt(called(checkpoint.path), inputs[1:], made, wish))
    made.adapters, made.seconds = len(wish.adapters), time.monotonic() - wish.start
    return made


def _loaded(folder: Path, task: Any, dtype: str, virtual: Sequence[Adapter]) -> Any:
    """The module of a folder, with virtual tokens acting on it."""
    from .. import live
    from ..export.load import load

    model = load(folder, task, dtype)
    for adapter in virtual:
        live.attach(model, adapter, freeze=False)
    return model


def _fingerprint(checkpoint: Checkpoint, taken: dict[Path, Any], wish: _Wish) -> str:
    """What a later run must have in common with this one to go on with its merge, which is checked here as well."""
    from ..export.trace import versions

    said: list[Any] = [sorted((str(f), s) for f, s in taken.items()), versions(), version("adaptkit")]
    said += [wish.dtype, wish.quantize, wish.task, wish.opset, wish.verify]
    said.append([*wish.kept.adapters] if wish.kept else [])
    if wish.adapters:
        merging = planned(checkpoint, wish.adapters, weights=wish.weights, dtype=wish.dtype or "float32")
        said.append(merging.fingerprint())
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()


def _merged(checkpoint: Checkpoint, out: Output, wish: _Wish) -> Checkpoint:
    """The model to trace: the base itself, or its merge in a folder that goes when the export is done.

    Merged on files, so that its numbers are mapped, not held, while they become a graph's.
    """
    if not wish.adapters and not checkpoint.pickled:
        return checkpoint
    folder = out.part("merged")
    if not (folder / "adaptkit.json").exists():
        wish.say("merging")
        if wish.adapters:
            merge(
                checkpoint.path,
                wish.adapters,
                folder,
                weights=wish.weights,
                dtype=wish.dtype or "float32",
                progress=wish.progress,
            )
        else:
            from .convert import convert

            convert(checkpoint.path, folder, "safetensors", progress=wish.progress)
    if wish.progress:
        wish.progress(0, 1)  # the merge was the way there
    return model_of(folder)


class _Job:
    """An export under way: a live module becomes files in a workshop, is compared with them, and they move out."""

    def __init__(
        self,
        out: Output,
        task: Any,
        wish: _Wish,
        dtype: str,
        config: dict[str, Any],
        extras: Sequence[tuple[Path, str]],
    ):
        self.out, self.task, self.wish, self.dtype, self.config, self.extras = out, task, wish, dtype, config, extras
        self.made = Exported(out.path, task.name, dtype, wish.opset, wish.quantize)
        self.files: dict[str, Path] = {}
        self.swaps: dict[str, Path] = {}
        self.exam: Any = None

    def done(self, module: Any, free: Callable[[], None] | None = None) -> Exported:
        """Do it all. free: called when the module's numbers are no longer needed."""
        work = self.out.part("graphs")
        work.mkdir(exist_ok=True)
        try:
            beside = self._traced(module, work)
            if free:
                free()
            if not self.wish.quantize:
                self._shared()
            if self.exam:
                self.made.checked = self._checked()
            if self.wish.quantize:
                self.made.quantized = self._quantised(self.wish.quantize)
            self._adopt()
        finally:
            shutil.rmtree(work, ignore_errors=True)  # half of it is no use to a later run
        self._beside(beside)
        return self.made

    def _traced(self, module: Any, work: Path) -> list[tuple[str, Path | bytes]]:
        """Write the graphs, and ask torch what they will be asked."""
        from ..export import folder, virtual
        from ..export.ways import graphs
        from ..export.write import write

        self.wish.say("preparing")
        built = graphs(module, self.task, self.wish.kept)
        self.made.virtual = virtual.count(module)
        if self.wish.verify:
            self._asked(module, built)
        count = _Bytes(sum(p.numel() * p.element_size() for p in module.parameters()), self.wish.progress)
        for graph in built:
            self.wish.say(f"tracing {graph.name}")
            written = write(graph, work, self.wish.opset, count)
            self.files[graph.name], self.made.route = written.file, written.route
        if self.wish.kept:
            self.swaps = self.wish.kept.write(work, self.dtype)
            self.made.swapped = {name: self.wish.kept.told(name) for name in self.swaps}
        return list(folder.beside(self.extras, self.config, module, built, self.dtype))

    def _asked(self, model: Any, built: Sequence[Any]) -> None:
        """Let torch answer, alone and with each adapter that stays beside the graph."""
        from ..export import players, verify

        names = players.outputs_of(built)
        self.exam = verify.exam(model, self.task.kind, names, self.wish.say)
        if self.wish.kept:
            self.wish.kept.ask(model, self.task.kind, names, self.wish.say)

    def _checked(self) -> Any:
        """What ONNX Runtime says, beside what torch said. Raises Mismatch when that is something else."""
        from ..export import players, verify
        from ..export.devices import device_of

        self.wish.say("checking")
        player = players.Runtime(self.files, self.task.kind, device_of(self.wish.device))
        if self.wish.device == "cuda" and player.provider != "CUDA":
            text = "ONNX Runtime could not use CUDA here; the graphs were checked on the CPU"
            warnings.warn(text, AdaptKitWarning, stacklevel=2)
        found = verify.compared(self.exam, player)
        verify.refuse(found, self.task.name)
        for name, file in self.swaps.items():
            player.put(file)
            mine = verify.compared(self.wish.kept.asked[name], player)
            verify.refuse(mine, file.name)
            self.made.swapped[name]["verified"] = asdict(mine)
        return found

    def _quantised(self, kind: str) -> Any:
        """Quantise the graphs; how much they still say what the model says."""
        from ..export import players, quantize, verify

        self.wish.say(f"quantising to {kind}")
        for file in self.files.values():
            quantize.quantised(file, kind)
        self._shared()
        if self.exam is None:
            return None
        self.wish.say("checking")
        player = players.Runtime(self.files, self.task.kind)
        found = verify.likeness(self.exam, player)
        for name, file in self.swaps.items():
            player.put(file)
            self.made.swapped[name]["quantized"] = asdict(verify.likeness(self.wish.kept.asked[name], player))
        return found

    def _shared(self) -> None:
        """Of an encoder-decoder, both decoders hold the same numbers."""
        from ..export.share import share

        if "decoder_with_past_model" in self.files:
            share(self.files["decoder_model"], self.files["decoder_with_past_model"])

    def _adopt(self) -> None:
        """Take the graphs out of the workshop."""
        from ..export.write import DATA, size

        for file in self.files.values():
            self.made.files[file.name] = size(file)
            self.made.bytes += size(file)
            for path in (file, file.with_name(file.name + DATA)):
                if path.exists():
                    self.out.adopt(path, path.name)
        for file in self.swaps.values():
            self.made.files[file.name] = file.stat().st_size
            self.made.bytes += file.stat().st_size
            self.out.adopt(file, file.name)

    def _beside(self, found: Sequence[tuple[str, Path | bytes]]) -> None:
        for name, value in found:
            if isinstance(value, bytes):
                write_text(self.out, name, value)
            elif not self.out.done(name):
                self.out.copy(value, name)
            self.made.bytes += len(value) if isinstance(value, bytes) else value.stat().st_size


def _receipt(base: str, adapters: Sequence[Path], made: Exported, wish: _Wish) -> dict[str, Any]:
    """adaptkit.json: what was made of what, with which versions, and what checking found."""
    from ..export.trace import versions

    how = {
        "verb": "export-onnx",
        "task": made.task,
        "dtype": made.dtype,
        "quantize": made.quantize,
        "opset": made.opset,
    }
    return {
        "adaptkit": version("adaptkit"),
        "made": {k: v for k, v in {**how, "weights": wish.weights, "route": made.route}.items() if v is not None},
        "base": base,
        "adapters": [called(p) for p in adapters],
        "versions": versions(),
        "verified": asdict(made.checked) if made.checked else "not verified (--no-verify)",
        **({"virtual_tokens": made.virtual} if made.virtual else {}),
        **({"swappable": made.swapped} if made.swapped else {}),
        **({"quantized": asdict(made.quantized)} if made.quantized else {}),
    }


def _live(model: Any, wish: _Wish, dry_run: bool) -> Exported:
    """A live module: its adapters act while it is traced, and it is afterwards what it was."""
    from ..export import lent

    config = lent.config_of(model)
    task, dtype = _task(config, wish), lent.dtype_of(model, wish.dtype)
    names = {f"{n}.onnx": 0 for n in FILES[task.kind]}
    if dry_run:
        return Exported(wish.output, task.name, dtype, wish.opset, wish.quantize, names, written=False)
    need = sum(p.numel() * p.element_size() for p in model.parameters()) + OVERHEAD
    plan = hashlib.sha256(os.urandom(16)).hexdigest()  # nobody knows whether the module is still the same
    out = Output(wish.output, plan=plan, need=need, overwrite=wish.overwrite)
    with out, lent.lent(model, [*wish.adapters, *wish.virtual], wish.weights) as module:
        made = _Job(out, task, wish, dtype, config, []).done(module)
        out.publish(_receipt(type(model).__name__, [], made, wish))
    made.adapters, made.seconds = len(wish.adapters), time.monotonic() - wish.start
    return made


class _Bytes:
    """Adds up the bytes of tensors for a progress function."""

    def __init__(self, total: int, report: Progress | None):
        self.total, self.report, self.done = total, report, 0

    def __call__(self, n: int) -> None:
        self.done += n
        if self.report:
            self.report(min(self.done, self.total), self.total)
