"""One graph and adapters beside it, against real PEFT: none, each, and back, in one session."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
import torch
from graphs import Decoder, batch, generated, onnxruntime, positions
from peft import IA3Config, LoraConfig, get_peft_model
from places import ROOT
from torch import nn

import adaptkit
from adaptkit.errors import Mismatch, Usage

# each model is exported once: in one process
pytestmark = [
    pytest.mark.xdist_group("swappable"),
    pytest.mark.slow,
    pytest.mark.peft,
    pytest.mark.filterwarnings("ignore"),
]
NEAR = 2e-5
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "v_proj"]
LORAS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "a": {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
        "b": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ALL},
        "c": {"r": 6, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 40}, "target_modules": ALL},
    },
    "gpt2": {
        "a": {"r": 8, "lora_alpha": 16, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        "b": {"r": 2, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    },
    "qwen3-moe": {
        "a": {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
        "b": {"r": 3, "use_rslora": True, "target_modules": ["k_proj", "o_proj"]},
    },
}
IA3S = {"llama": {"i": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}}}


def trained(family: str, config: Any, folder: Path, seed: int) -> nn.Module:
    """A PEFT model whose adapter acts, and the adapter's folder."""
    model = get_peft_model(graphs.decoder(family), config)
    stir = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.2, generator=stir)
            elif "ia3_" in name:
                p.uniform_(0.5, 2, generator=stir)
    model.save_pretrained(folder)
    return model.eval()


class Case:
    """A family's base, PEFT's models by adapter name (None is the base), and the exported folder."""

    def __init__(self, family: str, folder: Path):
        self.out = folder / "onnx"
        self.peft: dict[str | None, nn.Module] = {None: graphs.decoder(family)}
        self.peft[None].save_pretrained(folder / "base")
        configs = {n: LoraConfig(**c) for n, c in LORAS[family].items()}
        configs |= {n: IA3Config(**c) for n, c in IA3S.get(family, {}).items()}
        for seed, (name, config) in enumerate(configs.items()):
            self.peft[name] = trained(family, config, folder / name, seed)
        self.given = graphs.decoder(family) if family == "gpt2" else folder / "base"  # a live one, or a folder
        self.made = adaptkit.export_onnx(
            self.given, [folder / n for n in configs], self.out, swappable=True, no_verify=family == "qwen3-moe"
        )

    def file(self, name: str | None) -> Path | None:
        return self.out / f"{name}.onnx_adapter" if name else None


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Case("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return Case("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3-moe"])
def case(request, tmp_path_factory):
    if request.param == "qwen3-moe":
        return Case(request.param, tmp_path_factory.mktemp(request.param))
    return request.getfixturevalue(request.param)


def test_each_adapter_and_none_give_what_peft_gives_in_one_session(case):
    """Ranks, scales, targets and kinds differ; the first is put in again at the end, and none as well."""
    graph = Decoder(case.out)
    names = [n for n in case.peft if n]
    for name in [None, *names, names[0], None]:
        graph.use(case.file(name))
        for ids, mask in (batch(1), batch(3)):
            with torch.no_grad():
                theirs = case.peft[name](input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits

            apart = (graph.logits(ids, mask) - theirs)[mask > 0].abs().max()

            assert apart <= NEAR, name
            assert torch.equal(graph.greedy(ids, mask), generated(case.peft[name], ids, mask)), name


def test_adapters_differ_enough_for_the_test_above_to_mean_something(llama):
    """Each says something else than the base."""
    ids, mask = batch(1)
    graph = Decoder(llama.out)
    base = graph.logits(ids, mask)

    for name in ("a", "b", "c", "i"):
        assert (graph.use(llama.file(name)).logits(ids, mask) - base).abs().max() > 0.05


def test_inputs_of_slots_are_named_after_modules_and_may_be_left_out(llama):
    """The names of Olive and GenAI, transposed against PEFT, the rank first or last and free."""
    session = Decoder(llama.out).session
    required = {i.name for i in session.get_inputs()}
    slots = {i.name: i.shape for i in session.get_overridable_initializers()}

    assert not required & set(slots)
    site = "model.layers.1.self_attn.q_proj"
    assert slots[f"{site}.lora_A.weight"] == [32, f"{site}.rank"]
    assert slots[f"{site}.lora_B.weight"] == [f"{site}.rank", 32]
    assert slots["model.layers.0.mlp.down_proj.ia3_in"] == [48]
    assert len(slots) == 2 * (2 * 7) + 2 * 3


def test_every_adapter_was_verified_and_the_receipt_says_so(llama):
    """The base and each adapter beside torch, with 20 greedy tokens of a text alone and of three padded ones."""
    said = json.loads((llama.out / "adaptkit.json").read_text())

    assert set(said["swappable"]) == {"a", "b", "c", "i"}
    for found in [said["verified"], *(s["verified"] for s in said["swappable"].values())]:
        assert found["greedy"] == found["of"] == 80
        assert max(found["prefill"], found["decode"]) <= min(found["bound"], NEAR)
    assert said["swappable"]["a"]["ranks"] == [8]
    assert said["swappable"]["c"]["ranks"] == [3, 6]


@pytest.mark.parametrize(("kind", "least"), [("int8", 0.99), ("int4", 0.85)])
def test_adapters_still_swap_after_quantising(llama, tmp_path, kind, least):
    """Products with what an adapter brings keep their floats; how near depends on the base's numbers."""
    from adaptkit.export.quantize import quantised

    for name in ("model.onnx", "model.onnx_data"):
        shutil.copy(llama.out / name, tmp_path)
    quantised(tmp_path / "model.onnx", kind)
    graph, ids, mask = Decoder(tmp_path), *batch(1)

    for name in (None, "a", "b", "c", "i", "a"):
        with torch.no_grad():
            theirs = llama.peft[name](input_ids=ids).logits
        mine = graph.use(llama.file(name)).logits(ids, mask)
        assert torch.cosine_similarity(mine, theirs, dim=-1).min() > least, name


def test_an_adapter_converted_for_the_graph_is_the_one_that_was_exported(llama, tmp_path):
    """`adaptkit convert --to onnx_adapter --base onnx/` fits a graph of ours."""
    from plugin_door import door, opened

    with opened(door(tmp_path / "site", [ROOT / "plugins" / "adaptkit-onnx-adapter"])):
        adaptkit.convert(llama.out.parent / "c", tmp_path / "c.onnx_adapter", "onnx_adapter", base=llama.out)
    reader = onnxruntime.AdapterFormat.read_adapter
    mine, other = reader(str(llama.file("c"))), reader(str(tmp_path / "c.onnx_adapter"))
    ours, theirs = mine.get_parameters(), other.get_parameters()

    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[n].numpy(), theirs[n].numpy()) for n in ours)


def test_two_adapters_at_once_are_one_that_was_put_together(llama, tmp_path):
    """ONNX Runtime takes the first of two per tensor; concatenated, they are PEFT's sum."""
    folder = llama.out.parent
    adaptkit.combine([folder / "a", folder / "b"], tmp_path / "both", method="cat")
    model = graphs.decoder("llama")
    adaptkit.export_onnx(folder / "base", [tmp_path / "both"], tmp_path / "never", swappable=True, dry_run=True)
    from adaptkit.export import files, slots

    files.write(tmp_path / "both.onnx_adapter", slots.filled(model, adaptkit.read(tmp_path / "both")))
    both = get_peft_model(model, LoraConfig(**LORAS["llama"]["a"]), adapter_name="a")
    both.load_adapter(str(folder / "a"), "a")
    both.load_adapter(str(folder / "b"), "b")
    both.base_model.set_adapter(["a", "b"])
    ids, mask = batch(1)
    with torch.no_grad():
        theirs = both.eval()(input_ids=ids).logits

    mine = Decoder(llama.out).use(tmp_path / "both.onnx_adapter").logits(ids, mask)

    assert (mine - theirs).abs().max() <= NEAR


def test_onnxruntime_genai_continues_texts_as_peft_does(llama, tmp_path):
    """With its own loop, cache and way to switch adapters."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(llama.out))
    adapters = genai.Adapters(model)
    for name in ("a", "b", "c"):
        adapters.load(str(llama.file(name)), name)
    ids, mask = batch(1)

    for name in (None, "a", "b", "c", "a"):
        how = genai.GeneratorParams(model)
        how.set_search_options(do_sample=False, max_length=27, min_length=27)
        generator = genai.Generator(model, how)
        if name:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(ids.numpy().astype("i4"))
        while not generator.is_done():
            generator.generate_next_token()
        mine = torch.tensor(np.array(generator.get_sequence(0)))[7:]
        assert torch.equal(mine.long(), generated(llama.peft[name], ids, mask)[0][: len(mine)]), name


REFUSED = {
    "dora": (LoraConfig(r=4, use_dora=True, target_modules=ATTENTION), "dora"),
    "saved": (LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=["lm_head"]), "modules_to_save"),
    "bias": (LoraConfig(r=4, target_modules=ATTENTION, lora_bias=True), "bias"),
    "embedding": (LoraConfig(r=4, target_modules=["embed_tokens"]), "embedding"),
    "experts": (LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.down_proj"]), "down_proj"),
}


def test_a_live_model_is_afterwards_what_it_was(gpt2):
    """No hook, no adapter and no changed number is left on it."""
    there, before = gpt2.given.state_dict(), gpt2.peft[None].state_dict()

    assert list(there) == list(before)
    assert all(torch.equal(there[n], before[n]) for n in there)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in gpt2.given.modules())


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_slot_holds_is_refused_and_merging_is_offered(kind, tmp_path):
    """In a sentence, and nothing is left behind."""
    config, word = REFUSED[kind]
    family = "qwen3-moe" if kind == "experts" else "llama"
    graphs.decoder(family).save_pretrained(tmp_path / "base")
    trained(family, config, tmp_path / kind, 0)

    with pytest.raises(Mismatch, match=word) as caught:
        adaptkit.export_onnx(tmp_path / "base", tmp_path / kind, tmp_path / "out", swappable=True)

    assert "without --swappable" in str(caught.value)
    assert kind in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", kind]


def test_swappable_needs_adapters_and_takes_them_whole(tmp_path, llama):
    """Words that make no sense together are refused before anything is loaded."""
    base, a = llama.out.parent / "base", llama.out.parent / "a"

    with pytest.raises(Usage, match="--swappable"):
        adaptkit.export_onnx(base, [], tmp_path / "out", swappable=True)
    with pytest.raises(Usage, match="--weights"):
        adaptkit.export_onnx(base, a, tmp_path / "out", swappable=True, weights=[0.5])


def test_two_folders_of_one_name_become_two_files():
    """Trainers call every run's folder the same."""
    from adaptkit.export.kept import kept

    first, second, third = (adaptkit.Adapter(meta={"path": f"/runs/{n}/final"}) for n in (1, 2, 3))

    assert list(kept([first, second, third]).adapters) == ["final", "final_2", "final_3"]
