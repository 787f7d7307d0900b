"""resize: against the dense decomposition in float64."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import FIXTURES
from test_combine import PATH, close, delta, lora

from adaptkit import Adapter, AdaptKitError, Site, read, resize, write
from adaptkit.cli.app import run
from adaptkit.tuners.experts import ExpertLoRA
from adaptkit.verbs.resize import resized

LLAMA = FIXTURES / "adapters" / "llama"


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_error_is_the_smallest_there_is(rank: int):
    """And it is what the report says."""
    adapter = lora(0, r=8, rslora=True)
    made, report = resized(adapter, rank=rank)
    D = delta(adapter.sites[PATH])
    s = np.linalg.svd(D, compute_uv=False)
    error = np.linalg.norm(D - delta(made.sites[PATH])) / np.linalg.norm(D)

    assert made.sites[PATH].tuner.r == rank and made.sites[PATH].tuner.scale == 1
    assert abs(error - np.linalg.norm(s[rank:]) / np.linalg.norm(s)) < 1e-6
    assert abs(report.sites[0].error - error) < 1e-6 and abs(report.error - error) < 1e-6
    np.testing.assert_allclose(report.sites[0].values, s[:8], rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["lora", "rslora", "rank-alpha-patterns", "modules-to-save", "trainable-tokens", "bdlora"]
)
def test_full_rank_changes_nothing(name: str, tmp_path: Path):
    """Files of real PEFT: same updates, same replaced tensors."""
    before = read(LLAMA / name)
    after = resized(before, rank=512)[0]

    assert after.whole.keys() == before.whole.keys() and after.sites.keys() == before.sites.keys()
    for path, site in before.sites.items():
        if site.tuner.name != "tokens":
            close(delta(after.sites[path]), delta(site), 1e-5)


def test_energy_chooses_the_smallest_rank_of_each_site(tmp_path: Path):
    """8 equal values need 4 for half the energy, not 5 or 6; the file says so in its rank_pattern."""
    flat = Adapter({p: Site(lora(0, r=8).sites[PATH].tuner, {}) for p in (PATH, "net.1")})
    flat.sites[PATH].params = {"A": np.eye(8, 32, dtype="f4"), "B": np.eye(24, 8, dtype="f4")}
    flat.sites["net.1"].params = {
        "A": np.eye(8, 24, dtype="f4"),
        "B": np.eye(16, 8, dtype="f4") * np.float32(0.1) ** np.arange(8),
    }
    write(flat, tmp_path / "a")
    found = resize(tmp_path / "a", tmp_path / "o", energy=0.5)
    bounded = resize(tmp_path / "a", tmp_path / "p", energy=1.0, max_rank=3)

    assert {r.name: (r.new, round(r.energy, 6)) for r in found.sites} == {PATH: (4, 0.5), "net.1": (1, 0.99)}
    assert [r.new for r in bounded.sites] == [3, 3]
    assert json.loads((tmp_path / "o" / "adapter_config.json").read_text())["rank_pattern"]
    assert {p: s.tuner.r for p, s in read(tmp_path / "o").sites.items()} == {PATH: 4, "net.1": 1}


def test_experts_share_a_rank_that_serves_all():
    """Their factors are packed side by side, so a site has one rank."""
    rng = np.random.default_rng(0)
    params = {"A": rng.standard_normal((12, 10)).astype("f4"), "B": rng.standard_normal((8, 12)).astype("f4")}
    made, report = resized(Adapter({"m": Site(ExpertLoRA(r=4, alpha=4), params)}), energy=0.8)
    W = np.zeros((3, 8, 10))
    before = ExpertLoRA(r=4, alpha=4).weight(W.copy(), params)
    after = made.sites["m"].tuner.weight(W.copy(), made.sites["m"].params)

    assert abs(np.linalg.norm(before - after) / np.linalg.norm(before) - report.sites[0].error) < 1e-5
    assert report.sites[0].energy >= 0.8


def test_zero_updates_get_rank_one():
    """A rank of 0 is none."""
    adapter = lora(0)
    adapter.sites[PATH].params["B"][:] = 0
    made, report = resized(adapter, energy=0.95)

    assert report.sites[0].new == 1 and report.error == 0 and not delta(made.sites[PATH]).any()


BAD = {
    "neither": ({}, "either"), "both": ({"rank": 2, "energy": 0.5}, "either"), "rank 0": ({"rank": 0}, "not a rank"),
    "energy 2": ({"energy": 2}, "not a share"), "a bound for a rank": ({"rank": 2, "max_rank": 1}, "bounds"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_options_that_make_no_sense_are_refused(case: str):
    """With a sentence."""
    with pytest.raises(AdaptKitError, match=BAD[case][1]):
        resized(lora(0), **BAD[case][0])


@pytest.mark.parametrize("name", ["dora", "pissa", "ia3", "prompt"])
def test_what_has_no_thin_update_is_refused(name: str):
    """With the reason."""
    with pytest.raises(AdaptKitError, match="base|has one"):
        resized(read(LLAMA / name), rank=2)


def test_a_picture_without_matplotlib_is_one_line(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """That names the extra, before any work."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["resize", str(LLAMA / "lora"), "-o", str(tmp_path / "o"), "--rank", "2", "--plot", str(tmp_path / "p.png")]

    assert run(words) == 4 and not (tmp_path / "o").exists()
    assert "pip install adaptkit[plot]" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["folder.png", "p.txt", "no/where.png"])
def test_a_picture_that_has_no_place_is_refused_before_the_work(name: str, tmp_path: Path, capsys):
    """A folder of that name, too."""
    (tmp_path / "folder.png").mkdir()
    words = ["resize", str(LLAMA / "lora"), "-o", str(tmp_path / "o"), "--rank", "2", "--plot", str(tmp_path / name)]

    assert run(words) == 2 and not (tmp_path / "o").exists()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_the_command_prints_a_table_and_draws(tmp_path: Path, capsys):
    """One row per site; the picture is a PNG."""
    pytest.importorskip("matplotlib")
    file = tmp_path / "p.png"

    assert run(["resize", str(LLAMA / "lora"), "-o", str(tmp_path / "o"), "--energy", "0.9", "--plot", str(file)]) == 0
    assert capsys.readouterr().out.count("_proj") == len(read(LLAMA / "lora").sites)
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(tmp_path.glob(".*"))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 100), st.integers(0, 99))
def test_the_full_rank_is_the_update_itself(r: int, out: int, into: int, alpha: float, seed: int):
    """Of any shape, also where the rank is above both sides."""
    adapter = lora(seed, r=r, out=out, into=into, alpha=alpha)
    made, report = resized(adapter, rank=r)

    assert made.sites[PATH].tuner.r == min(r, out, into) and report.energy == 1
    close(delta(made.sites[PATH]), delta(adapter.sites[PATH]))


@pytest.mark.parametrize("name", ["ia3", "prompt", "ptuning", "prefix"])
def test_what_has_no_rank_is_said_to_have_none(name: str):
    """And not sent to be merged and extracted."""
    with pytest.raises(AdaptKitError, match=r"no rank; only LoRA has one"):
        resized(read(LLAMA / name), rank=2)
