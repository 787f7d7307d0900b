"""Virtual tokens of adaptkit.peft beside real PEFT: the same numbers in forward, training, generation and folders."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import peft as theirs
import pytest
import torch
import transformers
from models import loaded
from peft_zoo import IDS, Sizes, bert, gpt2, llama, t5
from places import FIXTURES, ROOT
from safetensors.torch import load_file, save_file
from torch import nn

import adaptkit.peft as ours
from adaptkit.errors import AdaptKitError, AdaptKitWarning

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore:(position|token_type)_ids are not used")]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "words": ("PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "lstm": ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 6}),
    "prefix": ("PrefixTuningConfig", {}),
    "projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 12}),
    "still": ("PrefixTuningConfig", {"init_weights": "zero"}),
}
MASK = torch.ones_like(IDS)
RIGHT, LEFT = MASK.clone(), MASK.clone()
RIGHT[1, 5:] = 0
LEFT[1, :3] = 0
TYPES = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]])


def bart() -> nn.Module:
    """Encoder and decoder with learnt positions."""
    sizes = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 40}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, forced_eos_token_id=None))


def shaped(kind: str, task: str) -> Any:
    """A maker of models of one family with a head."""
    if kind == "bert":
        return lambda: getattr(transformers, f"Bert{task}")(transformers.BertConfig(**Sizes, num_labels=3))
    made = {"llama": (transformers.LlamaConfig, "Llama"), "gpt2": (transformers.GPT2Config, "GPT2")}[kind]
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4} if kind == "gpt2" else Sizes
    return lambda: getattr(transformers, f"{made[1]}{task}")(made[0](**sizes, num_labels=3, pad_token_id=0))


def two(labels: Any) -> dict[str, Any]:
    return {"labels": torch.tensor(labels)}


CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama": ("CAUSAL_LM", llama, {"labels": IDS}),
    "gpt2": ("CAUSAL_LM", gpt2, {"labels": IDS}),
    "t5": ("SEQ_2_SEQ_LM", t5, {"labels": IDS[:, :5].contiguous()}),
    "bart": ("SEQ_2_SEQ_LM", bart, {"labels": IDS[:, :5].contiguous()}),
    "t5-decoder": ("SEQ_2_SEQ_LM", t5, {"decoder_input_ids": IDS[:, :5], "decoder_attention_mask": RIGHT[:, :5]}),
    "bert": ("SEQ_CLS", bert, two([1, 2]) | {"token_type_ids": TYPES}),
    "bert-many": ("SEQ_CLS", bert, two([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
    "bert-tokens": ("TOKEN_CLS", shaped("bert", "ForTokenClassification"), {"token_type_ids": TYPES}),
    "bert-answers": (
        "QUESTION_ANS",
        lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**Sizes)),
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
    ),
    "bert-features": ("FEATURE_EXTRACTION", lambda: transformers.BertModel(transformers.BertConfig(**Sizes)), {}),
    "llama-class": ("SEQ_CLS", shaped("llama", "ForSequenceClassification"), two([1, 2])),
    "gpt2-class": ("SEQ_CLS", shaped("gpt2", "ForSequenceClassification"), two([1, 2])),
    "llama-tokens": ("TOKEN_CLS", shaped("llama", "ForTokenClassification"), {}),
}


def config(room: Any, kind: str, task: str | None, **more: Any) -> Any:
    """The same settings, from PEFT or from here."""
    name, settings = KINDS[kind]
    return getattr(room, name)(**{"num_virtual_tokens": 4, "task_type": task} | settings | more)


def quietly(make: Any, *args: Any, **kwargs: Any) -> Any:
    """Call PEFT, whose warnings are not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **kwargs)


def base_of(case: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return CASES[case][1]().eval()


def twins(case: str, kind: str, **more: Any) -> tuple[nn.Module, nn.Module]:
    """PEFT's model and ours, on equal bases, begun with one seed."""
    task, base = CASES[case][0], base_of(case)
    torch.manual_seed(3)
    there = quietly(theirs.get_peft_model, copy.deepcopy(base), config(theirs, kind, task, **more))
    torch.manual_seed(3)
    here = ours.get_peft_model(base, config(ours, kind, task, **more))
    return there.eval(), here.eval()


def numbers(model: nn.Module, **inputs: Any) -> dict[str, torch.Tensor]:
    """Every tensor of an output that both have."""
    with torch.no_grad():
        found = quietly(model, **inputs)
    return {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}


def agree(there: nn.Module, here: nn.Module, **inputs: Any) -> None:
    a, b = numbers(there, **inputs), numbers(here, **inputs)
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(b[k], a[k], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_names_numbers_counts_and_outputs_are_peft_s(case: str, kind: str):
    """At one seed everything is PEFT's: the state dict, the settings, what trains, outputs and losses."""
    there, here = twins(case, kind)
    a, b = there.state_dict(), here.state_dict()
    a = {k: v for k, v in a.items() if not k.startswith("word_embeddings.")}  # the base's own, once more

    assert set(b) == set(a)
    for name in a:
        torch.testing.assert_close(b[name], a[name], atol=0, rtol=0)
    assert {n for n, p in here.named_parameters() if p.requires_grad} == {
        n for n, p in there.named_parameters() if p.requires_grad
    }
    assert here.get_nb_trainable_parameters() == there.get_nb_trainable_parameters()
    more = CASES[case][2]
    for mask in (None, MASK, RIGHT, LEFT):
        agree(there, here, input_ids=IDS, attention_mask=mask, **more)


CORE = ["prompt", "mlp", "lstm", "prefix", "projected"]


@pytest.mark.parametrize("kind", CORE)
@pytest.mark.parametrize("case", ["llama", "gpt2", "t5", "bart", "bert", "bert-answers", "llama-class"])
def test_twenty_steps_of_training_land_on_peft_s_weights(case: str, kind: str):
    """The same losses and, in float32, the same weights."""
    there, here = twins(case, kind)
    losses = []
    for model in (there, here):
        # the loss of answers does not change with the head's bias, and Adam would blow up what rounding leaves there
        kind_of = torch.optim.SGD if case == "bert-answers" else torch.optim.Adam
        optimizer = kind_of([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            loss = quietly(model, input_ids=IDS, attention_mask=RIGHT, **CASES[case][2]).loss
            loss.backward()
            optimizer.step()
        losses.append(loss.item())

    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    a, b = there.state_dict(), here.state_dict()
    for name in b:
        torch.testing.assert_close(b[name], a[name], atol=1e-5, rtol=1e-4)


SAVED = ["llama", "t5", "bert", "bert-answers", "llama-class", "bert-features"]


@pytest.mark.parametrize("kind", CORE)
@pytest.mark.parametrize("case", SAVED)
def test_peft_reads_what_is_saved_here(case: str, kind: str, tmp_path: Path):
    """The folder gives PEFT the same outputs, and its own folder the same tensors and settings."""
    there, here = twins(case, kind)
    here.save_pretrained(tmp_path / "here")
    quietly(there.save_pretrained, tmp_path / "there")
    again = quietly(theirs.PeftModel.from_pretrained, base_of(case), tmp_path / "here").eval()

    agree(again, here, input_ids=IDS, attention_mask=RIGHT, **CASES[case][2])
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("there", "here"))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], atol=1e-6, rtol=1e-5)
    a, b = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("there", "here"))
    heads = a.pop("modules_to_save"), b.pop("modules_to_save")
    assert set(heads[0] or ()) == set(heads[1] or ())  # PEFT names each head twice
    assert b == {k: v for k, v in a.items() if k in b} | {"peft_version": b["peft_version"]}


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("kind", CORE)
@pytest.mark.parametrize("case", SAVED)
def test_what_peft_saved_runs_here(case: str, kind: str, safe: bool, tmp_path: Path):
    """Folders of PEFT, in either file format, give PEFT's outputs; nothing trains."""
    there, _ = twins(case, kind)
    quietly(there.save_pretrained, tmp_path, safe_serialization=safe)
    here = ours.PeftModel.from_pretrained(base_of(case), tmp_path)

    agree(there, here, input_ids=IDS, attention_mask=RIGHT, **CASES[case][2])
    assert not any(p.requires_grad for p in here.parameters())
    assert type(here).__name__ == type(there).__name__


STEPS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
WAYS = {"greedy": {}, "beams": {"num_beams": 3}, "no-cache": {"use_cache": False}}


def stepwise(model: nn.Module, mask: torch.Tensor | None, start: torch.Tensor | None = None) -> torch.Tensor:
    """Greedy tokens, one whole forward for each."""
    ids, given = (IDS, {}) if start is None else (start, {"input_ids": IDS, "attention_mask": mask})
    begin = ids.shape[1]
    for _ in range(STEPS["max_new_tokens"]):
        if start is None:
            more = torch.ones(len(ids), ids.shape[1] - begin, dtype=torch.long)
            step = {"input_ids": ids, "attention_mask": None if mask is None else torch.cat([mask, more], 1)}
        else:
            step = given | {"decoder_input_ids": ids}
        with torch.no_grad():
            chosen = model(**step, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, chosen], 1)
    return ids


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["prompt", "mlp", "prefix"])
@pytest.mark.parametrize("case", ["llama", "gpt2", "t5", "bart"])
def test_generate_says_what_forward_says(case: str, kind: str, way: str):
    """Greedy tokens are those of one forward after the other, with a cache or without; beams are PEFT's."""
    there, here = twins(case, kind)
    start = torch.full((2, 1), here.config.decoder_start_token_id) if case in ("t5", "bart") else None
    for mask in (None, MASK, LEFT) + ((RIGHT,) if start is not None else ()):
        given = {"input_ids": IDS, "attention_mask": MASK if mask is None else mask} | STEPS | WAYS[way]
        found = quietly(here.generate, **given)
        if way != "beams":
            assert found.tolist() == stepwise(here, mask, start).tolist()
        elif kind != "prefix" or mask is not LEFT or start is not None:
            assert found.tolist() == quietly(there.generate, **given).tolist()


@pytest.mark.parametrize("kind", ["prompt", "mlp", "prefix"])
@pytest.mark.parametrize("case", ["llama", "gpt2", "t5", "bart"])
def test_generate_is_peft_s_where_peft_s_is_its_forward(case: str, kind: str):
    """The same tokens as PEFT for batches without padding on the left, and for prompts with it."""
    there, here = twins(case, kind)
    for mask in (MASK, LEFT):
        if kind == "prefix" and mask is LEFT and case in ("llama", "gpt2"):
            continue  # PEFT counts its positions otherwise there than in its forward
        given = {"input_ids": IDS, "attention_mask": mask} | STEPS
        assert quietly(here.generate, **given).tolist() == quietly(there.generate, **given).tolist()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("case", ["llama", "t5", "bert", "bert-tokens"])
def test_disabling_gives_the_base_and_leaving_gives_the_adapter_back(case: str, kind: str):
    """Also for encoders, where PEFT fails, and for models with heads."""
    base = base_of(case)
    more = {"decoder_input_ids": IDS[:, :4]} if case == "t5" else {}
    before = numbers(base, input_ids=IDS, **more)["logits"]
    here = ours.get_peft_model(base, config(ours, kind, CASES[case][0])).eval()
    for _, value in here.named_parameters():
        value.data += 0.1 * value.requires_grad
    running = numbers(here, input_ids=IDS, **more)["logits"]

    with here.disable_adapter():
        torch.testing.assert_close(numbers(here, input_ids=IDS, **more)["logits"], before, atol=0, rtol=0)
    torch.testing.assert_close(numbers(here, input_ids=IDS, **more)["logits"], running, atol=0, rtol=0)
    torch.testing.assert_close(numbers(here.unload(), input_ids=IDS, **more)["logits"], before, atol=0, rtol=0)
    assert all(p.requires_grad for p in base.parameters())
    assert set(base.state_dict()) == set(base_of(case).state_dict())


@pytest.mark.parametrize("kind", ["prompt", "mlp", "prefix"])
@pytest.mark.parametrize("case", ["llama", "bert"])
def test_several_adapters_are_switched_saved_loaded_and_deleted_as_in_peft(case: str, kind: str, tmp_path: Path):
    """add_adapter, set_adapter, save_pretrained of two, load_adapter, delete_adapter: PEFT's outputs at each step."""
    there, here = twins(case, kind)
    for room, model in ((theirs, there), (ours, here)):
        torch.manual_seed(5)
        quietly(model.add_adapter, "two", config(room, kind, CASES[case][0], num_virtual_tokens=2))
    agree(there, here, input_ids=IDS)
    there.set_adapter("two")
    here.set_adapter("two")
    agree(there, here, input_ids=IDS)
    assert here.active_adapters == ["two"]
    assert {n for n, p in here.named_parameters() if p.requires_grad} == {
        n for n, p in there.named_parameters() if p.requires_grad and (".two." in n or kind != "still")
    } - {n for n, p in there.named_parameters() if ".default." in n}
    here.save_pretrained(tmp_path)
    again = ours.PeftModel.from_pretrained(base_of(case), tmp_path)
    again.load_adapter(tmp_path / "two", "two")
    again.set_adapter("two", inference_mode=True)
    torch.testing.assert_close(numbers(again, input_ids=IDS), numbers(here, input_ids=IDS))
    with pytest.warns(AdaptKitWarning, match="now default is"):
        here.delete_adapter("two")
    there.set_adapter("default")
    agree(there, here, input_ids=IDS)
    here.delete_adapter("default")
    torch.testing.assert_close(numbers(here, input_ids=IDS), numbers(base_of(case), input_ids=IDS))


@pytest.mark.parametrize("kind", CORE)
def test_state_dicts_and_prompts_are_peft_s(kind: str):
    """get_prompt, get_prompt_embedding_to_save and both state dict functions; tensors go through a state_dict() too."""
    there, here = twins("bert", kind)
    a, b = theirs.get_peft_model_state_dict(there), ours.get_peft_model_state_dict(here)
    again = ours.get_peft_model_state_dict(here, state_dict={k: v + 0 for k, v in here.state_dict().items()})

    torch.testing.assert_close(b, dict(a))
    torch.testing.assert_close(again, b)
    torch.testing.assert_close(
        here.get_prompt_embedding_to_save("default"), there.get_prompt_embedding_to_save("default")
    )
    if kind in ("prefix", "projected"):
        mine, other = here.get_prompt(2), there.get_prompt(2)
        assert mine.get_seq_length() == other.get_seq_length() == 4
        torch.testing.assert_close(mine.layers[1].values, other.layers[1].values)
    else:
        torch.testing.assert_close(here.get_prompt(2), there.get_prompt(2))
    changed = {k: v + 1 for k, v in b.items()}
    if kind in ("prompt", "prefix"):
        result = ours.set_peft_model_state_dict(here, changed)
        assert not result.missing_keys and not result.unexpected_keys
        torch.testing.assert_close(ours.get_peft_model_state_dict(here), changed)
    else:
        with pytest.raises(AdaptKitError, match="the encoder of default makes its rows"):
            ours.set_peft_model_state_dict(here, changed)


def test_saving_in_the_middle_of_training_stores_no_noise(tmp_path: Path):
    """An LSTM with dropout: what is saved is what runs; PEFT saves one random draw of it."""
    _, here = twins("llama", "lstm", encoder_dropout=0.5)
    torch.manual_seed(0)
    running = numbers(here, input_ids=IDS)["logits"]
    here.train()
    here.save_pretrained(tmp_path)

    assert here.prompt_encoder["default"].training
    again = ours.PeftModel.from_pretrained(base_of("llama"), tmp_path)
    torch.testing.assert_close(numbers(again, input_ids=IDS)["logits"], running, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", CORE)
def test_a_saved_adapter_trains_on_from_its_rows(kind: str, tmp_path: Path):
    """PEFT refuses. The rows are all that runs, so they train; a warning says so where an encoder made them."""
    _, here = twins("llama", kind)
    here.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        again = ours.PeftModel.from_pretrained(base_of("llama"), tmp_path, is_trainable=True)
    before = quietly(again, input_ids=IDS, labels=IDS).loss
    before.backward()
    with torch.no_grad():
        for p in again.parameters():
            p -= 0.1 * p.grad if p.grad is not None else 0

    assert any("trained themselves" in str(w.message) for w in seen) == (kind not in ("prompt", "prefix"))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {"prompt_encoder.default.embedding.weight"}
    assert quietly(again, input_ids=IDS, labels=IDS).loss < before
    again.save_pretrained(tmp_path / "again")
    after = quietly(theirs.PeftModel.from_pretrained, base_of("llama"), tmp_path / "again").eval()
    agree(after, again, input_ids=IDS)


def test_text_starts_the_rows_as_in_peft(tmp_path: Path):
    """Repeated and cut; the tokenizer's options are given to it; running its code is not."""
    folder = FIXTURES / "models" / "llama"
    for tokens in (3, 30):
        rows = []
        for room in (theirs, ours):
            settings = room.PromptTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=tokens, prompt_tuning_init="TEXT",
                prompt_tuning_init_text="the fox said", tokenizer_name_or_path=str(folder),
                tokenizer_kwargs={"trust_remote_code": True, "add_bos_token": True},
            )  # fmt: skip
            model = quietly(room.get_peft_model, loaded(folder, "llama"), settings)
            rows.append(model.prompt_encoder["default"].embedding.weight)
        assert torch.equal(*rows)
    with pytest.raises(AdaptKitError, match="needs prompt_tuning_init_text"):
        ours.PromptTuningConfig(prompt_tuning_init="TEXT", tokenizer_name_or_path="x")
    lost = ours.PromptTuningConfig(
        num_virtual_tokens=2,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="x",
        tokenizer_name_or_path=str(tmp_path),
    )
    with pytest.raises(AdaptKitError, match="cannot be read as a tokenizer"):
        ours.get_peft_model(llama(), lost)


def test_token_classifiers_have_a_loss():
    """Virtual tokens have no label; PEFT's forward fails on the lengths."""
    here = ours.get_peft_model(base_of("bert-tokens"), config(ours, "prompt", "TOKEN_CLS")).eval()
    labels = IDS % 3
    found = numbers(here, input_ids=IDS, labels=labels)

    expected = nn.functional.cross_entropy(found["logits"][:, 4:].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(found["loss"], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["prompt", "mlp", "prefix"])
def test_short_floats_are_peft_s(kind: str, dtype: torch.dtype):
    """Rows stay float32 and are rounded to the model's dtype where they enter it."""
    base = base_of("llama").to(dtype)
    torch.manual_seed(3)
    there = quietly(theirs.get_peft_model, copy.deepcopy(base), config(theirs, kind, "CAUSAL_LM")).eval()
    torch.manual_seed(3)
    here = ours.get_peft_model(base, config(ours, kind, "CAUSAL_LM")).eval()

    assert here.prompt_encoder["default"].embedding.weight.dtype == torch.float32
    agree(there, here, input_ids=IDS, attention_mask=MASK)


def test_positions_are_moved_for_a_prefix_as_in_peft():
    """Explicit positions count from the end of the prefix."""
    there, here = twins("llama", "prefix")
    agree(there, here, input_ids=IDS, position_ids=torch.arange(8).expand(2, 8) + 3)


@pytest.mark.parametrize("model_type", ["Mistral", "Qwen3", "Gemma3", "Gemma2", "GPTNeoX"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_other_families_are_peft_s(model_type: str, kind: str):
    """Sliding windows, wide heads, caches made of the configuration."""
    name = {"Gemma3": "Gemma3Text"}.get(model_type, model_type)
    more = {} if model_type == "GPTNeoX" else {"num_key_value_heads": 2, "head_dim": 16}
    more |= {"sliding_window": 6} if model_type != "GPTNeoX" else {}
    torch.manual_seed(0)
    settings = getattr(transformers, f"{name}Config")(**Sizes | more, pad_token_id=0)
    base = getattr(transformers, f"{model_type}ForCausalLM")(settings).eval()
    torch.manual_seed(3)
    there = quietly(theirs.get_peft_model, copy.deepcopy(base), config(theirs, kind, "CAUSAL_LM")).eval()
    torch.manual_seed(3)
    here = ours.get_peft_model(base, config(ours, kind, "CAUSAL_LM")).eval()

    agree(there, here, input_ids=IDS, attention_mask=MASK, labels=IDS)
    given = {"input_ids": IDS, "attention_mask": MASK} | STEPS
    assert quietly(here.generate, **given).tolist() == quietly(there.generate, **given).tolist()


def test_a_t5_whose_heads_are_not_its_width_takes_a_prefix(tmp_path: Path):
    """PEFT cannot shape its rows."""
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 4, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    base = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()
    here = ours.get_peft_model(base, config(ours, "prefix", "SEQ_2_SEQ_LM"))

    assert here.prompt_encoder["default"].embedding.weight.shape == (4, 2 * 2 * 16)
    quietly(here, input_ids=IDS, labels=IDS).loss.backward()
    assert here.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0


def test_what_virtual_tokens_cannot_do_is_said_in_one_sentence(tmp_path: Path):
    """Merging, two at once, another kind, missing numbers, gradient checkpointing, models without a cache."""
    here = twins("llama", "prompt")[1]
    for name in ("merge_and_unload", "merge_adapter", "unmerge_adapter"):
        with pytest.raises(AdaptKitError, match=f"{name} is not for virtual tokens.*adaptkit merge.*ONNX"):
            getattr(here, name)()
    here.add_adapter("two", config(ours, "prompt", "CAUSAL_LM"))
    with pytest.raises(AdaptKitError, match="one acts at a time"):
        here.set_adapter(["default", "two"])
    with pytest.raises(AdaptKitError, match="this model carries PROMPT_TUNING"):
        here.add_adapter("three", config(ours, "prefix", "CAUSAL_LM"))
    with pytest.raises(AdaptKitError, match="no adapter is named four"):
        here.set_adapter("four")
    with pytest.raises(AdaptKitError, match="num_virtual_tokens is not given"):
        ours.get_peft_model(llama(), ours.PromptTuningConfig())
    with pytest.raises(AdaptKitError, match="num_virtual_tokens is 0"):
        ours.PrefixTuningConfig(num_virtual_tokens=0)
    with pytest.raises(AdaptKitError, match="there are MLP, LSTM"):
        ours.PromptEncoderConfig(encoder_reparameterization_type="GRU")
    with pytest.raises(AdaptKitError, match="carries adapters already"):
        ours.get_peft_model(here.get_base_model(), config(ours, "prefix", None))
    here.save_pretrained(tmp_path)
    with pytest.raises(AdaptKitError, match=r"prompt_embeddings is \[4, 32\].*ask for"):
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"token_dim": None}))
        ours.PeftModel.from_pretrained(loaded(FIXTURES / "models" / "llama", "llama"), tmp_path)
    checkpointed = llama()
    checkpointed.gradient_checkpointing_enable()
    with pytest.raises(AdaptKitError, match="gradient checkpointing"):
        ours.get_peft_model(checkpointed, config(ours, "prefix", "CAUSAL_LM"))
    distil = transformers.DistilBertModel(transformers.DistilBertConfig(vocab_size=64, dim=32, n_layers=1, n_heads=4))
    with pytest.raises(AdaptKitError, match="reads no cache of keys and values"):
        ours.get_peft_model(distil, config(ours, "prefix", None))


@pytest.mark.parametrize("kind", CORE)
def test_a_copy_is_a_model_of_its_own(kind: str):
    """deepcopy takes the virtual tokens along; the first model does not notice."""
    here = twins("llama", kind)[1]
    running = numbers(here, input_ids=IDS)["logits"]
    copied = copy.deepcopy(here)
    for p in here.prompt_encoder.parameters():
        p.data.zero_()

    torch.testing.assert_close(numbers(copied, input_ids=IDS)["logits"], running, atol=0, rtol=0)
    assert not torch.allclose(numbers(here, input_ids=IDS)["logits"], running)
    assert copied.unload() is copied.get_base_model()


TAUGHT = {
    "prompt": {"prompt_tuning_init": "SAMPLE_VOCAB"},
    "mlp": {"encoder_hidden_size": 64},
    "prefix": {"prefix_projection": True, "encoder_hidden_size": 32},
}


def told(steps: int) -> list[dict[str, torch.Tensor]]:
    """Batches of stories in a style that the model was not trained on."""
    sys.path.insert(0, str(ROOT / "fixtures"))
    from making.training import stories

    batch = stories(7, 4, str.upper, 120)
    return [batch() for _ in range(steps)]


def taught(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    """The mean loss after training."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for batch in batches:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judged(model.eval(), batches)


def judged(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    with torch.no_grad():
        return sum(model(**b).loss.item() for b in batches[:4]) / 4


@pytest.mark.slow
@pytest.mark.parametrize(("room", "other"), [(ours, theirs), (theirs, ours)], ids=["here-there", "there-here"])
@pytest.mark.parametrize("kind", TAUGHT)
def test_a_language_model_is_taught_in_one_and_runs_in_the_other(kind: str, room: Any, other: Any, tmp_path: Path):
    """A loss that falls, a folder, and the same loss in the other library."""
    batches, folder = told(30), FIXTURES / "models" / "llama"
    torch.manual_seed(0)
    name = KINDS[kind][0]
    settings = getattr(room, name)(num_virtual_tokens=6, task_type="CAUSAL_LM", **TAUGHT[kind])
    model = quietly(room.get_peft_model, loaded(folder, "llama"), settings)
    before = judged(model, batches)
    after = taught(model, batches)
    quietly(model.save_pretrained, tmp_path)
    again = quietly(other.PeftModel.from_pretrained, loaded(folder, "llama"), tmp_path).eval()

    assert after < 0.9 * before
    assert judged(again, batches) == pytest.approx(after, rel=1e-4)


def test_a_cache_of_a_fixed_size_is_refused():
    """Its mask comes ready-made, without room for virtual tokens."""
    here = twins("llama", "prompt")[1]
    with pytest.raises(AdaptKitError, match=r"attention_mask is not \(batch, length\)"):
        here.generate(IDS, attention_mask=MASK, cache_implementation="static", **STEPS)


def test_a_head_that_does_not_fit_is_refused_and_the_model_is_as_it_was(tmp_path: Path):
    """Every tensor of the file and of the head finds its other half."""
    here = twins("bert", "prompt")[1]
    here.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    for change, said in (
        ({"base_model.classifier.bias": None}, "holds nothing for classifier.bias"),
        ({"base_model.classifier.bias": torch.zeros(9)}, r"classifier.bias is \[9\], the model has \[3\]"),
    ):
        save_file({k: v for k, v in (whole | change).items() if v is not None}, file)
        base = base_of("bert")
        with pytest.raises(AdaptKitError, match=said):
            ours.PeftModel.from_pretrained(base, tmp_path)
        assert all(p.requires_grad for p in base.parameters())
        assert set(base.state_dict()) == set(base_of("bert").state_dict())
