"""Exporting a Llama of half a billion float32 parameters: the exporter called directly, and AdaptKit, which checks too.

python benchmarks/export_onnx.py [--rounds 1] [--layers 28] [--route transformers|torch] [--quantize] [--swappable]

"directly" is what a script of twenty lines does: load, wrap the cache, trace, save. It checks nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import shape
from measure import machine, rounds, table
from safetensors import safe_open
from safetensors.numpy import save_file

CONFIG = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4,
    "vocab_size": 65536, "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip

MAKE = """
import json, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[2]))).save_pretrained(sys.argv[1])
"""

DIRECT = """
import sys, torch, onnx_ir, onnx_ir.passes.common
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
folder, out, route = sys.argv[1:]

class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config
    def forward(self, input_ids, attention_mask, position_ids, past_key_values):
        cache = DynamicCache(ddp_cache_data=[(l["key"], l["value"]) for l in past_key_values.values()])
        said = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache)
        layers = enumerate(said.past_key_values.layers)
        return {"logits": said.logits, "present": {str(i): {"key": l.keys, "value": l.values} for i, l in layers}}

model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
c = model.config
past = lambda: torch.randn(2, c.num_key_value_heads, 5, c.hidden_size // c.num_attention_heads)
sample = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 8, dtype=torch.int64),
          "position_ids": torch.arange(5, 8).expand(2, 3).contiguous(),
          "past_key_values": {str(i): {"key": past(), "value": past()} for i in range(c.num_hidden_layers)}}
def shapes(d):
    old = {str(i): {"key": {0: d("b"), 2: d("p")}, "value": {0: d("b"), 2: d("p")}} for i in range(c.num_hidden_layers)}
    return {"input_ids": {0: d("b"), 1: d("s")}, "attention_mask": {0: d("b"), 1: d("t")},
            "position_ids": {0: d("b"), 1: d("s")}, "past_key_values": old}
with torch.no_grad():
    if route == "transformers":
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
        how = OnnxConfig(dynamic=True, dynamic_shapes=shapes(lambda _: torch.export.Dim.AUTO), opset_version=20)
        made = OnnxExporter().export(Wrapper(model), sample, how).program
    else:
        made = torch.onnx.export(Wrapper(model), (), kwargs=sample, dynamic_shapes=shapes(str), dynamo=True, opset_version=20).model
onnx_ir.passes.common.ClearMetadataAndDocStringPass()(made)
onnx_ir.save(made, out + "/model.onnx", external_data="model.onnx_data")
"""


SWAP = """
import json, os, statistics, sys, time
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np, onnxruntime as ort
folder, names = sys.argv[1], sys.argv[2:]
how = ort.SessionOptions()
how.log_severity_level = 3
session = ort.InferenceSession(folder + "/model.onnx", how)
feeds = {}
for i in session.get_inputs():
    if i.name.startswith("past_key_values."):
        feeds[i.name] = np.zeros((1, i.shape[1], 0, i.shape[3]), "f4")
    elif i.type == "tensor(int64)":
        feeds[i.name] = np.zeros((1, 1), "i8") if i.name == "position_ids" else np.ones((1, 1), "i8")
def step(options):
    start = time.perf_counter()
    session.run(["logits"], feeds, options)
    return time.perf_counter() - start
def swapped(name):
    start, adapter, options = time.perf_counter(), ort.LoraAdapter(), ort.RunOptions()
    adapter.Load(f"{folder}/{name}.onnx_adapter")
    options.add_active_adapter(adapter)
    took, first = time.perf_counter() - start, step(options)
    return took, first, statistics.median(step(options) for _ in range(3))
step(None)
base = statistics.median(step(None) for _ in range(5))
rounds = [swapped(names[i % len(names)]) for i in range(10)]
load, first, later = (1000 * statistics.median(r[k] for r in rounds) for k in range(3))
print(json.dumps({"load": load, "first": first, "later": later, "base": 1000 * base}))
"""
RANK = 16


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--rounds", type=int, default=1)
    words.add_argument("--layers", type=int, default=28)
    words.add_argument("--route", choices=["transformers", "torch"], default="transformers")
    words.add_argument("--quantize", action="store_true", help="each kind of quantising as well")
    words.add_argument("--dtype", action="store_true", help="float16 as well")
    words.add_argument(
        "--swappable", action="store_true", help="two adapters beside the graph, and how long a swap takes"
    )
    options = words.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = shape.scratch()
    base, out = made(folder, options.layers), folder / "out"
    ours = [sys.executable, "-m", "adaptkit", "export-onnx", str(base), "-o", str(out), "--json"]
    commands = {
        "directly": [sys.executable, "-c", DIRECT, str(base), str(out), options.route],
        "adaptkit --no-verify": [*ours, "--no-verify"],
        "adaptkit": ours,
    }
    if options.dtype:
        commands["adaptkit --dtype float16"] = [*ours, "--dtype", "float16"]
    for kind in ("int8", "int8_weight_only", "int4") if options.quantize else ():
        commands[f"adaptkit --quantize {kind} --no-verify"] = [*ours, "--quantize", kind, "--no-verify"]
    beside = [adapter(folder / f"onnx-{options.layers}-{name}", base) for name in "ab"] if options.swappable else []
    if beside:
        how = [str(base), *map(str, beside), "-o", str(out), "--swappable", "--no-verify"]
        commands["adaptkit --swappable --no-verify"] = [*ours[:4], *how]
    found = rounds(commands, options.rounds, lambda: clean(out))
    size = sum(f.stat().st_size for f in base.glob("*.safetensors"))
    print(f"{machine()}\n\nweights: {size / 1e6:.0f} MB\n\n{table(found, 'directly')}")
    if beside:
        print(swaps(out, beside))


def made(folder: Path, layers: int) -> Path:
    """The model, made by another process: a child's peak memory counts what its parent held."""
    base = folder / f"onnx-{layers}"
    if not (base / "config.json").exists():
        config = json.dumps(CONFIG | {"num_hidden_layers": layers})
        subprocess.run([sys.executable, "-c", MAKE, str(base), config], check=True)
    return base


def adapter(folder: Path, base: Path) -> Path:
    """A LoRA on every linear layer, with random numbers."""
    if (folder / "adapter_config.json").exists():
        return folder
    folder.mkdir()
    with safe_open(base / "model.safetensors", "np") as file:
        shapes = {n: file.get_slice(n).get_shape() for n in file.keys() if n.endswith("_proj.weight")}  # noqa: SIM118
    some, numbers = np.random.default_rng(len(folder.name)), {}
    for name, (out, into) in shapes.items():
        where = f"base_model.model.{name.removesuffix('.weight')}"
        numbers[f"{where}.lora_A.weight"] = some.standard_normal((RANK, into), "f4") / 32
        numbers[f"{where}.lora_B.weight"] = some.standard_normal((out, RANK), "f4") / 32
    save_file(numbers, folder / "adapter_model.safetensors")
    targets = sorted({n.split(".")[-2] for n in shapes})
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def swaps(out: Path, adapters: list[Path]) -> str:
    """How long the last export takes to go on with another adapter."""
    size = sum(f.stat().st_size for f in out.glob("*.onnx_adapter")) / len(adapters)
    words = [sys.executable, "-c", SWAP, str(out), *(a.name for a in adapters)]
    ms = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return (
        f"\nswapping to an adapter of {size / 1e6:.0f} MB: {ms['load']:.1f} ms to load it; one token takes {ms['base']:.0f} ms "
        f"without an adapter, {ms['first']:.0f} ms right after a swap, {ms['later']:.0f} ms from then on"
    )


def clean(out: Path) -> None:
    """Nothing of the last run is left, nothing waits to be written."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    os.sync()


if __name__ == "__main__":
    main()
