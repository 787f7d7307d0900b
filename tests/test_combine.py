"""combine: against PEFT where PEFT is right, and against the formula where it is not."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import FIXTURES
from safetensors.numpy import save_file

from adaptkit import Adapter, AdaptKitError, AdaptKitWarning, Site, combine, read, resize, write
from adaptkit.cli.app import run
from adaptkit.errors import Mismatch
from adaptkit.store.arrays import load
from adaptkit.tuners.experts import ExpertLoRA
from adaptkit.tuners.ia3 import IA3
from adaptkit.tuners.lora import LoRA
from adaptkit.tuners.virtual import PromptTuning
from adaptkit.verbs import thin
from adaptkit.verbs.combine import combined, rehearsed

LLAMA = FIXTURES / "adapters" / "llama"
PATH = "net.0"


def lora(
    seed: int, r: int = 4, out: int = 24, into: int = 32, alpha: float = 8.0, path: str = PATH, **settings: Any
) -> Adapter:
    rng = np.random.default_rng(seed)
    params = {"A": rng.standard_normal((r, into)).astype("f4"), "B": rng.standard_normal((out, r)).astype("f4")}
    return Adapter({path: Site(LoRA(r=r, alpha=alpha, **settings), params)})


def delta(site: Site) -> np.ndarray:
    """s B A in (out, in), the first expert's when there are several."""
    L, R = thin.factors(site)
    return site.tuner.scale * (L[0] @ R[0])


def deltas(adapter: Adapter) -> dict[str, np.ndarray]:
    return {p: delta(s) for p, s in adapter.sites.items()}


def close(a: np.ndarray, b: np.ndarray, share: float = 3e-6) -> None:
    assert np.linalg.norm(a - b) <= share * max(np.linalg.norm(b), 1e-30)


def peft_model(folders: list[Path]):
    """Real PEFT with these adapters on a two-layer model, named a0, a1, ..."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.Linear(24, 16))

        def forward(self, x):
            return self.net(x)

    model = peft.PeftModel.from_pretrained(Net(), folders[0], adapter_name="a0")
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=f"a{i}")
    return model


def peft_delta(model: Any, name: str, layer: int = 0) -> np.ndarray:
    return model.base_model.model.net[layer].get_delta_weight(name).detach().numpy()


@pytest.mark.peft
@pytest.mark.parametrize(
    "method", ["svd", "cat", "linear", "ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"]
)
@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.0, -0.5]])
def test_what_peft_gets_right_we_get_too(method: str, weights: list[float], tmp_path: Path):
    """The same update as add_weighted_adapter makes of the same files, and real PEFT reads ours back."""
    for i in range(2):
        write(lora(i), tmp_path / f"{i}")
    folders = [tmp_path / "0", tmp_path / "1"]
    options = {"density": 0.4} if method not in ("svd", "cat", "linear") else {}
    model = peft_model(folders)
    model.add_weighted_adapter(["a0", "a1"], weights, "both", combination_type=method, **options)
    combine(folders, tmp_path / "ours", method=method, weights=weights, **options)
    model.load_adapter(tmp_path / "ours", adapter_name="ours")

    close(peft_delta(model, "ours"), peft_delta(model, "both"), 2e-5 if method.endswith("svd") else 3e-6)


@pytest.mark.parametrize("clamp", [0.99, 0.8])
def test_clamped_factors_are_cut_at_one_size(clamp: float):
    """All values are on B before, as in PEFT; both factors end at the same largest number, and 1 clamps nothing."""
    pair = [lora(0), lora(1)]
    made, free = combined(pair, clamp=clamp, rank=8).sites[PATH], combined(pair, clamp=1.0, rank=8).sites[PATH]
    A, B = made.params["A"], made.params["B"]
    t = np.quantile(np.concatenate([free.params["B"].reshape(-1), free.params["A"].reshape(-1)]), clamp)

    assert abs(np.abs(B).max() - t) < 1e-5 * t
    np.testing.assert_allclose(A, np.clip(free.params["A"], -t, t), atol=1e-6)


def test_a_clamp_that_leaves_nothing_is_said():
    """The quantile is of signed numbers: from the middle down, all factors become one number."""
    with pytest.warns(AdaptKitWarning, match="--clamp 0.3 cuts at or below zero"):
        made = combined([lora(0), lora(1)], clamp=0.3).sites[PATH]
    assert len({*made.params["A"].ravel().tolist(), *made.params["B"].ravel().tolist()}) == 1


CASES = {
    "rsLoRA, where PEFT is sqrt(r) too large": {"rslora": True},
    "alpha unlike r": {"alpha": 32.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["svd", "cat"])
def test_the_scale_is_folded_in(case: str, method: str, tmp_path: Path):
    """The result has scale 1 and the exact sum, after a round trip through files."""
    parts = [lora(0, **CASES[case]), lora(1)]
    for i, part in enumerate(parts):
        write(part, tmp_path / f"{i}")
    combine(
        [tmp_path / "0", tmp_path / "1"],
        tmp_path / "o",
        method=method,
        weights=[0.5, 2],
        **({"rank": 8} if method == "svd" else {}),
    )
    made = read(tmp_path / "o").sites[PATH]

    assert made.tuner.scale == 1 and not made.tuner.rslora and made.tuner.r == 8
    close(delta(made), 0.5 * delta(parts[0].sites[PATH]) + 2 * delta(parts[1].sites[PATH]))


def test_a_trained_bias_is_added_too_where_peft_loses_it():
    """c = sum w s c, and zeros at sites that have none, since it is one setting for a file."""
    a, b = lora(0), lora(1)
    a.sites[PATH].params["c"] = np.arange(24, dtype="f4")
    b.sites["net.1"] = lora(2, out=16, into=24).sites[PATH]
    for method in ("svd", "cat", "linear"):
        made = combined([a, b], method=method, weights=[0.5, 1])
        np.testing.assert_allclose(made.sites[PATH].params["c"], 0.5 * 2.0 * np.arange(24), rtol=1e-6)
        assert not made.sites["net.1"].params["c"].any()


def test_sites_that_an_adapter_lacks_count_as_zero():
    """Whatever the order; PEFT drops layers that the first adapter's settings leave out."""
    a, b = lora(0), lora(1, path="net.1", out=16, into=24)
    made = combined([a, b], weights=[2, 3])

    close(delta(made.sites[PATH]), 2 * delta(a.sites[PATH]))
    close(delta(made.sites["net.1"]), 3 * delta(b.sites["net.1"]))


def test_ranks_are_per_site_and_no_larger_than_the_matrix(tmp_path: Path):
    """A rank that a matrix does not have is no error, and PEFT reads the pattern."""
    a, b = lora(0, r=20), lora(1, r=20)
    for part in (a, b):
        part.sites["net.1"] = lora(2, r=4, out=16, into=24).sites[PATH]
    write(combined([a, b], rank=64), tmp_path / "o")
    made = read(tmp_path / "o")

    assert {p: s.tuner.r for p, s in made.sites.items()} == {PATH: 24, "net.1": 8}
    close(peft_delta(peft_model([tmp_path / "o"]), "a0"), delta(a.sites[PATH]) + delta(b.sites[PATH]), 1e-5)


def test_the_same_adapter_twice_by_halves_is_itself():
    """But for linear, which PEFT defines with cross terms: they make it twice that."""
    a = lora(0)
    for options in ({}, {"method": "cat"}, {"method": "linear"}, {"method": "dare_linear_svd", "density": 1.0}):
        share = 2 if options.get("method") == "linear" else 1  # (2 * sqrt(1/2))^2: the cross terms
        close(delta(combined([a, a], weights=[0.5, 0.5], **options).sites[PATH]), share * delta(a.sites[PATH]), 1e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(-2, 2), st.floats(-2, 2), st.booleans())
def test_order_does_not_matter_and_cat_is_exact(r1: int, r2: int, w1: float, w2: float, rslora: bool):
    """For svd at full rank and cat alike."""
    a, b = lora(1, r=r1, rslora=rslora), lora(2, r=r2, alpha=3)
    exact = w1 * delta(a.sites[PATH]) + w2 * delta(b.sites[PATH])
    for options in ({"method": "cat"}, {"rank": 12}):
        for pair, weights in (([a, b], [w1, w2]), ([b, a], [w2, w1])):
            made = delta(combined(pair, weights=weights, **options).sites[PATH])
            assert (
                np.linalg.norm(made - exact)
                <= 1e-6 * (np.linalg.norm(delta(a.sites[PATH])) + np.linalg.norm(delta(b.sites[PATH]))) * 4
            )


@pytest.mark.parametrize("method", ["svd", "cat", "linear", "ties", "dare_ties", "ties_svd", "dare_linear_svd"])
def test_one_adapter_is_itself(method: str):
    """Of weight 1 and density 1."""
    a = lora(0)
    options = {"density": 1.0} if method[0] in "td" else {}

    close(delta(combined([a], method=method, **options).sites[PATH]), delta(a.sites[PATH]), 1e-5)


def test_dare_depends_on_the_seed_alone():
    """Not on the other sites, nor on the order of adapters' files in memory."""
    a, b = lora(0), lora(1)
    more = Adapter({"net.1": lora(5, out=16, into=24).sites[PATH], **a.sites})
    first, again, other = (
        combined([x, b], method="dare_linear", density=0.5, seed=s).sites[PATH].params["A"]
        for x, s in ((a, 1), (more, 1), (a, 2))
    )

    assert (first == again).all() and (first != other).any()


def test_the_number_of_workers_changes_no_byte(tmp_path: Path):
    """Sites are worked on side by side, and stand in the result as before; the receipt does not say how many did it."""
    for name, seed in (("a", 0), ("b", 10)):
        sites = {f"net.{i}": lora(seed + i, out=40 + i, path=f"net.{i}").sites[f"net.{i}"] for i in range(7)}
        write(Adapter(sites), tmp_path / name)
    for workers in (1, 3):
        out, given = tmp_path / f"out{workers}", [str(tmp_path / "a"), str(tmp_path / "b")]
        how = ["--method", "dare_ties_svd", "--density", "0.5", "--workers", str(workers)]
        assert run(["combine", *given, "-o", str(out), *how]) == 0

    names = sorted(p.name for p in (tmp_path / "out1").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "out3").iterdir()) and "adapter_model.safetensors" in names
    assert [n for n in names if (tmp_path / "out1" / n).read_bytes() != (tmp_path / "out3" / n).read_bytes()] == []


def test_a_worker_that_fails_is_heard():
    """The first site that does not fit ends the whole, with its name."""
    sites = {f"net.{i}": lora(i, path=f"net.{i}").sites[f"net.{i}"] for i in range(4)}
    for name in ("A", "B"):
        sites["net.2"].params[name] *= np.float32(1e30)
    with pytest.raises(Mismatch, match="net.2: the result does not fit float32"):
        combined([Adapter(sites)], method="ties_svd", density=0.5, workers=2)


def test_convolutions_embeddings_and_experts_keep_their_shapes():
    """Each expert's sum is its own."""
    rng = np.random.default_rng(0)

    def part(tuner: LoRA, A: tuple, B: tuple) -> Adapter:
        return Adapter(
            {"m": Site(tuner, {"A": rng.standard_normal(A).astype("f4"), "B": rng.standard_normal(B).astype("f4")})}
        )

    for shape in ((3, 5, 3), (3, 5, 3, 3), (3, 5, 2, 2, 2)):
        pair = [part(LoRA(r=3, alpha=6), shape, (7, 3, *[1] * (len(shape) - 2))) for _ in range(2)]
        made = combined(pair, rank=6).sites["m"]
        assert made.params["A"].shape == (6, *shape[1:]) and made.params["B"].shape[2:] == (1,) * (len(shape) - 2)
        close(delta(made), sum(delta(p.sites["m"]) for p in pair))
    pair = [part(ExpertLoRA(r=2, alpha=4), (6, 10), (8, 6)) for _ in range(2)]
    W = np.zeros((3, 8, 10))
    expected = sum(p.sites["m"].tuner.weight(W.copy(), p.sites["m"].params) for p in pair)
    for options in ({"rank": 4}, {"method": "cat"}, {"method": "dare_linear_svd", "density": 1.0, "rank": 4}):
        made = combined(pair, **options).sites["m"]
        close(made.tuner.weight(W.copy(), made.params), expected, 1e-5)


@pytest.mark.parametrize("name", ["bdlora", "embedding", "rank-alpha-patterns", "lora-bias", "rslora", "conv"])
def test_adapters_of_every_thin_kind_keep_their_update(name: str):
    """Files that real PEFT made, combined with themselves by halves."""
    (folder,) = (FIXTURES / "adapters").glob(f"*/{name}") if name != "embedding" else [LLAMA / name]
    adapter = read(folder)
    made = combined([adapter, adapter], weights=[0.25, 0.75])

    assert made.whole.keys() == adapter.whole.keys()
    for path, site in adapter.sites.items():
        if site.tuner.name != "tokens":
            close(delta(made.sites[path]), delta(site), 1e-5)


@pytest.mark.parametrize("name", ["dora", "pissa", "olora", "kasa"])
def test_updates_that_depend_on_the_base_are_refused(name: str):
    """PEFT combines them silently, and wrongly."""
    with pytest.raises(AdaptKitError, match="base"):
        combined([read(LLAMA / "lora"), read(LLAMA / name)])


def test_tensors_replaced_outright_are_kept_when_equal_and_taken_when_told():
    """No sum of them means anything; PEFT drops them."""
    a, b = lora(0), lora(1)
    a.whole, b.whole = {"head.weight": np.ones((2, 2), "f4")}, {"head.weight": np.zeros((2, 2), "f4")}
    with pytest.raises(AdaptKitError, match="--take"):
        combined([a, b])
    with pytest.raises(AdaptKitError, match="--take"):
        combined([a, lora(1)])

    assert not combined([a, b], take=2).whole["head.weight"].any()
    assert combined([a, a]).whole["head.weight"].all()


def test_ia3_vectors_are_averaged_and_absent_ones_are_ones():
    """PEFT counts a layer that an adapter leaves alone as zero."""
    l = np.linspace(0, 2, 6, dtype="f4")
    a, b = Adapter({"m": Site(IA3(), {"l": l}), "n": Site(IA3(), {"l": l})}), Adapter({"m": Site(IA3(), {"l": l * 3})})
    made = combined([a, b], method="linear")

    np.testing.assert_allclose(made.sites["m"].params["l"], 2 * l)
    np.testing.assert_allclose(made.sites["n"].params["l"], (l + 1) / 2)
    with pytest.warns(UserWarning, match="add up to 2"):
        combined([a, b], method="linear", weights=[1, 1])
    with pytest.raises(AdaptKitError, match="linear"):
        combined([a, b])


def test_prompts_are_averaged_or_follow_one_another():
    """Of other lengths they can only follow one another."""
    a, b = (
        Adapter({"": Site(PromptTuning(tokens=n), {"P": np.full((n, 4), n, "f4")})}, about={"num_virtual_tokens": n})
        for n in (2, 3)
    )

    assert combined([a, b], method="cat").sites[""].params["P"].shape == (5, 4)
    assert (combined([a, a], method="linear", weights=[0.25, 0.5]).sites[""].params["P"] == 1.5).all()
    with pytest.raises(AdaptKitError, match="shapes"):
        combined([a, b], method="linear")


@pytest.mark.parametrize("name", ["prompt", "ptuning", "prefix"])
def test_virtual_tokens_of_every_kind_are_combined_on_files(name: str, tmp_path: Path):
    """Read back, the average of an adapter with itself is itself."""
    combine([LLAMA / name, LLAMA / name], tmp_path / "o", method="linear", weights=[0.25, 0.75])
    before, after = read(LLAMA / name).sites[""], read(tmp_path / "o").sites[""]

    assert after.tuner == before.tuner
    np.testing.assert_allclose(load(after.params["P"]), load(before.params["P"]), rtol=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.sampled_from(["svd", "cat"]), st.floats(0.01, 100))
def test_one_adapter_of_any_shape_is_itself(r: int, out: int, into: int, method: str, alpha: float):
    """Also where the rank is above both sides, but for the rounding of factors whose products may cancel."""
    site = lora(r, r=r, out=out, into=into, alpha=alpha).sites[PATH]
    made = combined([Adapter({PATH: site})], method=method).sites[PATH]

    L, R = thin.factors(site)
    size = np.linalg.norm(site.tuner.scale * abs(L[0]) @ abs(R[0]))
    assert np.linalg.norm(delta(made) - delta(site)) <= 2e-7 * size


def test_dense_methods_are_clamped_like_svd():
    """All values on B, both factors cut at the quantile of their numbers together."""
    pair = [lora(0, r=8), lora(1, r=8)]
    free, made = (
        combined(pair, method="dare_linear_svd", density=1.0, rank=6, clamp=c).sites[PATH] for c in (1.0, 0.9)
    )
    t = np.quantile(np.concatenate([free.params[k].reshape(-1) for k in "AB"]), 0.9)

    np.testing.assert_allclose(np.linalg.norm(free.params["A"], axis=1), 1, atol=1e-5)
    for k in "AB":
        np.testing.assert_allclose(made.params[k], np.clip(free.params[k], -t, t), atol=1e-5)


BAD = {
    "two weights for three": ({"weights": [1, 2]}, "2 weights for 3"),
    "a density for svd": ({"density": 0.5}, "drops nothing"),
    "ties without a density": ({"method": "ties"}, "needs it"),
    "a density of 0": ({"method": "ties", "density": 0}, "above 0"),
    "a density above 1": ({"method": "ties", "density": 1.5}, "above 0"),
    "a rank for cat": ({"method": "cat", "rank": 4}, "only the svd"),
    "rank 0": ({"rank": 0}, "not a rank"),
    "an unknown method": ({"method": "slerp"}, "not one of"),
    "a clamp of 2": ({"clamp": 2}, "quantile"),
    "an election for svd": ({"majority_sign": "frequency"}, "elects no sign"),
    "a fourth of three": ({"take": 4}, "number of one"),
    "NaN weights": ({"weights": [1, float("nan"), 1]}, "not all numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_options_that_make_no_sense_are_refused(case: str):
    """With a sentence, before anything is computed."""
    options, text = BAD[case]
    with pytest.raises(AdaptKitError, match=text):
        combined([lora(0), lora(1), lora(2)], **options)


def test_adapters_that_do_not_fit_are_refused():
    """Other shapes, other kinds, ranks that linear cannot add, numbers that float32 cannot hold."""
    with pytest.raises(AdaptKitError, match="not the same module"):
        combined([lora(0), lora(1, into=16)])
    with pytest.raises(AdaptKitError, match="different kinds"):
        combined([lora(0), Adapter({"m": Site(IA3(), {"l": np.ones(3, "f4")})})])
    with pytest.raises(AdaptKitError, match="ranks 4 and 8"):
        combined([lora(0), lora(1, r=8)], method="linear")
    with pytest.raises(AdaptKitError, match="float32"):
        combined([lora(0)], method="cat", weights=[1e39])


def test_torch_computes_the_same_as_numpy():
    """The road that a GPU takes, on torch's CPU device, for thin sums and for dense ones."""
    torch = pytest.importorskip("torch")
    pair = [lora(0, out=200, into=150), lora(1, out=200, into=150)]
    for options in ({}, {"method": "ties_svd", "density": 0.3}):
        ours, theirs = (combined(pair, device=d, **options).sites[PATH] for d in (None, torch.device("cpu")))
        close(delta(theirs), delta(ours), 1e-4 if options else 1e-5)


def test_the_command_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Dry run writes nothing and says the same; an output that is there is refused; bases that differ are a warning."""
    a, b = lora(0), lora(1)
    a.meta["base"], b.meta["base"] = "x/one", "x/two"
    write(a, tmp_path / "a"), write(b, tmp_path / "b")
    words = ["combine", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "o")]

    assert run([*words, "--dry-run", "--json"]) == 0 and not (tmp_path / "o").exists()
    assert json.loads(capsys.readouterr().out)["ranks"] == {"4": 1}
    assert run(words) == 0
    printed = capsys.readouterr()
    assert "1 of rank 4" in printed.out and "different bases" in printed.err
    assert run(words) == 2 and "--overwrite" in capsys.readouterr().err
    assert run([*words, "--overwrite", "--quiet"]) == 0


def _nan(folder: Path) -> list[str]:
    broken = lora(1)
    tensors = {f"base_model.model.{PATH}.lora_{k}.weight": v.copy() for k, v in broken.sites[PATH].params.items()}
    write(broken, folder)
    tensors[f"base_model.model.{PATH}.lora_A.weight"][0, 0] = np.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    return []


def _wide(folder: Path) -> list[str]:
    write(lora(1, into=40), folder)
    return []


def _high(folder: Path) -> list[str]:
    write(lora(1, r=6), folder)
    return ["--method", "linear"]


def _taken(folder: Path) -> list[str]:
    write(lora(1), folder)
    (folder.parent / "o").mkdir()
    (folder.parent / "o" / "mine").write_text("")
    return []


@pytest.mark.parametrize("harm", [_nan, _wide, _high, _taken])
def test_a_dry_run_refuses_what_the_run_refuses(harm: Callable[[Path], list[str]], tmp_path: Path, capsys):
    """With the same words: numbers, shapes, ranks and the output are all looked at."""
    write(lora(0), tmp_path / "a")
    words = ["combine", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "o"), *harm(tmp_path / "b")]

    codes = run([*words, "--dry-run"]), run(words)
    dry, real = capsys.readouterr().err.splitlines()
    assert codes[0] == codes[1] != 0 and dry == real


def test_a_dry_run_of_prompts_compares_their_lengths(tmp_path: Path):
    """Of another length they cannot be averaged."""
    sites = [Site(PromptTuning(tokens=n), {"P": np.ones((n, 8), "f4")}) for n in (3, 5)]
    with pytest.raises(AdaptKitError, match=r"\[3, 8\] and \[5, 8\]"):
        rehearsed([Adapter({"": s}) for s in sites], tmp_path / "o", method="linear")


@pytest.mark.parametrize("verb", [combine, lambda *a, **k: resize(*a, rank=2, **k)])
def test_an_output_that_is_taken_is_refused_before_the_work(verb: Callable[..., Any], tmp_path: Path):
    """Not after what may be an hour."""
    (tmp_path / "mine").write_text("")
    steps: list[tuple[int, int]] = []
    with pytest.raises(AdaptKitError, match="not empty"):
        verb(LLAMA / "lora", tmp_path, progress=lambda *step: steps.append(step))
    assert steps == []


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("take", [1, 2])
def test_biases_that_are_taken_keep_their_setting(bias: str, take: int, tmp_path: Path):
    """Without it no program knows what the tensors are: the result could not be read again."""
    trained, plain = lora(0), lora(1)
    trained.about, plain.about = {"bias": bias}, {"bias": "none"}
    trained.whole = {f"{PATH}.bias": np.arange(24, dtype="f4")}
    pair = [trained, plain] if take == 1 else [plain, trained]
    write(combined(pair, take=take), tmp_path / "o")
    made = read(tmp_path / "o")

    assert made.about["bias"] == bias and not made.about["modules_to_save"]
    np.testing.assert_array_equal(load(made.whole[f"{PATH}.bias"]), np.arange(24))
    assert combined(pair, take=3 - take).whole == {}


def test_of_several_adapters_the_message_says_whose_file_is_wrong(tmp_path: Path, capsys):
    """All of them have files of one name."""
    for name in ("a", "b"):
        write(lora(0), tmp_path / name)
    (tmp_path / "b/adapter_model.safetensors").write_bytes(b"")

    assert run(["combine", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "o")]) == 3
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/b/adapter_model.safetensors: file has 0 bytes")


def test_of_different_kinds_the_message_says_which_is_what(tmp_path: Path):
    """And what can be done with them."""
    words = "different kinds cannot be combined: ia3 is ia3, lora is lora; merge them"
    with pytest.raises(AdaptKitError, match=words):
        combine([LLAMA / "lora", LLAMA / "ia3"], tmp_path / "o")


def test_bases_that_agree_are_kept(tmp_path: Path):
    """So is the task."""
    a, b = lora(0), lora(1)
    for part in (a, b):
        part.meta["base"], part.about = "x/one", {"task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(combined([a, b]), tmp_path / "o")
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())

    assert config["base_model_name_or_path"] == "x/one" and config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("verb", ["combine", "resize"])
def test_a_tokenizer_beside_the_adapter_goes_along(verb: str, tmp_path: Path):
    """Without it the new words of a grown vocabulary are lost."""
    grown, out = LLAMA / "grown", tmp_path / "o"
    resize(grown, out, rank=2) if verb == "resize" else combine([grown, grown], out)

    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (grown / name).read_bytes()


def test_of_different_tokenizers_none_is_taken_unless_said(tmp_path: Path):
    """With --take it is that adapter's."""
    other = tmp_path / "other"
    shutil.copytree(LLAMA / "grown", other)
    (other / "tokenizer_config.json").write_text("{}")

    with pytest.warns(AdaptKitWarning, match="different tokenizers.*--take"):
        combine([LLAMA / "grown", other], tmp_path / "a")
    assert not (tmp_path / "a/tokenizer.json").exists()
    combine([LLAMA / "grown", LLAMA / "lora", other], tmp_path / "b", take=3)
    assert (tmp_path / "b/tokenizer_config.json").read_text() == "{}"


def test_a_sum_of_nothing_is_said_to_be_nothing(tmp_path: Path):
    """Weights of zero are taken at their word."""
    with pytest.warns(AdaptKitWarning, match="every update of the result is zero"):
        combine([LLAMA / "lora", LLAMA / "rslora"], tmp_path / "o", weights=[0, 0])


def test_an_adapter_that_does_nothing_is_named(tmp_path: Path):
    """Training that never began looks so."""
    zero = read(LLAMA / "lora")
    for site in zero.sites.values():
        site.params["B"] = np.zeros(site.params["B"].shape, "f4")
    write(zero, tmp_path / "zero")
    with pytest.warns(AdaptKitWarning, match="^zero: every update is zero$"):
        combine([LLAMA / "lora", tmp_path / "zero"], tmp_path / "o")


def test_square_experts_packed_two_ways_are_refused():
    """Nothing in the numbers says which way is meant."""
    rng = np.random.default_rng(0)

    def stack(version: str, out: int) -> Adapter:
        params = {"A": rng.standard_normal((6, 8)).astype("f4"), "B": rng.standard_normal((out, 6)).astype("f4")}
        site = Site(ExpertLoRA(r=2, alpha=2.0), params)
        return Adapter({"mlp.experts.down_proj": site}, about={"peft_version": version})

    with pytest.raises(AdaptKitError, match="square.*pack experts differently"):
        combined([stack("0.18.0", 8), stack("0.21.2", 8)])
    assert combined([stack("0.20.0", 8), stack("0.21.2", 8)]).about["peft_version"] == "0.20.0"
    assert "peft_version" not in combined([stack("0.18.0", 9), stack("0.21.2", 9)]).about
