"""Sites that PEFT wraps one in another, written: adapted parameters, and nn.MultiheadAttention's output projection."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from models import inputs_of, loaded
from places import FIXTURES

from adaptkit import Adapter, AdaptKitError, Site, combine, read, resize, write
from adaptkit.tuners.experts import ExpertLoRA
from adaptkit.tuners.lora import LoRA
from adaptkit.verbs import thin

EXPERTS = FIXTURES / "adapters" / "mixtral" / "target-parameters"
ATTENTION = FIXTURES / "adapters" / "custom" / "mha"


def updates(adapter: Adapter) -> dict[str, np.ndarray]:
    """Each site's update, per expert."""
    found = {}
    for path, site in adapter.sites.items():
        L, R = thin.factors(site)
        found[path] = site.tuner.scale * (L @ R)
    return found


def same_updates(a: Adapter, b: Adapter, share: float = 3e-6) -> None:
    left, right = updates(a), updates(b)
    assert left.keys() == right.keys()
    for path, D in right.items():
        assert np.linalg.norm(left[path] - D) <= share * np.linalg.norm(D), path


def outputs(folder: Path, family: str, inputs: str, times: float = 1.0) -> np.ndarray:
    """What the model computes in real PEFT with an adapter; times: its scale."""
    import torch
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Found missing adapter keys")
        model = PeftModel.from_pretrained(loaded(FIXTURES / "models" / family, family), str(folder)).eval()
    with torch.no_grad():
        found = model(**inputs_of(inputs))
    return (found if family == "custom" else found.logits).numpy()


CASES = {"experts": (EXPERTS, "mixtral", "mixtral"), "attention": (ATTENTION, "custom", "custom/inputs.npz")}


@pytest.mark.peft
@pytest.mark.parametrize("case", CASES)
def test_written_combined_and_resized_it_acts_in_peft_as_before(case: str, tmp_path: Path):
    """Real PEFT computes the same with its own file and with ours of the same update, and we read the same from both."""
    folder, family, inputs = CASES[case]
    write(read(folder), tmp_path / "written")
    combine([folder, folder], tmp_path / "combined", weights=[0.25, 0.75])
    combine([folder, folder], tmp_path / "cat", method="cat", weights=[0.25, 0.75])
    resize(folder, tmp_path / "resized", rank=64)
    expected = outputs(folder, family, inputs)

    for name in ("written", "combined", "cat", "resized"):
        same_updates(read(tmp_path / name), read(folder))
        np.testing.assert_allclose(outputs(tmp_path / name, family, inputs), expected, atol=2e-5)


def attention(r: int, other: int, alpha: float, its: float, rslora: bool = False) -> Adapter:
    rng = np.random.default_rng(0)

    def site(r: int, alpha: float, out: int) -> Site:
        params = {"A": rng.standard_normal((r, 12)).astype("f4"), "B": rng.standard_normal((out, r)).astype("f4")}
        return Site(LoRA(r=r, alpha=alpha, rslora=rslora), params)

    return Adapter({"attention": site(r, alpha, 36), "attention.out_proj": site(other, its, 12)})


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("numbers", [(2, 3, 5.0, 7.0), (3, 2, 1.0, 0.0), (2, 2, 0.0, 3.0), (2, 1, 0.0, 0.0)])
def test_an_attention_of_two_ranks_and_scales_is_written_as_one(numbers: tuple, rslora: bool, tmp_path: Path):
    """PEFT gives both projections the same rank and alpha; beside them another site keeps its own."""
    adapter = attention(*numbers, rslora=rslora)
    adapter.sites["linear"] = Site(
        LoRA(r=1, alpha=1.0, rslora=rslora), {"A": np.ones((1, 12), "f4"), "B": np.ones((10, 1), "f4")}
    )
    write(adapter, tmp_path / "a")
    same_updates(read(tmp_path / "a"), adapter)
    if not rslora:
        assert np.isfinite(outputs(tmp_path / "a", "custom", "custom/inputs.npz")).all()


@pytest.mark.parametrize("leaves", [["gate_up_proj", "odd"], ["down_proj", "odd"]])
def test_parameters_in_an_unknown_order_are_refused(leaves: list[str], tmp_path: Path):
    """The file does not name them: a guess could give one the factors of the other."""
    params = {"A": np.ones((4, 6), "f4"), "B": np.ones((5, 4), "f4")}
    adapter = Adapter({f"mlp.experts.{n}": Site(ExpertLoRA(r=2, alpha=2.0), params) for n in leaves})

    with pytest.raises(AdaptKitError, match="order in which PEFT wraps odd"):
        write(adapter, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    write(Adapter({"mlp.experts.odd": adapter.sites["mlp.experts.odd"]}), tmp_path / "one")
    same_updates(read(tmp_path / "one"), Adapter({"mlp.experts.odd": adapter.sites["mlp.experts.odd"]}))


def test_experts_of_other_ranks_keep_them(tmp_path: Path):
    """By rank_pattern, under the parameter's name."""
    combine([EXPERTS, FIXTURES / "adapters/mixtral/target-parameters"], tmp_path / "cat", method="cat")
    adapter = read(tmp_path / "cat")
    resize(tmp_path / "cat", tmp_path / "small", energy=0.7)

    ranks = {s.tuner.r for s in read(tmp_path / "small").sites.values()}
    assert len(ranks) > 1 and max(ranks) < max(s.tuner.r for s in adapter.sites.values())


def test_what_peft_refuses_beside_experts_is_refused(tmp_path: Path):
    """A file that PEFT cannot load is not written."""
    adapter = read(EXPERTS)
    path = next(p for p in adapter.sites if "q_proj" in p)
    adapter.sites[path] = Site(LoRA(r=4, alpha=8.0, transposed=True), adapter.sites[path].params)

    with pytest.raises(AdaptKitError, match="fan_in_fan_out beside"):
        write(adapter, tmp_path / "a")
