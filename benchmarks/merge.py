"""Merging a rank-16 LoRA into a 1.2-billion model: copying, AdaptKit, PEFT, and AdaptKit on a model four times as large.

python benchmarks/merge.py [--rounds 5] [--layers 16] [--no-peers] [--large]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import shape
from measure import Runs, machine, once, rounds, table

PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out, max_shard_size="500MB")
"""


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--layers", type=int, default=16)
    words.add_argument("--no-peers", action="store_true", help="only cp and AdaptKit")
    words.add_argument("--large", action="store_true", help="peak memory on a model with four times the layers")
    options = words.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = shape.scratch()
    base, adapter = made(folder, options.layers)
    commands = commands_for(base, adapter, folder / "out", peers=not options.no_peers)
    found = rounds(commands, options.rounds, lambda: clean(folder / "out", base))
    print(f"{machine()}\n\n{table(found, 'cp -r')}")
    if options.large:
        large(folder, options.layers * 4)


def made(folder: Path, layers: int) -> tuple[Path, Path]:
    """The model and its adapter, made by another process: a child's peak memory counts what its parent held."""
    base, adapter = folder / f"base-{layers}", folder / f"adapter-{layers}"
    make = "import shape, sys; from pathlib import Path; b, a, n = sys.argv[1:]; "
    make += "shape.make_base(Path(b), int(n)); shape.make_adapter(Path(a), int(n))"
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent)}
    subprocess.run([sys.executable, "-c", make, str(base), str(adapter), str(layers)], check=True, env=here)
    return base, adapter


def commands_for(base: Path, adapter: Path, out: Path, peers: bool) -> dict[str, list[str]]:
    merge = [sys.executable, "-m", "adaptkit", "merge", str(base), str(adapter), "-o", str(out), "--quiet"]
    commands = {
        "cp -r": ["cp", "-r", str(base), str(out)],
        "cp -r, then sync": ["sh", "-c", f"cp -r {base} {out} && sync {out}/*"],
        "adaptkit merge": merge,
        "adaptkit merge --workers 1": [*merge, "--workers", "1"],
    }
    if peers:
        commands["PEFT merge_and_unload + save_pretrained"] = [
            sys.executable,
            "-c",
            PEFT,
            str(base),
            str(adapter),
            str(out),
        ]
    return commands


def clean(out: Path, base: Path) -> None:
    """Nothing of the last run is left, nothing waits to be written, and the base is in the page cache."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    for file in base.iterdir():
        with open(file, "rb") as f:
            while f.read(1 << 24):
                pass


def large(folder: Path, layers: int) -> None:
    """Peak memory must not grow with the model."""
    base, adapter = made(folder, layers)
    runs = Runs()
    clean(folder / "out", base)
    once(commands_for(base, adapter, folder / "out", peers=False)["adaptkit merge"], runs)
    size = sum(f.stat().st_size for f in base.iterdir()) / 1e9
    print(f"\n{layers} layers ({size:.1f} GB): {runs.wall[0]:.1f} s, peak memory {runs.memory[0] / 1e6:.0f} MB")
    shutil.rmtree(folder / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
