"""Adapters on live models: running equals merging, and real PEFT computes the same from what we write."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from places import FIXTURES
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import adaptkit
from adaptkit import IA3, DoRA, LoRA, Select, attach, detach, live

MODULES = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "linear-no-bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "conv1d-hf": (lambda: Conv1D(5, 6), (3, 6)),
    "embedding": (lambda: nn.Embedding(9, 4), None),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2, stride=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 7)),
    "conv2d-circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 1, 2)), (2, 2, 3, 3, 3)),
}
TUNERS = {
    "lora": LoRA(r=2),
    "rslora": LoRA(r=2, rslora=True),
    "dora": DoRA(r=2),
    "ia3": IA3(),
    "ia3-in": IA3(feedforward=True),
}


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def stir(model: nn.Module) -> None:
    """Make every adapter act: numbers near those they started with."""
    torch.manual_seed(1)
    for module in live.adapted_modules(model).values():
        for p in module.params.parameters():
            p.data += 0.3 * torch.randn_like(p)


def built(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = MODULES[kind]
    return One(make()), torch.randint(0, 9, (2, 3)) if shape is None else torch.randn(shape)


# IA3 is not defined on embeddings
PAIRS = [(k, t) for k in MODULES for t in TUNERS if not (k == "embedding" and t.startswith("ia3"))]


@pytest.mark.parametrize(("kind", "tuner"), PAIRS)
def test_running_equals_merging(kind: str, tuner: str):
    """Fresh adapters change nothing; stirred ones compute the same beside the weights as inside them; unmerge is exact."""
    model, x = built(kind)
    before, weights = model(x), copy.deepcopy(model.state_dict())

    attach(model, TUNERS[tuner], Select("layer"))
    torch.testing.assert_close(model(x), before)
    stir(model)
    running = model(x)
    live.merge(model)
    merged = model(x)
    live.unmerge(model)
    adapter = detach(model)

    assert not torch.allclose(running, before, atol=1e-3)
    torch.testing.assert_close(merged, running, atol=1e-5, rtol=1e-4)
    assert adapter.sites["layer"].tuner.name == TUNERS[tuner].name
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("first", ["lora", "dora", "ia3"])
def test_two_adapters_run_as_they_merge(first: str):
    """The second acts on what the first left, beside the weights and inside them."""
    model, x = built("linear")
    attach(model, TUNERS[first], Select("layer"), name="first")
    attach(model, TUNERS["rslora"], Select("layer"), name="second")
    stir(model)

    running = model(x)
    live.set_active(model, "second")
    alone = model(x)
    live.set_active(model, ["first", "second"])
    with live.disabled(model):
        plain = model(x)
    live.merge(model)

    torch.testing.assert_close(model(x), running, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(alone, running)
    assert not torch.allclose(plain, alone)


@pytest.fixture
def language_model() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(FIXTURES / "models/llama", dtype=torch.float32)


IDS = torch.arange(5, 35).reshape(2, 15)


def trained(model: nn.Module, steps: int = 12) -> list[float]:
    """Train whatever may be trained to repeat one batch; the losses."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    "tuner", [LoRA(r=4), LoRA(r=4, rslora=True), DoRA(r=4), IA3()], ids=["lora", "rslora", "dora", "ia3"]
)
def test_what_was_trained_here_runs_in_real_peft_and_merges_on_files(language_model, tuner, tmp_path: Path):
    """The loss falls; detached and written, PEFT gives the same logits, and so does the merged checkpoint."""
    base = copy.deepcopy(language_model)
    flags = [p.requires_grad for p in language_model.parameters()]
    pattern = r".*\.(q|v)_proj|.*embed_tokens" if tuner.name == "lora" else r".*\.(q|v)_proj"
    attach(language_model, tuner, Select(pattern))
    losses = trained(language_model)
    with torch.no_grad():
        expected = language_model(IDS).logits
    adapter = detach(language_model)
    adaptkit.write(adapter, tmp_path / "adapter")

    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")(IDS).logits
    adaptkit.merge(FIXTURES / "models/llama", tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert losses[-1] < 0.8 * losses[0]
    torch.testing.assert_close(theirs, expected, atol=2e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, expected, atol=2e-4, rtol=1e-4)
    assert [p.requires_grad for p in language_model.parameters()] == flags


def test_an_adapter_from_a_file_attaches_and_gives_what_peft_gave(language_model):
    """Read by the format, put on the live model: PEFT's own logits."""
    import numpy as np
    from models import inputs_of

    attach(language_model, adaptkit.read(FIXTURES / "adapters/llama/lora"))
    with torch.no_grad():
        got = language_model(**inputs_of("llama")).logits

    expected = np.load(FIXTURES / "adapters/llama/lora/expected.npy")
    torch.testing.assert_close(got, torch.from_numpy(expected), atol=1e-3, rtol=1e-4)


def test_layers_and_names_choose_together(language_model):
    """A pattern and layer numbers may be given at once."""
    chosen = attach(language_model, LoRA(r=2), Select(r".*\.(q|v)_proj", layers=range(2)))

    assert chosen == [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
    assert sum(p.requires_grad for p in language_model.parameters()) == 8


def test_mistakes_are_sentences(language_model):
    """Nothing chosen, a name twice, a module no tuner can stand on, an adapter that is not there."""
    with pytest.raises(adaptkit.AdaptKitError, match="Module names here end in"):
        attach(language_model, LoRA(), Select("q_prj"))
    with pytest.raises(adaptkit.AdaptKitError, match="LlamaMLP, which lora cannot stand on"):
        attach(language_model, LoRA(), Select(r".*\.mlp"))
    attach(language_model, LoRA(), Select(r".*q_proj"))
    with pytest.raises(adaptkit.AdaptKitError, match="attached already"):
        attach(language_model, LoRA(), Select(r".*q_proj"))
    with pytest.raises(adaptkit.AdaptKitError, match="there are: default"):
        detach(language_model, "other")
    live.merge(language_model)
    with pytest.raises(adaptkit.AdaptKitError, match="unmerge it first"):
        detach(language_model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_short_floats_rounds_once(dtype: torch.dtype):
    """The merged weight is the float64 sum, rounded once."""
    model = One(nn.Linear(64, 48).to(dtype))
    attach(model, LoRA(r=4), Select("layer"))
    stir(model)
    p = {k: v.detach().double() for k, v in live.adapted_modules(model)["layer"].of("default").items()}
    exact = model.layer.base_layer.weight.detach().double() + 2 * (p["B"] @ p["A"])

    live.merge(model)

    got = model.layer.base_layer.weight.detach()
    assert (got != exact.to(dtype)).float().mean() < 1e-3  # a tie may fall either way in float32
    assert (got.double() - exact).abs().max() <= (exact.abs() * torch.finfo(dtype).eps).max()


def test_merging_one_of_two_tied_ends_leaves_the_other(language_model):
    """Beside the weights or inside them, a LoRA on the embedding does not touch the head; unmerge ties them again."""
    with torch.no_grad():
        plain = language_model(IDS).logits
    attach(language_model, LoRA(r=4), Select(r".*embed_tokens"))
    stir(language_model)
    with torch.no_grad():
        running = language_model(IDS).logits
        live.merge(language_model)
        merged = language_model(IDS).logits
        live.unmerge(language_model)
        detach(language_model)
        back = language_model(IDS).logits

    assert not torch.allclose(running, plain, atol=1e-2)
    torch.testing.assert_close(merged, running, atol=1e-3, rtol=1e-4)
    assert torch.equal(back, plain)
    assert language_model.lm_head.weight is language_model.model.embed_tokens.weight


@pytest.mark.parametrize("path", ["attention.out_proj", "encoder.linear1"])
def test_layers_that_nobody_calls_are_refused(path: str):
    """nn.MultiheadAttention and nn.TransformerEncoderLayer read weights of layers they do not call."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "encoder": nn.TransformerEncoderLayer(8, 2, 16)})

    with pytest.raises(adaptkit.AdaptKitError, match=path):
        attach(model, LoRA(r=2), Select(re.escape(path)))


def test_odd_names_of_modules_and_adapters_are_kept():
    """A module called base_net, adapters called keys and a.b: attached, found and given back under their names."""
    model = nn.ModuleDict({"base_net": nn.ModuleDict({"base": nn.Linear(4, 3)})})
    for name in ("keys", "a.b"):
        attach(model, LoRA(r=2), Select("base_net.base"), name=name)

    assert list(live.adapted_modules(model)) == ["base_net.base"]
    for name in ("keys", "a.b"):
        assert list(detach(model, name).sites) == ["base_net.base"]
    assert isinstance(model["base_net"]["base"], nn.Linear)


def test_scaled_embeddings_run_as_they_merge():
    """Gemma 3 scales what it looks up; an update beside the weight is scaled with it."""

    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    torch.manual_seed(0)
    model, ids = One(Scaled(9, 4)), torch.randint(0, 9, (2, 3))
    attach(model, LoRA(r=2), Select("layer"))
    stir(model)
    running = model(ids)
    live.merge(model)

    torch.testing.assert_close(model(ids), running)


def test_dora_after_another_merge_is_refused():
    """Its norm is that of the unchanged weight, whether the other went in by the same call or before."""
    model, _ = built("linear")
    attach(model, LoRA(r=2), Select("layer"), name="first")
    attach(model, DoRA(r=2), Select("layer"), name="second")
    live.merge(model, "first")

    with pytest.raises(adaptkit.AdaptKitError, match="must be the first change"):
        live.merge(model, "second")


def test_ia3_on_a_convolution_is_written_as_peft_reads_it(tmp_path: Path):
    """(1, channels, 1, 1), and it reads back."""
    model, _ = built("conv2d")
    attach(model, IA3(), Select("layer"))
    adaptkit.write(detach(model), tmp_path / "adapter")

    assert adaptkit.read(tmp_path / "adapter").sites["layer"].params["l"].shape == (1, 6, 1, 1)
