"""export-onnx: what is decided and refused before anything is traced, and the exam that every graph has to pass."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx_families import FAMILIES, model_of
from places import FIXTURES

import adaptkit
from adaptkit.errors import Mismatch, Usage
from adaptkit.export.task import TASKS, task_of

LLAMA, LORA = FIXTURES / "models" / "llama", FIXTURES / "adapters" / "llama" / "lora"
BERT = FIXTURES / "models" / "bert"


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """No test writes into a real home."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return folder


@pytest.mark.parametrize(
    "said, task",
    [
        ({"architectures": ["LlamaForCausalLM"]}, "text-generation"),
        ({"architectures": ["GPT2LMHeadModel"]}, "text-generation"),
        ({"architectures": ["BertForSequenceClassification"]}, "text-classification"),
        ({"architectures": ["RobertaForTokenClassification"]}, "token-classification"),
        ({"architectures": ["BertForQuestionAnswering"]}, "question-answering"),
        ({"architectures": ["BertForMaskedLM"]}, "fill-mask"),
        ({"architectures": ["BertModel"]}, "feature-extraction"),
        ({"architectures": ["ViTForImageClassification"]}, "image-classification"),
        ({"architectures": ["CLIPModel"], "model_type": "clip"}, "zero-shot-image-classification"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "text2text-generation"),
        ({"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}, "automatic-speech-recognition"),
    ],
)  # fmt: skip
def test_the_architecture_says_the_task(said: dict, task: str):
    """config.json is enough to know which head a model has."""
    assert task_of(said).name == task


@pytest.mark.parametrize(
    "said, asked, words",
    [
        ({"architectures": ["LlavaForConditionalGeneration"]}, None, "a graph for each part"),
        ({"architectures": ["SomethingElse"]}, None, "no task that can be exported"),
        ({}, None, "names no architecture"),
        ({"architectures": ["BertModel"]}, "translation", "is not a task"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "seq2seq", "no encoder-decoder"),
        ({"architectures": ["T5Model"], "is_encoder_decoder": True}, "text-generation", "is an encoder-decoder"),
    ],
)
def test_a_model_without_a_graph_is_refused_by_name(said: dict, asked: str | None, words: str):
    """Never half an export: who cannot be exported is told why."""
    with pytest.raises((Mismatch, Usage), match=words):
        task_of(said, asked)


def test_every_task_has_a_class_of_transformers():
    """A name that transformers lost would only show when someone needs it."""
    import transformers

    assert [t.name for t in TASKS.values() if not hasattr(transformers, t.auto)] == []


REFUSED = {
    "bfloat16 on a CPU": ({"dtype": "bfloat16"}, "no bfloat16 Add and Mul on a CPU"),
    "bfloat16 unchecked without a GPU": ({"dtype": "bfloat16", "no_verify": True}, "no bfloat16 Add and Mul on a CPU"),
    "opset": ({"opset": 99}, "99 is not between 18 and 23"),
    "dtype": ({"dtype": "float8"}, "not one of float32"),
    "quantize": ({"quantize": "int2"}, "not one of int8, int8_weight_only, int4"),
    "device": ({"device": "tpu"}, "not one of auto, cpu, cuda"),
    "weights of nothing": ({"weights": [1.0]}, "there are none"),
    "quantising float16": ({"quantize": "int8", "dtype": "float16"}, "int8 does not start from float16"),
    "a file": ({"model": LLAMA / "model.safetensors"}, "is a weight file"),
    "an adapter of another model": ({"adapters": [FIXTURES / "adapters" / "gpt2" / "lora"]}, "not|no"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_says_why_and_leaves_nothing(case: str, tmp_path: Path):
    """One sentence, and no folder that looks like an export."""
    options, words = REFUSED[case]
    options = {"model": LLAMA, "adapters": (), **options}
    with pytest.raises(adaptkit.AdaptKitError, match=words):
        adaptkit.export_onnx(options.pop("model"), options.pop("adapters"), tmp_path / "out", **options)

    assert list(tmp_path.iterdir()) == []


STATES = {
    "MambaForCausalLM": ({"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 96, "state_size": 4}, "no cache of keys"),
    "T5Model": ({"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 96}, "does not run on the"),
    "Wav2Vec2Model": ({"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}, "reads input_values"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STATES)
def test_a_model_with_another_state_or_input_is_refused_by_name(kind: str, tmp_path: Path):
    """A graph of keys and values, or of token ids, would be half of it."""
    import transformers

    settings, words = STATES[kind]
    config = getattr(transformers, kind).config_class(**settings)
    with pytest.raises(Mismatch, match=f"{kind} .*{words}"):
        adaptkit.export_onnx(getattr(transformers, kind)(config).eval(), (), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_was_never_trained_is_not_made_up(tmp_path: Path):
    """transformers starts a missing head at random with a warning; an export of it would be noise."""
    model_of("BERT, features").save_pretrained(tmp_path / "base")

    with pytest.raises(Mismatch, match="holds no classifier.bias, classifier.weight, which text-classification needs"):
        adaptkit.export_onnx(tmp_path / "base", (), tmp_path / "out", task="text-classification")
    assert not (tmp_path / "out").exists()


def test_a_quantised_model_is_refused(tmp_path: Path):
    """Its stored numbers are not its weights, whatever loads them."""
    shutil.copytree(BERT, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )

    with pytest.raises(Mismatch, match="is quantised .gptq.; export the 16-bit model"):
        adaptkit.export_onnx(tmp_path / "base", (), tmp_path / "out")


def test_a_live_model_with_a_merged_adapter_is_left_alone(tmp_path: Path):
    """Giving the model back would take that adapter out as well."""
    from adaptkit import LoRA, Select, attach, live

    model = model_of("Llama")
    attach(model, LoRA(r=2), Select(r".*q_proj"))
    live.merge(model)
    with pytest.raises(Mismatch, match="is merged into model.layers.0.self_attn.q_proj at the moment"):
        adaptkit.export_onnx(model, (), tmp_path / "out")
    assert live.adapted_modules(model)["model.layers.0.self_attn.q_proj"].merged_adapters == ["default"]


def test_a_rehearsal_says_what_would_be_made_and_writes_nothing(tmp_path: Path):
    """--dry-run finds an adapter that does not fit, and loads no model."""
    made = adaptkit.export_onnx(LLAMA, LORA, tmp_path / "out", dry_run=True)

    assert (made.task, list(made.files), made.adapters, made.written) == ("text-generation", ["model.onnx"], 1, False)
    assert made.bytes > 2_000_000
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_what_to_install(tmp_path: Path):
    """Without the extra, one line."""
    code = (
        "import sys, importlib.util; real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'onnxruntime' else real(name, *a)\n"
        "from adaptkit.cli.app import run; sys.exit(run(sys.argv[1:]))"
    )
    words = ["export-onnx", str(LLAMA), "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)

    assert done.returncode == 4
    assert done.stderr == "error: exporting needs onnxruntime; pip install adaptkit[onnx]\n"


# the exam


def players(family: str, kind: str, names: list[str]):
    from adaptkit.export import players, verify
    from adaptkit.export.exam import exam

    model = model_of(family)
    return exam(model, kind, names, lambda text: None), model, players.Torch(model, kind, names), verify


def test_a_model_passes_its_own_exam():
    """The same model twice differs by nothing, and its noise is that of float32."""
    exam, _, player, verify = players("Mistral, sliding", "decoder", ["logits"])
    found = verify.compared(exam, player)

    assert (found.prefill, found.decode, found.greedy, found.of) == (0.0, 0.0, 80, 80)
    assert 0 < found.noise < 1e-4
    assert (3, 13) in found.shapes and (2, 5) in found.shapes


@pytest.mark.parametrize("change", ["weight", "mask", "positions", "window"])
def test_a_model_that_differs_fails(change: str):
    """What a graph can lose without a word: a number, the mask of padding, positions, the window of attention."""
    family = "GPT-2" if change == "positions" else "Mistral, sliding"
    exam, model, player, verify = players(family, "decoder", ["logits"])
    step = player.step
    if change == "weight":
        model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 0.05
    if change == "mask":
        player.step = lambda words: step({**words, "attention_mask": np.ones_like(words["attention_mask"])})
    if change == "positions":
        player.step = lambda words: step({k: v for k, v in words.items() if k != "position_ids"})
    if change == "window":
        model.config.sliding_window = 10**6
    found = verify.compared(exam, player)

    assert not found.ok
    with pytest.raises(Mismatch, match="differs from torch by .* is allowed, the model's own noise is"):
        verify.refuse(found, "text-generation")


def test_nan_does_not_pass():
    """A comparison with NaN is never true, and so must be asked the right way round."""
    exam, _, player, verify = players("BERT, features", "encoder", ["last_hidden_state"])
    step = player.step
    player.step = lambda words: {n: v * np.nan for n, v in step(words).items()}
    found = verify.compared(exam, player)

    assert not found.ok
    with pytest.raises(Mismatch, match="differs from torch by nan"):
        verify.refuse(found, "feature-extraction")


def test_a_tie_is_no_error_and_another_token_is():
    """Where two tokens are as likely as the bound can tell, either is right, and the rest of the text is another one."""
    from adaptkit.export.verify import Checked, _count

    mine, theirs = np.array([[1, 2, 3, 4]]), np.array([[1, 2, 9, 9]])
    for margin, counted in ((1e-7, (2, 3, 1)), (1.0, (2, 4, 0))):
        found = Checked(0.0, 0.0, None, 1e-5, 1.0)
        _count(found, mine, theirs, np.full((1, 4), margin))
        assert (found.greedy, found.of, found.ties) == counted
        assert found.ok == (margin == 1e-7)


@pytest.mark.parametrize("family", ["Llama, tied", "Mixtral", "T5", "Gemma 2 (sliding, soft caps)"])
def test_a_model_widened_for_its_noise_is_the_same_afterwards(family: str):
    """Numbers one size up live only while their module runs."""
    import torch

    from adaptkit.export.wide import widened

    model = model_of(family)
    before = {n: (p.data_ptr(), p.dtype) for n, p in model.state_dict().items()}
    words = {"input_ids": torch.ones(1, 3, dtype=torch.int64)}
    words |= {"decoder_input_ids": words["input_ids"]} if family == "T5" else {}
    from adaptkit.export.experts import plain_experts

    with torch.no_grad(), plain_experts(model), widened(model):
        assert model(**words).logits.dtype is torch.float64

    assert {n: (p.data_ptr(), p.dtype) for n, p in model.state_dict().items()} == before
    assert model(**words).logits.dtype is torch.float32


def test_a_large_head_is_widened_in_parts(monkeypatch: pytest.MonkeyPatch):
    """The same float64, to its own rounding, without all of it at once; afterwards the head is what it was."""
    import torch

    from adaptkit.export import wide

    model, words = model_of("Phi"), {"input_ids": torch.tensor([[1, 5, 9]])}
    assert model.lm_head.bias is not None
    with torch.no_grad():
        with wide.widened(model):
            whole = model(**words).logits
        monkeypatch.setattr(wide, "LARGE", 100)
        split, pieces = torch.Tensor.split, []
        monkeypatch.setattr(torch.Tensor, "split", lambda t, *a: pieces.append(split(t, *a)) or pieces[-1])
        with wide.widened(model):
            parts = model(**words).logits
    assert max(len(p) for p in pieces) == 32 and max(t.numel() for p in pieces for t in p) <= 100
    assert (parts - whole).abs().max() < 1e-14
    assert "forward" not in vars(model.lm_head)


def test_every_family_of_the_table_is_one_that_a_task_is_known_for():
    """The table in docs/onnx.md names no family that config.json would not lead to."""
    found = {family: task_of({"architectures": [kind], "model_type": _type(config), "is_encoder_decoder": two})
             for family, (kind, config, _) in FAMILIES.items() for two in [kind.startswith(("T5", "Bart", "Whisper"))]}  # fmt: skip

    assert len(found) == len(FAMILIES)


def _type(config: str) -> str:
    import transformers

    return getattr(transformers, config).model_type


def test_importing_the_runtime_is_the_only_way_and_it_is_told_not_to_report(home: Path):
    """onnxruntime writes a device id into the home folder when it is imported, unless it is told not to before."""
    code = "from adaptkit.export import extra; print(extra.runtime().__name__)"
    env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)

    assert done.stdout == "onnxruntime\n"
    assert [str(p) for p in home.rglob("*")] == []


def test_only_one_file_imports_onnxruntime_at_its_top():
    """A second place would be one that forgets the switch."""
    package = Path(adaptkit.__file__).parent
    lines = [
        f"{f.relative_to(package)}: {line}"
        for f in package.rglob("*.py")
        for line in f.read_text().splitlines()
        if line.startswith(("import onnxruntime", "from onnxruntime"))
    ]
    assert lines == []


def test_the_result_can_be_printed_as_json(tmp_path: Path):
    """A script reads what a person reads."""
    from adaptkit.cli.words import as_json

    made = json.loads(as_json(adaptkit.export_onnx(BERT, (), tmp_path / "out", dry_run=True)))

    assert made["task"] == "text-classification" and made["opset"] == 20
