"""The matrix: adapter kinds x base dtypes x adapter dtypes x file layouts, with real PEFT as the oracle.

All outputs are computed in float64, from stored weights, so that roundings of stored weights are the only differences.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft_zoo import DTYPES, FAMILIES, KINDS, LAYOUTS, ODD, PLAIN, VECTORS, Zoo, logits, reference, stir
from safetensors.torch import load_file, save_file
from torch import Tensor

import adaptkit

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore")]

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}  # distance of 1 to the next number
SMALLEST = {"float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}

Cell = tuple[str, str, str, str]  # kind, dtype of the base, dtype of the adapter, layout of the base


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Models and adapters, made on first use."""
    return Zoo(tmp_path_factory.mktemp("zoo"))


def cells() -> list[Cell]:
    """Everything for plain LoRA and IA3; every dtype for every family; two cells for each odd kind."""
    full = [(k, d, a, f) for k in ("plain", "ia3") for d in DTYPES for a in ("float32", "bfloat16") for f in LAYOUTS]
    wide = [(k, d, "float32", "safetensors") for k in PLAIN | VECTORS for d in DTYPES]
    wide += [(k, "bfloat16", "bfloat16", "sharded-bin") for k in PLAIN | VECTORS]
    odd = [(k, d, "float32", "safetensors") for k in ODD for d in ("float32", "bfloat16")]
    odd += [(k, "float16", "bfloat16", LAYOUTS[i % 3 + 1]) for i, k in enumerate(ODD) if i % 2]
    # this file holds the float32 base's head, which in PEFT is also the embedding: with another base it is another model
    return [c for c in dict.fromkeys(full + wide + odd) if c[0] != "head-tied-and-base" or c[1] == "float32"]


QUICK = (
    "plain", "plain-gpt2", "plain-vit", "plain-mixtral", "ia3", "ia3-gpt2", "dora", "experts", "tokens-tied", "embedding-tied",
    "bias-all", "pissa", "head-neox",
)  # fmt: skip


def params(chosen: list[Cell]) -> list:
    """Pytest's params; all but a bfloat16 cell of the quick kinds are slow."""
    quick = {(k, "bfloat16", "float32", "safetensors") for k in QUICK}
    return [pytest.param(*c, id="-".join(c), marks=() if c in quick else pytest.mark.slow) for c in chosen]


def first_quick(kinds: list, quick: int = 2) -> list:
    """Pytest's params: all but the first few are slow."""
    return [k if i < quick else pytest.param(k, marks=pytest.mark.slow) for i, k in enumerate(kinds)]


def merged(zoo: Zoo, kind: str, dtype: str, adapter: str, layout: str, to: str | None = None) -> Path:
    """The folder that AdaptKit made of a cell, once."""
    out = zoo.root / "merged" / "-".join((kind, dtype, adapter, layout, str(to)))
    if not out.exists():
        file = "bin" if layout.endswith("bin") else "safetensors"
        adaptkit.merge(
            zoo.base(KINDS[kind].family, dtype, layout), zoo.adapter(kind, adapter, file=file), out, dtype=to
        )
    return out


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, safetensors or PyTorch, one file or many."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*model*.safetensors")):
        found |= load_file(file)
    for file in sorted(folder.glob("pytorch_model*.bin")):
        found |= torch.load(file, weights_only=True)
    return found


def step(values: Tensor, dtype: str) -> Tensor:
    """The distance between neighbouring numbers of a dtype, where the values lie."""
    size = 2.0 ** torch.floor(torch.log2(values.abs().clamp_min(1e-300)))
    return (size * EPS[dtype]).clamp_min(SMALLEST[dtype])


def roundings(got: Tensor, exact: Tensor, dtype: str) -> float:
    """How far the farthest number is from the exact one, in units of the largest error that one rounding can make."""
    allowed = 0.501 * step(exact, dtype) + noise(dtype, exact)
    return float(((got.double() - exact).abs() / allowed).max())


def noise(dtype: str, exact: Tensor) -> float:
    """What sums in the next larger precision may add."""
    return float(exact.abs().max()) * (1e-6 if dtype != "float32" else 1e-12)


def mean_error(got: Tensor, exact: Tensor, dtype: str) -> float:
    """Mean absolute error of a tensor as stored in `dtype`."""
    return float((got.to(DTYPES[dtype]).double() - exact).abs().mean())


# -- the merged model computes what the adapted model computes


@pytest.mark.parametrize(("kind", "dtype", "adapter", "layout"), params(cells()))
def test_merged_model_computes_what_peft_computes(zoo: Zoo, kind: str, dtype: str, adapter: str, layout: str):
    """In float32 outputs equal PEFT's; in 16 bits they differ by what one rounding of the float32 weights does to them."""
    family, near = KINDS[kind].family, KINDS[kind].near
    expected, before = zoo.expected(kind, dtype, adapter), zoo.plain(kind, dtype)
    size = np.abs(expected).max()
    assert np.abs(expected - before).max() > 0.005 * size  # the adapter acts

    exact = zoo.model(merged(zoo, kind, dtype, adapter, layout, None if dtype == "float32" else "float32"), family)
    np.testing.assert_allclose(logits(exact, family), expected, rtol=0, atol=near * size)

    if dtype != "float32":
        once = logits(exact.to(DTYPES[dtype]), family)
        got = zoo.logits(merged(zoo, kind, dtype, adapter, layout), family)
        assert np.abs(got - expected).max() <= 1.2 * np.abs(once - expected).max() + near * size


@pytest.mark.parametrize(("kind", "dtype", "adapter", "layout"), params([c for c in cells() if KINDS[c[0]].formula]))
def test_stored_tensors_are_one_rounding_from_the_truth(zoo: Zoo, kind: str, dtype: str, adapter: str, layout: str):
    """Every tensor is one rounding away from the formula in float64, and in the mean not further than PEFT's own merge."""
    family, file = KINDS[kind].family, zoo.adapter(kind, adapter)
    base = zoo.model(zoo.base(family, dtype), family, torch.float64).state_dict()
    truth = reference(kind, base, file)

    got = zoo.model(merged(zoo, kind, dtype, adapter, layout), family, DTYPES[dtype]).state_dict()

    theirs = zoo.peft_merged(kind, dtype, file).state_dict() if KINDS[kind].peft_merges else {}
    for name, exact in truth.items():
        assert roundings(got[name], exact, dtype) <= 1, name
        if name in theirs:
            assert mean_error(got[name], exact, dtype) <= 1.001 * mean_error(theirs[name], exact, dtype), name
    for name in got.keys() - truth.keys():
        assert (got[name] == base[name].to(got[name].dtype)).all() or tied(name, truth, got), name


def tied(name: str, truth: dict[str, Tensor], got: dict[str, Tensor]) -> bool:
    """Whether a tensor is the second name of a changed one."""
    return any(got[n].data_ptr() == got[name].data_ptr() for n in truth)


@pytest.mark.parametrize(("kind", "dtype", "adapter", "layout"), params([c for c in cells() if c[0] in QUICK]))
def test_what_does_not_change_is_copied_and_what_does_is_named(
    zoo: Zoo, kind: str, dtype: str, adapter: str, layout: str
):
    """Names, shapes and dtypes stay; `changed` lists exactly the tensors with other bytes."""
    family, file = KINDS[kind].family, "bin" if layout.endswith("bin") else "safetensors"
    base, out = zoo.base(family, dtype, layout), zoo.root / "named" / "-".join((kind, dtype, adapter, layout))

    done = adaptkit.merge(base, zoo.adapter(kind, adapter, file=file), out)

    before, after = tensors(base), tensors(out)
    new = set(after) - set(before)
    assert set(before) <= set(after)
    assert new == ({"lm_head.weight"} if kind == "embedding-tied" else set())
    assert {n for n in before if not torch.equal(before[n], after[n])} | new == set(done.changed) | new
    assert all(after[n].dtype == before[n].dtype and after[n].shape == before[n].shape for n in before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "ia3", "dora", "experts"])
@pytest.mark.parametrize(("dtype", "to"), [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "bfloat16")])
def test_another_dtype_is_one_rounding_away(zoo: Zoo, kind: str, dtype: str, to: str):
    """--dtype rounds the exact sum once, not the sum in the base's dtype."""
    family = KINDS[kind].family
    base = zoo.model(zoo.base(family, dtype), family, torch.float64).state_dict()
    truth = {n: t.double() for n, t in base.items()} | reference(kind, base, zoo.adapter(kind))

    out = merged(zoo, kind, dtype, "float32", "safetensors", to)

    assert {t.dtype for t in tensors(out).values()} == {DTYPES[to]}
    got = zoo.model(out, family, DTYPES[to]).state_dict()
    for name, exact in truth.items():
        assert roundings(got[name], exact, to) <= 1, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["plain-tied", "tokens-tied", "embedding-tied", "tokens-gpt2", "plain-t5", "plain-opt"]
)
def test_pickles_that_hold_tied_tensors_twice_merge_alike(zoo: Zoo, kind: str, tmp_path: Path):
    """Old .bin files hold both names of a tied tensor; the merged model computes the same."""
    family = KINDS[kind].family
    base = shutil.copytree(zoo.base(family, "float32"), tmp_path / "base")
    state = zoo.model(base, family).state_dict()
    (base / "model.safetensors").unlink()
    torch.save(state, base / "pytorch_model.bin")

    adaptkit.merge(base, zoo.adapter(kind), tmp_path / "out")

    expected = zoo.expected(kind, "float32")
    out = getattr(transformers, "AutoModelForSeq2SeqLM" if family == "t5" else "AutoModelForCausalLM").from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    np.testing.assert_allclose(
        logits(out.eval(), family), expected, rtol=0, atol=KINDS[kind].near * np.abs(expected).max()
    )


# -- several adapters in one pass


def several(zoo: Zoo, kind: str, dtype: str, weights: list[float] | None, tmp_path: Path) -> tuple[dict, dict, dict]:
    """(base, merged, [a, b]'s references) by parameter name, for two adapters of one kind."""
    family = KINDS[kind].family
    files = [zoo.adapter(kind, seed=seed) for seed in (0, 1)]
    adaptkit.merge(zoo.base(family, dtype), files, tmp_path / "out", weights=weights)
    base = zoo.model(zoo.base(family, dtype), family, torch.float64).state_dict()
    got = zoo.model(tmp_path / "out", family, DTYPES[dtype]).state_dict()
    return base, got, {i: reference(kind, base, f) for i, f in enumerate(files)}


@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(d, marks=pytest.mark.slow) for d in ("float32", "float16"))]
)
@pytest.mark.parametrize(
    "kind",
    first_quick(
        ["plain", "experts", "plain-gpt2", "plain-mixtral", "conv", "lora-bias", "patterns", "embedding-full-path"]
    ),
)
def test_weighted_adapters_are_one_sum_with_one_rounding(zoo: Zoo, kind: str, dtype: str, tmp_path: Path):
    """W + 0.7 dA + 0.3 dB, rounded once."""
    base, got, truth = several(zoo, kind, dtype, [0.7, 0.3], tmp_path)

    for name in truth[0]:
        W = base[name]
        exact = W + 0.7 * (truth[0][name] - W) + 0.3 * (truth[1][name] - W)
        assert roundings(got[name], exact, dtype) <= 1, name
        assert not torch.equal(got[name].double(), W)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", first_quick(["plain", "ia3", "plain-gpt2", "plain-neox", "experts", "ia3-gpt2", "ia3-neox", "conv"])
)
def test_adapters_without_weights_merge_as_pefts_active_ones(zoo: Zoo, kind: str, dtype: str, tmp_path: Path):
    """As merge_and_unload(adapter_names=[a, b]), with one rounding where PEFT makes two; IA3's vectors multiply."""
    base, got, truth = several(zoo, kind, dtype, None, tmp_path)
    files = [zoo.adapter(kind, seed=seed) for seed in (0, 1)]
    theirs = zoo.peft_merged(kind, dtype, *files).state_dict()

    both = reference(kind, {**base, **truth[0]}, files[1])

    for name, exact in both.items():
        assert roundings(got[name], exact, dtype) <= 1, name
        assert mean_error(got[name], exact, dtype) <= 1.001 * mean_error(theirs[name], exact, dtype), name
        np.testing.assert_allclose(theirs[name].double(), exact, rtol=0, atol=8 * float(step(exact, dtype).max()))


def test_lora_and_ia3_in_one_pass_act_in_their_order(zoo: Zoo, tmp_path: Path):
    """(W + D) l, not W l + D."""
    base = zoo.model(zoo.base("llama"), "llama", torch.float64).state_dict()
    lora, ia3 = zoo.adapter("plain"), zoo.adapter("ia3")
    adaptkit.merge(zoo.base("llama"), [lora, ia3], tmp_path / "out")

    got = tensors(tmp_path / "out")
    first = base | reference("plain", base, lora)
    for name, exact in (first | reference("ia3", first, ia3)).items():
        assert roundings(got[name], exact, "float32") <= 1, name


def test_dora_first_and_lora_second_run_as_pefts_two_active_adapters(zoo: Zoo, tmp_path: Path):
    """DoRA's norm is that of the base; the LoRA comes on top."""
    files = [zoo.adapter("dora"), zoo.adapter("rslora")]
    expected = logits(zoo.attached("dora", "float32", *files), "llama")

    adaptkit.merge(zoo.base("llama"), files, tmp_path / "out")

    np.testing.assert_allclose(
        zoo.logits(tmp_path / "out", "llama"), expected, rtol=0, atol=2e-6 * np.abs(expected).max()
    )


@pytest.mark.parametrize(
    ("kinds", "weights", "says"),
    [
        (("plain", "dora"), None, "dora must be the only change"),
        (("plain", "pissa"), None, "pissa must be the only change"),
        (("saved-head", "plain"), [0.5, 0.5], "cannot be weighted by 0.5"),
    ],
)
def test_sums_that_are_not_defined_are_refused(zoo: Zoo, kinds: tuple, weights: list | None, says: str, tmp_path: Path):
    """A refusal with the reason, and nothing is written."""
    with pytest.raises(adaptkit.AdaptKitError, match=says):
        adaptkit.merge(zoo.base("llama"), [zoo.adapter(k) for k in kinds], tmp_path / "out", weights=weights)
    assert not list(tmp_path.iterdir())


def test_two_different_heads_are_refused(zoo: Zoo, tmp_path: Path):
    """Two adapters that replace one tensor by different ones do not merge."""
    heads = [zoo.adapter("saved-head", seed=s) for s in (0, 1)]
    with pytest.raises(adaptkit.AdaptKitError, match="different tensors"):
        adaptkit.merge(zoo.base("llama"), heads, tmp_path / "out")


# -- and back


INVERTIBLE = [
    "plain", "ia3", "experts", "plain-gpt2", "plain-mixtral", "plain-neox", "ia3-gpt2", "ia3-vit", "conv", "ia3-conv", "rslora",
    "patterns", "lora-bias", "bdlora", "embedding-full-path",
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", first_quick(INVERTIBLE, 3))
def test_unmerging_gives_the_base_back(zoo: Zoo, kind: str, dtype: str, tmp_path: Path):
    """Within one rounding of the merged numbers, and exactly where nothing changed."""
    base = zoo.base(KINDS[kind].family, dtype)
    adaptkit.merge(base, zoo.adapter(kind), tmp_path / "merged")

    adaptkit.unmerge(tmp_path / "merged", zoo.adapter(kind), tmp_path / "back")

    before, middle, after = tensors(base), tensors(tmp_path / "merged"), tensors(tmp_path / "back")
    assert set(before) == set(after)
    for name, W in before.items():
        M = middle[name].double()
        if torch.equal(M, W.double()):
            assert torch.equal(after[name], W), name
            continue
        # dividing by l scales what merging rounded
        ratio = (W.double() / M).abs().nan_to_num(1.0, 1.0, 1.0).clamp(min=1.0) if KINDS[kind].ia3 else 1.0
        allowed = 0.51 * step(M, dtype) * ratio + 0.51 * step(W.double(), dtype) + noise(dtype, W)
        assert float(((after[name].double() - W.double()).abs() / allowed).max()) <= 1, name
        if dtype == "float32":
            assert (after[name] - W).norm() <= 1e-6 * W.norm()


@pytest.mark.parametrize("weights", [[0.7, 0.3], None])
def test_unmerging_several_weighted_adapters_gives_the_base_back(zoo: Zoo, weights: list[float] | None, tmp_path: Path):
    """The same weights take out what they put in."""
    files = [zoo.adapter("plain", seed=s) for s in (0, 1)]
    adaptkit.merge(zoo.base("llama"), files, tmp_path / "merged", weights=weights)
    adaptkit.unmerge(tmp_path / "merged", files, tmp_path / "back", weights=weights)

    after = tensors(tmp_path / "back")
    for name, W in tensors(zoo.base("llama")).items():
        assert (after[name] - W).norm() <= 1e-6 * W.norm(), name


def test_unmerging_lora_and_ia3_goes_backwards(zoo: Zoo, tmp_path: Path):
    """What came last goes first."""
    files = [zoo.adapter("plain"), zoo.adapter("ia3")]
    adaptkit.merge(zoo.base("llama"), files, tmp_path / "merged")
    adaptkit.unmerge(tmp_path / "merged", files, tmp_path / "back")

    after = tensors(tmp_path / "back")
    for name, W in tensors(zoo.base("llama")).items():
        assert (after[name] - W).norm() <= 1e-6 * W.norm(), name


@pytest.mark.parametrize(
    "kind", first_quick(["dora", "saved-head", "pissa", "tokens", "bias-all", "kasa", "embedding"])
)
def test_what_cannot_be_taken_out_is_refused(zoo: Zoo, kind: str, tmp_path: Path):
    """The old values are gone, and the refusal says so."""
    adaptkit.merge(zoo.base("llama"), zoo.adapter(kind), tmp_path / "merged")
    with pytest.raises(adaptkit.AdaptKitError, match="are gone"):
        adaptkit.unmerge(tmp_path / "merged", zoo.adapter(kind), tmp_path / "back")


# -- verify


@pytest.mark.parametrize(
    ("kind", "dtype", "adapter", "layout"), params([c for c in cells() if c[1] == "bfloat16" or c[0] in QUICK])
)
def test_verify_accepts_what_adaptkit_merged(zoo: Zoo, kind: str, dtype: str, adapter: str, layout: str):
    """Every tensor is equal, byte by byte."""
    base = zoo.base(KINDS[kind].family, dtype, layout)

    found = adaptkit.verify(merged(zoo, kind, dtype, adapter, layout), base=base, adapters=zoo.adapter(kind, adapter))

    assert found.ok, found.wrong
    assert found.equal == found.tensors


@pytest.mark.parametrize("to", ["bfloat16", "float16"])
def test_verify_accepts_a_merge_into_another_dtype(zoo: Zoo, to: str):
    """A model of one dtype is compared with the merge in that dtype."""
    out = merged(zoo, "plain", "float32", "float32", "safetensors", to)
    assert adaptkit.verify(out, base=zoo.base("llama"), adapters=zoo.adapter("plain")).ok


PEFTS = [k for k in KINDS if KINDS[k].peft_merges]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(k, d, marks=() if k in QUICK and d == "bfloat16" else pytest.mark.slow)
        for k in PEFTS
        for d in DTYPES
        # where PEFT changes the base first, it rounds that once more in 16 bits: another model
        if KINDS[k].formula or d == "float32"
    ],
)
def test_verify_accepts_what_peft_merged(zoo: Zoo, kind: str, dtype: str, tmp_path: Path):
    """merge_and_unload and save_pretrained give the same merge, within roundings."""
    base = zoo.base(KINDS[kind].family, dtype)
    theirs = zoo.peft_merged(kind, dtype, zoo.adapter(kind))
    theirs.to(DTYPES[dtype]).save_pretrained(tmp_path / "out")

    found = adaptkit.verify(tmp_path / "out", base=base, adapters=zoo.adapter(kind))

    assert found.ok, found.wrong


def rewritten(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a model's folder with other tensors."""
    shutil.copytree(folder, out)
    found = tensors(out)
    change(found)
    save_file(found, out / "model.safetensors", metadata={"format": "pt"})
    return out


Q0 = "model.layers.0.self_attn.q_proj.weight"


def _swapped(t: dict[str, Tensor]) -> None:
    other = Q0.replace("layers.0", "layers.1")
    t[Q0], t[other] = t[other], t[Q0]


def _flipped(t: dict[str, Tensor]) -> None:
    t[Q0][3, 5] *= -1


def _copied_flipped(t: dict[str, Tensor]) -> None:
    t["model.norm.weight"][7] *= -1


def _next(t: dict[str, Tensor]) -> None:
    t["model.norm.weight"].view(torch.int16 if t[Q0].dtype != torch.float32 else torch.int32)[7] += 1


def _other_dtype(t: dict[str, Tensor]) -> None:
    t[Q0] = t[Q0].to(torch.float16)


def _narrowed(t: dict[str, Tensor]) -> None:
    for name in t:
        t[name] = t[name].to(torch.float8_e5m2 if t[name].dtype != torch.float32 else torch.bfloat16).to(t[name].dtype)


def _missing(t: dict[str, Tensor]) -> None:
    del t[Q0]


def _surplus(t: dict[str, Tensor]) -> None:
    t["model.extra.weight"] = torch.ones(3, dtype=t[Q0].dtype)


def _nan(t: dict[str, Tensor]) -> None:
    t[Q0][0, 0] = float("nan")


SPOILS = [_swapped, _flipped, _copied_flipped, _next, _other_dtype, _narrowed, _missing, _surplus, _nan]


@pytest.mark.parametrize("dtype", first_quick(["bfloat16", "float32"], 1))
@pytest.mark.parametrize("spoil", SPOILS, ids=lambda f: f.__name__.strip("_"))
def test_verify_finds_what_is_spoilt(zoo: Zoo, spoil: Callable, dtype: str, tmp_path: Path):
    """A tensor that is not the merge's is named, however little of it is wrong."""
    out = rewritten(merged(zoo, "plain", dtype, "float32", "safetensors"), tmp_path / "out", spoil)

    found = adaptkit.verify(out, base=zoo.base("llama", dtype), adapters=zoo.adapter("plain"))

    assert not found.ok
    assert len(found.wrong) == {"_swapped": 2, "_narrowed": len(found.wrong)}.get(spoil.__name__, 1)


def scaled(adapter: Path, out: Path, factor: float) -> Path:
    """A copy of an adapter whose update is a multiple."""
    shutil.copytree(adapter, out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * factor}))
    return out


@pytest.mark.parametrize("dtype", first_quick(["bfloat16", "float32"], 1))
@pytest.mark.parametrize("wrong", ["no adapter", "half", "other", "twice", "negative", "half in the vectors"])
def test_verify_finds_another_update(zoo: Zoo, wrong: str, dtype: str, tmp_path: Path):
    """The base itself, half the scale, another adapter: none of them is the merge."""
    kind = "ia3" if "vectors" in wrong else "plain"
    base, right = zoo.base("llama", dtype), zoo.adapter(kind)
    if wrong == "no adapter":
        out = base
    else:
        used = {
            "half": lambda: scaled(right, tmp_path / "a", 0.5),
            "other": lambda: zoo.adapter(kind, seed=1),
            "twice": lambda: [right, right],
            "negative": lambda: scaled(right, tmp_path / "a", -1.0),
            "half in the vectors": lambda: right,
        }[wrong]()
        out = tmp_path / "out"
        adaptkit.merge(base, used, out, weights=[0.5] if "vectors" in wrong else None)
        (out / "adaptkit.json").unlink()

    found = adaptkit.verify(out, base=base, adapters=right)

    assert not found.ok
    assert len(found.wrong) >= 2


@pytest.fixture(scope="session")
def faint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bfloat16 model of one large matrix, and adapters whose update is a tenth of a rounding step."""
    root = tmp_path_factory.mktemp("faint")
    made = torch.Generator().manual_seed(3)
    W = torch.randn(384, 256, generator=made).to(torch.bfloat16)
    (root / "base").mkdir()
    save_file({"model.layers.0.q_proj.weight": W}, root / "base" / "model.safetensors", metadata={"format": "pt"})
    (root / "base" / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    for name in ("right", "other"):
        A, B = torch.randn(4, 256, generator=made), torch.randn(384, 4, generator=made)
        B *= 0.1 * float(step(W.double(), "bfloat16").mean()) / float((B @ A).std())
        path = "model.layers.0.q_proj"
        _by_hand(root / name, {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}, targets=["q_proj"])
    return {n: root / n for n in ("base", "right", "other")}


def _by_hand(folder: Path, parts: dict[str, Tensor], targets: list[str], **more: object) -> Path:
    """An adapter of rank 4 and scale 1, written without PEFT."""
    folder.mkdir(parents=True)
    tensors = {f"base_model.model.{n}": t.contiguous() for n, t in parts.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": targets, "bias": "none"} | more
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def test_verify_accepts_an_update_below_rounding(faint: dict[str, Path], tmp_path: Path):
    """Though most of the numbers equal the base's."""
    adaptkit.merge(faint["base"], faint["right"], tmp_path / "out")
    assert adaptkit.verify(tmp_path / "out", base=faint["base"], adapters=faint["right"]).ok


@pytest.mark.parametrize("wrong", ["no adapter", "half", "other", "negative", "both"])
def test_verify_finds_another_update_below_rounding(faint: dict[str, Path], wrong: str, tmp_path: Path):
    """The update shows in the mean where it does not in any number."""
    right = faint["right"]
    used = {
        "no adapter": lambda: None,
        "half": lambda: scaled(right, tmp_path / "a", 0.5),
        "other": lambda: faint["other"],
        "negative": lambda: scaled(right, tmp_path / "a", -1.0),
        "both": lambda: [right, faint["other"]],
    }[wrong]()
    out = faint["base"]
    if used is not None:
        out = tmp_path / "out"
        adaptkit.merge(faint["base"], used, out)
        (out / "adaptkit.json").unlink()

    assert not adaptkit.verify(out, base=faint["base"], adapters=right).ok


# -- files of old versions


def renamed(zoo: Zoo, kind: str, out: Path, rule: Callable[[str], str], **settings: object) -> Path:
    """A copy of an adapter under other tensor names; settings given as None are removed."""
    shutil.copytree(zoo.adapter(kind), out)
    file = out / "adapter_model.safetensors"
    save_file({rule(n): t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    config = json.loads((out / "adapter_config.json").read_text()) | settings
    (out / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return out


def bare(name: str) -> str:
    """Without PEFT's prefix."""
    return name.removeprefix("base_model.model.")


def with_name(name: str) -> str:
    """With the adapter's name in the key, as raw state dicts have it."""
    head, dot, leaf = name.rpartition(".")
    if leaf in (
        "lora_embedding_A",
        "lora_embedding_B",
        "ia3_l",
        "lora_magnitude_vector",
        "lora_diag",
        "trainable_tokens_delta",
    ):
        return f"{name}.default" + (".weight" if leaf == "lora_magnitude_vector" else "")
    return f"{head}.default.{leaf}" if "lora_" in head else name


def saved(inner: str) -> Callable[[str], str]:
    """The head's tensors under the name of the wrapper that held them."""
    return lambda name: name.replace("lm_head.", f"lm_head.{inner}")


def unwrapped(name: str) -> str:
    """Biases as PEFT <= 0.6 wrote them, whose layers were the Linear itself."""
    return name.replace(".base_layer.bias", ".bias")


OLD = [
    *(
        (k, bare)
        for k in ("plain", "ia3", "dora", "embedding-full-path", "saved-head", "tokens", "kasa", "lora-bias", "bdlora")
    ),
    *(
        (k, with_name)
        for k in ("plain", "ia3", "dora", "embedding-full-path", "tokens", "kasa", "lora-bias", "plain-gpt2", "experts")
    ),
    *((k, lambda n: bare(with_name(n))) for k in ("plain", "ia3", "experts")),
    *((k, unwrapped) for k in ("bias-lora-only", "bias-all", "bias-all-bert", "bias-lora-only-opt")),
    *(("saved-head", saved(inner)) for inner in ("modules_to_save.", "modules_to_save.default.")),
]


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        pytest.param(k, r, id=f"{k}-{i}", marks=() if k in ("plain", "ia3", "saved-head") else pytest.mark.slow)
        for i, (k, r) in enumerate(OLD)
    ],
)
def test_old_spellings_of_keys_mean_the_same(zoo: Zoo, kind: str, rule: Callable[[str], str], tmp_path: Path):
    """The merged tensors are the same bytes."""
    old = renamed(zoo, kind, tmp_path / "old", rule, peft_version=None)
    names, today = (set(load_file(f / "adapter_model.safetensors")) for f in (old, zoo.adapter(kind)))
    assert names != today
    if kind == "experts":  # whose packing the version tells; see below
        version = json.loads((zoo.adapter(kind) / "adapter_config.json").read_text())["peft_version"]
        _settings(old, {"peft_version": version})

    adaptkit.merge(zoo.base(KINDS[kind].family), old, tmp_path / "out")

    got, expected = tensors(tmp_path / "out"), tensors(merged(zoo, kind, "float32", "float32", "safetensors"))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[n], expected[n]) for n in expected)


def _settings(folder: Path, more: dict) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | more))


def test_saved_modules_of_the_first_versions_come_with_the_originals(zoo: Zoo, tmp_path: Path):
    """PEFT 0.1 wrote original_module beside modules_to_save; the original is not what is merged."""
    old = renamed(zoo, "saved-head", tmp_path / "old", saved("modules_to_save."), peft_version=None)
    file = old / "adapter_model.safetensors"
    held = load_file(file)
    held["base_model.model.lm_head.original_module.weight"] = torch.full((64, 32), 9.0)
    save_file(held, file, metadata={"format": "pt"})

    adaptkit.merge(zoo.base("llama"), old, tmp_path / "out")

    expected = tensors(merged(zoo, "saved-head", "float32", "float32", "safetensors"))
    got = tensors(tmp_path / "out")
    assert all(torch.equal(got[n], expected[n]) for n in expected)


E3 = "model.layers.0.mlp.experts"


def _stacks(kind: str, hidden: int, inner: int, root: Path) -> tuple[Path, dict[str, tuple[int, int]]]:
    """A tiny model with stacked experts on disk or in the model, and the shapes of its two stacks."""
    sizes = {
        "vocab_size": 16, "hidden_size": hidden, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": inner, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8,
    }  # fmt: skip
    torch.manual_seed(5)
    if kind == "mixtral":
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    else:
        model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes))
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()
    model.save_pretrained(root / "base")
    experts = model.model.layers[0].mlp.experts
    return root / "base", {n: tuple(getattr(experts, n).shape[1:]) for n in ("gate_up_proj", "down_proj")}


def _packed(pairs: list[tuple[Tensor, Tensor]], transposed: bool) -> tuple[Tensor, Tensor]:
    """(A, B) as PEFT packs them, for D[e] = L R of each pair: as B_e A_e, or as its transpose."""
    A = torch.cat([(L.T if transposed else R) for L, R in pairs])
    B = torch.stack([(R.T if transposed else L) for L, R in pairs], dim=2)  # rank-major columns, experts fastest
    return A, B.reshape(B.shape[0], -1)


# down_proj is square with an inner size of 16, gate_up_proj with 8
SHAPES = [("mixtral", 24), ("mixtral", 8), ("gpt_oss", 24), ("gpt_oss", 16), ("gpt_oss", 8)]
VERSIONS = [
    (None, "old"), ("0.17.0", "old"), ("0.17.1", "old"), ("0.18.0", "old"), ("0.18.2.dev0@UNKNOWN", "old"), ("0.19.0", "middle"),
    ("0.19.1", "new"), ("0.20.0", "new"), ("0.21.2", "new"),
]  # fmt: skip


@pytest.mark.parametrize(("version", "era"), VERSIONS, ids=[str(v) for v, _ in VERSIONS])
@pytest.mark.parametrize(
    ("kind", "hidden", "inner"),
    [("mixtral", 16, 16), *(pytest.param(k, 16, i, marks=pytest.mark.slow) for k, i in SHAPES)],
)
def test_three_packings_of_experts_give_one_merge(
    kind: str, hidden: int, inner: int, version, era: str, tmp_path: Path
):
    """The same update, packed as PEFT packed it up to 0.18, in 0.19.0 and since 0.19.1, is the same; square or not."""
    base, shapes = _stacks(kind, hidden, inner, tmp_path)
    transposed = {"old": True, "middle": kind == "mixtral", "new": kind == "gpt_oss"}[era]
    made, parts, deltas = torch.Generator().manual_seed(2), {}, {}
    for where, name in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
        d1, d2 = shapes[name]
        pairs = [(torch.randn(d1, 4, generator=made), torch.randn(4, d2, generator=made)) for _ in range(3)]
        deltas[name] = torch.stack([L.double() @ R.double() for L, R in pairs])
        parts[f"{E3}{where}.lora_A.weight"], parts[f"{E3}{where}.lora_B.weight"] = _packed(pairs, transposed)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = _by_hand(tmp_path / "adapter", parts, targets=[], target_parameters=targets, peft_version=version)

    adaptkit.merge(base, adapter, tmp_path / "out")

    before, after = (_experts(p) for p in (base, tmp_path / "out"))
    for name, D in deltas.items():
        np.testing.assert_allclose(after[name] - before[name], D, atol=1e-5)


def _experts(folder: Path) -> dict[str, np.ndarray]:
    """The two stacks of a model, as its modules hold them."""
    experts = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.layers[0].mlp.experts
    return {n: getattr(experts, n).detach().double().numpy() for n in ("gate_up_proj", "down_proj")}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "hidden", "inner"), [("mixtral", 16, 24), ("mixtral", 16, 16), ("gpt_oss", 16, 16)])
def test_todays_packing_is_what_installed_peft_packs(kind: str, hidden: int, inner: int, tmp_path: Path):
    """A file of the installed PEFT gives what PEFT's own merge gives, square or not."""
    base, _ = _stacks(kind, hidden, inner, tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(
        load(base, dtype=torch.float32), LoraConfig(r=4, target_modules=[], target_parameters=targets)
    )
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    attached = PeftModel.from_pretrained(load(base, dtype=torch.float32), tmp_path / "adapter")
    attached.merge_and_unload().save_pretrained(tmp_path / "theirs")

    adaptkit.merge(base, tmp_path / "adapter", tmp_path / "out")

    expected, got, before = (_experts(tmp_path / n) for n in ("theirs", "out", "base"))
    for name in expected:
        assert np.abs(expected[name] - before[name]).max() > 1e-3
        np.testing.assert_allclose(got[name], expected[name], atol=1e-6)


def test_every_family_and_every_odd_kind_is_in_the_matrix():
    """No kind of the zoo is left out by accident."""
    assert {c[0] for c in cells()} == set(KINDS)
    assert {KINDS[c[0]].family for c in cells()} == set(FAMILIES)
