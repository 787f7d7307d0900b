"""Adapters and checkpoints that other people and programs made: merged like PEFT, or refused for a reason that is true."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from places import SHARED

import adaptkit
from adaptkit.errors import AdaptKitError, AdaptKitWarning
from adaptkit.formats.peft.config import read_config
from adaptkit.store.arrays import NUMPY, load, raw_bytes

REAL, SAMPLES = SHARED / "real", SHARED / "samples"
PEFT, FULL = SAMPLES / "peft", SAMPLES / "full_checkpoints"
CONFIGS = sorted((REAL / "configs").glob("*.json"))
ADAPTERS = {p.name[:2]: p for p in sorted((REAL / "adapters").glob("*_*"))}
pytestmark = [
    pytest.mark.skipif(not (CONFIGS and PEFT.exists()), reason="the collection of real files is not here"),
    pytest.mark.filterwarnings("ignore"),
]

# number of the file -> (words of the refusal, what the refusal claims, as a function of the file's text)
MLX = ("settings of MLX", lambda text: "peft_type" not in json.loads(text) and "lora_parameters" in json.loads(text))
HUB = ("settings of AdapterHub", lambda text: "peft_type" not in json.loads(text) and json.loads(text)["model_class"])
REFUSED_CONFIGS = {
    **dict.fromkeys(
        ("018", "026", "028", "058", "060", "076", "086", "098", "112", "152", "212", "216", "252", "254"), MLX
    ),
    **dict.fromkeys(("272", "278", "320"), MLX),
    **dict.fromkeys(("030", "158"), HUB),
    "174": ("does not say peft_type", lambda text: json.loads(text)["framework"] == "jax-tunix-qwix"),
    "214": ("git-lfs pointer", lambda text: text.startswith("version https://git-lfs.github.com/spec/v1")),
    "280": ("enable_lora", lambda text: json.loads(text)["enable_lora"] == [True, False, True]),
    "284": ("settings of transformers", lambda text: json.loads(text)["architectures"] == ["LlamaForCausalLM"]),
}

# number of the folder -> (transformers config, sizes that the adapter touches as it was trained, the others small; head)
CAUSAL, SEQ = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
SMALL = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
GPT2 = {**SMALL, "n_positions": 16}
T5 = {"vocab_size": 64, "d_model": 512, "d_ff": 64}
BASES = {
    "02": ("GPT2Config", {**GPT2, "n_layer": 6, "n_inner": 64}, CAUSAL),
    "04": ("GPT2Config", {**GPT2, "n_layer": 8}, CAUSAL),
    "05": ("GPT2Config", {**GPT2, "n_layer": 12, "n_inner": 64}, SEQ),
    "09": ("GPT2Config", {**GPT2, "n_layer": 12, "n_inner": 64}, CAUSAL),
    "13": ("BertConfig", {**SMALL, "intermediate_size": 64}, "AutoModelForQuestionAnswering"),
    "15": ("DistilBertConfig", {**SMALL, "hidden_dim": 64}, SEQ),
    "27": (
        "T5Config",
        {**T5, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"},
        "AutoModelForSeq2SeqLM",
    ),
    "28": ("T5Config", {**T5, "num_layers": 6, "num_heads": 8}, "AutoModelForSeq2SeqLM"),
    "32": ("GPTNeoXConfig", {**SMALL, "hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 6}, CAUSAL),
    "39": (
        "BertConfig",
        {**SMALL, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 5},
        SEQ,
    ),
    "43": ("BloomConfig", {**SMALL, "hidden_size": 1536, "n_layer": 24, "n_head": 16}, CAUSAL),
}
VIT = ("ViTConfig", {"image_size": 32, "intermediate_size": 64}, "AutoModelForImageClassification")
FOREIGN = ("recognises it", 4)
OTHER_MODELS = {"57": 8, "61": 128, "62": 128, "63": 128, "70": 4}  # MLX's, kohya's and diffusers'
REFUSED = {
    "46": ("virtual tokens [12, 1536], the embedding transformer.wte.weight is [64, 16]", 4),
    **{n: (f"none of {count} adapted modules is in the model", 4) for n, count in OTHER_MODELS.items()},
    "58": ("does not hold its scale", 4),
    **dict.fromkeys(("71", "77", "85"), FOREIGN),
    "84": ("file has 2 bytes, too few for a safetensors header", 3),
    "82": ("holds no tensors", 3),
}

# sample -> (its base, None when it merges, or words of the refusal)
KIND, VIRTUAL = "is not supported (LORA", "has no weight to merge into: it acts on activations"
BAKED = ""  # merges, and its outputs begin with those of the virtual tokens
LLAMA, BIASED = "_base_llama", "_base_llama_attention_bias"
PEFT_SAMPLES = {
    **dict.fromkeys(("adaption_prompt", "boft", "cartridge", "cpt", "hra", "ln_tuning", "loha"), (LLAMA, KIND)),
    **dict.fromkeys(("loha_conv", "lokr", "lokr_both", "multitask_prompt_tuning", "oft"), (LLAMA, KIND)),
    "vera": (LLAMA, KIND),
    **dict.fromkeys(("prefix_tuning", "prefix_tuning_proj"), (LLAMA, VIRTUAL)),
    **dict.fromkeys(("p_tuning", "prompt_tuning"), (LLAMA, BAKED)),
    **dict.fromkeys(("ia3", "lora", "lora_bin", "lora_dora", "lora_embedding", "lora_embedding_noemb"), (LLAMA, None)),
    **dict.fromkeys(
        ("lora_modules_to_save", "lora_rslora", "lora_trainable_tokens", "trainable_tokens", "adalora"), (LLAMA, None)
    ),
    **dict.fromkeys(("lora_bias_all", "lora_bias_lora_only", "lora_lora_bias2"), (BIASED, None)),
    "lora_named_adapter/style": (LLAMA, None),
    "lora_gpt2_conv1d": ("_base_gpt2", None),
    "lora_lora_bias": (LLAMA, "has a trained bias (lora_bias), but the model's layer has none"),
    "lora_conv": (LLAMA, "g is a convolution with 2 groups"),
    "ia3_conv": (LLAMA, "none of 2 adapted modules is in the model"),
    "lora_conv_dora": (LLAMA, "none of 2 adapted modules is in the model"),
    "lora_mha": (LLAMA, "none of 2 adapted modules is in the model"),
    "lora_target_parameters": (LLAMA, "none of 2 adapted modules is in the model"),
}
MERGED_SAMPLES = [name for name, (_, refusal) in PEFT_SAMPLES.items() if refusal is None]
REFUSED_SAMPLES = [name for name, (_, refusal) in PEFT_SAMPLES.items() if refusal]
BARE = {
    "37": ADAPTERS.get("37"),
    **{n: PEFT / n for n in ("ia3_conv", "lora_conv_dora", "lora_mha", "lora_target_parameters")},
}
GOLDEN = "expected_logits_tokens_1_5_9_3.npy"
CHECKPOINTS = (
    "hf_sharded_safetensors",
    "hub_sharded_bin",
    "hub_tied",
    "hf_tied_single",
    "safetensors_save_model_tied",
    "torch_dcp_hf_writer",
    "pth/model_state_dict.pth",
    "pth/legacy_tar.pth",
    "pth/wrapped.pth",
)


def built(recipe: tuple[str, dict, str], folder: Path, dtype: str = "bfloat16") -> Path:
    """A model of random weights, saved by transformers."""
    import torch
    import transformers

    name, sizes, head = recipe
    torch.manual_seed(0)
    model = getattr(transformers, head).from_config(getattr(transformers, name)(**sizes), dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


def opened(folder: Path, head: str = CAUSAL):
    """The model in a folder, in float32, with every tensor of the folder used and none made up."""
    import torch
    import transformers

    model, info = getattr(transformers, head).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def run(model, head: str) -> np.ndarray:
    """What a model says to one fixed input."""
    import torch

    inputs = {"input_ids": torch.tensor([[1, 5, 9, 3, 7, 4, 8]])}
    if head == "AutoModelForImageClassification":
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    if head == "AutoModelForSeq2SeqLM":
        inputs["decoder_input_ids"] = torch.tensor([[0, 4, 6]])
    with torch.no_grad():
        found = model(**inputs)
    both = [found.start_logits, found.end_logits] if head == "AutoModelForQuestionAnswering" else [found.logits]
    return torch.cat(both, -1).numpy()


def adapted(base: Path, adapter: Path, head: str) -> tuple[np.ndarray, np.ndarray]:
    """What PEFT says, without and with the adapter."""
    from peft import PeftModel

    model = opened(base, head)
    plain = run(model, head)
    said = run(PeftModel.from_pretrained(model, str(adapter)).eval(), head)
    del model
    gc.collect()
    return plain, said


def same(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal within what float32 sums differ by."""
    np.testing.assert_allclose(got, expected, atol=1e-5 * max(float(np.abs(expected).max()), 1.0), rtol=1e-4)


def refused(base: Path, adapter: Path, words: str, code: int, out: Path) -> None:
    """Python and the command line say the same one line, with its exit code, and write nothing."""
    with pytest.raises(AdaptKitError) as caught:
        adaptkit.merge(base, adapter, out)
    assert words in str(caught.value)
    command = [sys.executable, "-m", "adaptkit", "merge", str(base), str(adapter), "-o", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.stderr.splitlines() == [f"error: {caught.value}"]
    assert (ran.returncode, caught.value.code, ran.stdout) == (code, code, "")
    assert not list(out.parent.glob(f"*{out.name}*"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_real_config_is_read_whole_or_refused_for_a_true_reason(path: Path):
    """Settings keep the values in the file; a refusal is one of the table's, and what it claims is so."""
    text = path.read_text(encoding="utf-8-sig")
    if path.name[:3] in REFUSED_CONFIGS:
        words, claim = REFUSED_CONFIGS[path.name[:3]]
        with pytest.raises(AdaptKitError) as caught:
            read_config(path)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        assert claim(text)
        return
    assert read_config(path) == json.loads(text)


def test_every_real_file_is_in_a_table():
    """No folder, config or sample of the collection is left out."""
    assert set(ADAPTERS) == {*BASES, *REFUSED, "22", "37"}
    assert set(REFUSED_CONFIGS) <= {p.name[:3] for p in CONFIGS}
    found = {p.parent.relative_to(PEFT).as_posix() for p in PEFT.rglob("adapter_config.json")}
    assert found == set(PEFT_SAMPLES)


@pytest.mark.slow
@pytest.mark.peft
@pytest.mark.parametrize("number", BASES)
def test_a_real_adapter_merges_into_what_peft_runs(number: str, tmp_path: Path, tidy):
    """On a base of the same names and shapes, the merged model says what PEFT's says."""
    head = BASES[number][2]
    dtype = "float32" if number == "43" else "bfloat16"  # a billion numbers: opened as they are, they need no memory
    base = built(BASES[number], tmp_path / "base", dtype)
    plain, expected = adapted(base, ADAPTERS[number], head)

    adaptkit.merge(base, ADAPTERS[number], tmp_path / "out", dtype="float32")

    assert np.abs(expected - plain).max() > 0.01  # the adapter does something, so equality says something
    same(run(opened(tmp_path / "out", head), head), expected)


@pytest.mark.slow
def test_an_adapter_that_was_never_trained_leaves_the_model_as_it_was(tmp_path: Path, tidy):
    """Its lora_B are all zero: a warning says so, and the output equals the base."""
    base = built(VIT, tmp_path / "base")

    with pytest.warns(AdaptKitWarning, match="every update of the adapter is zero"):
        adaptkit.merge(base, ADAPTERS["22"], tmp_path / "out")

    before, after = adaptkit.open_checkpoint(base).entries, adaptkit.open_checkpoint(tmp_path / "out").entries
    assert {n: raw_bytes(e) for n, e in before.items()} == {n: raw_bytes(e) for n, e in after.items()}


@pytest.mark.slow
@pytest.mark.peft
def test_an_adapter_for_names_that_transformers_has_since_changed_still_merges(tmp_path: Path, tidy):
    """The names in files stayed; PEFT is given the adapter under today's names, and noise in place of its zeros."""
    base, head = built(VIT, tmp_path / "base"), VIT[2]
    old, new = _in_old_and_new_names(ADAPTERS["22"], tmp_path)
    plain, expected = adapted(base, new, head)

    adaptkit.merge(base, old, tmp_path / "out", dtype="float32")

    assert np.abs(expected - plain).max() > 0.01
    same(run(opened(tmp_path / "out", head), head), expected)


def _in_old_and_new_names(adapter: Path, folder: Path) -> tuple[Path, Path]:
    import torch
    from safetensors.torch import load_file, save_file

    noise = torch.Generator().manual_seed(0)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {k: torch.randn(v.shape, generator=noise) * 0.02 if ".lora_B." in k else v for k, v in tensors.items()}
    config = json.loads((adapter / "adapter_config.json").read_text())
    renames = {
        ".encoder.layer.": ".layers.",
        ".attention.attention.": ".attention.",
        "query": "q_proj",
        "value": "v_proj",
    }
    for name, renaming in (("old", {}), ("new", renames)):
        (folder / name).mkdir()
        targets = [renaming.get(t, t) for t in config["target_modules"]]
        (folder / name / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
        renamed = {_replaced(k, renaming): v for k, v in tensors.items()}
        save_file(renamed, folder / name / "adapter_model.safetensors")
    return folder / "old", folder / "new"


def _replaced(name: str, renaming: dict[str, str]) -> str:
    for old, new in renaming.items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("number", REFUSED)
def test_a_real_adapter_that_cannot_be_merged_is_refused_in_one_line(number: str, tmp_path: Path):
    """Another kind, another program's, or broken: the reason is said, also by the command, and nothing is written."""
    words, code = REFUSED[number]
    refused(PEFT / "_base_gpt2", ADAPTERS[number], words, code, tmp_path / "out")


def test_what_the_refusals_of_real_adapters_claim_is_so():
    """No PEFT settings where no format recognises the folder, and no tensor in the file that is said to hold none."""
    import torch

    foreign = [n for n, refusal in REFUSED.items() if refusal == FOREIGN]
    assert not [n for n in foreign if list(ADAPTERS[n].glob("adapter_*"))]
    assert torch.load(ADAPTERS["82"] / "adapter_model.bin", weights_only=True) == {}
    assert json.loads((ADAPTERS["46"] / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"


def bare(name: str):
    """(a module of random weights that an adapter of no transformers model fits, an input)"""
    import torch
    from torch import nn

    class Named(nn.Module):
        """Modules by name, run one after the other."""

        def __init__(self, **modules: nn.Module):
            super().__init__()
            self.order = list(modules)
            for k, v in modules.items():
                setattr(self, k, v)

        def forward(self, x):
            for k in self.order:
                x = getattr(self, k)(x)
            return x

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x)[0]

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(3, 8, 12)), nn.Parameter(torch.randn(3, 6, 8))

        def forward(self, x):
            gate, up = (x @ self.gate_up_proj).chunk(2, -1)
            return (gate * up) @ self.down_proj

    torch.manual_seed(0)
    if name == "37":
        return nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2)), torch.randn(3, 10)
    if name == "lora_mha":
        return Attention(), torch.randn(2, 5, 8)
    if name == "lora_target_parameters":
        return Named(experts=Experts()), torch.randn(3, 4, 8)
    into = 8 if name == "ia3_conv" else 3
    convolutions = Named(c1=nn.Conv2d(into, 8, 3, padding=1), c2=nn.Conv2d(8, 8, 1 if name == "lora_conv_dora" else 3))
    return convolutions, torch.randn(2, into, 6, 6)


@pytest.mark.peft
@pytest.mark.parametrize("name", BARE)
def test_an_adapter_of_a_bare_module_merges_into_what_peft_runs(name: str, tmp_path: Path):
    """Convolutions, attention and experts outside any model that transformers knows, in one weight file."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    module, x = bare(name)
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, tmp_path / "model.safetensors")
    with torch.no_grad():
        plain, expected = module(x), PeftModel.from_pretrained(module, str(BARE[name])).eval()(x)

    adaptkit.merge(tmp_path / "model.safetensors", BARE[name], tmp_path / "out")

    fresh, _ = bare(name)
    fresh.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    with torch.no_grad():
        got = fresh.eval()(x)
    assert bool((expected - plain).abs().max() > 1e-4) == (name != "37")  # 37 was never trained: its lora_B is zero
    same(got.numpy(), expected.numpy())


def logits(folder: Path) -> np.ndarray:
    """What the model in a folder says to the tokens that the golden outputs were made from."""
    import torch

    model = opened(folder, CAUSAL)
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9, 3]])).logits.numpy()


@pytest.mark.parametrize("name", MERGED_SAMPLES)
def test_a_sample_merges_into_its_golden_outputs(name: str, tmp_path: Path):
    """The merged model says what PEFT's model said when the sample was made, or what PEFT says now where none was kept."""
    base = PEFT / PEFT_SAMPLES[name][0]

    adaptkit.merge(base, PEFT / name, tmp_path / "out")

    expected = np.load(PEFT / name / GOLDEN) if (PEFT / name / GOLDEN).exists() else _by_peft(base, PEFT / name)
    assert np.abs(expected - logits(base)).max() > 5e-5
    same(logits(tmp_path / "out"), expected)


@pytest.mark.filterwarnings("ignore:the base has no tokenizer")
@pytest.mark.parametrize("name", [n for n, (_, refusal) in PEFT_SAMPLES.items() if refusal == BAKED])
def test_a_sample_with_a_soft_prompt_merges_into_its_golden_outputs(name: str, tmp_path: Path):
    """With the ids of the virtual tokens in front, the old rows of the vocabulary get PEFT's logits."""
    import torch

    merged = adaptkit.merge(PEFT / LLAMA, PEFT / name, tmp_path / "out")

    with torch.no_grad():
        got = opened(tmp_path / "out", CAUSAL)(torch.tensor([[*merged.virtual, 1, 5, 9, 3]])).logits.numpy()
    same(got[..., : merged.virtual[0]], np.load(PEFT / name / GOLDEN))


def _by_peft(base: Path, adapter: Path) -> np.ndarray:
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(opened(base, CAUSAL), str(adapter)).eval()
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9, 3]])).logits.numpy()


def test_the_golden_outputs_of_the_base_are_what_it_says():
    """The yardstick of the samples holds: no adapter, no difference."""
    same(logits(PEFT / LLAMA), np.load(PEFT / LLAMA / GOLDEN))


@pytest.mark.parametrize("name", REFUSED_SAMPLES)
def test_a_sample_that_cannot_be_merged_is_refused_in_one_line(name: str, tmp_path: Path):
    """A kind without a merged weight here, or another base: the reason is said and nothing is written."""
    base, words = PEFT_SAMPLES[name]
    refused(PEFT / base, PEFT / name, words, 4, tmp_path / "out")


def read_by_torch(path: Path) -> dict:
    """The tensors of a file or folder by the libraries that wrote it."""
    import torch
    from safetensors.torch import load_file

    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin"))
        return {k: v for f in files for k, v in read_by_torch(f).items()}
    found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return found.get("state_dict", found)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_full_checkpoint_reads_as_its_own_library_reads_it(name: str):
    """The same names, shapes, dtypes and values, from shards, tied files, zips and pickles before zips."""
    expected = read_by_torch(FULL / name)

    found = adaptkit.open_checkpoint(FULL / name).entries

    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert NUMPY[found[key].dtype] == tensor.numpy().dtype
        np.testing.assert_array_equal(load(found[key]), tensor.numpy(), strict=True)


@pytest.mark.parametrize("path", sorted(FULL.glob("dtypes/*.safetensors")), ids=lambda p: p.stem)
def test_every_dtype_reads_bit_for_bit(path: Path):
    """The shape is the header's, the bytes are those that torch has, and NumPy's values have them too."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    tensor = load_file(path)["x"]
    with safe_open(path, "pt") as file:
        shape, dtype = file.get_slice("x").get_shape(), file.get_slice("x").get_dtype()
    bits = tensor.contiguous().view(torch.uint8).numpy().tobytes()

    entry = adaptkit.open_checkpoint(path).entries["x"]

    assert (list(entry.shape), entry.dtype) == (shape, dtype)
    assert bytes(raw_bytes(entry)) == bits
    assert dtype == "F4" or load(entry).tobytes() == bits  # NumPy has no dtype of two numbers in a byte


@pytest.mark.parametrize("name", ["torch_dcp", "onnx_external_data", "pth"])
def test_a_checkpoint_of_another_kind_is_refused(name: str):
    """Torch's distributed folders, ONNX and a folder of several files have no reading, and it is said which it is."""
    words = "3 weight files and no index" if name == "pth" else "no weights found"

    with pytest.raises(AdaptKitError, match=words) as caught:
        adaptkit.open_checkpoint(FULL / name)

    assert caught.value.code == 3


@pytest.fixture
def tidy(tmp_path: Path):
    """Removes models at once: pytest would keep gigabytes of three runs."""
    import shutil

    yield
    gc.collect()
    shutil.rmtree(tmp_path, ignore_errors=True)
