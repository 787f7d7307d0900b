"""Extracting a rank-16 LoRA: one matrix against torch's whole decomposition, and a 1.2-billion model.

python benchmarks/extract.py [--quick] [--layers 16] [--rounds 3] [--sites-only]

torch.linalg.svd stands for mergekit-extract-lora: it is what that spends its time in.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import shape
from measure import Runs, machine, once
from merge import clean, made

from adaptkit.algebra.randomised import truncated
from adaptkit.engines.local import single_threaded_blas

RANK = 16


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--layers", type=int, default=16)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--sites-only", action="store_true")
    words.add_argument("--quick", action="store_true", help="one layer, one round, smaller matrices")
    options = words.parse_args()
    if options.quick:
        options.layers, options.rounds = 1, 1
    print(machine())
    if not options.sites_only:  # first, since a child's peak memory counts what its parent held
        print(f"\n{model(options.layers, options.rounds)}")
    print(f"\n{sites([(512, 512)] if options.quick else [(2048, 2048), (8192, 2048)])}")


def matrices(sizes: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Differences as fine-tuning leaves them: a thin update with rounding noise, a falling spectrum, noise alone."""
    rng = np.random.default_rng(0)
    found = {}
    for m, n in sizes:
        thin = rng.standard_normal((m, RANK), dtype="f4") @ rng.standard_normal((RANK, n), dtype="f4")
        noise = rng.standard_normal((m, n), dtype="f4")
        found[f"{m} x {n}, LoRA and rounding noise"] = thin + 0.08 * noise
        found[f"{m} x {n}, falling as i^-0.8"] = _falling(rng, m, n)
        found[f"{m} x {n}, noise"] = noise
    return found


def _falling(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    U, V = (np.linalg.qr(rng.standard_normal((size, min(m, n)), dtype="f4"))[0] for size in (m, n))
    return (U * np.arange(1, min(m, n) + 1, dtype="f4") ** -0.8) @ V.T


def sites(sizes: list[tuple[int, int]]) -> str:
    """One thread each. The excess is over the smallest error that the whole decomposition gives."""
    import torch

    torch.set_num_threads(1)
    lines = ["| matrix | torch.linalg.svd s | adaptkit s | times faster | excess error |", "|---|--:|--:|--:|--:|"]
    with single_threaded_blas():
        for name, D in matrices(sizes).items():
            whole, (_, s, _) = _timed(lambda D=D: torch.linalg.svd(torch.from_numpy(D), full_matrices=False))
            best = float(np.sqrt((s.double().numpy()[RANK:] ** 2).sum()))
            runs = [_timed(lambda D=D: truncated(D, RANK)) for _ in range(3)]
            took, found = statistics.median(t for t, _ in runs), runs[0][1]
            error = float(np.linalg.norm(D.astype("f8") - found.L.astype("f8") @ found.R))
            lines.append(f"| {name} | {whole:.2f} | {took:.3f} | {whole / took:.0f} | {error / best - 1:+.5f} |")
    return "\n".join(lines)


def _timed(f: Callable) -> tuple[float, object]:
    start = time.perf_counter()
    found = f()
    return time.perf_counter() - start, found


def model(layers: int, rounds: int) -> str:
    """The whole model, as a process: a LoRA is merged into it, and extracted again."""
    folder = shape.scratch()
    base, adapter = made(folder, layers)
    new, out = folder / f"finetuned-{layers}", folder / "extracted"
    adaptkit = [sys.executable, "-m", "adaptkit"]
    if not new.exists():
        subprocess.run([*adaptkit, "merge", str(base), str(adapter), "-o", str(new), "--quiet"], check=True)
    command = [*adaptkit, "extract", str(new), str(base), "-o", str(out), "--rank", str(RANK)]
    runs = Runs()
    for _ in range(rounds):
        clean(out, base)
        once([*command, "--quiet"], runs)
    shutil.rmtree(out, ignore_errors=True)
    told = json.loads(subprocess.run([*command, "--json"], check=True, capture_output=True).stdout)
    excess = max(s["excess"] for s in told["sites"])
    distance = _distance(adapter, out)
    shutil.rmtree(out)
    wall, cpu = statistics.median(runs.wall), statistics.median(runs.cpu)
    return (
        f"{layers} layers, {len(told['sites'])} sites: {wall:.1f} s, {cpu:.1f} s of processor time, peak memory "
        f"{max(runs.memory) / 1e6:.0f} MB; excess error at most {excess:.1e}, distance to the merged LoRA {distance:.5f}"
    )


def _distance(adapter: Path, out: Path) -> float:
    """|D - D'| / |D| over all sites, D of the LoRA that was merged and D' of the one that was extracted."""
    import adaptkit

    pair = adaptkit.inspect([adapter, out]).pairs[0]
    a, b = pair.norms
    return float(np.sqrt(max(a * a + b * b - 2 * pair.cosine * a * b, 0.0)) / a)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
