"""combine and resize against PEFT and a dense decomposition, and on a whole adapter. --full: 4096 x 4096 and x 11008 too.

python benchmarks/combine.py [--full]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from adaptkit import Adapter, Site, combine, resize, write
from adaptkit.tuners.lora import LoRA
from adaptkit.verbs.combine import combined
from adaptkit.verbs.resize import resized

RANK = 16
WIDTH, HIDDEN, LAYERS = 2048, 8192, 16


def site(out: int, into: int, seed: int, rank: int = RANK) -> Site:
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((rank, into), dtype="f4"), rng.standard_normal((out, rank), dtype="f4")
    return Site(LoRA(r=rank, alpha=rank), {"A": A / into**0.5, "B": B / rank})


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def theirs(out: int, into: int, pair: list[Site]) -> float:
    """PEFT's add_weighted_adapter of two adapters on one layer, with its defaults."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(into, out)), config, adapter_name="a0")
    model.add_adapter("a1", config)
    layer = model.base_model.model[0]
    for i, s in enumerate(pair):
        layer.lora_A[f"a{i}"].weight.data = torch.from_numpy(s.params["A"])
        layer.lora_B[f"a{i}"].weight.data = torch.from_numpy(s.params["B"])
    return timed(lambda: model.add_weighted_adapter(["a0", "a1"], [0.5, 0.5], "c", combination_type="svd"))


def dense(s: Site) -> float:
    """What resizing scripts do: decompose the whole update."""
    import torch

    return timed(lambda: torch.linalg.svd(torch.from_numpy(s.params["B"] @ s.params["A"]), full_matrices=False))


def sites(full: bool) -> None:
    print(
        "| layer out x in | combine: adaptkit s | PEFT s | resize 16 to 8: adaptkit s | dense SVD s |\n|---|--:|--:|--:|--:|"
    )
    for out, into in [(1024, 2816)] + ([(4096, 4096), (4096, 11008)] if full else []):
        pair = [site(out, into, k) for k in range(2)]
        adapters = [Adapter({"m": s}) for s in pair]
        ours = min(timed(lambda a=adapters: combined(a, weights=[0.5, 0.5])) for _ in range(3))
        cut = min(timed(lambda a=adapters: resized(a[0], rank=8)) for _ in range(3))
        print(f"| {out} x {into} | {ours:.4f} | {theirs(out, into, pair):.2f} | {cut:.4f} | {dense(pair[0]):.2f} |")


def whole() -> None:
    """112 sites of a model of 1.2 billion numbers, from files to files."""
    shapes = {"q": (WIDTH, WIDTH), "k": (512, WIDTH), "v": (512, WIDTH), "o": (WIDTH, WIDTH)}
    shapes |= {"gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for k in range(2):
            made = {f"layers.{i}.{n}": site(*s, seed=100 * i + k) for i in range(LAYERS) for n, s in shapes.items()}
            write(Adapter(made), folder / f"{k}")
        start = time.process_time()
        both = timed(lambda: combine([folder / "0", folder / "1"], folder / "both", weights=[0.5, 0.5]))
        used = time.process_time() - start
        small = timed(lambda: resize(folder / "0", folder / "small", energy=0.9))
    print(
        f"\n{LAYERS * len(shapes)} sites, files to files: combine {both:.2f} s ({used:.2f} s of CPU), resize {small:.2f} s"
    )


if __name__ == "__main__":
    sites("--full" in sys.argv)
    whole()
