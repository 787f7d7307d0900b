"""The torch road for blocks: what a GPU does, on whatever device torch has here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from places import FIXTURES

import adaptkit
from adaptkit.engines import local
from adaptkit.store.arrays import load
from adaptkit.verbs.merge import planned

CASES = ["llama/lora", "llama/ia3", "llama/pissa", "mixtral/target-parameters", "llama/rank-alpha-patterns"]
EPS = {None: 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}  # the bases are bfloat16
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("case", CASES)
def test_torch_and_numpy_give_the_same_numbers(case: str, device: str, dtype: str | None, tmp_path: Path):
    """Every block computed by torch is within one rounding of the one computed by NumPy, and most are equal."""
    plan = planned(FIXTURES / "models" / case.split("/")[0], FIXTURES / "adapters" / case, dtype=dtype)
    ours, theirs = (_blocks(plan, where, tmp_path) for where in (None, torch.device(device)))

    for name, expected in ours.items():
        step = np.abs(expected).max(initial=0) * EPS[dtype]
        assert np.abs(expected - theirs[name]).max(initial=0) <= step, name
    same = sum(int((ours[n] == theirs[n]).sum()) for n in ours) / sum(a.size for a in ours.values())
    assert same > 0.99


def _blocks(plan, device, folder: Path) -> dict[str, np.ndarray]:
    space, out = local.Workspace(), {}
    spill = local._Spill(folder, device)
    for name, targets in plan.files.items():
        shard = local.shard(name, [spill.ready(t) for t in targets], {}, device)
        data = bytearray(shard.size)
        local.fill(shard, memoryview(data), 0, space)
        path = folder / f"{device}-{name}"
        path.write_bytes(data)
        entries, _ = local_read(path)
        out |= {n: load(e, np.dtype("f8")) for n, e in entries.items()}
    spill.close()
    space.close()
    return out


def local_read(path: Path):
    from adaptkit.store import safetensors

    return safetensors.read(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_asking_for_a_device_that_is_not_there_is_a_usage_error(tmp_path: Path):
    """--device cuda without one says so and writes nothing."""
    with pytest.raises(adaptkit.AdaptKitError, match="no CUDA device") as caught:
        adaptkit.merge(FIXTURES / "models/llama", FIXTURES / "adapters/llama/lora", tmp_path / "out", device="cuda")

    assert caught.value.code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_merge_on_the_gpu_verifies(tmp_path: Path):
    """What the GPU wrote is the merge, as computed on the CPU."""
    base, adapter = FIXTURES / "models/llama", FIXTURES / "adapters/llama/lora"
    adaptkit.merge(base, adapter, tmp_path / "out", device="cuda")

    assert adaptkit.verify(tmp_path / "out", base=base, adapters=[adapter]).ok
