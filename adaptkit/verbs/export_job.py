"""An export under way: a live module becomes files in a workshop, is compared with them, and they move out."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import AdaptKitWarning
from ..store.output import Output
from .export_wish import Wish, named
from .inputs import Counter
from .merge import write_text


@dataclass
class Exported:
    """What was exported.

    files: bytes of each graph with its numbers, 0 in a rehearsal.    route: which exporter traced it.
    checked: what comparing with torch found, None when it was not done.    quantized: the same for the quantised graph,
    against the one before.    bytes: of everything; of a rehearsal, what the disk must have room for.
    seconds: it took.    written: False for a rehearsal.
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


class Job:
    """An export under way: what it is made of, and what was made so far."""

    def __init__(
        self,
        out: Output,
        task: Any,
        wish: Wish,
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
        count = Counter(sum(p.numel() * p.element_size() for p in module.parameters()), self.wish.progress)
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
        from ..export import players
        from ..export.exam import exam

        names = players.outputs_of(built)
        self.exam = exam(model, self.task.kind, names, self.wish.say)
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


def receipt(base: str, made: Exported, wish: Wish) -> dict[str, Any]:
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
        "adapters": list(dict.fromkeys(map(named, wish.every))),
        "versions": versions(),
        "verified": asdict(made.checked) if made.checked else "not verified (--no-verify)",
        **({"virtual_tokens": made.virtual} if made.virtual else {}),
        **({"swappable": made.swapped} if made.swapped else {}),
        **({"quantized": asdict(made.quantized)} if made.quantized else {}),
    }
