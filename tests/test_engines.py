"""What the engine must not do to tensors it was not asked about, and what it must say about those it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from places import FIXTURES
from safetensors.torch import load_file, save_file

import adaptkit

LLAMA, LORA = FIXTURES / "models/llama", FIXTURES / "adapters/llama/lora"


def base_with(folder: Path, files: dict[str, dict[str, torch.Tensor]], index: str | None = None) -> Path:
    """A model folder of named files, with the config of the small language model."""
    folder.mkdir()
    for name, tensors in files.items():
        torch.save(tensors, folder / name) if name.endswith(".bin") else save_file(tensors, folder / name)
    if index:
        table = {"metadata": {}, "weight_map": {n: f for f, tensors in files.items() for n in tensors}}
        (folder / index).write_text(json.dumps(table))
    shutil.copy(LLAMA / "config.json", folder)
    return folder


def adapter_with(folder: Path, tensors: dict[str, torch.Tensor], **settings) -> Path:
    """A PEFT folder."""
    folder.mkdir()
    save_file({f"base_model.model.{n}": t for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2} | settings))
    return folder


def lora(module: str, out: int, into: int, size: float) -> dict[str, torch.Tensor]:
    """Factors of rank 2."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator)
    return {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": size * B}


HALVES = [("model.layers.0", "model.layers.1", "model.embed", "model.norm"), ("model.layers.2", "model.layers.3")]


@pytest.mark.parametrize(
    ("names", "index"),
    [
        (
            ["model.safetensors-00001-of-00002.safetensors", "model.safetensors-00002-of-00002.safetensors"],
            "model.safetensors",
        ),
        (["layer-00.safetensors", "layer-01.safetensors"], "model.safetensors"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], "pytorch_model.bin"),
    ],
)
@pytest.mark.parametrize("limit", [None, "500KB"])
def test_transformers_finds_the_index_whatever_the_shards_are_called(names, index, limit, tmp_path: Path):
    """The output loads, and holds what a merge of the single file holds."""
    from transformers import AutoModelForCausalLM

    whole = load_file(LLAMA / "model.safetensors")
    files = {f: {n: t for n, t in whole.items() if n.startswith(half)} for f, half in zip(names, HALVES, strict=True)}
    base = base_with(tmp_path / "base", files, f"{index}.index.json")

    adaptkit.merge(base, LORA, tmp_path / "out", max_shard_size=limit)
    adaptkit.merge(LLAMA, LORA, tmp_path / "same")

    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(got[n], t) for n, t in load_file(tmp_path / "same/model.safetensors").items())


def test_a_single_numbered_pytorch_file_becomes_model_safetensors(tmp_path: Path):
    """pytorch_model-00001-of-00001.bin with an index is one file, and is called so."""
    name = "pytorch_model-00001-of-00001.bin"
    base = base_with(tmp_path / "base", {name: load_file(LLAMA / "model.safetensors")}, "pytorch_model.bin.index.json")

    adaptkit.merge(base, LORA, tmp_path / "out")

    assert sorted(p.name for p in (tmp_path / "out").glob("model*")) == ["model.safetensors"]


def test_strided_tensors_that_do_not_change_keep_every_bit(tmp_path: Path):
    """Integers and complex numbers of a view that is not contiguous pass through no other type."""
    odd = {
        "ids": torch.tensor([[2**24 + 1, 5], [2**40 + 1, 7]]).T,
        "phase": torch.tensor([[1 + 2j, 3 - 4j], [5j, 6]], dtype=torch.complex64).T,
        "nan": torch.tensor([[float("nan"), 1.0], [-0.0, 2.0]]).T,
    }
    base = base_with(tmp_path / "base", {"pytorch_model.bin": {**load_file(LLAMA / "model.safetensors"), **odd}})

    adaptkit.merge(base, LORA, tmp_path / "out")

    got = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(got["ids"], odd["ids"])
    assert torch.equal(got["phase"], odd["phase"])
    assert got["nan"].numpy().tobytes() == odd["nan"].contiguous().numpy().tobytes()


@pytest.mark.parametrize("start", [True, "pissa"])
def test_overflow_is_refused_on_every_road(start, tmp_path: Path):
    """By rows or at once: numbers too large for float16 refuse the merge, and leave nothing."""
    base = base_with(tmp_path / "base", {"model.safetensors": {"m.q_proj.weight": torch.ones(8, 8).half()}})
    factors = lora("m.q_proj", 8, 8, 1e6)
    adapter = adapter_with(tmp_path / "adapter", factors, target_modules=["q_proj"], init_lora_weights=start)

    with pytest.raises(adaptkit.AdaptKitError, match="merged values overflow F16") as caught:
        adaptkit.merge(base, adapter, tmp_path / "out")

    assert caught.value.code == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_what_rounding_ate_is_told_for_each_adapter(tmp_path: Path):
    """A small update beside a large one on another tensor is reported as if it were alone."""
    weights = {
        f"m.{n}_proj.weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).bfloat16() for n in "qv"
    }
    base = base_with(tmp_path / "base", {"model.safetensors": weights})
    large = adapter_with(tmp_path / "large", lora("m.q_proj", 64, 64, 0.5), target_modules=["q_proj"])
    small = adapter_with(tmp_path / "small", lora("m.v_proj", 64, 64, 1e-3), target_modules=["v_proj"])

    with pytest.warns(adaptkit.AdaptKitWarning, match="of the update of small"):
        alone = adaptkit.merge(base, small, tmp_path / "one")
    with pytest.warns(adaptkit.AdaptKitWarning, match="of the update of small"):
        both = adaptkit.merge(base, [large, small], tmp_path / "two")

    assert len(both.lost) == 2
    assert both.lost[0] < 0.05
    assert both.lost[1] == pytest.approx(alone.lost[0])


def test_rounding_of_tensors_done_at_once_is_told_too():
    """PiSSA's update is measured like any other's."""
    from adaptkit.engines.local import _Spill
    from adaptkit.verbs.merge import planned

    plan = planned(LLAMA, FIXTURES / "adapters/llama/pissa")
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        spill = _Spill(Path(folder))
        ready = [spill.ready(t) for t in plan.targets if t.changes]
        spill.close()
    assert len(spill.space.looks) == len(ready) > 0
    assert all(look.update > 0 for look in spill.space.looks)


@pytest.mark.parametrize("weights", [["a"], 3, [None], {"a": 1}, [0.0], [True]])
def test_a_receipt_that_lies_about_weights_is_not_believed(weights, tmp_path: Path):
    """Nonsense and zero in adaptkit.json are an error that names the option."""
    shutil.copytree(LLAMA, tmp_path / "copy")
    (tmp_path / "copy/adaptkit.json").write_text(json.dumps({"made": {"verb": "merge", "weights": weights}}))

    with pytest.raises(adaptkit.AdaptKitError, match="say --weights"):
        adaptkit.verify(tmp_path / "copy", base=LLAMA, adapters=[LORA])


def test_replacing_an_eight_bit_tensor_is_refused(tmp_path: Path):
    """A float32 head cannot be stored as an 8-bit float without asking."""
    tensors = {"m.q_proj.weight": torch.ones(8, 8), "lm_head.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}
    base = base_with(tmp_path / "base", {"model.safetensors": tensors})
    more = {"lm_head.weight": torch.ones(8, 8)}
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapter = adapter_with(tmp_path / "adapter", lora("m.q_proj", 8, 8, 1.0) | more, **settings)

    with pytest.raises(adaptkit.AdaptKitError, match="stored as F8_E4M3"):
        adaptkit.merge(base, adapter, tmp_path / "out")


def test_a_tied_embedding_under_another_name_is_not_changed_on_the_sly(tmp_path: Path):
    """A multimodal model calls its embedding otherwise than its file does; the head must not change with it."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16}
    config = LlavaConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    A, B = torch.randn(2, 40), torch.randn(16, 2)
    name = "model.language_model.embed_tokens"
    factors = {f"{name}.lora_embedding_A": A, f"{name}.lora_embedding_B": B}
    adapter = adapter_with(tmp_path / "adapter", factors, target_modules=["embed_tokens"])

    with pytest.raises(adaptkit.AdaptKitError, match="tied ends"):
        adaptkit.merge(tmp_path / "base", adapter, tmp_path / "out")


def test_one_very_long_row_is_read_once(tmp_path: Path):
    """A tensor that only changes its dtype has no rows to keep together."""
    from adaptkit.engines.blocks import Tensor
    from adaptkit.engines.workspace import Workspace
    from adaptkit.verbs.merge import planned

    row = torch.arange(3_000_000).reshape(1, -1).bfloat16()
    base = base_with(tmp_path / "base", {"model.safetensors": {**load_file(LLAMA / "model.safetensors"), "row": row}})
    target = next(t for t in planned(base, LORA, dtype="float32").targets if t.name == "row")
    out, space = bytearray(target.nbytes), Workspace()

    Tensor(target).fill(memoryview(out), 0, space)

    assert np.frombuffer(out, "f4").tolist() == row.float().reshape(-1).tolist()
    assert space._buffers["sum"].nbytes < 10 * 2**20
    space.close()


def test_sentence_transformers_modules_come_along(tmp_path: Path):
    """Weights that modules.json names are copied; others inside the base are warned of."""
    base = base_with(tmp_path / "base", {"model.safetensors": load_file(LLAMA / "model.safetensors")})
    for folder in ("2_Dense", "other"):
        (base / folder).mkdir()
        save_file({"linear.weight": torch.ones(2, 2)}, base / folder / "model.safetensors")
        (base / folder / "config.json").write_text("{}")
    (base / "modules.json").write_text(json.dumps([{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}]))

    with pytest.warns(adaptkit.AdaptKitWarning, match="left behind: other/model.safetensors"):
        adaptkit.merge(base, LORA, tmp_path / "out")

    dense = "2_Dense/model.safetensors"
    assert (tmp_path / "out" / dense).read_bytes() == (base / dense).read_bytes()
    assert not (tmp_path / "out/other/model.safetensors").exists()


def test_the_tokenizer_is_that_of_the_adapter_that_grew_the_vocabulary(tmp_path: Path):
    """Another adapter's tokenizer, which lies beside it by habit, is not shipped."""
    first = tmp_path / "first"
    shutil.copytree(LORA, first)
    (first / "tokenizer.json").write_text("{}")
    grown = FIXTURES / "adapters/llama/grown"

    adaptkit.merge(LLAMA, [first, grown], tmp_path / "out")

    assert (tmp_path / "out/tokenizer.json").read_bytes() == (grown / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 263


def test_replacing_what_another_adapter_changed_is_refused_in_that_order(tmp_path: Path):
    """A change before a replacement would be lost; after it, it counts."""
    weights = {"m.q_proj.weight": torch.ones(8, 8), "lm_head.weight": torch.ones(8, 8)}
    base = base_with(tmp_path / "base", {"model.safetensors": weights})
    change = adapter_with(tmp_path / "change", lora("lm_head", 8, 8, 1.0), target_modules=["lm_head"])
    new = lora("m.q_proj", 8, 8, 1.0) | {"lm_head.weight": 3 * torch.ones(8, 8)}
    whole = adapter_with(tmp_path / "whole", new, target_modules=["q_proj"], modules_to_save=["lm_head"])

    with pytest.raises(adaptkit.AdaptKitError, match="after another adapter changed it"):
        adaptkit.merge(base, [change, whole], tmp_path / "out")
    adaptkit.merge(base, [whole, change], tmp_path / "out")

    factors = lora("lm_head", 8, 8, 1.0)
    expected = 3 + factors["lm_head.lora_B.weight"].double() @ factors["lm_head.lora_A.weight"].double()
    got = load_file(tmp_path / "out/model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)


def test_another_programs_index_does_not_win_over_the_models_file(tmp_path: Path):
    """consolidated.safetensors.index.json lies beside model.safetensors in some repositories."""
    base = base_with(tmp_path / "base", {"model.safetensors": load_file(LLAMA / "model.safetensors")})
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, base / "consolidated-00001-of-00001.safetensors")
    table = {"weight_map": {"tok_embeddings.weight": "consolidated-00001-of-00001.safetensors"}}
    (base / "consolidated.safetensors.index.json").write_text(json.dumps(table))

    assert "model.norm.weight" in adaptkit.open_checkpoint(base).entries


def test_the_plan_says_which_numbers_each_change_reads():
    """Two sites that swap their factors make another plan: a stopped run of the one is not continued by the other."""
    from adaptkit.verbs.merge import planned

    one, other = adaptkit.read(LORA), adaptkit.read(LORA)
    a, b = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    other.sites[a], other.sites[b] = other.sites[b], other.sites[a]

    assert planned(LLAMA, one).fingerprint() == planned(LLAMA, adaptkit.read(LORA)).fingerprint()
    assert planned(LLAMA, one).fingerprint() != planned(LLAMA, other).fingerprint()


@pytest.mark.parametrize("size", ["0", "0.5B", 0, "5 parsecs", "-1"])
def test_a_shard_size_that_is_none_is_a_usage_error(size, tmp_path: Path):
    """Nothing is silently taken for "keep"."""
    with pytest.raises(adaptkit.AdaptKitError, match="is not a size") as caught:
        adaptkit.merge(LLAMA, LORA, tmp_path / "out", max_shard_size=size)

    assert caught.value.code == 2


def test_nan_in_an_adapter_is_refused_when_it_is_taken_out_too(tmp_path: Path):
    """unmerge looks at the numbers as merge does."""
    factors = lora("m.q_proj", 8, 8, 1.0)
    factors["m.q_proj.lora_B.weight"][0, 0] = float("nan")
    base = base_with(tmp_path / "base", {"model.safetensors": {"m.q_proj.weight": torch.ones(8, 8)}})
    adapter = adapter_with(tmp_path / "adapter", factors, target_modules=["q_proj"])

    with pytest.raises(adaptkit.AdaptKitError, match="NaN or infinite") as caught:
        adaptkit.unmerge(base, adapter, tmp_path / "out")

    assert caught.value.code == 3
