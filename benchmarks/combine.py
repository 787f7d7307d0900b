"""combine and resize beside PEFT and a dense decomposition, on one layer, and on a whole adapter from files to files.

python benchmarks/combine.py [--quick | --full] [--rounds 3]

torch.linalg.svd of the update stands for the scripts that resize a LoRA (kohya's, mergekit's): it is what they spend
their time in. Each round runs peers and AdaptKit one after the other, on one thread; the tables have medians.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measure import Runs, machine, once

from adaptkit import Adapter, Site, write
from adaptkit.tuners.lora import LoRA
from adaptkit.verbs.combine import combined
from adaptkit.verbs.resize import resized

RANK = 16
WIDTH, HIDDEN = 2048, 8192
SHAPES = {
    "q": (WIDTH, WIDTH), "k": (512, WIDTH), "v": (512, WIDTH), "o": (WIDTH, WIDTH),
    "gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN),
}  # fmt: skip


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--quick", action="store_true", help="a small layer and two layers of the adapter")
    words.add_argument("--full", action="store_true", help="4096 x 4096 and 4096 x 11008 too")
    words.add_argument("--rounds", type=int, default=3)
    options = words.parse_args()
    print(machine())
    print(f"\n{whole(2 if options.quick else 16, options.rounds)}")
    sizes = [(256, 704)] if options.quick else [(1024, 2816)]
    print(f"\n{layers(sizes + ([(4096, 4096), (4096, 11008)] if options.full else []), options.rounds)}")


def site(out: int, into: int, seed: int, rank: int = RANK) -> Site:
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((rank, into), dtype="f4"), rng.standard_normal((out, rank), dtype="f4")
    return Site(LoRA(r=rank, alpha=rank), {"A": A / into**0.5, "B": B / rank})


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# one layer


def layers(sizes: list[tuple[int, int]], rounds: int) -> str:
    import torch

    torch.set_num_threads(1)
    lines = ["| layer out x in | work | adaptkit s | peer s | peer |", "|---|---|--:|--:|---|"]
    for out, into in sizes:
        for work, (peer, ours, theirs) in contests(out, into).items():
            pairs = [(timed(ours), timed(theirs)) for _ in range(rounds)]
            a, b = (statistics.median(p[k] for p in pairs) for k in range(2))
            lines.append(f"| {out} x {into} | {work} | {a:.4f} | {b:.3f} | {peer} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def contests(out: int, into: int) -> dict[str, tuple[str, Callable[[], object], Callable[[], object]]]:
    """Name of the work: the peer, ours, theirs."""
    import torch

    pair = [site(out, into, k) for k in range(2)]
    both = [Adapter({"0": s}) for s in pair]
    weighted, half = peft(out, into, pair), {"weights": [0.5, 0.5]}
    update = torch.from_numpy(pair[0].params["B"] @ pair[0].params["A"])
    prune = {"method": "magnitude_prune_svd", "density": 0.5}
    theirs = {"combination_type": prune["method"], "density": 0.5}
    return {
        "combine, svd": ("PEFT add_weighted_adapter", lambda: combined(both, **half), lambda: weighted()),
        "combine, magnitude_prune_svd": (
            "PEFT add_weighted_adapter",
            lambda: combined(both, **half, **prune),
            lambda: weighted(**theirs),
        ),
        "resize 16 to 8": (
            "torch.linalg.svd",
            lambda: resized(both[0], rank=8),
            lambda: torch.linalg.svd(update, full_matrices=False),
        ),
    }


def peft(out: int, into: int, pair: list[Site]) -> Callable[..., None]:
    """PEFT's add_weighted_adapter of two adapters on one layer, without the full matrices that it makes by default."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(into, out)), config, adapter_name="a0")
    model.add_adapter("a1", config)
    layer = model.base_model.model[0]
    for i, s in enumerate(pair):
        layer.lora_A[f"a{i}"].weight.data = torch.from_numpy(s.params["A"])
        layer.lora_B[f"a{i}"].weight.data = torch.from_numpy(s.params["B"])

    def run(**how: object) -> None:
        options = {"combination_type": "svd", "svd_full_matrices": False} | how
        model.base_model.add_weighted_adapter(["a0", "a1"], [0.5, 0.5], "c", **options)
        model.base_model.delete_adapter("c")

    return run


# a whole adapter


def whole(count: int, rounds: int) -> str:
    """All linear layers of a model of 1.2 billion numbers, as processes."""
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / "out"
        for k in range(2):
            sites = {f"layers.{i}.{n}": site(*s, seed=100 * i + k) for i in range(count) for n, s in SHAPES.items()}
            write(Adapter(sites), folder / f"{k}")
        adaptkit, one, two = [sys.executable, "-m", "adaptkit"], str(folder / "0"), str(folder / "1")
        end = ["-o", str(out), "--quiet"]
        commands = {
            "combine": [*adaptkit, "combine", one, two, "--weights", "0.5,0.5", *end],
            "resize --rank 8": [*adaptkit, "resize", one, "--rank", "8", *end],
            "resize --energy 0.9": [*adaptkit, "resize", one, "--energy", "0.9", *end],
        }
        runs = {n: Runs() for n in commands}
        for _ in range(rounds):
            for n, command in commands.items():
                shutil.rmtree(out, ignore_errors=True)
                once(command, runs[n])
    lines = [f"| {count * len(SHAPES)} sites, files to files | wall s | CPU s | peak memory MB |", "|---|--:|--:|--:|"]
    for n, r in runs.items():
        wall, cpu = statistics.median(r.wall), statistics.median(r.cpu)
        lines.append(f"| {n} | {wall:.2f} | {cpu:.2f} | {max(r.memory) / 1e6:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
