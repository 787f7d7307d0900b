"""adaptkit.json: what was made of what, by hashes, and how far each tensor moved."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from places import FIXTURES

import adaptkit
from adaptkit.store.arrays import load
from adaptkit.store.checkpoint import open_checkpoint
from adaptkit.verbs.verify import described

MODEL, ADAPTERS = FIXTURES / "models" / "llama", FIXTURES / "adapters" / "llama"


def receipt(folder: Path) -> dict:
    return json.loads((folder / "adaptkit.json").read_text())


def moved(folder: Path) -> dict[str, float]:
    """|W' - W| of every tensor that both models have in one shape and that changed."""
    old, new = open_checkpoint(MODEL).entries, open_checkpoint(folder).entries
    both = [n for n in old if n in new and old[n].shape == new[n].shape]
    found = {n: float(np.linalg.norm(load(new[n], "f8") - load(old[n], "f8"))) for n in both}
    return {n: v for n, v in found.items() if v}


@pytest.mark.parametrize("kind", ["lora", "rslora", "rank-alpha-patterns", "dora", "ia3", "trainable-tokens"])
def test_it_says_how_far_each_tensor_moved(tmp_path: Path, kind: str):
    """The norm of the update before rounding: of a merge in float32, which rounds nothing worth telling."""
    adaptkit.merge(MODEL, ADAPTERS / kind, tmp_path / "out", dtype="float32")

    assert receipt(tmp_path / "out")["norms"] == pytest.approx(moved(tmp_path / "out"), rel=1e-5)


def test_updates_of_two_adapters_add_up_before_the_norm(tmp_path: Path):
    """Half of one against half of the other leaves nothing; rounding to 16 bits does not enter."""
    adaptkit.merge(MODEL, [ADAPTERS / "lora"] * 2, tmp_path / "none", weights=[0.5, -0.5])
    adaptkit.merge(MODEL, [ADAPTERS / "lora", ADAPTERS / "rslora"], tmp_path / "out", dtype="float32", weights=[1, 2])

    assert max(receipt(tmp_path / "none")["norms"].values()) < 1e-6
    assert receipt(tmp_path / "out")["norms"] == pytest.approx(moved(tmp_path / "out"), rel=1e-5)


def test_it_knows_its_inputs_by_hash_and_no_path(tmp_path: Path):
    """Base and adapter, settings included; the versions that took part."""
    adaptkit.merge(MODEL, ADAPTERS / "lora", tmp_path / "out")

    said = receipt(tmp_path / "out")
    base, lora = ({f["name"]: f["sha256"] for f in given["files"]} for given in said["inputs"])
    files = {MODEL: base, ADAPTERS / "lora": lora}
    assert set(base) == {"model.safetensors", "config.json"}
    assert set(lora) == {"adapter_model.safetensors", "adapter_config.json"}
    for folder, sums in files.items():
        assert sums == {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in sums}
    assert said["versions"]["numpy"] == np.__version__
    assert str(FIXTURES) not in json.dumps(said)
    assert str(tmp_path) not in json.dumps(said)


def test_verify_says_which_input_is_another(tmp_path: Path):
    """By the hashes in adaptkit.json, whatever the comparison finds."""
    lora = shutil.copytree(ADAPTERS / "lora", tmp_path / "lora")
    adaptkit.merge(MODEL, lora, tmp_path / "out")
    (lora / "adapter_config.json").write_text((lora / "adapter_config.json").read_text() + "\n")

    same = adaptkit.verify(tmp_path / "out", base=MODEL, adapters=ADAPTERS / "lora")
    other = adaptkit.verify(tmp_path / "out", base=MODEL, adapters=lora)

    assert (same.ok, same.others) == (True, [])
    assert (other.ok, other.others) == (True, ["lora/adapter_config.json"])
    assert "lora/adapter_config.json: other bytes than adaptkit.json names" in described(other)


@pytest.mark.parametrize(
    "inputs", [None, 3, [], [1, 2], [{"files": 1}, {"files": [1]}], [{}, {"files": [{"sha256": 1}]}]]
)
def test_verify_bears_a_receipt_of_nonsense(tmp_path: Path, inputs: object):
    """adaptkit.json is a file like any other."""
    adaptkit.merge(MODEL, ADAPTERS / "lora", tmp_path / "out")
    (tmp_path / "out" / "adaptkit.json").write_text(json.dumps({"inputs": inputs}))

    assert adaptkit.verify(tmp_path / "out", base=MODEL, adapters=ADAPTERS / "lora", sample=1).others == []


TWO = [ADAPTERS / "lora", ADAPTERS / "rslora"]


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, merged in float32 with weights."""
    out = tmp_path_factory.mktemp("weighted") / "out"
    adaptkit.merge(MODEL, TWO, out, weights=[0.6, -0.3], dtype="float32")
    return out


def test_unmerge_takes_the_weights_of_the_merge(weighted: Path, tmp_path: Path):
    """With weights of 1 the result would be no model that anybody ever had."""
    with pytest.warns(adaptkit.AdaptKitWarning, match="taken out with weights 0.6,-0.3, as adaptkit.json says"):
        adaptkit.unmerge(weighted, TWO, tmp_path / "back")
    old, new = open_checkpoint(MODEL).entries, open_checkpoint(tmp_path / "back").entries

    for name in old:
        np.testing.assert_allclose(load(new[name], "f8"), load(old[name], "f8"), atol=1e-6)


@pytest.mark.parametrize(
    ("adapters", "words"), [(TWO[:1], "says weights 0.6,-0.3, of lora, rslora; 1 given"), (TWO[::-1], "other bytes")]
)
def test_weights_of_other_adapters_are_not_taken(adapters: list[Path], words: str, weighted: Path, tmp_path: Path):
    """One of the two, or both in another order: it has to be said which weight is whose."""
    with pytest.raises(adaptkit.AdaptKitError, match=f"adaptkit.json: .*{words}.*--weights"):
        adaptkit.unmerge(weighted, adapters, tmp_path / "back")
    assert not list(tmp_path.iterdir())
    assert adaptkit.unmerge(weighted, adapters, tmp_path / "back", weights=[1.0] * len(adapters)).changed


def test_verify_says_where_weights_come_from_that_nobody_gave(weighted: Path):
    """They are adaptkit.json's, of two adapters."""
    with pytest.raises(adaptkit.AdaptKitError, match="adaptkit.json: says weights 0.6,-0.3, of lora, rslora; 1 given"):
        adaptkit.verify(weighted, base=MODEL, adapters=TWO[:1])


def test_a_merge_with_a_weight_of_zero_is_verified(tmp_path: Path):
    """Zero is a weight like others."""
    adaptkit.merge(MODEL, TWO, tmp_path / "out", weights=[0, 1])
    with pytest.warns(adaptkit.AdaptKitWarning, match="compared with weights 0,1"):
        assert adaptkit.verify(tmp_path / "out", base=MODEL, adapters=TWO).ok


def test_of_another_model_no_more_tensors_differ_than_there_are():
    """Those that only one has count on both sides."""
    found = adaptkit.verify(FIXTURES / "models" / "gpt2", base=MODEL, adapters=TWO[0])

    assert len(found.wrong) <= found.tensors


def test_combine_resize_and_extract_say_what_they_were_made_of(tmp_path: Path):
    """Verb, options, inputs; the base's path is nobody's business."""
    lora = ADAPTERS / "lora"
    adaptkit.combine([lora, ADAPTERS / "rslora"], tmp_path / "both", weights=[0.7, 0.3])
    adaptkit.resize(lora, tmp_path / "small", rank=2)
    adaptkit.merge(MODEL, lora, tmp_path / "merged")
    adaptkit.extract(tmp_path / "merged", MODEL, tmp_path / "again", rank=4)

    both, small, again = (receipt(tmp_path / n) for n in ("both", "small", "again"))
    assert both["made"] == {
        "verb": "combine",
        "method": "svd",
        "weights": [0.7, 0.3],
        "density": 1.0,
        "majority": "total",
    }
    assert both["adapters"] == ["lora", "rslora"]
    assert small["made"] == {"verb": "resize", "rank": 2}
    assert [i["name"] for i in small["inputs"]] == ["lora"]
    assert again["made"] == {"verb": "extract", "rank": 4}
    assert (again["base"], again["finetuned"]) == ("llama", "merged")
    assert not [s for s in (both, small, again) if str(tmp_path) in json.dumps(s) or str(FIXTURES) in json.dumps(s)]
