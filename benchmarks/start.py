"""How soon the command line answers: --help and inspect, and planning a checkpoint of 50,000 tensors.

python benchmarks/start.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import shape
from measure import machine, rounds, table

from adaptkit.store.safetensors import header

ROOT = Path(__file__).resolve().parent.parent
TENSORS = 50_000


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--rounds", type=int, default=9)
    count = words.parse_args().rounds
    adaptkit = [sys.executable, "-m", "adaptkit"]
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "adaptkit --help": [*adaptkit, "--help"],
        "adaptkit inspect": [*adaptkit, "inspect", str(ROOT / "fixtures/adapters/llama/lora")],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        "python -c 'import peft'": [sys.executable, "-c", "import peft"],
    }
    print(f"{machine()}\n\n{table(rounds(commands, count, lambda: None), 'python -c pass')}")
    print(f"\nplanning a checkpoint of {TENSORS:,} tensors: {planning():.2f} s")


def planning() -> float:
    """Seconds from opening the checkpoint to the finished plan, best of three."""
    from adaptkit.verbs.merge import planned

    base = many(shape.scratch() / "many")
    adapter = shape.make_adapter(shape.scratch() / "adapter-1", 1)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        planned(base, adapter)
        times.append(time.perf_counter() - start)
    return min(times)


def many(folder: Path) -> Path:
    """A checkpoint of one ordinary layer and very many small expert matrices."""
    folder.mkdir(parents=True, exist_ok=True)
    experts = [(f"model.layers.{i // 1000 + 1}.mlp.experts.{i % 1000}.up_proj.weight", (4, 4)) for i in range(TENSORS)]
    held = [*shape.layer_shapes(1), *experts]
    head = header(((n, "BF16", s, 2 * s[0] * (s[1] if len(s) > 1 else 1)) for n, s in held), {})
    size = len(head) + sum(2 * s[0] * (s[1] if len(s) > 1 else 1) for _, s in held)
    with open(folder / "model.safetensors", "wb") as f:
        f.write(head)
        os.ftruncate(f.fileno(), size)
    (folder / "config.json").write_text(json.dumps(shape.config(51)))
    return folder


if __name__ == "__main__":
    main()
