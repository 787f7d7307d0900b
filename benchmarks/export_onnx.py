"""Exporting a Llama of half a billion float32 parameters: the exporter called directly, and AdaptKit, which checks too.

python benchmarks/export_onnx.py [--rounds 1] [--layers 28] [--route transformers|torch] [--quantize]

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

import shape
from measure import machine, rounds, table

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


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--rounds", type=int, default=1)
    words.add_argument("--layers", type=int, default=28)
    words.add_argument("--route", choices=["transformers", "torch"], default="transformers")
    words.add_argument("--quantize", action="store_true", help="each kind of quantising as well")
    words.add_argument("--dtype", action="store_true", help="float16 as well")
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
    found = rounds(commands, options.rounds, lambda: clean(out))
    size = sum(f.stat().st_size for f in base.glob("*.safetensors"))
    print(f"{machine()}\n\nweights: {size / 1e6:.0f} MB\n\n{table(found, 'directly')}")


def made(folder: Path, layers: int) -> Path:
    """The model, made by another process: a child's peak memory counts what its parent held."""
    base = folder / f"onnx-{layers}"
    if not (base / "config.json").exists():
        config = json.dumps(CONFIG | {"num_hidden_layers": layers})
        subprocess.run([sys.executable, "-c", MAKE, str(base), config], check=True)
    return base


def clean(out: Path) -> None:
    """Nothing of the last run is left, nothing waits to be written."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    os.sync()


if __name__ == "__main__":
    main()
