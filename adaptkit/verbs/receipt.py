"""adaptkit.json: what was made of what. Names, commits and hashes, never paths, which would tell about the machine."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .. import registry
from ..adapter import Adapter
from ..algebra.overlap import Update, inner
from ..engines.plan import Change, Plan, Target
from ..errors import AdaptKitError, Corrupt, Usage, quoted, some
from ..store import journal
from ..store.checkpoint import read_json, warn
from ..store.hub import Ref, called, origin
from ..store.hub.choose import CONFIG
from ..store.hub.fetch import File, digest_of
from ..store.hub.ids import RECEIPT
from .inputs import files_of

HASHED = 1 << 28  # bytes of a base beyond which hashing would take as long as merging
BESIDE = (CONFIG, "config.json")
PACKAGES = ("numpy", "ml_dtypes", "torch", "transformers")
Known = Callable[[Path], File | None]


def receipt_of(folder: Path) -> dict[str, Any]:
    """adaptkit.json, {} when there is none or it cannot be read."""
    try:
        return read_json(folder / RECEIPT) if (folder / RECEIPT).is_file() else {}
    except AdaptKitError:
        return {}


def receipt(plan: Plan, sums: dict[str, list[float]], known: Known | None = None) -> dict[str, Any]:
    """What a merge did. sums: of Survival.tensors.   known: sizes and hashes of files that are not here any more."""
    facts = {
        **about(plan.options, plan.checkpoint.path, plan.adapters),
        "inputs": inputs_of(plan, known),
        "plugins": _plugins(plan),
        "changed": len(plan.changed),
        "norms": norms(plan.changed, sums),
    }
    if plan.virtual:
        facts["virtual_tokens"] = [plan.virtual.start, plan.virtual.stop - 1]
    return facts


def about(options: dict[str, Any], base: Path | None, adapters: Sequence[Path]) -> dict[str, Any]:
    """What any verb can say: itself, its options, and the names and commits of its inputs."""
    return {
        "adaptkit": version("adaptkit"),
        "versions": versions(),
        "made": {k: v for k, v in options.items() if v not in (None, False)},
        **({"base": called(base)} if base else {}),
        "adapters": [called(path) for path in adapters],
        **_from_the_hub([*([base] if base else []), *adapters]),
    }


def inputs_of(plan: Plan, known: Known | None = None) -> list[dict[str, Any]]:
    """The base and the adapters, by their files."""
    files = plan.adapter_files
    mine = {path: [f for f in files if f == path or path in f.parents] for path in plan.adapters}
    base = _input(plan.checkpoint.path, plan.checkpoint.files, HASHED, known)
    return [base, *(adapter_input(path, mine[path]) for path in plan.adapters)]


def adapter_input(path: Path, files: Iterable[Path]) -> dict[str, Any]:
    """An adapter by its files, which are hashed however large they are."""
    return _input(path, files, sys.maxsize, None)


def said(options: dict[str, Any], adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What a verb says that makes an adapter of adapters."""
    return {**about(options, None, paths_of(adapters)), "inputs": inputs_said(adapters)}


def inputs_said(adapters: Sequence[Adapter]) -> list[dict[str, Any]]:
    """Adapters that were read from files, by those."""
    return [adapter_input(Path(a.meta["path"]), files_of(a)) for a in adapters if "path" in a.meta]


def paths_of(adapters: Sequence[Adapter]) -> list[Path]:
    """Where adapters lie that were read from files."""
    return [Path(a.meta["path"]) for a in adapters if "path" in a.meta]


def versions() -> dict[str, str]:
    """Of Python and of the libraries that took part."""
    return {"python": platform.python_version()} | {p: version(p) for p in PACKAGES if p in sys.modules}


def _input(path: Path, files: Iterable[Path], limit: int, known: Known | None) -> dict[str, Any]:
    """One input: its name, and what is known of its files. limit: how many bytes are read for hashes."""
    folder = path if path.is_dir() else path.parent
    ref, rows = origin(path), []
    recorded = journal.records(receipt_of(folder).get("files"))
    for file in dict.fromkeys([*(folder / n for n in BESIDE if (folder / n).is_file()), *files]):
        rows.append(_file(file, folder, limit, known and known(file), recorded))
        limit -= rows[-1]["size"]
    return {"name": called(path), **({"revision": ref.revision} if ref else {}), "files": rows}


def _file(path: Path, folder: Path, limit: int, known: File | None, recorded: dict[str, dict]) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix() if folder in path.parents else path.name
    if known and known.large:
        return {"name": name, "size": known.size, "sha256": known.digest}
    size = path.stat().st_size
    digest = _named(path) or (recorded[name].get("sha256") if recorded.get(name, {}).get("size") == size else None)
    if digest is None and size <= limit:
        digest = digest_of(path, File(size, "0" * 64))
    return {"name": name, "size": size, **({"sha256": digest} if digest else {})}


def _named(path: Path) -> str | None:
    """The sha256 that a cache of the Hub calls a large file by."""
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and len(blob.name) == 64 else None


def _from_the_hub(paths: Sequence[Path]) -> dict[str, list[dict[str, str]]]:
    """Which inputs came from the Hub, and the commits they were at."""
    refs = dict.fromkeys(filter(None, map(origin, paths)))
    return {"hub": [{"id": str(Ref(r.id, None, r.sub)), "revision": r.revision} for r in refs]} if refs else {}


def _plugins(plan: Plan) -> dict[str, list[str]]:
    """Tuners of other packages that took part: name -> packages and versions."""
    names = sorted({c.tuner.name for t in plan.targets for c in t.changes})
    strangers = [n for n in names if not registry.built_in("tuners", n)]
    return {n: [f"{owner} {version(owner)}" for owner in registry.owners("tuners", n)] for n in strangers}


# -- how far each tensor moved


def norms(targets: Iterable[Target], sums: dict[str, list[float]]) -> dict[str, float]:
    """|W' - W| before rounding, Frobenius, of every tensor that changed and was not replaced.

    Of thin updates exactly, from the factors. Of others from `sums`: the squares that were seen, and how many numbers.
    """
    found = {}
    for target in targets:
        if target.is_thin:
            found[target.name] = _thin(target.changes)
        elif sums.get(target.name, (0, 0))[1]:
            square, seen = sums[target.name]
            found[target.name] = math.sqrt(square * math.prod(target.shape) / seen)
    return {name: float(f"{norm:.6g}") for name, norm in found.items()}


def _thin(changes: Sequence[Change]) -> float:
    """Of changes to rows that may overlap: between two ends of ranges, the updates there are one thin product."""
    thin = [(c.rows, *c.thin(np.dtype("f8"))) for c in changes]
    ends = sorted({end for rows, _, _ in thin for end in rows})
    squares = []
    for a, b in pairwise(ends):
        parts = [(L[a - rows[0] : b - rows[0]], R) for rows, L, R in thin if rows[0] <= a and b <= rows[1]]
        if parts:
            update = Update(np.hstack([L for L, _ in parts]), np.vstack([R for _, R in parts]))
            squares.append(inner(update, update))
    return math.sqrt(max(0.0, sum(squares)))


# -- against what a receipt says


def weights_said(folder: Path, count: int, did: str) -> list[float] | None:
    """The weights that a merged model's adaptkit.json names, with a warning where one is not 1; None when it names none.

    count: of adapters.   did: the first words of the warning. Raises Usage when the weights are of another number of adapters
    and not all 1.
    """
    file = folder / RECEIPT
    said = read_json(file) if file.is_file() else {}
    made = said.get("made")
    if not isinstance(made, dict) or made.get("verb") != "merge" or "weights" not in made:
        return None
    weights = made["weights"]
    if not isinstance(weights, list) or not all(map(_is_number, weights)) or not any(weights):
        raise Corrupt(f"says weights {quoted(weights)}", where=RECEIPT, hint="say --weights")
    if all(w == 1 for w in weights):
        return None
    shown = ",".join(f"{w:g}" for w in weights)
    if len(weights) != count:
        raise Usage(
            f"says weights {shown}, of {some(said.get('adapters') or ['other adapters'])}; {count} given",
            where=RECEIPT, hint="give these in this order, or say --weights",
        )  # fmt: skip
    warn(f"{did} with weights {shown}, as adaptkit.json says; --weights asks otherwise")
    return [float(w) for w in weights]


def _is_number(weight: Any) -> bool:
    return type(weight) in (int, float) and math.isfinite(weight)


def strangers(said: list[Any], now: list[dict[str, Any]]) -> list[str]:
    """Files of inputs whose sha256 is another than a receipt says, among those that both know."""
    if len(said) != len(now):
        return []
    pairs = zip(map(_sums, said), now, strict=True)
    return [
        f"{here['name']}/{f['name']}" for there, here in pairs for f in here["files"]
        if f.get("sha256") and there.get(f["name"], f["sha256"]) != f["sha256"]
    ]  # fmt: skip


def _sums(said: Any) -> dict[str, str]:
    """name -> sha256 of one input, as far as it reads like such."""
    rows = said.get("files") if isinstance(said, dict) else None
    rows = [r for r in rows if isinstance(r, dict)] if isinstance(rows, list) else []
    return {str(r.get("name")): str(r["sha256"]) for r in rows if r.get("sha256")}
