"""From a Graph to an ONNX model in memory: transformers' exporter, and torch's own where that fails."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..errors import Mismatch, Usage, quoted
from . import names
from .experts import plain_experts
from .graph import Graph
from .rules import quick_rules

OPSET = 20  # IR version 10: what the most runtimes read
OPSETS = range(18, 24)
PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "onnxruntime-gpu")


def traced(graph: Graph, opset: int = OPSET) -> tuple[Any, str]:
    """An onnx_ir.Model with the names of the graph, and the route it took.

    Not safe in threads: both exporters exchange functions of torch while they run.
    Raises Usage for an opset out of reach, Mismatch with the cause when no route leads there.
    """
    if opset not in OPSETS:
        raise Usage(f"{opset} is not between {OPSETS[0]} and {OPSETS[-1]}", where="--opset")
    failures: list[Exception] = []
    for name, route in (("transformers.exporters", _transformers), ("torch.onnx", _torch)):
        try:
            with quiet(), light(), quick_rules(), torch.no_grad():
                model = route(graph, opset)
            names.settle(model, graph)
            return model, name
        except Mismatch:
            raise
        except Exception as e:
            failures.append(e)
    raise Mismatch(
        f"{_kind(graph)} cannot be traced: {_cause(failures[0])}", hint="--debug shows all of it"
    ) from failures[0]


def _transformers(graph: Graph, opset: int) -> Any:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    auto = torch.export.Dim.AUTO
    how = OnnxConfig(dynamic=True, dynamic_shapes=graph.shapes(lambda _: auto), opset_version=opset)
    return OnnxExporter().export(graph.module, graph.fresh(), how).program


def _torch(graph: Graph, opset: int) -> Any:
    with plain_experts(getattr(graph.module, "model", None)), _spelled(graph.module, list(graph.sample)):
        program = torch.onnx.export(
            graph.module, (), kwargs=graph.fresh(), input_names=graph.inputs, output_names=list(graph.outputs),
            dynamic_shapes=graph.shapes(lambda axis: axis), dynamo=True, opset_version=opset, verbose=False,
        )  # fmt: skip
    return program.model


@contextlib.contextmanager
def _spelled(module: Any, words: list[str]) -> Iterator[None]:
    """A module whose forward says which words it takes: torch.export counts **words as one."""
    forward = module.forward

    def spelled(**given: Any) -> Any:
        return forward(**given)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    spelled.__signature__ = inspect.Signature([inspect.Parameter(w, kind, default=None) for w in words])  # type: ignore[attr-defined]
    module.forward = spelled
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)


@contextlib.contextmanager
def light() -> Iterator[None]:
    """torch.export without the source lines of its nodes, and without its memory of operations by their shapes.

    Of 250 MB that tracing 32 layers holds they are 15 and 30, and no time was seen to be saved by either.
    """
    import torch._dynamo.config
    import torch.fx.config

    settings = (
        (torch.fx.config, "do_not_emit_stack_traces", True),
        (torch._dynamo.config, "fake_tensor_cache_enabled", False),
    )
    settings = [s for s in settings if hasattr(*s[:2])]  # neither is promised
    before = [getattr(config, name) for config, name, _ in settings]
    try:
        for config, name, value in settings:
            setattr(config, name, value)
        yield
    finally:
        for (config, name, _), value in zip(settings, before, strict=True):
            setattr(config, name, value)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters print that their user can do nothing about."""
    from transformers.utils import logging as hf

    bars, before = hf.is_progress_bar_enabled(), logging.root.manager.disable
    hf.disable_progress_bar()
    logging.disable(logging.CRITICAL)  # of all: some set levels and handlers of their own
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if bars:
            hf.enable_progress_bar()


def _kind(graph: Graph) -> str:
    inner = getattr(graph.module, "model", None) or graph.module
    return quoted(type(inner).__name__)


def _cause(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {quoted(lines[0] if lines else '')}"


def versions() -> dict[str, str]:
    """The packages that a graph depends on."""
    return {name: version(name) for name in PACKAGES if _there(name)}


def _there(name: str) -> bool:
    with contextlib.suppress(PackageNotFoundError):
        return bool(version(name))
    return False
