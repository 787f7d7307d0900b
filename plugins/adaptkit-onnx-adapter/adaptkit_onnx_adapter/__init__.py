"""LoRA adapters as ONNX Runtime reads them: one .onnx_adapter file of named tensors, which become inputs of a model.

    y = W x + (x a) b     a: (in, r), named <module>.lora_A.weight     b: (r, out), named <module>.lora_B.weight

The file has no scale and no settings: Olive and GenAI multiply the scale into b, and so does this. A model whose graph
multiplies by a scale of its own (its inputs are called lora_A.default.weight) needs b without it, and is refused.
The format: https://onnxruntime.ai/docs/genai/tutorials/finetune.html and onnxruntime's AdapterFormat
"""

import ctypes
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np

from adaptkit import Adapter, AdaptKitError, Corrupt, Format, LoRA, Note, Site, appearing, fold

NAME = re.compile(r"(?P<module>.+)\.lora_(?P<letter>[AB])\.weight")
GRAPH = re.compile(r".+\.lora_[AB]\.(?!weight$)[^.]+\.weight")  # the exporter's names: the scale stays in the graph
PREFIXES = ("", "base_model.model.", "base_model.", "model.")
TYPES = {"float32": 1, "float16": 10, "float64": 11, "bfloat16": 16}  # of ONNX's TensorProto
WIDE = {f"tensor({word})": dtype for word, dtype in {
    "float": np.float32, "float16": np.float16, "double": np.float64, "bfloat16": ml_dtypes.bfloat16,
}.items()}  # fmt: skip


class OnnxAdapter(Format):
    """ONNX Runtime: one .onnx_adapter file; with a model given as base, in its names and shapes."""

    name = "onnx_adapter"
    suffix = ".onnx_adapter"
    cannot = (
        "anything but LoRA on matrices",
        "a scale (folded, which changes nothing beyond a rounding)",
        "modules that the ONNX model has no inputs for",
    )

    def sniff(self, path):
        path = self.file(path)
        if not path.is_file():
            return False
        with open(path, "rb") as f:
            return f.read(8)[4:] == b"TORT"

    def read(self, path, *, base=None):
        ort, path = library(), self.file(path)
        if not self.sniff(path):
            raise AdaptKitError("is no ONNX Runtime adapter: it lacks the mark TORT", where=path.name)
        try:
            file = ort.AdapterFormat.read_adapter(str(path))
            values = {n: array(v) for n, v in file.get_parameters().items()}
            versions = {"adapter_version": file.get_adapter_version(), "model_version": file.get_model_version()}
        except AdaptKitError:
            raise
        except Exception as e:  # whatever the library stumbles over
            text = f"is no sound ONNX Runtime adapter ({first_line(e)})"
            raise Corrupt(text, where=path.name, hint="fetch it again") from None
        try:
            sites = sites_of(values)
        except AdaptKitError as e:
            raise e.at(path.name) from None
        return Adapter(sites, meta={f"onnx_adapter:{k}": str(v) for k, v in versions.items()})

    def write(self, adapter, path, *, base=None, drop=()):
        sites, _, notes = fold.chosen(adapter, "onnx_adapter", set(), drop)
        text = "the file has no scale, so it went into lora_B"
        notes += [Note("folded", p, text) for p, s in sites.items() if s.tuner.scale != 1]
        folded = {p: fold.with_scale(s, 1.0, p) for p, s in sites.items()}
        tensors = {}
        for place, site in folded.items():
            for letter in "AB":
                tensors[f"{place}.lora_{letter}.weight"] = turned(site.params[letter], f"{place}.{letter}")
        if base is not None and of_transformers(Path(base)):
            notes.append(Note("kept", "names", "as Olive writes them: --base holds no ONNX model"))
            base = None
        save(path, tensors if base is None else renamed(tensors, base), adapter.meta)
        return notes


def library():
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read on import: it writes files into the home folder
    try:
        import onnxruntime
    except ImportError:
        raise AdaptKitError(
            "format 'onnx_adapter' needs onnxruntime", hint="pip install adaptkit[onnx_adapter]"
        ) from None
    return onnxruntime


def turned(value, where):
    found = fold.stored(value).T
    if found.dtype.name not in TYPES:
        raise AdaptKitError(f"{where} is {found.dtype}, which onnx_adapter cannot hold")
    if not np.isfinite(found.astype("f4")).all():
        raise AdaptKitError(f"{where} has numbers that are not finite", hint="fetch or train it again")
    return np.ascontiguousarray(found)


def array(value):
    """An OrtValue as NumPy has it. The library itself has no way out for bfloat16."""
    if value.data_type() not in WIDE:
        raise AdaptKitError(
            f"holds {value.data_type()}, adapters hold floats", hint="is it quantised? read the original"
        )
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy().copy()
    raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(raw, ml_dtypes.bfloat16).reshape(value.shape()).copy()


def sites_of(values):
    pairs = {}
    for name, value in values.items():
        if GRAPH.fullmatch(name):
            hint = "read the adapter that it was exported from"
            raise AdaptKitError(f"{name!r} belongs to a graph that has the scale, the file does not", hint=hint)
        if not (found := NAME.fullmatch(name)):
            raise AdaptKitError(f"{name!r} is no part of a LoRA")
        pairs.setdefault(found["module"], {})[found["letter"]] = value
    if not pairs:
        raise AdaptKitError("holds no tensors")
    return {module: site(module, both) for module, both in pairs.items()}


def site(module, both):
    if len(both) == 1:
        raise AdaptKitError(f"{module} has only lora_{next(iter(both))}; it is incomplete", hint="fetch it again")
    A, B = both["A"].T, both["B"].T
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not A.shape[0]:
        raise AdaptKitError(f"{module}: lora_A {list(A.T.shape)} and lora_B {list(B.T.shape)} do not fit each other")
    return Site(LoRA(r=A.shape[0], alpha=float(A.shape[0])), {"A": A, "B": B})


# the model that the file is for


def renamed(tensors, base):
    """The tensors under the names that the model's inputs have. Every one must find an input that fits it."""
    inputs = model_inputs(base)
    if named := [n for n in inputs if GRAPH.fullmatch(n)]:
        hint = "export it with the scale in lora_B, as Olive's convert-adapters does"
        raise AdaptKitError(f"multiplies by a scale of its own ({named[0]})", where=base, hint=hint)
    found, lost = {}, []
    for name, value in tensors.items():
        full = next((p + name for p in PREFIXES if p + name in inputs), None) or bare(name, inputs)
        if full is None:
            lost.append(name)
            continue
        fits(full, value, *inputs[full])
        found[full] = value
    if lost:
        raise AdaptKitError(f"has no input for {lost[0]}" + f" and {len(lost) - 1} more" * (len(lost) > 1), where=base)
    return found


def bare(name, inputs):
    """An input that lacks the first part of a module's path."""
    return next((n for p in PREFIXES if p and (n := name.removeprefix(p)) != name and n in inputs), None)


def fits(name, value, shape, kind):
    same = len(shape) == value.ndim and all(
        not isinstance(n, int) or n == m for n, m in zip(shape, value.shape, strict=True)
    )
    if not same:
        raise AdaptKitError(f"{name}: the model takes {shape}, the adapter has {list(value.shape)}")
    if kind not in WIDE or value.dtype != WIDE[kind]:
        hint = f"write it with --dtype {np.dtype(WIDE[kind]).name}" if kind in WIDE else None
        raise AdaptKitError(f"{name}: the model takes {kind}, the adapter has {value.dtype}", hint=hint)


def model_inputs(base):
    """Shape and type of each input of an ONNX model, by name."""
    ort, base = library(), graph(Path(base))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(str(base), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise AdaptKitError(f"cannot be opened as an ONNX model ({first_line(e)})", where=base) from None
    found = [*session.get_inputs(), *session.get_overridable_initializers()]
    return {i.name: (list(i.shape), i.type) for i in found}


def of_transformers(base):
    """Whether the base is a model that is not in ONNX, given for the format that is read."""
    return (base / "config.json").is_file() and not any(base.glob("*.onnx"))


def graph(base):
    """The model's file; in a folder model.onnx, or else the only one."""
    if not base.is_dir():
        return base
    files = [base / "model.onnx"] if (base / "model.onnx").is_file() else sorted(base.glob("*.onnx"))
    if len(files) != 1:
        raise AdaptKitError(
            f"holds {len(files) or 'no'} .onnx file{'s' * (len(files) > 1)}", where=base, hint="give one"
        )
    return files[0]


def first_line(error):
    """What the library says, without where in its own source."""
    line = str(error).strip().partition("\n")[0]
    return (line.rpartition(") ")[2] if line.startswith("/") else line)[:200] or type(error).__name__


def save(path, tensors, meta):
    ort = library()
    make = ort.OrtValue.ortvalue_from_numpy_with_onnx_type
    # bfloat16 has no name in the library's NumPy: its bits go as 16-bit integers
    raw = {n: v.view("u2") if v.dtype == ml_dtypes.bfloat16 else v for n, v in tensors.items()}
    file = ort.AdapterFormat()
    file.set_adapter_version(int(meta.get("onnx_adapter:adapter_version", 0)))
    file.set_model_version(int(meta.get("onnx_adapter:model_version", 0)))
    file.set_parameters({n: make(raw[n], TYPES[v.dtype.name]) for n, v in tensors.items()})
    with appearing(path) as beside:
        file.export_adapter(str(beside))
