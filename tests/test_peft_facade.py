"""adaptkit.peft beside real PEFT: the same scripts, the same numbers, and folders that either one reads."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft as theirs
import pytest
import torch
import transformers
from models import inputs_of, loaded
from peft.utils import constants
from peft_zoo import IDS, Sizes, bert, gpt2, llama, t5
from places import FIXTURES
from safetensors.torch import load_file, save_file
from torch import nn

import adaptkit.peft as ours
from adaptkit.errors import AdaptKitError, AdaptKitWarning
from adaptkit.peft import defaults
from adaptkit.tuners.experts import LAYOUT

pytestmark = pytest.mark.peft
MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 10},
    "gaussian": {"r": 4, "init_lora_weights": "gaussian", "target_modules": "all-linear"},
    "rslora": {"r": 4, "use_rslora": True, "target_modules": "all-linear"},
    "dora": {"r": 4, "use_dora": True, "lora_alpha": 3},
    "loose-dora": {"r": 4, "use_dora": True, "init_lora_weights": False},
    "ia3": {},
}
PAIRS = [(m, k) for m in MODELS for k in KINDS]


def config(room: Any, kind: str, **more: Any) -> Any:
    """The same settings, from PEFT or from here."""
    made = room.IA3Config if kind == "ia3" else room.LoraConfig
    return made(**KINDS[kind] | more)


def quietly(make: Any, *args: Any, **kwargs: Any) -> Any:
    """Call PEFT, whose warnings are not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **kwargs)


def stirred(tensors: dict[str, torch.Tensor], seed: int = 1) -> dict[str, torch.Tensor]:
    """Numbers near the fresh ones, that act."""
    torch.manual_seed(seed)
    return {k: v.detach() + 0.2 * torch.randn_like(v) for k, v in tensors.items()}


def twins(model: str, kind: str, **more: Any) -> tuple[nn.Module, nn.Module]:
    """PEFT's model and ours on equal bases, with equal numbers in their adapters."""
    torch.manual_seed(0)
    base = MODELS[model]().eval()
    there = quietly(theirs.get_peft_model, copy.deepcopy(base), config(theirs, kind, **more))
    here = ours.get_peft_model(base, config(ours, kind, **more))
    share(there, here)
    return there.eval(), here.eval()


def share(there: nn.Module, here: nn.Module, name: str = "default", seed: int = 1) -> None:
    """Give both the same numbers, by PEFT's names."""
    numbers = stirred(theirs.get_peft_model_state_dict(there, adapter_name=name, save_embedding_layers=False), seed)
    theirs.set_peft_model_state_dict(there, numbers, adapter_name=name)
    result = ours.set_peft_model_state_dict(here, numbers, adapter_name=name)
    assert not result.missing_keys
    assert not result.unexpected_keys


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def agree(a: nn.Module, b: nn.Module, atol: float = 1e-5) -> None:
    torch.testing.assert_close(logits(b), logits(a), atol=atol, rtol=1e-4)


@pytest.mark.parametrize(("model", "kind"), PAIRS)
def test_names_shapes_settings_counts_and_outputs_are_peft_s(model: str, kind: str):
    """Fresh tensors have PEFT's names, shapes and dtypes; equal numbers give equal logits."""
    there, here = twins(model, kind)
    a, b = theirs.get_peft_model_state_dict(there), ours.get_peft_model_state_dict(here)

    assert {k: (v.shape, v.dtype) for k, v in b.items()} == {k: (v.shape, v.dtype) for k, v in a.items()}
    assert here.get_nb_trainable_parameters() == there.get_nb_trainable_parameters()
    settings = here.peft_config["default"].to_dict()
    assert settings == there.peft_config["default"].to_dict() | {"peft_version": LAYOUT}
    agree(there, here)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("model", MODELS)
def test_a_fresh_adapter_changes_nothing(model: str, kind: str):
    """The first forward is the base's own."""
    torch.manual_seed(0)
    base = MODELS[model]().eval()
    before = logits(base)

    torch.testing.assert_close(logits(ours.get_peft_model(base, config(ours, kind)).eval()), before)


def test_starts_are_those_that_are_asked_for():
    """'gaussian' deviates by 1 / r, False is no no-op."""
    base = llama().eval()
    before = logits(base)
    model = ours.get_peft_model(base, ours.LoraConfig(r=4, init_lora_weights="gaussian"))
    A = torch.cat([v.flatten() for k, v in ours.get_peft_model_state_dict(model).items() if "lora_A" in k])
    model.unload()
    loose = ours.get_peft_model(base, ours.LoraConfig(r=4, init_lora_weights=False))
    changed = logits(loose)
    vectors = ours.get_peft_model(loose.unload(), ours.IA3Config(init_ia3_weights=False))

    assert 0.22 < A.std() < 0.28
    assert not torch.allclose(changed, before, atol=1e-4)
    assert not torch.allclose(logits(vectors), before, atol=1e-4)


TARGETS: dict[str, dict[str, Any]] = {
    "pattern": {"target_modules": r".*layers\.1\..*(up|down)_proj"},
    "layers": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    "one-layer": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "exclude": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0.*"},
    "exclude-list": {"target_modules": "all-linear", "exclude_modules": ["up_proj", "layers.0.self_attn.q_proj"]},
    "patterns": {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 5}},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "embedding-dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "capitals": {"target_modules": "All-Linear", "init_lora_weights": "Gaussian"},
}  # fmt: skip


@pytest.mark.parametrize("case", TARGETS)
def test_targets_choose_what_peft_chooses(case: str, tmp_path: Path):
    """The same modules with the same ranks and scales; the folder is read there with the same result."""
    there, here = twins("llama", "lora", **TARGETS[case])
    base = copy.deepcopy(here)
    agree(there, here)
    here.save_pretrained(tmp_path)

    agree(here, theirs.PeftModel.from_pretrained(base.unload(), tmp_path))


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "ia3"])
@pytest.mark.parametrize("model", MODELS)
def test_training_lands_where_peft_s_training_lands(model: str, kind: str):
    """Twenty steps of AdamW from the same numbers: the same weights."""
    there, here = twins(model, kind)
    more = {"labels": torch.tensor([0, 2])} if model == "bert" else {"labels": IDS}
    for trained in (there, here):
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(20):
            optimizer.zero_grad()
            trained(input_ids=IDS, **more).loss.backward()
            optimizer.step()
    a, b = theirs.get_peft_model_state_dict(there), ours.get_peft_model_state_dict(here)

    for name in a:
        torch.testing.assert_close(b[name], a[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    agree(there, here, atol=1e-3)


def test_dropout_draws_as_peft_draws():
    """With one seed, one training step drops the same inputs."""
    there, here = twins("llama", "lora", lora_dropout=0.3)
    outputs = []
    for model in (there, here):
        torch.manual_seed(5)
        outputs.append(logits(model.train()))

    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(outputs[1], logits(here.eval()), atol=1e-4)


@pytest.mark.parametrize(("model", "kind"), PAIRS)
def test_merging_unmerging_and_unloading(model: str, kind: str):
    """Merged weights are PEFT's; unmerging and unloading give back every byte."""
    there, here = twins(model, kind)
    bare = {k: v.clone() for k, v in copy.deepcopy(here).unload().state_dict().items()}
    adapted = logits(here)

    here.merge_adapter()
    torch.testing.assert_close(logits(here), adapted, atol=1e-4, rtol=1e-4)
    with here.disable_adapter():
        plain = logits(here)
    torch.testing.assert_close(logits(here), adapted, atol=1e-4, rtol=1e-4)
    here.unmerge_adapter()
    torch.testing.assert_close(logits(here), adapted)
    merged, other = copy.deepcopy(here).merge_and_unload(), quietly(there.merge_and_unload)
    unloaded = here.unload()

    state, expected = merged.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name in state:
        torch.testing.assert_close(state[name], expected[name], atol=1e-5, rtol=1e-4)
    assert type(unloaded) is type(MODELS[model]())
    assert all(torch.equal(v, bare[k]) for k, v in unloaded.state_dict().items())
    assert all(p.requires_grad for p in unloaded.parameters())
    torch.testing.assert_close(logits(unloaded), plain, rtol=0, atol=0)


@pytest.mark.parametrize(("model", "kind"), PAIRS)
def test_folders_go_both_ways(model: str, kind: str, tmp_path: Path):
    """What is saved here loads there with the same logits, and the reverse; the settings that matter are equal."""
    there, here = twins(model, kind)
    expected = logits(there)
    base = copy.deepcopy(here).unload()
    here.save_pretrained(tmp_path / "here")
    quietly(there.save_pretrained, tmp_path / "there")

    back = ours.PeftModel.from_pretrained(copy.deepcopy(base).train(), tmp_path / "there")
    torch.testing.assert_close(logits(back), expected, atol=1e-5, rtol=1e-4)
    again = theirs.PeftModel.from_pretrained(base, tmp_path / "here")
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-4)
    a, b = (json.loads((tmp_path / p / "adapter_config.json").read_text()) for p in ("there", "here"))
    for settings in (a, b):
        settings.pop("peft_version")
        settings.update({k: sorted(v) for k, v in settings.items() if isinstance(v, list)})
    assert b == a
    assert not back.training
    assert not any(p.requires_grad for p in back.parameters())
    assert ours.PeftConfig.from_pretrained(tmp_path / "there").target_modules == set(a["target_modules"])


FIXED = [
    "llama/lora",
    "llama/rslora",
    "llama/dora",
    "llama/ia3",
    "llama/bf16",
    "llama/layers",
    "llama/rank-alpha-patterns",
]
FIXED += ["llama/exclude-modules", "llama/embedding", "gpt2/lora", "gpt2/dora", "gpt2/ia3", "gpt2/embedding"]
FIXED += ["llama/modules-to-save", "llama/trainable-tokens", "llama/pissa", "llama/olora", "llama/lm-head"]
FIXED += [
    "llama-untied-tiny/bias-all",
    "llama-untied-tiny/bias-lora-only",
    "llama-untied-tiny/lora-bias",
    "gpt2/bias-all",
]
FIXED += ["llama-untied-tiny/dora-rslora", "llama-untied-tiny/ia3-bias", "bert/bias-all", "bert/lora", "bert/ia3"]
FIXED += ["mixtral/target-parameters", "custom/mha", "custom/conv", "custom/conv-dora", "custom/embedding-dora"]
FIXED += ["custom/ia3-conv"]


@pytest.mark.parametrize("case", FIXED)
def test_adapters_that_peft_made_give_what_peft_gave(case: str):
    """Fixtures: the logits lie beside the adapter."""
    family = case.partition("/")[0]
    folder = FIXTURES / "adapters" / case
    model = ours.PeftModel.from_pretrained(loaded(FIXTURES / "models" / family, family), folder)
    inputs = json.loads((folder / "expect.json").read_text())["inputs"]
    with torch.no_grad():
        found = model(**inputs_of(inputs))
    if family == "custom":
        got = found.numpy()
    else:
        got = (found.last_hidden_state if family == "minilm" else found.logits).float().numpy()

    np.testing.assert_allclose(got, np.load(folder / "expected.npy"), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("case", "why"), [("llama/kasa", "kasa"), ("llama/bdlora", "bdlora")])
def test_folders_that_hold_more_are_refused(case: str, why: str):
    """A sentence, and a model that was not touched."""
    family = case.partition("/")[0]
    base = loaded(FIXTURES / "models" / family, family)
    names = [n for n, _ in base.named_parameters()]

    with pytest.raises(AdaptKitError, match=why):
        ours.PeftModel.from_pretrained(base, FIXTURES / "adapters" / case)
    assert [n for n, _ in base.named_parameters()] == names


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_several_adapters(kind: str, tmp_path: Path):
    """Two act together as in PEFT; one is deleted; each is saved in a folder of its own."""
    there, here = twins("llama", kind)
    more = {"target_modules": ["k_proj", "down_proj"]} | (
        {"feedforward_modules": ["down_proj"]} if kind == "ia3" else {}
    )
    there.add_adapter("other", config(theirs, kind, **more))
    here.add_adapter("other", config(ours, kind, **more))
    share(there, here, "other", seed=2)
    assert here.active_adapter == here.active_adapters[0] == "default"
    agree(there, here)
    there.base_model.set_adapter(["default", "other"])
    here.base_model.set_adapter(["default", "other"])
    agree(there, here)
    both = logits(here)
    assert [n for n, p in here.named_parameters() if p.requires_grad and "other" in n]
    with there.disable_adapter(), here.disable_adapter():
        agree(there, here)
    here.save_pretrained(tmp_path)
    base = copy.deepcopy(here).unload()

    for model in (here, there):
        model.set_adapter("other")
    agree(there, here)
    assert not torch.allclose(logits(here), both, atol=1e-4)
    assert here.get_nb_trainable_parameters() == there.get_nb_trainable_parameters()
    here.delete_adapter("default")
    there.delete_adapter("default")
    agree(there, here)
    assert list(here.peft_config) == ["other"]
    quietly(there.save_pretrained, tmp_path / "theirs")

    read = ours.PeftModel.from_pretrained(base, tmp_path)
    read.load_adapter(tmp_path / "theirs", "other", subfolder="other", is_trainable=True)
    assert read.active_adapters == ["default"]
    assert any(p.requires_grad for p in read.parameters())
    read.base_model.set_adapter(["default", "other"], inference_mode=True)
    torch.testing.assert_close(logits(read), both, atol=1e-5, rtol=1e-4)
    merged = read.merge_and_unload(adapter_names=["default", "other"])
    torch.testing.assert_close(logits(merged), both, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_generating_is_equal(model: str):
    """Greedy tokens of a causal model; the class follows the task, and the model's own names are there."""
    there, here = twins(model, "lora", task_type="CAUSAL_LM")
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    assert isinstance(here, ours.PeftModelForCausalLM)
    assert torch.equal(here.generate(input_ids=IDS, **kwargs), there.generate(input_ids=IDS, **kwargs))
    assert here.config is here.get_base_model().config
    assert here.base_model.model is here.get_base_model()


class Convolved(nn.Module):
    """A model without settings: kernels of two shapes, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).mean((2, 3)))


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_convolutions_have_peft_s_shapes(kind: str, tmp_path: Path):
    """Kernels of a model that is no transformer: equal outputs, and folders both ways."""
    torch.manual_seed(0)
    base, x = Convolved(), torch.randn(2, 3, 6, 6)
    targets = {"target_modules": ["first", "second", "head"]}
    targets |= {"feedforward_modules": ["second"]} if kind == "ia3" else {}
    there = theirs.get_peft_model(copy.deepcopy(base), config(theirs, kind, **targets))
    here = ours.get_peft_model(copy.deepcopy(base), config(ours, kind, **targets))
    share(there, here)
    expected = there(x)
    torch.testing.assert_close(here(x), expected, atol=1e-5, rtol=1e-4)
    here.save_pretrained(tmp_path / "here")
    quietly(there.save_pretrained, tmp_path / "there")

    back = ours.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "there")
    torch.testing.assert_close(back(x), expected, atol=1e-5, rtol=1e-4)
    again = theirs.PeftModel.from_pretrained(base, tmp_path / "here")
    torch.testing.assert_close(again(x), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(here.merge_and_unload()(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_a_short_base_has_float32_adapters_as_in_peft(kind: str):
    """bfloat16 weights: equal tensors and outputs; merging rounds once."""
    torch.manual_seed(0)
    base = llama().eval().bfloat16()
    there = theirs.get_peft_model(copy.deepcopy(base), config(theirs, kind))
    here = ours.get_peft_model(base, config(ours, kind))
    share(there, here)

    assert {v.dtype for v in ours.get_peft_model_state_dict(here).values()} == {torch.float32}
    torch.testing.assert_close(logits(here), logits(there), atol=2e-2, rtol=2e-2)
    merged, other = here.merge_and_unload(), quietly(there.merge_and_unload)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    for name, value in other.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, atol=1e-3, rtol=1e-2)


def test_an_encoder_and_decoder_generates_as_in_peft():
    """T5 by its task."""
    torch.manual_seed(0)
    base = t5().eval()
    there = theirs.get_peft_model(copy.deepcopy(base), theirs.LoraConfig(task_type="SEQ_2_SEQ_LM"))
    here = ours.get_peft_model(base, ours.LoraConfig(task_type=ours.TaskType.SEQ_2_SEQ_LM))
    share(there, here)

    assert isinstance(here, ours.PeftModelForSeq2SeqLM)
    a, b = (m.eval().generate(input_ids=IDS, max_new_tokens=5, do_sample=False) for m in (there, here))
    assert torch.equal(b, a)
    torch.testing.assert_close(here(input_ids=IDS, labels=IDS).loss, there(input_ids=IDS, labels=IDS).loss)


def test_printing_is_equal(capsys):
    """The line that scripts print."""
    there, here = twins("bert", "lora")
    there.print_trainable_parameters()
    here.print_trainable_parameters()

    first, second = capsys.readouterr().out.splitlines()
    assert second == first


def test_tuner_models_work_alone():
    """LoraModel and IA3Model on a bare model, with PEFT's names for that."""
    for a, b, kind in ((theirs.LoraModel, ours.LoraModel, "lora"), (theirs.IA3Model, ours.IA3Model, "ia3")):
        torch.manual_seed(0)
        base = llama().eval()
        there = a(copy.deepcopy(base), config(theirs, kind, target_modules=["q_proj"], **_flat(kind)), "default")
        here = b(base, config(ours, kind, target_modules=["q_proj"], **_flat(kind)), "default")
        numbers = stirred(theirs.get_peft_model_state_dict(there))
        theirs.set_peft_model_state_dict(there, numbers)
        assert not ours.set_peft_model_state_dict(here, numbers).missing_keys
        agree(there, here)
        torch.testing.assert_close(logits(here.merge_and_unload()), logits(there), atol=1e-4, rtol=1e-4)


def _flat(kind: str) -> dict[str, Any]:
    return {"feedforward_modules": []} if kind == "ia3" else {}


SHAPES = {
    "llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig, "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config, "gemma": transformers.GemmaConfig, "gpt2": transformers.GPT2Config,
    "bert": transformers.BertConfig, "roberta": transformers.RobertaConfig, "distilbert": transformers.DistilBertConfig,
    "t5": transformers.T5Config, "opt": transformers.OPTConfig, "gpt_neox": transformers.GPTNeoXConfig,
    "bloom": transformers.BloomConfig, "vit": transformers.ViTConfig,
}  # fmt: skip
SMALL = Sizes | {
    "num_key_value_heads": 2, "head_dim": 8, "n_embd": 32, "n_layer": 2, "n_head": 4, "d_model": 32, "d_kv": 8, "d_ff": 48,
    "num_layers": 2, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "ffn_dim": 48, "image_size": 16,
    "patch_size": 8, "word_embed_proj_dim": 32, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
def test_models_have_targets_by_default(kind: str):
    """Without target_modules a model's type decides, as in PEFT where PEFT knows the type."""
    made = SHAPES[kind]
    model = transformers.AutoModel.from_config(made(**{k: v for k, v in SMALL.items() if hasattr(made(), k)}))
    twin = copy.deepcopy(model)
    names = set(ours.get_peft_model_state_dict(quietly(ours.get_peft_model, model, ours.LoraConfig())))

    assert names
    if kind not in ("distilbert", "vit"):
        assert names == set(theirs.get_peft_model_state_dict(quietly(theirs.get_peft_model, twin, theirs.LoraConfig())))


def test_every_type_that_peft_knows_has_its_targets():
    """Also those that are not built here."""
    wanted = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert {kind: defaults.LORA[kind] for kind in wanted} == wanted
    modules, inputs = (
        constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
        constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    )
    assert {kind: defaults.IA3[kind] for kind in modules} == {kind: (modules[kind], inputs[kind]) for kind in modules}


OFF = [
    {"layer_replication": [(0, 1)]}, {"loftq_config": {"a": 1}}, {"use_qalora": True}, {"ensure_weight_tying": True},
]  # fmt: skip


@pytest.mark.parametrize("options", OFF, ids=lambda o: next(iter(o)))
def test_what_is_not_there_yet_says_so(options: dict[str, Any]):
    """An option that would be ignored is refused."""
    with pytest.raises(AdaptKitError, match="not there yet"):
        ours.LoraConfig(**options)


def test_mistakes_are_sentences(tmp_path: Path):
    """Names that are not there, names twice, other kinds, ranks of zero, and what PEFT says nothing about."""
    model = ours.get_peft_model(llama(), ours.LoraConfig(r=2))
    for call in (model.set_adapter, model.delete_adapter, lambda n: model.merge_and_unload(adapter_names=[n])):
        with pytest.raises(AdaptKitError, match="no adapter is named ghost; there are: default"):
            call("ghost")
    with pytest.raises(AdaptKitError, match="there already"):
        model.add_adapter("default", ours.LoraConfig(r=2))
    with pytest.raises(AdaptKitError, match="cannot be an adapter's name"):
        model.add_adapter("../up", ours.LoraConfig(r=2))
    with pytest.raises(AdaptKitError, match="IA3, this model carries LORA"):
        model.add_adapter("other", ours.IA3Config())
    with pytest.raises(AdaptKitError, match="no module matches"):
        model.add_adapter("other", ours.LoraConfig(target_modules=["nothing"]))
    assert list(model.peft_config) == ["default"]
    with pytest.raises(AdaptKitError, match="carries adapters already"):
        ours.get_peft_model(model, ours.LoraConfig())
    with pytest.raises(AdaptKitError, match="a rank is a whole number"):
        ours.LoraConfig(r=0)
    with pytest.raises(AdaptKitError, match="holds no adapter_config.json"):
        ours.PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(AdaptKitError, match="'me/too/many' is not a Hub id"):
        model.push_to_hub("me/too/many")
    with pytest.raises(AdaptKitError, match="adapter_names"):
        model(input_ids=IDS, adapter_names=["default"])
    with pytest.warns(AdaptKitWarning, match="no module is called v_prj"):
        model.add_adapter("third", ours.LoraConfig(target_modules=["q_proj", "v_prj"]))


def test_tensors_that_do_not_fit_are_named():
    """What is missing or left over is returned and warned of; a wrong shape is refused."""
    model = ours.get_peft_model(llama(), ours.LoraConfig(r=2))
    numbers = ours.get_peft_model_state_dict(model)
    name = next(iter(numbers))

    with pytest.warns(AdaptKitWarning, match="not used"):
        result = ours.set_peft_model_state_dict(model, {"extra": torch.ones(1), name: numbers[name]})
    assert result.unexpected_keys == ["extra"]
    assert len(result.missing_keys) == len(numbers) - 1
    with pytest.raises(AdaptKitError, match=r"is \[3\], the model has"):
        ours.set_peft_model_state_dict(model, {name: torch.ones(3)})
    state = model.state_dict()
    torch.testing.assert_close(ours.get_peft_model_state_dict(model, state_dict=state), numbers)


def test_a_folder_that_lacks_a_module_is_loaded_with_a_warning(tmp_path: Path):
    """The settings choose more than the file holds."""
    model = ours.get_peft_model(llama(), ours.LoraConfig(r=2))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if ".layers.0.self_attn.q_proj" not in k}, file)

    with pytest.warns(AdaptKitWarning, match="holds nothing for model.layers.0.self_attn.q_proj"):
        result = model.load_adapter(tmp_path, "other")
    assert result.missing_keys == ["model.layers.0.self_attn.q_proj"]


def test_dora_beside_another_merges_only_if_it_runs_first():
    """Its norm is that of the unchanged weight, so an order that would compute something else is refused."""
    model = ours.get_peft_model(llama(), ours.LoraConfig(r=2, use_dora=True))
    model.add_adapter("plain", ours.LoraConfig(r=2))
    model.base_model.set_adapter(["default", "plain"])
    share_alone(model)
    running = logits(model.eval())

    with pytest.raises(AdaptKitError, match="must be the first change"):
        model.merge_adapter(["plain"])
    model.merge_adapter(["default", "plain"])
    torch.testing.assert_close(logits(model), running, atol=1e-4, rtol=1e-4)


def share_alone(model: nn.Module) -> None:
    for name in model.peft_config:
        numbers = ours.get_peft_model_state_dict(model, adapter_name=name)
        ours.set_peft_model_state_dict(model, stirred(numbers), adapter_name=name)


def test_merging_one_of_two_tied_ends_unties_them():
    """The merged model computes what the adapted one did, where PEFT changes both ends."""
    torch.manual_seed(0)
    model = ours.get_peft_model(gpt2().eval(), ours.LoraConfig(r=2, target_modules=["wte"]))
    share_alone(model)
    running = logits(model)

    with pytest.warns(AdaptKitWarning, match="untied now"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), running, atol=1e-4, rtol=1e-4)
    assert not merged.config.tie_word_embeddings


def test_choosing_another_adapter_takes_what_is_merged_out():
    """As in PEFT, with a warning; deleting what is merged is refused."""
    _, model = twins("llama", "lora")
    model.add_adapter("other", ours.LoraConfig(r=2))
    model.merge_adapter()

    with pytest.raises(AdaptKitError, match="unmerge it first"):
        model.delete_adapter("default")
    with pytest.raises(AdaptKitError, match="unmerge_adapter first"):
        model.add_adapter("third", ours.LoraConfig(r=2))
    with pytest.warns(AdaptKitWarning, match="taken out of the weights"):
        model.set_adapter("other")
    with model.disable_adapter():
        plain = logits(model)
    torch.testing.assert_close(logits(model), plain)  # the other is fresh, and default is out
    with pytest.warns(AdaptKitWarning, match="other was active; now default is"):
        model.delete_adapter("other")
    assert model.active_adapter == "default"
    assert not torch.allclose(logits(model), plain, atol=1e-4)


def test_a_vocabulary_that_grew_is_saved_with_the_adapter(tmp_path: Path):
    """The new rows go along, PEFT loads them, and a base that has not grown is told to."""
    base = loaded(FIXTURES / "models/llama", "llama")
    base.resize_token_embeddings(264)
    with torch.no_grad():
        base.get_input_embeddings().weight[260:] += 1
    model = ours.get_peft_model(base.eval(), ours.LoraConfig(r=2))
    share_alone(model)
    ids = torch.tensor([[5, 262, 7, 263]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)

    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / "adapter_model.safetensors")
    for room in (theirs, ours):
        fresh = loaded(FIXTURES / "models/llama", "llama")
        if room is ours:
            with pytest.raises(AdaptKitError, match="resize its embeddings|resize_token_embeddings"):
                ours.PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path)
        fresh.resize_token_embeddings(264)
        with torch.no_grad():
            got = quietly(room.PeftModel.from_pretrained, fresh, tmp_path)(input_ids=ids).logits
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_trains():
    """Factors get gradients though every input of a checkpoint is frozen."""
    base = llama()
    base.gradient_checkpointing_enable({"use_reentrant": True})
    model = ours.get_peft_model(base, ours.LoraConfig(r=2)).train()
    model(input_ids=IDS, labels=IDS).loss.backward()

    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
