"""The contracts that authors of tuners and formats run against their own: one call in one test.

    def test_hra():            check_tuner(HRA(r=4))
    def test_npz(tmp_path):    check_format(Npz(), zoo()["lora"], tmp_path / "a.npz")

A broken promise is an AssertionError that says which one, and by how much.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from . import registry
from .adapter import Adapter, Site
from .errors import AdaptKitError
from .formats.base import Format
from .store.arrays import dtype_of, load
from .store.entry import Entry
from .tuners.base import Params, Tuner

CLOSE = 1e-4  # of the largest value: float32 sums of a few terms, with room for other orders of summing
OURS_TO_SET = {"path", "format"}  # meta that says where an adapter was read from
ParamsFor = Callable[[tuple[int, ...]], Mapping[str, np.ndarray]]


# tuners


def check_tuner(tuner: Tuner, params_for: ParamsFor | None = None, shape: tuple[int, int] = (6, 4)) -> None:
    """A tuner keeps its promises on a Linear layer. Needs torch.

    params_for: trained params for a weight of a shape, as NumPy arrays; left out, what `init` gives, moved by noise.
    shape: (out, in) of the layer.
    """
    _is_a_value(tuner)
    layer = _layer(shape)
    started = _started(tuner, layer)
    if type(tuner).weight is Tuner.weight:
        return  # acts on activations: there is nothing to merge
    if started is not None:
        _starts_as_no_op(tuner, layer, started)
    if params_for is None and started is None:
        raise AssertionError(f"{tuner.name} has no init: give check_tuner its params_for")
    p = {k: np.asarray(v) for k, v in params_for(shape).items()} if params_for else _moved(started)
    tuner = tuner.fit(shape, {k: v.shape for k, v in p.items()})
    W, b = layer.weight.detach().numpy().astype("f8"), layer.bias.detach().numpy().astype("f8")
    p = {k: v.astype("f8") if v.dtype.kind == "f" else v for k, v in p.items()}
    _keeps_the_shape(tuner, W, b, p)
    _libraries_agree(tuner, W, b, p)
    _rows_agree(tuner, W, p)
    _factors_agree(tuner, W, p)
    _inverse_undoes(tuner, W, b, p)
    _every_param_learns(tuner, W, p)
    _running_equals_merging(tuner, layer, p)


def _layer(shape: tuple[int, int]) -> Any:
    from torch import nn

    layer = nn.Linear(shape[1], shape[0]).requires_grad_(False)
    layer.weight.copy_(_tensor(_numbers(shape, 1)))
    layer.bias.copy_(_tensor(_numbers(shape[:1], 2)))
    return layer


def _is_a_value(tuner: Tuner) -> None:
    again = type(tuner)(**tuner.settings())
    assert again == tuner, f"{type(tuner).__name__}(**settings()) is {again}, not {tuner}: is it a frozen dataclass?"
    assert type(tuner).__hash__ is not None, f"{type(tuner).__name__} is not a frozen dataclass"
    json.dumps(tuner.settings(), allow_nan=False)
    assert tuner.arrays in ("any", "torch"), f'arrays is {tuner.arrays!r}, neither "any" nor "torch"'


def _started(tuner: Tuner, layer: Any) -> Params | None:
    """What `init` gives for a layer; None for a tuner that cannot be started."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return tuner.init(layer)
        except AdaptKitError:
            return None


def _starts_as_no_op(tuner: Tuner, layer: Any, started: Params) -> None:
    W, b = layer.weight.clone(), layer.bias.clone()
    _same(
        tuner.weight(W, started), layer.weight, f"{tuner.name}.init is no no-op: the fresh weight differs from the base"
    )
    _same(tuner.bias(b, started), layer.bias, f"{tuner.name}.init is no no-op: the fresh bias differs from the base")


def _moved(started: Params) -> dict[str, np.ndarray]:
    """Params as if they had been trained a little."""
    arrays = {k: v.detach().numpy() for k, v in started.items()}
    return {
        k: v + _numbers(v.shape, i, 0.1) if v.dtype.kind == "f" else v
        for i, (k, v) in enumerate(sorted(arrays.items()))
    }


def _keeps_the_shape(tuner: Tuner, W: np.ndarray, b: np.ndarray, p: Params) -> None:
    changed = _weight(tuner, W, p)
    assert changed.shape == W.shape, f"{tuner.name}.weight made {changed.shape} of {W.shape}"
    assert changed.dtype == W.dtype, (
        f"{tuner.name}.weight made {changed.dtype} of {W.dtype}: sums would be rounded twice"
    )
    moved = not np.array_equal(tuner.bias(b.copy(), p), b)
    assert bool(tuner.changes_bias(p)) or not moved, f"{tuner.name}.bias changes the bias, but changes_bias says no"


def _libraries_agree(tuner: Tuner, W: np.ndarray, b: np.ndarray, p: Params) -> None:
    tensors = _tensors(p)
    _same(
        tuner.bias(_tensor(b), tensors), tuner.bias(b.copy(), p), f"{tuner.name}.bias differs between NumPy and torch"
    )
    if tuner.arrays == "any":
        ours, theirs = tuner.weight(W.copy(), p), tuner.weight(_tensor(W), tensors)
        _same(theirs, ours, f"{tuner.name}.weight differs between NumPy and torch; does it need arrays = torch?")


def _rows_agree(tuner: Tuner, W: np.ndarray, p: Params) -> None:
    whole = _weight(tuner, W, p)
    for start, stop in ((0, 2), (2, len(W))):
        mine = tuner.rows(p, start, stop)
        if mine is not None:
            what = f"{tuner.name}.rows: weight on rows {start}:{stop} differs from those rows of weight on all"
            _same(_weight(tuner, W[start:stop], mine), whole[start:stop], what)


def _factors_agree(tuner: Tuner, W: np.ndarray, p: Params) -> None:
    found = tuner.factors(p)
    if found is not None:
        L, R, s = found
        _same(W + s * (L @ R), _weight(tuner, W, p), f"{tuner.name}.factors: W + s L R differs from weight")


def _inverse_undoes(tuner: Tuner, W: np.ndarray, b: np.ndarray, p: Params) -> None:
    try:
        back, q = tuner.inverse(p)
    except AdaptKitError:
        return  # it says that it cannot, which is an answer
    _same(_weight(back, _weight(tuner, W, p), q), W, f"{tuner.name}.inverse does not undo weight")
    _same(back.bias(tuner.bias(b.copy(), p), q), b, f"{tuner.name}.inverse does not undo bias")


def _every_param_learns(tuner: Tuner, W: np.ndarray, p: Params) -> None:
    tensors = {k: t.requires_grad_(t.is_floating_point()) for k, t in _tensors(p).items()}
    learning = {k: t for k, t in tensors.items() if t.requires_grad and k != "c"}  # c is the bias's
    if not learning:
        return
    changed = tuner.weight(_tensor(W), tensors)
    if changed.requires_grad:
        (changed * _tensor(_numbers(W.shape, 5))).sum().backward()
    for k, t in learning.items():
        assert t.grad is not None, f"{tuner.name}.weight gives no gradient to {k!r}"
        assert bool(t.grad.isfinite().all()), f"{tuner.name}.weight gives {k!r} a gradient that is not finite"


def _running_equals_merging(tuner: Tuner, layer: Any, p: Params) -> None:
    """A layer run with the changed weight computes what the layer computes that the file engine merged."""
    import torch

    x = _tensor(_numbers((3, layer.in_features), 9)).float()
    tensors = {k: t.float() if t.is_floating_point() else t for k, t in _tensors(p).items()}
    changed = {"weight": tuner.weight(layer.weight.clone(), tensors), "bias": tuner.bias(layer.bias.clone(), tensors)}
    with torch.no_grad():
        running = torch.func.functional_call(layer, changed, (x,))
        merged = torch.func.functional_call(layer, _merged(tuner, layer, p), (x,))
    _same(merged, running, f"{tuner.name}: merging differs from running")


def _merged(tuner: Tuner, layer: Any, p: Params) -> dict[str, Any]:
    import torch
    from safetensors.numpy import save_file

    from .store.checkpoint import open_checkpoint
    from .verbs.merge import merge

    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder, "model.safetensors"), Path(folder, "merged")
        save_file({f"lin.{k}": np.ascontiguousarray(v.numpy()) for k, v in layer.state_dict().items()}, base)
        merge(base, Adapter({"lin": Site(tuner, dict(p))}), out)
        entries = open_checkpoint(out / "model.safetensors").entries
        return {k.removeprefix("lin."): torch.from_numpy(load(e)) for k, e in entries.items()}


def _weight(tuner: Tuner, W: np.ndarray, p: Params) -> np.ndarray:
    """`weight` on NumPy arrays, by way of torch for a tuner that needs it."""
    if tuner.arrays == "any":
        return tuner.weight(W.copy(), p)
    return tuner.weight(_tensor(W), _tensors(p)).numpy()


def _tensor(array: Any) -> Any:
    import torch

    return torch.from_numpy(np.array(array))


def _tensors(p: Params) -> dict[str, Any]:
    return {k: _tensor(v) for k, v in p.items()}


def _same(got: Any, wanted: Any, what: str) -> None:
    got, wanted = (load(v).astype("f8") for v in (got, wanted))
    assert got.shape == wanted.shape, f"{what}: shape {got.shape} instead of {wanted.shape}"
    off, scale = np.abs(got - wanted).max(initial=0), np.abs(wanted).max(initial=0)
    assert off <= CLOSE * max(scale, 1e-3), f"{what} by up to {off:.3g} (largest value {scale:.3g})"


# formats


def check_format(
    format: Format,
    adapter: Adapter,
    path: Path,
    may_refuse: bool = False,
    may_fold: bool = False,
    base: Path | None = None,
) -> bool:
    """A format holds an adapter: it recognises what it wrote, reads it back bit for bit, and loses nothing.

    may_refuse: a refusal in a sentence, with nothing left at `path`, is good as well. Returns whether it was held.
    may_fold: a scale may go into the factors, and ranks may grow: what each site adds is compared, to one rounding.
        Meta of other formats may be left out then.
    base: the model, for formats that need one.
    """
    _recognises_nothing_else(format, path.parent)
    refusal = _refusal(format, adapter, path, base)
    if refusal is not None and not may_refuse:
        raise refusal
    if refusal is not None:
        assert str(refusal).strip(), f"{format.name} refuses without a reason"
        assert not path.exists(), f"{format.name} refuses ({refusal}), but has written {path.name}"
        return False
    assert path.exists(), f"{format.name}.write made nothing at {path.name}"
    assert format.sniff(path), f"{format.name}.sniff does not recognise what it wrote"
    back = format.read(path, **({"base": base} if base else {}))
    (_equal_updates if may_fold else _equal)(adapter, back, format.name)
    return True


def _refusal(format: Format, adapter: Adapter, path: Path, base: Path | None) -> AdaptKitError | None:
    try:
        format.write(adapter, path, **({"base": base} if base else {}))
    except AdaptKitError as e:
        return e
    return None


ROUNDING = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}


def _equal_updates(wrote: Adapter, read: Adapter, who: str) -> None:
    """What LoRA adds is the same to one rounding of its B; everything else bit for bit."""
    for path in read.sites.keys() - wrote.sites.keys():
        assert not _added(read.sites[path])[0].any(), f"{who} adds something to {path}"
    for path, site in wrote.sites.items():
        assert path in read.sites, f"{who} loses {path}"
        back = read.sites[path]
        if not {"A", "B"} <= set(site.params):
            assert back.tuner == site.tuner, f"{who}: {path} has {back.tuner} instead of {site.tuner}"
            _same_bits(site.params, back.params, f"{who}: {path}")
            continue
        (mine, most), (theirs, _) = _added(site), _added(back)
        assert theirs.shape == mine.shape, f"{who}: {path} adds {theirs.shape} instead of {mine.shape}"
        worst = (np.abs(mine - theirs) / np.maximum(most, 1e-300)).max(initial=0)
        allowed = max(ROUNDING[dtype_of(s.params["B"])] for s in (site, back))
        assert worst <= allowed, f"{who}: what {path} adds differs by {worst:.3g}, one rounding is {allowed:.3g}"
    _same_bits(wrote.whole, read.whole, f"{who}: whole")


def _added(site: Site) -> tuple[np.ndarray, np.ndarray]:
    """s B A and s |B| |A|, which bounds what a rounding of B can change."""
    A, B = (load(site.params[k]).astype("f8") for k in "AB")
    A, B, s = A.reshape(len(A), -1), B.reshape(len(B), -1), getattr(site.tuner, "scale", 1.0)
    return s * (B @ A), abs(s) * (np.abs(B) @ np.abs(A))


def _recognises_nothing_else(format: Format, folder: Path) -> None:
    """Every format is asked about every path: it may not raise, and may not claim what holds nothing."""
    with tempfile.TemporaryDirectory(dir=folder) as empty:
        assert not format.sniff(Path(empty)), f"{format.name}.sniff recognises an empty folder"
        noise = Path(empty, "noise.dat")
        noise.write_bytes(bytes(range(256)))
        assert not format.sniff(noise), f"{format.name}.sniff recognises a file of noise"


def _equal(wrote: Adapter, read: Adapter, who: str) -> None:
    assert sorted(read.sites) == sorted(wrote.sites), f"{who} holds sites {sorted(read.sites)} of {sorted(wrote.sites)}"
    for path, site in wrote.sites.items():
        assert read.sites[path].tuner == site.tuner, (
            f"{who}: {path} has {read.sites[path].tuner} instead of {site.tuner}"
        )
        _same_bits(site.params, read.sites[path].params, f"{who}: {path}")
    _same_bits(wrote.whole, read.whole, f"{who}: whole")
    lost = {k for k, v in wrote.meta.items() if read.meta.get(k) != v} - OURS_TO_SET
    assert not lost, f"{who} loses meta {sorted(lost)}"


def _same_bits(wrote: Mapping[str, Any], read: Mapping[str, Any], where: str) -> None:
    assert sorted(read) == sorted(wrote), f"{where} holds {sorted(read)} of {sorted(wrote)}"
    for name, value in wrote.items():
        (kind, shape, raw), (kind2, shape2, raw2) = bits(value), bits(read[name])
        assert (kind2, shape2) == (kind, shape), f"{where}.{name} is {kind2} {shape2} instead of {kind} {shape}"
        assert raw2 == raw, f"{where}.{name} has other numbers"


def bits(value: Any) -> tuple[str, tuple[int, ...], bytes]:
    """The dtype, shape and bytes of a param: a NumPy array, a torch tensor or an Entry."""
    if isinstance(value, np.ndarray | Entry):
        array = load(value)
        return array.dtype.name, array.shape, array.tobytes()
    import torch

    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return str(value.dtype).removeprefix("torch."), tuple(value.shape), flat.numpy().tobytes()


# the zoo


def zoo() -> dict[str, Adapter]:
    """The smallest adapters that differ in kind, by name. Made afresh at each call; arrays are NumPy's."""
    q, k = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    lora, ia3 = _lora(2), Site(_tuner("ia3"), {"l": _numbers((6,), 3)})
    dora = Site(_tuner("dora", r=2, alpha=1 / 3), {**lora.params, "m": _numbers((6,), 4) + 2})
    embedding = Site(_tuner("lora", r=2, alpha=4.0, transposed=True), lora.params)
    tokens = Site(_tuner("tokens"), {"index": np.array([7, 1]), "rows": _numbers((2, 4), 5)})
    conv = Site(_tuner("lora", r=2, alpha=4.0), {"A": _numbers((2, 3, 3, 3), 6), "B": _numbers((6, 2, 1, 1), 7)})
    whole = {"lm_head.weight": _numbers((8, 4), 8), "classifier.bias": _numbers((3,), 9).astype("f2")}
    half = {n: v.astype(ml_dtypes.bfloat16) for n, v in lora.params.items()}
    return {
        "lora": Adapter({q: lora}),
        "two ranks": Adapter({q: lora, k: _lora(1)}),
        "mixed tuners": Adapter({q: lora, k: ia3}),
        "dora": Adapter({q: dora}),
        "ia3": Adapter({q: ia3, "model.layers.0.mlp.down_proj": Site(_tuner("ia3", feedforward=True), ia3.params)}),
        "rslora": Adapter({q: Site(_tuner("lora", r=2, alpha=1 / 3, rslora=True), lora.params)}),
        "bias": Adapter({q: Site(lora.tuner, {**lora.params, "c": _numbers((6,), 10)})}),
        "whole": Adapter({q: lora}, whole),
        "only whole": Adapter({}, whole),
        "embedding": Adapter({"model.embed_tokens": embedding}),
        "tokens": Adapter({"model.embed_tokens": tokens}),
        "conv": Adapter({"features.0": conv}),
        "prompt": Adapter({"": Site(_tuner("prompt", tokens=2), {"P": _numbers((2, 4), 11)})}),
        "half": Adapter({q: Site(_tuner("lora", r=2, alpha=4.0), {n: v.astype("f2") for n, v in lora.params.items()})}),
        "bfloat16": Adapter({q: Site(lora.tuner, half)}),
        "meta": Adapter({q: lora}, meta={"base": "a/model", "kohya:ss_network_dim": "2"}),
        "empty": Adapter(),
    }


def _lora(r: int) -> Site:
    return Site(_tuner("lora", r=r, alpha=1 / 3), {"A": _numbers((r, 4), 1), "B": _numbers((6, r), 2)})


def _tuner(name: str, **settings: Any) -> Tuner:
    return registry.load("tuners", name)(**settings)


def _numbers(shape: tuple[int, ...], seed: int, size: float = 1.0) -> np.ndarray:
    """Float32 values that use all their bits, as 1/3 does, and differ from each other."""
    return (np.random.default_rng(seed).standard_normal(shape) * size / 3).astype("f4")
