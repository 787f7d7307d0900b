"""How far updates overlap, from their factors, against the dense matrices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from places import FIXTURES

import adaptkit
from adaptkit import IA3, Adapter, DoRA, LoRA, Site
from adaptkit.algebra.overlap import Update, angles, inner, shared
from adaptkit.cli.app import cli, run
from adaptkit.verbs.similarity import updates

LLAMA = FIXTURES / "adapters" / "llama"


def random(m: int, r: int, n: int, seed: int) -> Update:
    rng = np.random.default_rng(seed)
    return Update(rng.standard_normal((m, r)), rng.standard_normal((r, n)))


@pytest.mark.parametrize(("m", "n"), [(8, 8), (30, 50), (50, 30), (1, 9)])
@pytest.mark.parametrize(("r", "k"), [(1, 1), (3, 5), (5, 3), (8, 8)])
def test_inner_products_and_norms_are_those_of_the_matrices(m: int, n: int, r: int, k: int):
    """Also for ranks above the smaller side."""
    a, b = random(m, r, n, 1), random(m, k, n, 2)
    A, B = a.L @ a.R, b.L @ b.R

    assert inner(a, b) == pytest.approx(float((A * B).sum()), rel=1e-9, abs=1e-9)
    assert a.norm() == pytest.approx(np.linalg.norm(A), rel=1e-12)


def test_angles_are_those_between_the_spaces():
    """Against scipy, with a common direction, orthogonal ones and one nearly common."""
    from scipy.linalg import subspace_angles

    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((40, 7)))[0]
    U = Q[:, :3]
    V = np.linalg.qr(np.stack([Q[:, 0], Q[:, 1] + 1e-6 * Q[:, 5], Q[:, 2] + Q[:, 6], Q[:, 3]], axis=1))[0]
    found = angles(U, V)

    np.testing.assert_allclose(found, np.sort(np.degrees(subspace_angles(U, V))), atol=1e-9)
    np.testing.assert_allclose(found, [0, np.degrees(1e-6), 45], atol=1e-9)
    assert shared(found) == pytest.approx((1 + 1 + 0.5) / 3)


def test_spaces_leave_out_what_the_rank_does_not_reach():
    """Factors of rank 4 whose product has rank 2 span two directions."""
    a = random(20, 2, 30, 3)
    doubled = Update(np.concatenate([a.L, a.L], axis=1), np.concatenate([a.R, a.R]))
    U, V = doubled.spaces()

    assert (U.shape, V.shape) == ((20, 2), (30, 2))
    np.testing.assert_allclose(U @ U.T @ a.L, a.L, atol=1e-9)
    np.testing.assert_allclose(a.R @ V @ V.T, a.R, atol=1e-9)


def site(seed: int, r: int = 2, size: float = 1.0, **more) -> Site:
    u = random(6, r, 4, seed)
    return Site(LoRA(r=r, alpha=3.0, **more), {"A": (size * u.R).astype("f4"), "B": u.L.astype("f4")})


def test_an_adapter_is_like_itself_and_opposite_to_its_inverse():
    """Cosine 1 with equal spaces, -1 with the signs turned."""
    one = Adapter({"layers.0.q": site(1), "layers.1.q": site(2)})
    other = Adapter({"layers.0.q": site(1, size=-2.0), "layers.1.q": site(2, size=-2.0)})
    same, turned = (adaptkit.inspect([one, b]).pairs[0] for b in (one, other))

    assert same.cosine == pytest.approx(1)
    assert turned.cosine == pytest.approx(-1)
    assert turned.norms[1] == pytest.approx(2 * turned.norms[0])
    for s in (*same.sites, *turned.sites):
        assert s.shared_columns == pytest.approx(1)
        assert max(s.columns + s.rows) < 1e-4


def test_all_sites_together_are_one_long_vector():
    """A module that only one of them changes counts with its norm, and is named."""
    a = Adapter({"layers.0.q": site(1), "layers.0.k": site(2)})
    b = Adapter({"layers.0.q": site(3, r=3), "layers.0.v": site(4)})
    found = adaptkit.inspect([a, b]).pairs[0]

    def vector(adapter: Adapter) -> np.ndarray:
        dense = {n: sum(u.L @ u.R for u in updates(s)) for n, s in adapter.sites.items()}
        return np.concatenate([dense.get(f"layers.0.{n}", np.zeros((6, 4))).ravel() for n in "qkv"])

    x, y = vector(a), vector(b)
    assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert found.norms == pytest.approx((np.linalg.norm(x), np.linalg.norm(y)))
    assert found.only == (["layers.0.k"], ["layers.0.v"])


def test_how_the_weight_is_stored_does_not_matter():
    """An update of (in, out) weights is compared as (out, in)."""
    one, other = Adapter({"h": site(1)}), Adapter({"h": site(1, transposed=True)})

    assert adaptkit.inspect([one, other]).pairs[0].cosine == pytest.approx(1)


def test_what_cannot_be_compared_is_named_with_the_reason():
    """DoRA needs the base, shapes must agree, a replaced tensor has no update, IA3 does not add."""
    m = {"m": np.ones(6, "f4")}
    dora = Site(DoRA(r=2), {**site(1).params, **m})
    l = Site(IA3(), {"l": np.full(6, 1.5, "f4")})
    a = Adapter({"d": dora, "w": site(1), "i": l}, {"norm.weight": np.ones(3, "f4")})
    wide = Site(LoRA(r=2), {"A": np.ones((2, 5), "f4"), "B": np.ones((6, 2), "f4")})
    found = adaptkit.inspect([a, Adapter({"d": dora, "w": wide, "i": site(2)})]).pairs[0]

    assert not found.sites
    assert found.uncompared.keys() == {"d", "w", "i", "norm.weight"}
    assert "dora" in found.uncompared["d"]
    assert "(6, 4) in one" in found.uncompared["w"]
    assert "multiplies" in found.uncompared["i"]


def test_a_bias_trained_with_the_update_is_named():
    """It is no part of the product, so no cosine counts it."""
    biased = site(1)
    biased.params["c"] = np.ones(8, "f4")
    pair = adaptkit.inspect([Adapter({"h": biased}), Adapter({"h": site(1)})]).pairs[0]

    assert pair.cosine == pytest.approx(1)
    assert list(pair.uncompared) == ["h.bias"] and "lora_bias" in pair.uncompared["h.bias"]


def test_ia3_is_compared_by_its_relative_change():
    """l - 1 is what it does to the weight."""
    one, other = (Adapter({"k": Site(IA3(), {"l": np.array(l, "f4")})}) for l in ([2, 1, 1], [2, 2, 1]))

    assert adaptkit.inspect([one, other]).pairs[0].cosine == pytest.approx(1 / np.sqrt(2))


@pytest.mark.parametrize("name", ["lora", "rslora", "bin", "bf16", "rank-alpha-patterns", "bdlora", "ia3"])
def test_adapters_of_real_peft_are_like_themselves(name: str):
    """Every kind with factors: cosine 1 over all and at each site."""
    found = adaptkit.inspect([LLAMA / name, LLAMA / name]).pairs[0]

    assert found.cosine == pytest.approx(1)
    assert found.sites
    assert not found.uncompared
    assert all(s.cosine == pytest.approx(1) for s in found.sites)


def test_stacks_of_experts_are_compared_expert_by_expert():
    """As one vector; angles are those of single matrices and left out."""
    mixtral = FIXTURES / "adapters" / "mixtral" / "target-parameters"
    found = adaptkit.inspect([mixtral, mixtral]).pairs[0]

    assert found.cosine == pytest.approx(1)
    assert any(not s.columns and s.cosine == pytest.approx(1) for s in found.sites)


def test_three_adapters_make_three_pairs():
    """And each pair is printed."""
    found = CliRunner().invoke(cli, ["inspect", *(str(LLAMA / n) for n in ("lora", "rslora", "bf16"))]).output

    assert found.count("modules compared") == 3
    assert "lora and rslora: cosine +0.0050" in found


def test_json_has_the_angles():
    """What the table sums up."""
    told = json.loads(CliRunner().invoke(cli, ["inspect", str(LLAMA / "lora"), str(LLAMA / "rslora"), "--json"]).output)
    first = told["pairs"][0]["sites"][0]

    assert len(first["columns"]) == len(first["rows"]) > 1
    assert first["columns"] == sorted(first["columns"])


@pytest.mark.parametrize("adapters", [["lora"], ["lora", "rslora"], ["lora", "rslora", "bf16"], ["ia3"]])
def test_a_picture_is_drawn(adapters: list[str], tmp_path: Path):
    """The norm of one, the cosines of several; nothing is left beside it."""
    pytest.importorskip("matplotlib")
    adaptkit.inspect([LLAMA / n for n in adapters], plot=tmp_path / "a.png")

    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_says_what_it_lacks(tmp_path: Path):
    """DoRA's update depends on the base."""
    pytest.importorskip("matplotlib")
    with (
        pytest.raises(adaptkit.AdaptKitError, match="no site of the adapter can be drawn"),
        pytest.warns(adaptkit.AdaptKitWarning, match="depends on the base"),
    ):
        adaptkit.inspect(LLAMA / "dora", plot=tmp_path / "a.png")
    with pytest.raises(adaptkit.AdaptKitError, match=r"nothing to draw: .* not compared"):
        adaptkit.inspect([LLAMA / "dora", LLAMA / "lora"], plot=tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch, capsys):
    """One line, and what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    assert run(["inspect", str(LLAMA / "lora"), "--plot", str(tmp_path / "a.png")]) == 4
    assert capsys.readouterr().err == "error: --plot: drawing needs matplotlib; pip install adaptkit[plot]\n"


@pytest.mark.parametrize("name", ["a.txt", "no/where.png"])
def test_a_picture_needs_a_place(name: str, tmp_path: Path):
    """An ending that is a picture's, in a folder that is there."""
    assert run(["inspect", str(LLAMA / "lora"), "--plot", str(tmp_path / name)]) == 2


def test_comparing_imports_neither_torch_nor_matplotlib():
    """Only the picture needs matplotlib."""
    code = (
        "import sys; from adaptkit.cli.app import run; code = run(['inspect', *sys.argv[1:]]);"
        "print(code, sorted({'torch', 'transformers', 'matplotlib'} & sys.modules.keys()), file=sys.stderr)"
    )
    paths = [str(LLAMA / n) for n in ("lora", "rslora")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=60)

    assert done.stderr.splitlines()[-1] == "0 []", done.stderr


@pytest.mark.parametrize("other", ["ia3", "dora", "prompt"])
def test_what_cannot_be_compared_is_one_line_for_each_reason(other: str, capsys):
    """No norms and no cosine are shown where nothing was compared."""
    assert run(["inspect", str(LLAMA / "lora"), str(LLAMA / other)]) == 0
    lines = capsys.readouterr().out.splitlines()

    assert sum(line.startswith("not compared: ") for line in lines) == 1
    assert lines[-1] == f"lora and {other}: nothing could be compared"
    assert not any(line.endswith(": ") for line in lines)
