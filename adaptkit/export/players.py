"""One way to talk to a model, whether it is torch's or a graph in ONNX Runtime: begin with a batch, then step by step.

The side of torch uses transformers' own caches and none of our wrappers, so that it is a witness of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from ..errors import Mismatch, quoted
from . import extra, virtual
from .build import takes
from .graph import Graph

Arrays = dict[str, np.ndarray]
COPIES = ["ConstantFolding"]  # turns a tied embedding around and holds both; products can read it as it lies
SHORT = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(double)": np.float64}


class Player(Protocol):
    """begin: forget everything, and read what an encoder is given.    step: outputs for new inputs."""

    def begin(self, batch: int, source: Arrays) -> None: ...

    def step(self, inputs: Arrays) -> Arrays: ...


class Torch:
    """A live model. names: of the outputs that count."""

    def __init__(self, model: nn.Module, kind: str, names: list[str]):
        self.model, self.kind, self.names = model, kind, names

    def begin(self, batch: int, source: Arrays) -> None:
        """Start with an empty cache, as transformers makes it for this model."""
        from transformers import DynamicCache, EncoderDecoderCache

        self.cache: Any = DynamicCache(config=self.model.config) if self.kind == "decoder" else None
        if self.kind == "seq2seq":
            self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            words = self._tensors(source)
            self.said = self._run(self.model.get_encoder(), words)
            self.mask = {"attention_mask": words["attention_mask"]} if "attention_mask" in words else {}

    def step(self, inputs: Arrays) -> Arrays:
        """What the model says; half precision as float32."""
        words = self._tensors(inputs)
        if self.kind == "seq2seq":
            words = {"decoder_input_ids": words["input_ids"], "encoder_outputs": self.said, **self.mask}
        if self.kind != "encoder":
            words |= {"past_key_values": self.cache, "use_cache": True}
        said = self._run(self.model, words)
        self.cache = getattr(said, "past_key_values", None)
        return {n: _single(self._own(getattr(said, n), words)).cpu().numpy() for n in self.names}

    def _own(self, value: Any, words: dict[str, Any]) -> Any:
        """An output without what it says of virtual tokens, which stand before the ones that were given."""
        ids = words.get("decoder_input_ids" if self.kind == "seq2seq" else "input_ids")
        more = virtual.rows(self.model)
        if ids is None or not more or value.ndim < 2 or value.shape[1] != ids.shape[1] + more:
            return value
        return value[:, more:]

    def _tensors(self, arrays: Arrays) -> dict[str, Any]:
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        made = {k: torch.from_numpy(v).to(self.model.device) for k, v in arrays.items()}
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.items()}

    @torch.no_grad()
    def _run(self, module: nn.Module, words: dict[str, Any]) -> Any:
        counted = takes(module, "position_ids") and not virtual.rows(self.model)  # a prompt moves them all
        return module(**{k: v for k, v in words.items() if k != "position_ids" or counted})


class Session:
    """A graph in ONNX Runtime. provider: where it really runs."""

    def __init__(self, file: Path, device: str = "cpu"):
        runtime, self.file = extra.runtime(), file
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of the weights
        options.enable_cpu_mem_arena = False  # it keeps what the longest prompt needed
        exact = ("CUDAExecutionProvider", {"use_tf32": "0"})  # else products of float32 keep ten bits
        wanted = [exact] if device == "cuda" and exact[0] in runtime.get_available_providers() else []
        with explained(file):
            self.session = runtime.InferenceSession(
                str(file), options, providers=[*wanted, "CPUExecutionProvider"], disabled_optimizers=COPIES
            )
        self.provider = self.session.get_providers()[0].removesuffix("ExecutionProvider")
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.names = [o.name for o in self.session.get_outputs()]
        self.options: Any = None
        self.adapter: Any = None

    def put(self, adapter: Path | None) -> None:
        """Let an adapter act from now on, or none."""
        runtime = extra.runtime()
        self.options, self.adapter = runtime.RunOptions(), runtime.LoraAdapter()  # which must live as long as it acts
        if adapter is not None:
            self.adapter.Load(str(adapter))
            self.options.add_active_adapter(self.adapter)

    def run(self, feeds: Arrays) -> Arrays:
        """Outputs by name; numbers are given in the graph's own dtype."""
        given = {n: self._fit(n, feeds[n]) for n in self.inputs}
        with explained(self.file):
            return dict(zip(self.names, self.session.run(None, given, self.options), strict=True))

    def empty(self, name: str, batch: int) -> np.ndarray:
        """A past of no tokens."""
        shape = [batch, *self.inputs[name].shape[1:]]
        return np.zeros([0 if isinstance(d, str) else d for d in shape], SHORT[self.inputs[name].type])

    def _fit(self, name: str, value: np.ndarray) -> np.ndarray:
        dtype = SHORT.get(self.inputs[name].type)
        return value.astype(dtype) if dtype is not None and value.dtype != dtype else value


@contextlib.contextmanager
def explained(file: Path) -> Iterator[None]:
    """Turn what ONNX Runtime reports into a sentence."""
    try:
        yield
    except Exception as e:
        if not type(e).__module__.startswith("onnxruntime"):
            raise
        raise Mismatch(f"ONNX Runtime does not run {file.name}: {quoted(e)}", hint="--opset may change that") from e


class Runtime:
    """The graphs of an export in ONNX Runtime. The cache is what the graph gave, fed back by its names."""

    def __init__(self, files: dict[str, Path], kind: str, device: str = "cpu"):
        self.kind = kind
        self.sessions = {name: Session(file, device) for name, file in files.items()}
        self.provider = next(iter(self.sessions.values())).provider

    def put(self, adapter: Path | None) -> None:
        """Let an adapter act in the one graph that there is, or none."""
        self.sessions["model"].put(adapter)

    def begin(self, batch: int, source: Arrays) -> None:
        """An empty past, and what the encoder says."""
        self.past: Arrays = {}
        if self.kind == "decoder":
            main = self.sessions["model"]
            self.past = {n: main.empty(n, batch) for n in main.inputs if n.startswith("past_key_values.")}
        if self.kind == "seq2seq":
            said = self.sessions["encoder_model"].run(source)["last_hidden_state"]
            self.said = {"encoder_hidden_states": said}
            if "attention_mask" in source:
                self.said["encoder_attention_mask"] = source["attention_mask"]

    def step(self, inputs: Arrays) -> Arrays:
        """What the graph says; half precision as float32."""
        main, feeds = self._graph(), {**inputs, **self.past}
        if self.kind == "seq2seq":
            feeds |= self.said
        said = main.run(feeds)
        kept = {n.replace("present.", "past_key_values."): v for n, v in said.items() if n.startswith("present.")}
        self.past = self.past | kept
        said = {n: v for n, v in said.items() if not n.startswith("present.")}
        return {n: np.asarray(v, np.promote_types(v.dtype, np.float32)) for n, v in said.items()}

    def _graph(self) -> Session:
        if self.kind != "seq2seq":
            return self.sessions["model"]
        return self.sessions["decoder_with_past_model" if self.past else "decoder_model"]


def _single(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def outputs_of(graphs: list[Graph]) -> list[str]:
    """The outputs that are compared: not the caches, which show in the next step."""
    return [n for n in graphs[-1].outputs if not n.startswith("present.")]
