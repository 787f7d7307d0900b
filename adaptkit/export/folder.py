"""What lies beside the graphs, so that programs find it: settings for optimum, transformers.js and onnxruntime-genai."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import genai
from .graph import Graph

LEFT = (".py",)  # code of strangers, which no ONNX program runs


def config_text(config: Mapping[str, Any], names: Sequence[str], dtype: str, kind: str) -> bytes:
    """config.json, with the words by which transformers.js finds the data files.    kind: the class that was traced."""
    known = {k: v for k, v in config.items() if k != "auto_map"}  # it names code, which stays behind
    known["architectures"] = [kind]
    data, said = {f"{name}.onnx": 1 for name in names}, known.get("transformers.js_config")
    known["transformers.js_config"] = {**(said if isinstance(said, dict) else {}), "use_external_data_format": data}
    if dtype == "float16":
        known["transformers.js_config"]["kv_cache_dtype"] = {"fp16": "float16"}
    return text(known)


def beside(
    extras: Sequence[tuple[Path, str]], config: Mapping[str, Any], model: Any, graphs: Sequence[Graph], dtype: str
) -> Iterator[tuple[str, Path | bytes]]:
    """(name, file or content) of everything beside the graphs."""
    for file, name in extras:
        if name != "config.json" and Path(name).suffix not in LEFT:
            yield name, file
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's wrapper around one
    yield "config.json", config_text(config, [g.name for g in graphs], dtype, type(bare).__name__)
    there = {name for _, name in extras}
    if "generation_config.json" not in there and getattr(model, "generation_config", None) is not None:
        yield "generation_config.json", (model.generation_config.to_json_string() + "\n").encode()
    if len(graphs) == 1 and "past_key_values" in graphs[0].sample and (found := genai.settings(model, graphs[0])):
        yield "genai_config.json", text(found)


def text(value: Mapping[str, Any]) -> bytes:
    """JSON as it is written beside weights."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
