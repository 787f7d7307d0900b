"""adaptkit.algebra against dense decompositions in float64, and against PEFT's functions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.algebra import blend, lowrank

ROUNDING = 2e-6  # of the norm: a few float32 roundings


def terms(m: int, n: int, ranks: list[int], seed: int = 0, size: float = 1.0) -> list[tuple]:
    rng = np.random.default_rng(seed)
    shapes = [((m, r), (r, n)) for r in ranks]
    return [
        (c, rng.standard_normal(a) * size, rng.standard_normal(b) * size)
        for c, (a, b) in zip(rng.standard_normal(len(ranks)), shapes, strict=True)
    ]


def total(made: list[tuple]) -> np.ndarray:
    return sum(c * L @ R for c, L, R in made)


def best_error(D: np.ndarray, rank: int) -> float:
    return float(np.sqrt((np.linalg.svd(D, compute_uv=False)[rank:] ** 2).sum()))


def check_best(made: list[tuple], rank: int) -> None:
    D = total(made)
    L, R = lowrank.split(lowrank.spectrum(made), rank)
    error = np.linalg.norm(D - L.astype("f8") @ R.astype("f8"))
    assert error <= best_error(D, rank) + ROUNDING * np.linalg.norm(D)


@pytest.mark.parametrize(
    ("m", "n", "ranks", "rank"),
    [
        (8, 8, [1], 1),
        (8, 8, [4, 4], 8),
        (8, 8, [8, 8, 8], 3),
        (8, 40, [16, 16], 8),
        (200, 64, [8, 16], 8),
        (256, 512, [128, 32], 128),
    ],
)
def test_a_sum_of_products_is_cut_as_well_as_can_be(m: int, n: int, ranks: list[int], rank: int):
    """The error is that of the dense decomposition in float64, for ranks above the matrix's too."""
    check_best(terms(m, n, ranks), rank)


@pytest.mark.slow
def test_a_large_layer_is_cut_as_well_as_can_be():
    """4096 x 11008: the core's singular values are those of an exact Gram matrix."""
    made = terms(4096, 11008, [16, 16])
    found = lowrank.spectrum(made)
    L, R = np.concatenate([c * L for c, L, _ in made], 1), np.concatenate([R for _, _, R in made], 0)
    squares = np.sort(np.linalg.eigvals((L.T @ L) @ (R @ R.T)).real)[::-1]

    np.testing.assert_allclose(found.s**2, squares, rtol=1e-9)


@pytest.mark.parametrize("size", [1e-20, 1e-10, 1e9, 1e18])
def test_huge_and_tiny_factors_are_no_problem(size: float):
    """Each factor is brought to size one before anything is multiplied."""
    made = terms(32, 48, [4, 6], size=size)
    L, R = lowrank.split(lowrank.spectrum(made), 10)

    np.testing.assert_allclose(
        L.astype("f8") @ R.astype("f8"), total(made), atol=ROUNDING * np.abs(total(made)).max() * 10
    )


def test_zero_and_deficient_updates_have_small_spectra():
    """Zeros give zeros, not NaN; the same product twice has the rank of one."""
    zero = lowrank.spectrum([(1.0, np.zeros((16, 4)), np.ones((4, 8)))])
    ((c, L, R),) = terms(32, 24, [4])
    twice = lowrank.spectrum([(c, L, R), (c, L, R)])

    assert (
        np.abs(lowrank.split(zero, 4)[0]).max() == 0
        and lowrank.energy(zero.s, 1) == 1
        and lowrank.rank_for(zero.s, 0.9) == 1
    )
    assert (twice.s[4:] < 1e-12 * twice.s[0]).all() and lowrank.rank_for(twice.s, 1.0) == 4


def test_torch_and_a_batch_give_what_numpy_gives_one_by_one():
    """One code path for both libraries, in float32 as on a GPU; leading axes are a batch."""
    torch = pytest.importorskip("torch")
    sites = [terms(24, 40, [4, 8], seed=k) for k in range(3)]
    batch = [
        (np.array([s[i][0] for s in sites]), *(np.stack([s[i][k] for s in sites]) for k in (1, 2))) for i in range(2)
    ]
    as_torch = [(c, torch.from_numpy(L).float(), torch.from_numpy(R).float()) for c, L, R in batch]
    for found in (lowrank.spectrum(batch), lowrank.spectrum(as_torch)):
        L, R = lowrank.split(found, 12)
        for k, site in enumerate(sites):
            np.testing.assert_allclose(L[k] @ R[k], total(site), atol=1e-4)


@pytest.mark.gpu
def test_cuda_gives_what_numpy_gives():
    """The same on a device, where there is one."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    made = terms(64, 96, [8, 8])
    L, R = lowrank.split(
        lowrank.spectrum(
            [(c, torch.from_numpy(L).cuda().float(), torch.from_numpy(R).cuda().float()) for c, L, R in made]
        ),
        16,
    )

    np.testing.assert_allclose(L @ R, total(made), atol=1e-3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 12), st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(0, 99))
def test_any_shape_is_cut_as_well_as_can_be(m: int, n: int, ranks: list[int], seed: int):
    """Also vectors, and ranks above both sides."""
    for rank in {1, min(m, n, sum(ranks))}:
        check_best(terms(m, n, ranks, seed), rank)


def test_blends_are_those_of_peft():
    """Linear, ties with both elections and magnitude pruning, on the same tensors."""
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("peft.utils.merge_utils")
    rng = np.random.default_rng(3)
    xs, w = [rng.standard_normal((6, 10)).astype("f4") for _ in range(3)], [0.7, -0.4, 1.5]
    ts, tw = [torch.from_numpy(x) for x in xs], torch.tensor(w)
    cut = [blend.largest(x, 0.3) for x in xs]

    np.testing.assert_allclose(blend.blended(xs, w, "linear"), theirs.task_arithmetic(ts, tw), atol=1e-6)
    np.testing.assert_allclose(blend.blended(cut, w, "magnitude_prune"), theirs.magnitude_prune(ts, tw, 0.3), atol=1e-6)
    for way in ("total", "frequency"):
        np.testing.assert_allclose(blend.blended(cut, w, "ties", way), theirs.ties(ts, tw, 0.3, way), atol=1e-6)


def test_dare_with_our_mask_is_pefts_formula(monkeypatch: pytest.MonkeyPatch):
    """The random numbers are ours; with them in its place, PEFT gives the same."""
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("peft.utils.merge_utils")
    rng = np.random.default_rng(3)
    xs, w = [rng.standard_normal((40, 50)).astype("f4") for _ in range(2)], [0.7, 0.6]
    kept = [blend.dropped(x, 0.4, blend.generator(0, "site", i)) for i, x in enumerate(xs)]
    for name in ("dare_linear", "dare_ties"):
        masks = iter([torch.from_numpy((k != 0).astype("f4")) for k in kept])
        monkeypatch.setattr(torch, "bernoulli", lambda *_, masks=masks: next(masks))
        expected = getattr(theirs, name)([torch.from_numpy(x) for x in xs], torch.tensor(w), 0.4)
        np.testing.assert_allclose(blend.blended(kept, w, name), expected, atol=1e-5)

    assert abs(np.mean([k != 0 for k in kept]) - 0.4) < 0.03


def test_a_blend_of_products_is_the_blend_of_the_dense_matrices(monkeypatch: pytest.MonkeyPatch):
    """Made in blocks of rows, whatever their size."""
    rng = np.random.default_rng(5)
    pairs = [(rng.standard_normal((30, 3)).astype("f4"), rng.standard_normal((3, 20)).astype("f4")) for _ in range(2)]
    for method in ("ties", "magnitude_prune", "dare_ties"):
        made = []
        for block in (1 << 22, 50):
            monkeypatch.setattr(blend, "BLOCK", block)
            randoms = [blend.generator(i) for i in range(2)]
            made.append(blend.product_blend(pairs, [0.5, 0.8], method, 0.3, "total", randoms))
        whole = [blend.pruned(L @ R, method, 0.3, blend.generator(i)) for i, (L, R) in enumerate(pairs)]
        np.testing.assert_allclose(made[0], blend.blended(whole, [0.5, 0.8], method), atol=1e-5)
        np.testing.assert_allclose(made[1], made[0], atol=1e-5)


@pytest.mark.parametrize("q", [0.99, 0.7, 1.0])
def test_the_clamp_is_pefts(q: float):
    """The quantile of the signed numbers of both factors together."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    L, R = rng.standard_normal((9, 4)).astype("f4"), rng.standard_normal((4, 11)).astype("f4")
    t = torch.quantile(torch.cat([torch.from_numpy(L).flatten(), torch.from_numpy(R).flatten()]), q).item()
    a, b = lowrank.clamped(L, R, q)

    np.testing.assert_allclose(a, np.clip(L, -t, t), atol=1e-6)
    np.testing.assert_allclose(b, np.clip(R, -t, t), atol=1e-6)
