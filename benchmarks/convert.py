"""Another container for a 1.2-billion model: copying, AdaptKit both ways, and torch with safetensors; and its adapter.

python benchmarks/convert.py [--rounds 3] [--layers 16] [--no-peers]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import shape
from measure import machine, rounds, table
from merge import clean, made

SAVE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
base, out = map(Path, sys.argv[1:])
out.mkdir()
names = {}
for file in sorted(base.glob("*.safetensors")):
    state, name = load_file(file), f"pytorch_{file.stem}.bin"
    torch.save(state, out / name)
    names |= dict.fromkeys(state, name)
(out / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
(out / "config.json").write_text((base / "config.json").read_text())
"""
PEER = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
base, out = map(Path, sys.argv[1:])
out.mkdir()
for file in sorted(base.glob("*.bin")):
    save_file(torch.load(file, weights_only=True, mmap=True), out / f"{file.stem}.safetensors", {"format": "pt"})
"""


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--layers", type=int, default=16)
    words.add_argument("--no-peers", action="store_true", help="only cp and AdaptKit")
    options = words.parse_args()
    folder = shape.scratch()
    base, adapter = made(folder, options.layers)
    pickled = folder / f"bin-{options.layers}"
    if not pickled.exists():
        subprocess.run([sys.executable, "-c", SAVE, str(base), str(pickled)], check=True)
    out = folder / "out"
    found = rounds(commands(base, pickled, out, not options.no_peers), options.rounds, lambda: clean(out, pickled))
    print(f"{machine()}\n\n{table(found, 'cp -r')}")
    found = rounds(of_adapter(adapter, out), options.rounds, lambda: clean(out, adapter))
    print(f"\nThe adapter, beyond the interpreter's start:\n\n{table(found, 'python -c pass')}")
    shutil.rmtree(out, ignore_errors=True)


def commands(base: Path, pickled: Path, out: Path, peers: bool) -> dict[str, list[str]]:
    convert = [sys.executable, "-m", "adaptkit", "convert", "-o", str(out), "--quiet"]
    found = {
        "cp -r": ["cp", "-r", str(pickled), str(out)],
        "cp -r, then sync": ["sh", "-c", f"cp -r {pickled} {out} && sync {out}/*"],
        "adaptkit convert --to safetensors": [*convert, str(pickled), "--to", "safetensors"],
        "adaptkit convert --to pytorch": [*convert, str(base), "--to", "pytorch"],
        "adaptkit convert --to safetensors --dtype float32": [
            *convert,
            str(pickled),
            "--to",
            "safetensors",
            "--dtype",
            "float32",
        ],
    }
    if peers:
        found["torch.load + safetensors save_file"] = [sys.executable, "-c", PEER, str(pickled), str(out)]
    return found


def of_adapter(adapter: Path, out: Path) -> dict[str, list[str]]:
    """A LoRA of rank 16 on all linear layers, into two formats."""
    convert = [sys.executable, "-m", "adaptkit", "convert", str(adapter), "-o", str(out), "--quiet", "--to"]
    found = {f"adaptkit convert --to {name}": [*convert, name] for name in ("peft", "mlx")}
    return {"python -c pass": [sys.executable, "-c", "pass"], **found}


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    main()
