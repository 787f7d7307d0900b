"""What tests of formats share: where genuine files lie, and whether two adapters compute the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from places import FIXTURES

from adaptkit import Adapter, AdaptKitError, Site
from adaptkit.formats.base import read, write
from adaptkit.formats.fold import PLAIN
from adaptkit.store.arrays import load
from adaptkit.testing import bits

FORMATS = FIXTURES / "formats"
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
NAMES = {"kohya": "x.safetensors", "diffusers": "x.safetensors", "gguf": "x.gguf", "onnx_adapter": "x.onnx_adapter"}


def sample(kind: str, case: str) -> Path:
    """A file made by the program whose format it is: the folder, or its one weight file."""
    folder = FORMATS / kind / case
    files = [p for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf", ".onnx_adapter", ".pt")]
    return folder if (folder / "adapter_config.json").exists() or len(files) != 1 else files[0]


def update(site: Site) -> np.ndarray:
    """s B A in float64, as a matrix (out, in): what the site adds."""
    A, B = (load(site.params[k]).astype("f8") for k in "AB")
    return site.tuner.scale * (B.reshape(len(B), -1) @ A.reshape(len(A), -1))


def off(one: Site, other: Site) -> float:
    """How far two sites are apart, in units of one rounding of the narrowest dtype that they hold; 0 for the same bits."""
    if one.tuner.name not in PLAIN:
        assert one.tuner == other.tuner
        assert {k: bits(v) for k, v in one.params.items()} == {k: bits(v) for k, v in other.params.items()}
        return 0.0
    assert {"A", "B"} <= set(other.params) and set(one.params) == set(other.params), (
        set(one.params),
        set(other.params),
    )
    a, b = update(one), update(other)
    assert a.shape == b.shape
    eps = max(EPS[load(s.params["B"]).dtype.name] for s in (one, other))
    # |B| |A| bounds what one rounding of B can change
    A, B = (np.abs(load(one.params[k]).astype("f8")) for k in "AB")
    most = abs(one.tuner.scale) * (B.reshape(len(B), -1) @ A.reshape(len(A), -1))
    extra = 0.0
    for k in set(one.params) - {"A", "B"}:
        x, y = (load(s.params[k]).astype("f8").reshape(-1) * (s.tuner.scale if k == "c" else 1) for s in (one, other))
        extra = max(extra, float((np.abs(x - y) / np.maximum(np.abs(x), 1e-30)).max() / eps))
    return max(extra, float((np.abs(a - b) / np.maximum(most, 1e-300) / eps).max(initial=0)))


def apart(one: Adapter, other: Adapter) -> float:
    """The worst `off` of all sites. Sites that only one of them has must add nothing."""
    for mine, theirs in ((one, other), (other, one)):
        for path in mine.sites.keys() - theirs.sites.keys():
            assert not update(mine.sites[path]).any(), f"{path} is lost"
    assert {n: bits(v) for n, v in one.whole.items()} == {n: bits(v) for n, v in other.whole.items()}
    return max((off(one.sites[p], other.sites[p]) for p in one.sites.keys() & other.sites.keys()), default=0.0)


@dataclass
class Trip:
    """What came of writing an adapter in a format and reading it back."""

    refused: str = ""
    roundings: float = 0.0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.refused:
            return "refused"
        more = f" ({', '.join(self.notes)})" if self.notes else ""
        return ("exact" if self.roundings == 0 else "one rounding") + more


def trip(adapter: Adapter, name: str, folder: Path, base: Path | None = None) -> Trip:
    """Write, read, compare. A refusal must leave nothing behind."""
    path = folder / NAMES.get(name, f"{name}.out")
    try:
        notes = write(adapter, path, name, base=base)
    except AdaptKitError as e:
        assert not path.exists() and not list(folder.iterdir()), f"{name} refuses and leaves files: {e}"
        return Trip(refused=str(e))
    back = read(path, base=base)
    assert back.meta["format"] == name, f"{path} is taken for {back.meta['format']}"
    return Trip("", apart(adapter, back), sorted({n.what for n in notes}))
