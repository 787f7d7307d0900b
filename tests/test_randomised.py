"""The randomised truncation against the whole decomposition in float64: Eckart and Young say what is best."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptkit.algebra.randomised import SMALL, STEPS, exact, frobenius, holding, residual, truncated

SHAPES = [(8, 8), (1, 40), (40, 1), (97, 300), (300, 97), (256, 704), (512, 512)]
LARGE = [pytest.param((1024, 2816), marks=pytest.mark.slow), pytest.param((2816, 1024), marks=pytest.mark.slow)]
SPECTRA = ["gauss", "flat", "slow", "fast", "low rank", "lora and noise"]


def made(shape: tuple[int, int], kind: str) -> np.ndarray:
    """A matrix with a spectrum of some kind, float32."""
    rng = np.random.default_rng(shape)
    m, n, k = *shape, min(shape)
    if kind == "gauss":
        return rng.standard_normal(shape, dtype="f4")
    if kind in ("low rank", "lora and noise"):
        thin = rng.standard_normal((m, 5)) @ rng.standard_normal((5, n))
        return (thin + (0.02 * rng.standard_normal(shape) if kind != "low rank" else 0)).astype("f4")
    power = {"flat": 0, "slow": 0.3, "fast": 1.5}[kind]
    U, V = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (m, n))
    return ((U * np.arange(1, k + 1) ** -power) @ V.T).astype("f4")


def best(D: np.ndarray, rank: int) -> float:
    """The smallest error of that rank."""
    s = np.linalg.svd(D.astype("f8"), compute_uv=False)
    return float(np.sqrt((s[rank:] ** 2).sum()))


def error(D: np.ndarray, found) -> float:
    return float(np.linalg.norm(D.astype("f8") - found.L.astype("f8") @ found.R.astype("f8")))


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_the_error_is_within_a_hundredth_of_the_best(shape: tuple[int, int], kind: str):
    """Also for flat spectra, the worst case, and what is said of the error is the error."""
    D = made(shape, kind)
    norm = float(np.linalg.norm(D.astype("f8")))
    found = truncated(D, 12)
    here, least = error(D, found), best(D, 12)

    assert here <= 1.01 * least + 1e-6 * norm
    assert abs(found.error - here) <= 1e-3 * here + 1e-6 * norm
    assert found.rank == min(12, *shape)
    if least > 1e-3 * norm:
        assert here / least - 1 <= 1.5 * found.excess + 1e-4


@pytest.mark.slow
def test_a_layer_of_a_7b_model_is_within_a_thousandth():
    """4096 x 11008: a thin update with noise, whose best error is known from how it was made."""
    rng = np.random.default_rng(0)
    thin = rng.standard_normal((4096, 16), dtype="f4") @ rng.standard_normal((16, 11008), dtype="f4")
    noise = 0.05 * rng.standard_normal((4096, 11008), dtype="f4")
    found = truncated(thin + noise, 16)

    # the best of rank 16 cannot be better than the noise less its 16 largest directions
    top = 0.05 * (np.sqrt(4096) + np.sqrt(11008))
    least = np.sqrt(frobenius(noise) ** 2 - 16 * top**2)
    assert least <= found.error <= 1.001 * frobenius(noise)
    assert error(thin + noise, found) == pytest.approx(found.error, rel=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e15, 1e30])
def test_tiny_and_huge_matrices_are_as_good_as_others(size: float):
    """Squares that float32 cannot hold do no harm."""
    D = made((150, 200), "lora and noise")
    found = truncated((D * np.float32(size)).astype("f4"), 5)

    assert found.error / size == pytest.approx(best(D, 5), rel=1e-3)
    scaled = (found.L.astype("f8") @ found.R.astype("f8")) / size
    assert np.linalg.norm(D - scaled) <= 1.01 * best(D, 5)


def test_zero_is_approximated_by_zero():
    """No NaN comes out of nothing, at any size."""
    for shape in ((8, 8), (200, 300)):
        found = truncated(np.zeros(shape, "f4"), 4)
        assert (found.L @ found.R == 0).all()
        assert (found.norm, found.error, found.energy) == (0, 0, 1)


def test_infinity_is_refused():
    """A matrix that is no matrix has no approximation."""
    D = made((120, 130), "gauss")
    D[3, 4] = np.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        truncated(D, 4)


def test_full_rank_is_the_matrix():
    """Nothing is lost but float32 rounding."""
    D = made((60, 90), "gauss")
    found = truncated(D, 1000)

    assert found.rank == 60
    assert error(D, found) <= 1e-6 * found.norm


def test_a_rank_above_that_of_the_matrix_loses_nothing():
    """Values that are rounding are kept as such."""
    D = made((400, 300), "low rank")
    found = truncated(D, 20)

    assert error(D, found) <= 2e-6 * found.norm
    assert np.isfinite(found.L).all() and np.isfinite(found.R).all()


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["fast", "slow", "lora and noise"])
def test_the_rank_for_an_energy_is_the_smallest(kind: str, energy: float):
    """One value less would hold less than was asked for."""
    D = made((150, 260), kind)
    s = np.linalg.svd(D.astype("f8"), compute_uv=False) ** 2
    wanted = int(np.searchsorted(np.cumsum(s) / s.sum(), min(energy, 1 - 1e-9))) + 1
    found = holding(D, energy)

    assert abs(found.rank - wanted) <= (3 if energy == 1 else 0)
    assert found.energy >= energy - 1e-6
    assert error(D, found) <= 1.01 * best(D, found.rank) + 1e-6 * found.norm


def test_an_energy_stops_at_the_largest_rank():
    """And then says how much it keeps."""
    found = holding(made((300, 260), "flat"), 0.9, most=26)

    assert found.rank == 26
    assert found.energy == pytest.approx(0.1, abs=1e-3)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_nearly():
    """The random start is all that is random."""
    D = made((300, 256), "slow")
    a, b, c = truncated(D, 8, 1), truncated(D, 8, 1), truncated(D, 8, 2)

    assert (a.L == b.L).all() and (a.R == b.R).all()
    assert a.error == pytest.approx(c.error, rel=1e-3)
    assert (a.L != c.L).any()


@pytest.mark.parametrize("kind", SPECTRA)
def test_torch_gives_what_numpy_gives(kind: str):
    """The same lines run on tensors, as they do on a GPU."""
    D = made((256, 400), kind)
    ours, theirs = truncated(D, 8), truncated(torch.from_numpy(D), 8)

    assert theirs.error == pytest.approx(ours.error, rel=1e-3, abs=1e-5 * ours.norm)
    product = (theirs.L @ theirs.R).numpy()
    assert np.linalg.norm(D - product) <= 1.01 * best(D, 8) + 1e-5 * ours.norm


def test_the_residual_is_made_out_by_parts():
    """As the whole difference at once."""
    D = made((120, 64), "gauss")
    found = exact(D, 3, frobenius(D))

    assert residual(D, found.L, found.R, rows=7) == pytest.approx(error(D, found), rel=1e-5)
    assert frobenius(D) == pytest.approx(np.linalg.norm(D.astype("f8")), rel=1e-6)
    assert min(D.shape) <= SMALL and STEPS > 2
