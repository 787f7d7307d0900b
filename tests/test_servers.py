"""Adapters for inference servers: one rank, one alpha, the same product; what a server cannot hold is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from places import FIXTURES
from safetensors.torch import load_file

import adaptkit
from adaptkit.adapter import Adapter, Site
from adaptkit.formats.servers import SERVERS, prepared
from adaptkit.store.arrays import load
from adaptkit.tuners.experts import ExpertLoRA
from adaptkit.tuners.lora import LoRA

ADAPTERS = FIXTURES / "adapters" / "llama"
LLAMA = FIXTURES / "models" / "llama"
pytestmark = pytest.mark.filterwarnings("ignore::adaptkit.AdaptKitWarning")
HELD = ["lora", "rslora", "rank-alpha-patterns", "bf16", "bin", "layers"]
# adapter, the kind to drop
BARRED = [("dora", "dora"), ("modules-to-save", "whole"), ("trainable-tokens", "tokens")]


def updates(adapter: Adapter) -> dict[str, np.ndarray]:
    """s B A of each site, in float64."""
    found = {}
    for path, site in adapter.sites.items():
        A, B = (load(site.params[k]).astype("f8").reshape(load(site.params[k]).shape[0], -1) for k in "AB")
        found[path] = site.tuner.scale * B @ A
    return found


def served(folder: Path) -> dict[str, np.ndarray]:
    """s B A as a server computes it that reads r and lora_alpha alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not any(
        config.get(k) for k in ("use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "modules_to_save")
    )
    assert config.get("bias") == "none"
    tensors = {n: t.double() for n, t in load_file(folder / "adapter_model.safetensors").items()}
    assert all(n.endswith((".lora_A.weight", ".lora_B.weight")) for n in tensors)
    found = {}
    for name, A in tensors.items():
        if name.endswith(".lora_A.weight"):
            assert A.shape[0] == config["r"]
            path = name.removesuffix(".lora_A.weight")
            B = tensors[f"{path}.lora_B.weight"]
            found[path.removeprefix("base_model.model.")] = (config["lora_alpha"] / config["r"] * B @ A).numpy()
    return found


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("name", HELD)
def test_a_server_that_knows_one_alpha_computes_the_same(name: str, server: str, tmp_path: Path):
    """Patterns and rsLoRA are folded and ranks padded; the update stays within the rounding of the stored dtype."""
    adaptkit.convert(ADAPTERS / name, tmp_path / "out", "peft", for_=server, base=LLAMA)

    expected, got = updates(adaptkit.read(ADAPTERS / name)), served(tmp_path / "out")
    step = 2e-2 if name == "bf16" else 1e-6
    assert expected.keys() <= got.keys()
    for path, update in expected.items():
        np.testing.assert_allclose(got[path], update, atol=step * np.abs(update).max())
    assert all(not got[path].any() for path in got.keys() - expected.keys())


@pytest.mark.peft
@pytest.mark.slow
def test_real_peft_computes_the_same_after_folding(tmp_path: Path):
    """Patterns for vllm: PEFT's logits with the folded adapter are those with the original."""
    from models import inputs_of, loaded
    from peft import PeftModel

    source = ADAPTERS / "rank-alpha-patterns"
    adaptkit.convert(source, tmp_path / "out", "peft", for_="vllm")
    inputs = inputs_of(json.loads((source / "expect.json").read_text())["inputs"])

    with torch.no_grad():
        expected, got = (
            PeftModel.from_pretrained(loaded(LLAMA, "llama"), folder).eval()(**inputs).logits
            for folder in (source, tmp_path / "out")
        )

    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_fold_by_a_power_of_two_and_padding_are_exact():
    """Scales 2 and 4 with ranks 2 and 3: not a bit of the product changes."""
    rng = np.random.default_rng(0)
    sites = {}
    for i, (r, alpha) in enumerate([(2, 4.0), (3, 12.0), (3, 6.0)]):
        params = {"A": rng.standard_normal((r, 5)).astype("f4"), "B": rng.standard_normal((4, r)).astype("f4")}
        sites[f"m{i}.q_proj"] = Site(LoRA(r=r, alpha=alpha), params)
    source = Adapter(sites)

    made, notes = prepared(source, "vllm")

    assert {(s.tuner.r, s.tuner.alpha) for s in made.sites.values()} == {(3, 6.0)}
    assert all(np.array_equal(updates(made)[p], u) for p, u in updates(source).items())
    assert {n.what for n in notes} == {"folded", "padded", "kept"}
    assert any("--max-lora-rank 8" in n.text for n in notes)


@pytest.mark.parametrize("server", ["vllm", "sglang", "trtllm"])
@pytest.mark.parametrize(("name", "kind"), BARRED)
def test_what_a_server_cannot_hold_is_refused_or_dropped(name: str, kind: str, server: str, tmp_path: Path):
    """The sentence names the kind and --drop; dropped, it stands in the report and the rest is served."""
    with pytest.raises(adaptkit.AdaptKitError, match=rf"{server} cannot hold .*--drop {kind} leaves it out") as caught:
        adaptkit.convert(ADAPTERS / name, tmp_path / "no", "peft", for_=server, base=LLAMA)
    assert caught.value.code == 4

    done = adaptkit.convert(ADAPTERS / name, tmp_path / "out", "peft", for_=server, base=LLAMA, drop=[kind])

    assert any(n.what == "dropped" for n in done.notes)
    assert served(tmp_path / "out")
    assert not (tmp_path / "no").exists()


def test_several_kinds_are_dropped_by_commas(tmp_path: Path):
    """--drop a,b and --drop a --drop b are the same."""
    done = adaptkit.convert(ADAPTERS / "dora", tmp_path / "out", "peft", for_="vllm", drop=["dora,bias"])

    assert {n.what for n in done.notes} >= {"dropped"}


def test_ia3_and_virtual_tokens_are_no_lora(tmp_path: Path):
    """Nothing can be dropped there: the hint says to merge."""
    for name in ("ia3", "prompt"):
        with pytest.raises(adaptkit.AdaptKitError, match="vllm takes LoRA only.*merge it into the base model"):
            adaptkit.convert(ADAPTERS / name, tmp_path / "out", "peft", for_="vllm")


def test_ranks_beyond_the_largest_are_refused():
    """vLLM's largest rank is 512."""
    params = {"A": np.zeros((600, 8), "f4"), "B": np.zeros((8, 600), "f4")}

    with pytest.raises(adaptkit.AdaptKitError, match="rank 600, vllm takes at most 512; adaptkit resize it"):
        prepared(Adapter({"q_proj": Site(LoRA(r=600, alpha=600.0), params)}), "vllm")


def test_sglang_gets_q_and_v_together(tmp_path: Path):
    """A q_proj alone gets a v_proj of zeros in the base's shape; without --base the sentence asks for it."""
    params = {"A": np.ones((2, 64), "f4"), "B": np.ones((64, 2), "f4")}
    lone = Adapter({"model.layers.0.self_attn.q_proj": Site(LoRA(r=2, alpha=2.0), params)})

    with pytest.raises(adaptkit.AdaptKitError, match="q_proj and v_proj together.*give --base"):
        prepared(lone, "sglang")
    made, notes = prepared(lone, "sglang", base=LLAMA)

    v = made.sites["model.layers.0.self_attn.v_proj"]
    shape = load_file(LLAMA / "model.safetensors")["model.layers.0.self_attn.v_proj.weight"].shape
    assert v.params["B"].shape == (shape[0], 2)
    assert not v.params["B"].any()
    assert any(n.what == "padded" for n in notes)


def experts(turned: bool) -> Adapter:
    """Three experts, d = 6, f = 4, rank 2, packed as PEFT packs stacks."""
    rng = np.random.default_rng(1)
    sides = {"gate_up_proj": (6, 8), "down_proj": (4, 6)}
    sites = {}
    for leaf, (into, out) in sides.items():
        into, out = (out, into) if turned else (into, out)
        params = {"A": rng.standard_normal((6, into)).astype("f4"), "B": rng.standard_normal((out, 6)).astype("f4")}
        sites[f"mlp.experts.{leaf}"] = Site(ExpertLoRA(r=2, alpha=4.0), params)
    return Adapter(sites)


@pytest.mark.parametrize("turned", [False, True])
def test_fused_experts_are_split_for_vllm(turned: bool):
    """Each expert's gate, up and down get the rows of the stack's update that are theirs, whichever way it was packed."""
    source = experts(turned)

    made, _ = prepared(source, "vllm")

    got = updates(made)
    assert sorted(got) == sorted(f"mlp.experts.{e}.{n}_proj" for e in range(3) for n in ("gate", "up", "down"))
    for e in range(3):
        for leaf, parts in (("gate_up_proj", ["gate_proj", "up_proj"]), ("down_proj", ["down_proj"])):
            site = source.sites[f"mlp.experts.{leaf}"]
            one = site.tuner.one(site.params, e, 3)
            update = 2.0 * one["B"].astype("f8") @ one["A"]
            update = update.T if turned else update
            mine = np.concatenate([got[f"mlp.experts.{e}.{p}"] for p in parts])
            np.testing.assert_allclose(mine, update, rtol=1e-12)


def test_experts_whose_sides_cannot_be_told_are_refused():
    """One stack alone does not say which side is the input."""
    lone = experts(False)
    del lone.sites["mlp.experts.down_proj"]

    with pytest.raises(adaptkit.AdaptKitError, match="not tell which side is the input; --drop experts"):
        prepared(lone, "vllm")


def test_ollama_takes_few_families(tmp_path: Path):
    """With --base the family is checked, without it the report says what is taken."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "qwen2"}')

    with pytest.raises(adaptkit.AdaptKitError, match="takes adapters of llama, mistral, gemma, gemma2, not of qwen2"):
        adaptkit.convert(ADAPTERS / "lora", tmp_path / "out", "peft", for_="ollama", base=tmp_path / "base")
    _, notes = prepared(adaptkit.read(ADAPTERS / "lora"), "ollama")
    assert any("--base would tell" in n.text for n in notes)


def test_a_fold_that_overflows_is_refused():
    """Float16 factors times a large scale: refused rather than infinite."""
    big = {"A": np.ones((1, 4), "f2"), "B": np.full((4, 1), 3e4, "f2")}
    small = {"A": np.ones((1, 4), "f2"), "B": np.ones((4, 1), "f2")}
    sites = {"a": Site(LoRA(r=1, alpha=16.0), big)} | {k: Site(LoRA(r=1, alpha=1.0), small) for k in "bc"}

    with pytest.raises(adaptkit.AdaptKitError, match="B times 16 overflows float16; use --dtype float32"):
        prepared(Adapter(sites), "vllm")


def test_unknown_kinds_to_drop_are_told():
    """--drop with a word that is no kind lists the kinds."""
    with pytest.raises(adaptkit.AdaptKitError, match="heads is not one of dora, bias, whole"):
        prepared(adaptkit.read(ADAPTERS / "lora"), "vllm", ["heads"])
