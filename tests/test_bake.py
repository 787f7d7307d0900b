"""A soft prompt that is merged: plain transformers gives with the output what real PEFT gives with the adapter."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from places import FIXTURES
from safetensors import safe_open
from safetensors.numpy import save_file

import adaptkit
from adaptkit import registry
from adaptkit.adapter import Adapter, Site
from adaptkit.cli.app import cli
from adaptkit.formats.base import read

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

LLAMA = FIXTURES / "models/llama"
WORDS = "a b c d e f g h i j k l m n o p q r s t u v w x y z".split()
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 39, "initializer_range": 0.4,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "opt": ("OPTConfig", {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "phi": ("PhiConfig", {"tie_word_embeddings": False}),  # its head has a bias
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 2}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 8}),  # multiplies its embedding by 4 = sqrt(16)
}


def tokenizer_with(folder: Path, post: str = "template", **settings) -> None:
    """A tokenizer of single letters, with 30 ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {w: i for i, w in enumerate([*SPECIALS, *WORDS])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)])
    made.post_processor = {
        "template": bos,
        "none": None,
        "bytes": processors.ByteLevel(trim_offsets=False),
        "sequence": processors.Sequence([processors.ByteLevel(trim_offsets=False), bos]),
    }[post]
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **named, **settings)
    fast.save_pretrained(folder)


def base_of(family: str, folder: Path, dtype=torch.float32) -> Path:
    """A tiny model of random weights with a tokenizer shorter than its vocabulary."""
    name, more = FAMILIES[family]
    torch.manual_seed(7)
    config = getattr(transformers, name)(**{**SIZES, **more})
    transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    tokenizer_with(folder)
    return folder


def prompt_of(base: Path, folder: Path, tokens: int = 3, kind: str = "PromptTuningConfig", **more) -> Path:
    """An adapter that real PEFT saves."""
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=tokens, **more)
    made = peft.get_peft_model(model, config)
    with torch.no_grad():
        for p in made.prompt_encoder.parameters():
            p.mul_(0.7)
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path]:
    """(base, adapter): a tiny untied Llama."""
    base = base_of("llama", tmp_path / "base")
    return base, prompt_of(base, tmp_path / "prompt")


def with_peft(base: Path, adapter: Path, dtype=torch.float32):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return peft.PeftModel.from_pretrained(model, adapter).eval(), tokens_of(base)


def plain(out: Path, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(out, dtype=dtype).eval(), tokens_of(out)


def tokens_of(folder: Path):
    return transformers.AutoTokenizer.from_pretrained(folder)


def generated(model, tokenizer, text: str, **how) -> list[int]:
    """The new ids."""
    inputs = tokenizer(text, return_tensors="pt")
    how = {"max_new_tokens": 12, "do_sample": False, **how}
    return model.generate(**inputs, **how)[0, inputs["input_ids"].shape[1] :].tolist()


def quiet_merge(*args, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", adaptkit.AdaptKitWarning)
        return adaptkit.merge(*args, **more)


@pytest.mark.parametrize("kind", ["prompt", "ptuning"])
def test_the_fixture_model_writes_what_it_writes_under_peft(kind: str, tmp_path: Path):
    """Greedy and beams, tied ends, bfloat16 base: ids equal to real PEFT's."""
    adapter = FIXTURES / "adapters/llama" / kind
    quiet_merge(LLAMA, adapter, tmp_path / "out")

    theirs, ours = with_peft(LLAMA, adapter), plain(tmp_path / "out")

    for text in ("The quick brown", "a"):
        for how in ({}, {"num_beams": 4}):
            assert generated(*ours, text, **how) == generated(*theirs, text, **how)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_what_it_writes_under_peft(family: str, tmp_path: Path):
    """Greedy, beams, and the probabilities that sampling draws from, in float32."""
    base = base_of(family, tmp_path / "base")
    adapter = prompt_of(base, tmp_path / "prompt")
    quiet_merge(base, adapter, tmp_path / "out")
    theirs, ours = with_peft(base, adapter), plain(tmp_path / "out")

    for text in ("a b c", "z"):
        for how in ({}, {"num_beams": 3}, {"num_beams": 3, "length_penalty": 2.0}):
            assert generated(*ours, text, **how) == generated(*theirs, text, **how)
        a, b = (probabilities(*pair, text) for pair in (theirs, ours))
        assert not b[40:].any()
        np.testing.assert_allclose(b[:40], a, atol=1e-6)
    without = probabilities(*plain(base), "a b c")
    assert np.abs(without - probabilities(*theirs, "a b c")).max() > 1e-3  # the prompt does something


def probabilities(model, tokenizer, text: str) -> np.ndarray:
    """What sampling draws the next id from."""
    inputs = tokenizer(text, return_tensors="pt")
    how = {"do_sample": True, "top_k": 0, "temperature": 1.3, "max_new_tokens": 1}
    found = model.generate(**inputs, **how, output_scores=True, return_dict_in_generate=True)
    return found.scores[0].softmax(-1)[0].numpy()


def test_sampling_never_draws_a_virtual_token(tmp_path: Path):
    """Of tied ends the new rows have logits of their own, and 300 draws show none of them."""
    base = base_of("llama-tied", tmp_path / "base")
    quiet_merge(base, prompt_of(base, tmp_path / "prompt"), tmp_path / "out")
    model, tokenizer = plain(tmp_path / "out")
    torch.manual_seed(0)

    inputs = tokenizer("a b", return_tensors="pt")
    drawn = model.generate(**inputs, do_sample=True, temperature=5.0, max_new_tokens=30, num_return_sequences=10)

    new = drawn[:, inputs["input_ids"].shape[1] :]
    assert new.max() < 40
    assert model(**inputs).logits[0, -1, 40:].abs().max() > 0  # a forward of one's own must leave them out


def test_rows_and_ids_are_one_number(llama, tmp_path: Path):
    """The tokenizer had 30 ids and the embedding 40 rows: the virtual tokens are rows and ids 40, 41, 42."""
    base, adapter = llama
    merged = quiet_merge(base, adapter, tmp_path / "out")

    assert merged.virtual == [40, 41, 42]
    assert tokens_of(tmp_path / "out")("a")["input_ids"] == [40, 41, 42, 1, 4]
    P = read(adapter).sites[""].params["P"]
    with safe_open(tmp_path / "out/model.safetensors", "np") as f, safe_open(base / "model.safetensors", "np") as old:
        for name, rows in (("model.embed_tokens.weight", np.asarray(P)), ("lm_head.weight", np.zeros((3, 16)))):
            np.testing.assert_array_equal(f.get_tensor(name)[:40], old.get_tensor(name))
            np.testing.assert_array_equal(f.get_tensor(name)[40:], rows)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 43


@pytest.mark.parametrize("post", ["template", "none", "bytes", "sequence"])
def test_virtual_tokens_stand_before_everything(post: str, llama, tmp_path: Path):
    """Before the beginning token, with one text and with two, and also after the tokenizer is saved again."""
    base, adapter = llama
    tokenizer_with(base, post)
    quiet_merge(base, adapter, tmp_path / "out")
    before, after = tokens_of(base), tokens_of(tmp_path / "out")
    after.save_pretrained(tmp_path / "again")

    for found in (after, tokens_of(tmp_path / "again")):
        assert found("a b")["input_ids"] == [40, 41, 42, *before("a b")["input_ids"]]
        pair = found("a b", "c")
        assert pair["input_ids"] == [40, 41, 42, *before("a b", "c")["input_ids"]]
        assert len(pair["attention_mask"]) == len(pair["input_ids"])
        assert found.decode(found("a b")["input_ids"], skip_special_tokens=True) == "a b"
        assert found("a b", add_special_tokens=False)["input_ids"] == [4, 5]
        assert found("a b c d", truncation=True, max_length=6)["input_ids"][:3] == [40, 41, 42]
        assert sorted(found("a")) == sorted(before("a"))


def bpe_of(folder: Path) -> None:
    """A Llama tokenizer, which transformers builds anew from the vocabulary."""
    letters = {w: i for i, w in enumerate([*SPECIALS, "\u2581", *WORDS, "\u2581a"])}
    made = transformers.LlamaTokenizer(vocab=letters, merges=[("\u2581", "a")])
    made.save_pretrained(folder)


def unigram_of(folder: Path) -> None:
    """A tokenizer whose vocabulary is a list with scores."""
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.Unigram([*((s, 0.0) for s in SPECIALS), *((w, -1.0) for w in WORDS)], unk_id=3))
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(folder)


@pytest.mark.parametrize("make", [bpe_of, unigram_of])
def test_tokenizers_of_other_kinds_put_the_prompt_in_front(make, llama, tmp_path: Path):
    """What transformers made of the base's tokenizer comes after the prompt, and is decoded as before."""
    base, adapter = llama
    make(base)
    quiet_merge(base, adapter, tmp_path / "out")
    before, after = tokens_of(base), tokens_of(tmp_path / "out")

    for text in ("a b", "zz top", "ab  a"):
        ids = before(text)["input_ids"]
        assert after(text)["input_ids"] == [40, 41, 42, *ids]
        assert after.decode([40, 41, 42, *ids], skip_special_tokens=True) == before.decode(
            ids, skip_special_tokens=True
        )
    assert sorted(after("a")) == sorted(before("a"))
    assert after.special_tokens_map == before.special_tokens_map


def test_a_class_that_builds_its_own_post_processor_keeps_the_prompt(llama, tmp_path: Path):
    """add_bos_token makes some releases replace the post-processor; the output does what the base did, and the prompt."""
    base, adapter = llama
    tokenizer_with(base, "none")
    settings = json.loads((base / "tokenizer_config.json").read_text()) | {"add_bos_token": True, "add_eos_token": True}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    quiet_merge(base, adapter, tmp_path / "out")

    before = tokens_of(base)("a b")["input_ids"]

    assert "add_bos_token" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert tokens_of(tmp_path / "out")("a b")["input_ids"] == [40, 41, 42, *before]


def test_chat_templates_begin_with_the_prompt(llama, tmp_path: Path):
    """apply_chat_template gives ids with the prompt, and its text gives them when no special tokens are added again."""
    base, adapter = llama
    template = "{{ bos_token }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
    tokenizer_with(base, chat_template=template)
    quiet_merge(base, adapter, tmp_path / "out")
    chat = [{"role": "user", "content": "a b"}]
    before, after = tokens_of(base), tokens_of(tmp_path / "out")

    expected = [40, 41, 42, *before.apply_chat_template(chat)["input_ids"]]

    assert after.apply_chat_template(chat)["input_ids"] == expected
    text = after.apply_chat_template(chat, tokenize=False)
    assert after(text, add_special_tokens=False)["input_ids"] == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_padded_rows_give_what_they_give_alone(family: str, tmp_path: Path):
    """Padding lies before the prompt, and positions come from the mask: a batch changes nothing."""
    base = base_of(family, tmp_path / "base")
    quiet_merge(base, prompt_of(base, tmp_path / "prompt"), tmp_path / "out")
    model, tokenizer = plain(tmp_path / "out")
    tokenizer.padding_side = "left"
    texts = ["a b c d e f", "z", "k l"]

    batch = tokenizer(texts, return_tensors="pt", padding=True)
    found = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]

    assert batch["input_ids"][1, 5:8].tolist() == [40, 41, 42]
    for row, text in zip(found.tolist(), texts, strict=True):
        alone = generated(model, tokenizer, text, max_new_tokens=8)
        assert row[: len(alone)] == alone


def test_lengths_in_the_generation_settings_count_the_prompt(llama, tmp_path: Path):
    """max_length counts what was read: PEFT's count has no virtual tokens, so it grows by as many."""
    base, adapter = llama
    said = {"max_length": 9, "suppress_tokens": [5], "eos_token_id": 39, "pad_token_id": 0}
    (base / "generation_config.json").write_text(json.dumps(said))
    quiet_merge(base, adapter, tmp_path / "out")

    found = json.loads((tmp_path / "out/generation_config.json").read_text())

    assert (found["max_length"], found["suppress_tokens"]) == (12, [5, 40, 41, 42])
    theirs, ours = with_peft(base, adapter), plain(tmp_path / "out")
    how = {"max_new_tokens": None}
    assert generated(*ours, "a b", **how) == generated(*theirs, "a b", **how)


def test_settings_in_config_json_alone_are_kept(llama, tmp_path: Path):
    """Without generation_config.json the ids of config.json count, and still do when one is written."""
    base, adapter = llama
    (base / "generation_config.json").unlink(missing_ok=True)
    quiet_merge(base, adapter, tmp_path / "out")

    found = transformers.GenerationConfig.from_pretrained(tmp_path / "out")

    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 39, 0)
    assert found.suppress_tokens == [40, 41, 42]


def test_a_16_bit_base_rounds_the_prompt_once(tmp_path: Path):
    """PEFT casts the prompt to the embeddings' dtype; the rows hold just that."""
    base = base_of("llama", tmp_path / "base", torch.bfloat16)
    adapter = prompt_of(base, tmp_path / "prompt")
    quiet_merge(base, adapter, tmp_path / "out")

    rows = plain(tmp_path / "out", torch.bfloat16)[0].get_input_embeddings().weight[40:]

    P = torch.from_numpy(np.asarray(read(adapter).sites[""].params["P"]).astype("f4"))
    assert torch.equal(rows, P.to(torch.bfloat16))
    theirs, ours = with_peft(base, adapter, torch.bfloat16), plain(tmp_path / "out", torch.bfloat16)
    assert generated(*ours, "a b") == generated(*theirs, "a b")


def test_an_embedding_with_a_scale_that_is_no_power_of_two_warns(tmp_path: Path):
    """Gemma multiplies by sqrt(width): for width 24 no row gives every number back, and the user is told how many."""
    torch.manual_seed(7)
    config = transformers.Gemma2Config(**{**SIZES, "hidden_size": 24, "query_pre_attn_scalar": 8})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer_with(tmp_path / "base")
    adapter = prompt_of(tmp_path / "base", tmp_path / "prompt")

    with pytest.warns(adaptkit.AdaptKitWarning, match="numbers of the prompt are one rounding off"):
        adaptkit.merge(tmp_path / "base", adapter, tmp_path / "out")

    model, _ = plain(tmp_path / "out")
    P = np.asarray(read(adapter).sites[""].params["P"])
    got = model.get_input_embeddings()(torch.tensor([40, 41, 42])).detach().numpy()
    np.testing.assert_allclose(got, P, rtol=2e-7)


@pytest.mark.parametrize("dora", [False, True])
def test_a_prompt_and_a_lora_merge_together(dora: bool, llama, tmp_path: Path):
    """The prompt stands before the model that the other adapter leaves, in either order."""
    base, adapter = llama
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False, use_dora=dora)
    lora = peft.get_peft_model(model, config)
    lora.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    quiet_merge(base, tmp_path / "lora", tmp_path / "merged")

    for k, order in enumerate(([tmp_path / "lora", adapter], [adapter, tmp_path / "lora"])):
        quiet_merge(base, order, tmp_path / f"out{k}")
        theirs, ours = with_peft(tmp_path / "merged", adapter), plain(tmp_path / f"out{k}")
        assert generated(*ours, "a b") == generated(*theirs, "a b")


def sharded_of(base: Path, folder: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(folder, max_shard_size="6KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    return folder


def test_shards_stay_as_they_are_but_for_the_ends(llama, tmp_path: Path):
    """The same tensors in the same files, the two ends longer by three rows; --max-shard-size fills new files."""
    base, adapter = llama
    quiet_merge(sharded_of(base, tmp_path / "sharded"), adapter, tmp_path / "out", workers=1)
    quiet_merge(base, adapter, tmp_path / "other", max_shard_size="4KB", workers=3)

    maps = [json.loads((tmp_path / n / "model.safetensors.index.json").read_text()) for n in ("sharded", "out")]
    assert maps[0]["weight_map"] == maps[1]["weight_map"]
    for name, file in maps[0]["weight_map"].items():
        with safe_open(tmp_path / "sharded" / file, "np") as a, safe_open(tmp_path / "out" / file, "np") as b:
            old, new = a.get_tensor(name), b.get_tensor(name)
            assert len(new) - len(old) == (3 if name in ("model.embed_tokens.weight", "lm_head.weight") else 0)
            np.testing.assert_array_equal(new[: len(old)], old)
    texts = [generated(*plain(tmp_path / name), "a b") for name in ("out", "other")]
    assert texts[0] == texts[1] == generated(*with_peft(base, adapter), "a b")


def test_verify_finds_a_row_and_a_tokenizer_that_were_changed(llama, tmp_path: Path):
    """The output is that merge; with one number of the prompt or the tokenizer changed it is not."""
    base, adapter = llama
    out = tmp_path / "out"
    quiet_merge(base, adapter, out)
    assert adaptkit.verify(out, base=base, adapters=adapter).ok

    shutil.copy(base / "tokenizer.json", out / "tokenizer.json")
    assert list(adaptkit.verify(out, base=base, adapters=adapter).wrong) == ["tokenizer.json"]

    with safe_open(out / "model.safetensors", "np") as f:
        tensors = {k: f.get_tensor(k).copy() for k in list(f.keys())}
    tensors["model.embed_tokens.weight"][41, 3] += 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    assert "model.embed_tokens.weight" in adaptkit.verify(out, base=base, adapters=adapter).wrong


def test_a_run_that_was_stopped_goes_on(llama, tmp_path: Path):
    """A run that stops between two shards leaves no OUT; the same command finishes to the same bytes."""
    base, adapter = llama
    sharded = sharded_of(base, tmp_path / "sharded")
    quiet_merge(sharded, adapter, tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        if done > total * 0.7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet_merge(sharded, adapter, tmp_path / "out", workers=1, progress=stop)
    assert not (tmp_path / "out").exists()

    merged = quiet_merge(sharded, adapter, tmp_path / "out")

    assert merged.resumed >= 1
    for file in (tmp_path / "whole").iterdir():
        assert file.name == "adaptkit.json" or file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_a_pytorch_base_becomes_safetensors_with_the_prompt(llama, tmp_path: Path):
    """The rows are appended to a pickled embedding as well."""
    base, adapter = llama
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    old = shutil.copytree(base, tmp_path / "old")
    (old / "model.safetensors").unlink()
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    quiet_merge(old, adapter, tmp_path / "out")

    assert generated(*plain(tmp_path / "out"), "a b") == generated(*with_peft(base, adapter), "a b")


def test_a_dry_run_says_which_rows_and_files(llama, tmp_path: Path):
    """The plan names the rows that are appended and the files that put them in front, and writes nothing."""
    base, adapter = llama
    found = CliRunner().invoke(cli, ["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--dry-run"])

    assert found.exit_code == 0
    assert "3 rows appended" in found.output
    assert "tokenizer.json" in found.output
    assert not (tmp_path / "out").exists()


def test_a_base_without_a_tokenizer_is_baked_with_a_word_about_the_ids(llama, tmp_path: Path):
    """Whoever has the tokenizer elsewhere must know which ids to put in front."""
    base, adapter = llama
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()

    with pytest.warns(adaptkit.AdaptKitWarning, match="put the ids 40 to 42 before every input"):
        adaptkit.merge(base, adapter, tmp_path / "out")

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape[0] == 43


def refused(match: str, base, adapters, out: Path, **more) -> None:
    with pytest.raises(adaptkit.AdaptKitError, match=match):
        quiet_merge(base, adapters, out, **more)
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()


def test_what_cannot_be_baked_is_refused_in_a_sentence(llama, tmp_path: Path):
    """Two prompts, weights, prefix tuning, a second prompt, another width, another kind of model."""
    base, adapter = llama
    out = tmp_path / "out"
    refused("two soft prompts", base, [adapter, adapter], out)
    refused("cannot be weighted by 0.5", base, adapter, out, weights=[0.5])
    refused("let adaptkit export-onnx carry it", LLAMA, FIXTURES / "adapters/llama/prefix", out)
    refused("needs a model folder", shutil.copy(base / "model.safetensors", tmp_path / "m.safetensors"), adapter, out)
    refused(r"virtual tokens \[6, 128\], the embedding", base, FIXTURES / "adapters/llama/prompt", out)
    quiet_merge(base, adapter, tmp_path / "baked")
    refused("already carries a soft prompt", tmp_path / "baked", adapter, out)
    with pytest.raises(adaptkit.AdaptKitError, match="cannot be taken out"):
        adaptkit.unmerge(tmp_path / "baked", adapter, out)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "only a plain causal language model"),
        (
            {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "its decoder shares the embedding",
        ),
    ],
)
def test_other_kinds_of_models_are_refused_with_the_reason(config: dict, reason: str, llama, tmp_path: Path):
    """What their outputs mean depends on positions, or on who reads the embedding."""
    base, adapter = llama
    changed = json.loads((base / "config.json").read_text()) | config
    (base / "config.json").write_text(json.dumps(changed))
    refused(reason, base, adapter, tmp_path / "out")


def test_a_model_that_numbers_positions_by_ids_is_refused(tmp_path: Path):
    """RoBERTa counts positions from ids that are not padding, which PEFT's embeddings do not have."""
    config = transformers.RobertaConfig(**{**SIZES, "is_decoder": True})
    transformers.RobertaForCausalLM(config).save_pretrained(tmp_path / "base")
    site = Site(registry.load("tuners", "prompt")(tokens=2), {"P": np.ones((2, 16), "f4")})
    refused("does more with token ids than look them up", tmp_path / "base", Adapter({"": site}), tmp_path / "out")
