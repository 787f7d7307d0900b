"""A live model: attach, forward, backward, merge and unload, PEFT and AdaptKit on equal models, one after the other.

python benchmarks/live.py [--rounds 5] [--layers 16] [--device cpu|cuda] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from measure import machine
from transformers import AutoModelForCausalLM, LlamaConfig

import adaptkit.peft as ours

ROOMS = {"PEFT": peft, "adaptkit": ours}
STEPS = ("attach", "forward", "forward and backward", "merge_and_unload")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--layers", type=int, default=8)
    words.add_argument("--hidden", type=int, default=1024)
    words.add_argument("--device", default="cpu")
    words.add_argument("--dtype", default="bfloat16")
    options = words.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    took: dict[str, dict[str, list[float]]] = {r: {s: [] for s in STEPS} for r in ROOMS}
    for _ in range(options.rounds):
        for name, room in ROOMS.items():
            one(room, options, took[name])
            gc.collect()
    print(f"{machine()}, {options.device}\n\n{table(took)}\n")
    print(floor(options))


def one(room: Any, options: argparse.Namespace, took: dict[str, list[float]]) -> None:
    """Each step once, on a model of its own."""
    torch.manual_seed(0)
    model = made(options)
    ids = torch.randint(0, 1000, (1, 32), device=options.device)
    config = room.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    timed(took["attach"], options, lambda: room.get_peft_model(model, config))
    adapted = room.get_peft_model(made(options), config)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    with torch.no_grad():
        adapted(input_ids=ids)
        timed(took["forward"], options, lambda: adapted(input_ids=ids))
    timed(took["forward and backward"], options, lambda: adapted(input_ids=ids, labels=ids).loss.backward())
    adapted.zero_grad(set_to_none=True)
    timed(took["merge_and_unload"], options, adapted.merge_and_unload)


def made(options: argparse.Namespace) -> torch.nn.Module:
    h = options.hidden
    config = LlamaConfig(
        hidden_size=h, intermediate_size=4 * h, num_hidden_layers=options.layers, num_attention_heads=h // 64,
        num_key_value_heads=h // 128, vocab_size=2048, torch_dtype=options.dtype,
    )  # fmt: skip
    with torch.device(options.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()


def timed(into: list[float], options: argparse.Namespace, work: Callable[[], Any]) -> None:
    _settled(options)
    start = time.perf_counter()
    work()
    _settled(options)
    into.append(time.perf_counter() - start)


def _settled(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def floor(options: argparse.Namespace) -> str:
    """What reading and writing every weight once takes: the least that a merge can need."""
    model = made(options)
    took: list[float] = []
    with torch.no_grad():
        for _ in range(options.rounds):
            timed(took, options, lambda: [p.neg_() for p in model.parameters() if p.ndim == 2])
    size = sum(p.nbytes for p in model.parameters() if p.ndim == 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    what = f"{size / 1e6:.0f} MB of {options.dtype} matrices, read and written once: {statistics.median(took):.3f} s"
    return f"{what}; peak memory of this process {peak:.0f} MB"


def table(took: dict[str, dict[str, list[float]]]) -> str:
    """Medians, and the ratio of PEFT's time to ours round by round."""
    lines = ["| step | PEFT s | adaptkit s | times faster |", "|---|--:|--:|--:|"]
    for step in STEPS:
        theirs, mine = took["PEFT"][step], took["adaptkit"][step]
        ratio = statistics.median(a / b for a, b in zip(theirs, mine, strict=True))
        lines.append(f"| {step} | {statistics.median(theirs):.3f} | {statistics.median(mine):.3f} | {ratio:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
