"""export-onnx, before anything is traced: heads that were trained for something else, numbers that do not fit, live models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_families import model_of
from places import FIXTURES

import adaptkit
from adaptkit import Adapter, LoRA, Site
from adaptkit.errors import Corrupt, Mismatch, Usage
from adaptkit.export.task import task_of

LLAMA, LORA = FIXTURES / "models" / "llama", FIXTURES / "adapters" / "llama" / "lora"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """BERT with no head and with one, in folders."""
    folder = tmp_path_factory.mktemp("bases")
    model_of("BERT, features").save_pretrained(folder / "bare")
    model_of("BERT, classes").save_pretrained(folder / "classes")
    return folder


def headed(kind: str | None, folder: str = "trained") -> Adapter:
    """An adapter that brings a head, with PEFT's word for what it was trained for."""
    head = {"classifier.weight": np.ones((2, 32), "f4"), "classifier.bias": np.zeros(2, "f4")}
    about = {"modules_to_save": ["classifier"]} | ({"task_type": kind} if kind else {})
    return Adapter({}, head, {"path": folder}, about)


@pytest.mark.parametrize(
    ("base", "kind", "asked", "words"),
    [
        ("bare", "SEQ_CLS", None, "trained for SEQ_CLS.* says feature-extraction; .*--task text-classification or"),
        ("classes", "TOKEN_CLS", None, "trained for TOKEN_CLS.* says text-classification; say which with --task token-c"),
        ("classes", "TOKEN_CLS", "text-classification", "'?trained'? was trained for TOKEN_CLS; leave it out"),
        ("classes", None, "token-classification", "its head would be taken for another"),
        ("bare", "SEQ_CLS", "feature-extraction", "leaves out classifier.bias, classifier.weight, which the adapter"),
        ("bare", None, None, "leaves out classifier.bias, classifier.weight, which the adapter brings"),
    ],
)  # fmt: skip
def test_a_trained_head_is_neither_lost_nor_taken_for_another(
    bases: Path, tmp_path: Path, base: str, kind: str | None, asked: str | None, words: str
):
    """Heads of texts and of tokens have one name and shape; a task without a head would drop what was trained."""
    with pytest.raises(Mismatch, match=words) as caught:
        adaptkit.export_onnx(bases / base, headed(kind), tmp_path / "out", task=asked)
    assert ".partial" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("base", "kind", "asked", "task"),
    [
        ("bare", "SEQ_CLS", "text-classification", "text-classification"),
        ("classes", "SEQ_CLS", None, "text-classification"),
        ("classes", "TOKEN_CLS", "token-classification", "token-classification"),
    ],
)
def test_the_task_that_a_head_was_trained_for_is_taken(bases: Path, tmp_path: Path, base, kind, asked, task):
    """The adapter brings the head, so the base need not have one."""
    made = adaptkit.export_onnx(bases / base, headed(kind), tmp_path / "out", task=asked, dry_run=True)

    assert made.task == task


@pytest.mark.parametrize("said", [5, "LlamaForCausalLM", None, [5], {}])
def test_architectures_that_are_no_list_of_names_are_no_bug_of_ours(said: Any):
    """config.json comes from anywhere."""
    with pytest.raises(Mismatch, match="config.json: names no architecture"):
        task_of({"architectures": said})


def test_config_json_names_the_class_that_was_traced_and_no_code_that_stays_behind():
    """Code of strangers is not copied; the head may be an adapter's; a setting of the wrong kind is no bug of ours."""
    from adaptkit.export.folder import config_text

    config = {"architectures": ["BertModel"], "auto_map": {"AutoModel": "theirs.Model"}, "transformers.js_config": 5}
    made = json.loads(config_text(config, ["model"], "float32", "BertForSequenceClassification"))

    assert made == {
        "architectures": ["BertForSequenceClassification"],
        "transformers.js_config": {"use_external_data_format": {"model.onnx": 1}},
    }


def test_adapters_of_like_names_get_files_of_their_own():
    """A folder may be called what a second one of another name would be; some disks do not tell capitals."""
    from adaptkit.export.kept import kept

    paths = ["/runs/final_2", "/runs/1/final", "/runs/2/final", "/runs/FINAL"]

    found = kept([Adapter(meta={"path": path}) for path in paths])

    assert list(found.adapters) == ["final_2", "final", "final_3", "FINAL_4"]
    assert [a.meta["path"] for a in found.adapters.values()] == paths


def test_numbers_too_large_for_float16_are_refused_unchecked_as_well(tmp_path: Path):
    """transformers casts them to infinity without a word."""
    import torch

    model = model_of("Llama").to(torch.bfloat16)
    model.model.embed_tokens.weight.data[3, 3] = 1e5
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(Mismatch, match="numbers of model.embed_tokens.weight are too large for float16"):
        adaptkit.export_onnx(tmp_path / "base", (), tmp_path / "out", dtype="float16", no_verify=True)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"vocab_size": 999}, "tensors have other shapes than config.json says"),
        ({"num_attention_heads": 0}, "does not load it for text-generation: "),
    ],
)
def test_settings_that_do_not_fit_the_numbers_are_refused_in_words(tmp_path: Path, said: dict[str, int], words: str):
    """No advice for programmers of transformers, and no bug of ours."""
    model_of("Llama").save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    with pytest.raises(adaptkit.AdaptKitError, match=f"base: .*{words}"):
        adaptkit.export_onnx(tmp_path / "base", (), tmp_path / "out", no_verify=True)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_nan_is_not_called_too_large(tmp_path: Path):
    """The model is broken, whatever the dtype."""
    model = model_of("Llama")
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(Corrupt, match="base: model.norm.weight holds NaN"):
        adaptkit.export_onnx(tmp_path / "base", (), tmp_path / "out", dtype="float16", no_verify=True)


def test_a_live_model_that_gives_tuples_is_lent_with_names_and_gives_tuples_afterwards():
    """ "return_dict": false of the live model's own config."""
    from adaptkit.export.lent import lent

    model = model_of("BERT, classes", return_dict=False)
    words = {"input_ids": model.dummy_inputs["input_ids"] % 60}
    with lent(model, [], None) as module:
        assert module(**words).logits.shape == (3, 2)
    assert isinstance(model(**words), tuple)


def test_a_folder_that_asks_for_tuples_is_loaded_all_the_same(tmp_path: Path):
    """ "return_dict": false is how some programs run a model, and says nothing of the model."""
    from adaptkit.export.build import graphs
    from adaptkit.export.load import load

    model_of("BERT, classes", return_dict=False).save_pretrained(tmp_path)
    task = task_of({"architectures": ["BertForSequenceClassification"]})

    assert list(graphs(load(tmp_path, task, "float32"), task)[0].outputs) == ["logits"]


def test_torch_giving_nan_is_not_a_difference_of_the_graph():
    """Nobody should report a model whose own numbers overflow as a bug of the export."""
    from adaptkit.export.exam import exam

    model = model_of("Llama")
    model.lm_head.weight.data[0, 0] = float("inf")
    with pytest.raises(Mismatch, match="torch itself gives NaN or infinity for the model in float32"):
        exam(model, "decoder", ["logits"], lambda text: None)


def on_meta() -> Any:
    import torch
    import transformers

    with torch.device("meta"):
        return transformers.LlamaForCausalLM(model_of("Llama").config)


LIVE = {
    "numbers elsewhere": (on_meta, {}, "has no numbers for model.embed_tokens.weight"),
    "bfloat16 on a CPU": (lambda: model_of("Llama").bfloat16(), {"device": "cpu"}, "no bfloat16 Add and Mul on a CPU"),
    "int8 of float16": (lambda: model_of("Llama").half(), {"quantize": "int8"}, "int8 does not start from float16"),
    "another task": (lambda: model_of("Llama"), {"task": "text-classification"}, "is made for text-generation"),
}


@pytest.mark.parametrize("case", LIVE)
def test_a_live_model_that_cannot_be_what_was_asked_is_refused_at_once(case: str, tmp_path: Path):
    """Its dtype, its head and where its numbers are show before torch is asked anything."""
    make, options, words = LIVE[case]
    with pytest.raises((Mismatch, Usage), match=words):
        adaptkit.export_onnx(make(), (), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.peft
def test_a_model_in_peft_s_wrapper_is_refused_with_what_to_do():
    """Its forward takes any words, so a decoder's cache cannot be seen in it."""
    import peft

    from adaptkit.export import lent

    model = peft.get_peft_model(model_of("Llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(Mismatch, match="PeftModelForCausalLM of PEFT hides .* merge_and_unload"):
        lent.suited(model, task_of({"architectures": ["LlamaForCausalLM"]}))


def lora(path: str, name: str = "support") -> Adapter:
    params = {"A": np.ones((2, 32), "f4"), "B": np.ones((32, 2), "f4")}
    return Adapter({path: Site(LoRA(r=2), params)}, meta={"path": name})


def test_a_rehearsal_of_a_live_model_tries_its_adapters_and_its_output(tmp_path: Path):
    """What an export would refuse, a rehearsal refuses; the model is left as it was."""
    from adaptkit import live

    model, site = model_of("Llama"), "model.layers.0.self_attn.q_proj"
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(Mismatch, match="is not a module of this model"):
        adaptkit.export_onnx(model, lora("transformer.h.0"), tmp_path / "out", dry_run=True)
    made = adaptkit.export_onnx(model, lora(site), tmp_path / "out", dry_run=True)
    kept = adaptkit.export_onnx(model, lora(site), tmp_path / "out", dry_run=True, swappable=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(Usage, match="is not empty"):
        adaptkit.export_onnx(model, None, tmp_path / "out", dry_run=True)

    assert (made.adapters, made.written, made.bytes > 1e6) == (1, False, True)
    assert list(kept.files) == ["model.onnx", "support.onnx_adapter"]
    assert not live.attached(model)
    assert all((p == before[n]).all() for n, p in model.state_dict().items())


def test_a_rehearsal_refuses_what_no_slot_of_the_folder_s_model_takes(tmp_path: Path):
    """Merging knows older names and fused experts; a slot is at a module."""
    base, old = FIXTURES / "models" / "mixtral", FIXTURES / "adapters" / "mixtral" / "old-experts"
    with pytest.raises(Mismatch, match="under that name, so it has no slot; export it alone, without --swappable"):
        adaptkit.export_onnx(base, old, tmp_path / "out", swappable=True, dry_run=True)
    with pytest.raises(Mismatch, match="lora: none of .* is it made for another base model"):
        adaptkit.export_onnx(
            LLAMA, FIXTURES / "adapters" / "gpt2" / "lora", tmp_path / "out", swappable=True, no_verify=True
        )
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_is_not_in_the_way_of_a_run_that_goes_on(tmp_path: Path):
    """A folder that was left by the same command is no obstacle, and one of another command is."""
    told: list[tuple[int, int]] = []

    def stopped(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) > 1 and not done:  # the merge is done, tracing begins
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adaptkit.export_onnx(LLAMA, LORA, tmp_path / "out", progress=stopped)

    assert told[-1][1] > 1_000_000  # bytes of the graph
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    assert not adaptkit.export_onnx(LLAMA, LORA, tmp_path / "out", dry_run=True).written
    with pytest.raises(Usage, match="was left by another job"):
        adaptkit.export_onnx(LLAMA, LORA, tmp_path / "out", opset=18, dry_run=True)


def test_an_interrupted_export_is_said_to_go_on():
    """Its merge is kept, so "nothing was written" would be untrue."""
    from adaptkit.cli.app import RESUMED

    assert "export-onnx" in RESUMED


def test_names_in_a_receipt_are_names_wherever_the_command_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """ "." has no name of its own; a path would tell where somebody works."""
    from adaptkit.verbs.export_wish import named

    (tmp_path / "support").mkdir()
    monkeypatch.chdir(tmp_path / "support")

    assert [named(Adapter(meta={"path": p})) for p in (".", "../support", str(tmp_path / "support"))] == ["support"] * 3
