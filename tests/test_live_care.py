"""What live models must not lose: running equals merging for the rarer tuners, and no trace of what failed or left."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from places import FIXTURES
from torch import nn
from transformers import AutoModelForCausalLM

from adaptkit import LoRA, Select, attach, detach, live
from adaptkit.adapter import Adapter, Site
from adaptkit.errors import AdaptKitError, Corrupt, Mismatch, Usage
from adaptkit.live.attach import unwrapped
from adaptkit.tuners.experts import ExpertLoRA
from adaptkit.tuners.spectral import OLoRA, PiSSA
from adaptkit.tuners.tokens import Tokens
from adaptkit.tuners.virtual import PromptTuning

IDS = torch.arange(5, 35).reshape(2, 15)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def state(model: nn.Module) -> dict[str, Any]:
    """Every name, number and flag."""
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    return {n: (v.tolist(), flags.get(n)) for n, v in model.state_dict().items()}


def stir(model: nn.Module) -> None:
    torch.manual_seed(1)
    for module in live.adapted_modules(model).values():
        for p in (p for p in module.params.parameters() if p.requires_grad):
            p.data += 0.3 * torch.randn_like(p)


def llama(name: str = "llama") -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(FIXTURES / "models" / name, dtype=torch.float32)


class Stack(nn.Module):
    """A stack of matrices and a matrix, both bare parameters."""

    def __init__(self):
        super().__init__()
        self.stack, self.matrix = nn.Parameter(torch.randn(3, 5, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x @ self.matrix.T, self.stack)


class Attention(nn.Module):
    """An nn.MultiheadAttention that listens to itself."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x)[0]


def lora(out: int, into: int, kind: type[LoRA] = LoRA, experts: int = 1) -> Site:
    return Site(kind(r=2), {"A": torch.randn(2 * experts, into), "B": torch.randn(out, 2 * experts)})


def on_parameters() -> tuple[nn.Module, torch.Tensor, Adapter]:
    sites = {"0.stack": lora(5, 4, ExpertLoRA, 3), "0.matrix": lora(4, 4, ExpertLoRA)}
    return nn.Sequential(Stack()), torch.randn(2, 4), Adapter(sites)


def on_attention() -> tuple[nn.Module, torch.Tensor, Adapter]:
    return Attention(), torch.randn(2, 3, 8), Adapter({"inner": lora(24, 8), "inner.out_proj": lora(8, 8)})


def with_whole() -> tuple[nn.Module, torch.Tensor, Adapter]:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model[1].weight.requires_grad_(False)
    whole = {"0.bias": torch.ones(4), "1.weight": 2 * torch.ones(4)}
    return model, torch.randn(2, 4), Adapter({"0": lora(4, 4)}, whole)


def in_two_places() -> tuple[nn.Module, torch.Tensor, Adapter]:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer), torch.randn(2, 4), Adapter({"0": lora(4, 4)})


def channels_last() -> tuple[nn.Module, torch.Tensor, Adapter]:
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    factors = {"A": torch.randn(2, 4, 3, 3), "B": torch.randn(6, 2, 1, 1)}
    return model, torch.randn(2, 4, 7, 7), Adapter({"0": Site(LoRA(r=2), factors)})


def fresh(tuner: LoRA) -> Callable[[], tuple[nn.Module, torch.Tensor, Adapter]]:
    def made() -> tuple[nn.Module, torch.Tensor, Adapter]:
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        x, scratch = torch.randn(3, 6), copy.deepcopy(model)
        attach(scratch, tuner, Select("0|2"))
        torch.testing.assert_close(scratch(x), model(x), atol=1e-5, rtol=1e-5)
        stir(scratch)
        return model, x, detach(scratch)

    return made


def rows_of(name: str, *ends: str) -> Callable[[], tuple[nn.Module, torch.Tensor, Adapter]]:
    def made() -> tuple[nn.Module, torch.Tensor, Adapter]:
        model = llama(name)
        index, rows = torch.tensor([5, 7]), model.model.embed_tokens.weight[[5, 7]].detach()
        sites = {end: Site(Tokens(), {"index": index, "rows": rows + 1 + i}) for i, end in enumerate(ends)}
        return model, IDS, Adapter(sites)

    return made


CASES = {
    "pissa": fresh(PiSSA(r=2)),
    "pissa-niter": fresh(PiSSA(r=2, niter=4)),
    "pissa-rslora": fresh(PiSSA(r=2, rslora=True, alpha=3.0)),
    "olora": fresh(OLoRA(r=2)),
    "parameters": on_parameters,
    "attention": on_attention,
    "whole": with_whole,
    "two-places": in_two_places,
    "channels-last": channels_last,
    "tokens-tied": rows_of("llama", "model.embed_tokens"),
    "tokens-untied": rows_of("llama-untied-tiny", "model.embed_tokens", "lm_head"),
}


@pytest.mark.parametrize("case", CASES)
def test_running_is_merging_is_absorbing_and_detaching_leaves_no_trace(case: str):
    """One output in every way to run; copies know which parameters trained; the bytes and flags come back."""
    torch.manual_seed(0)
    model, x, adapter = CASES[case]()

    def run(m: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return m(x % m.config.vocab_size).logits if case.startswith("tokens") else m(x)

    before, plain, notes = state(model), run(model), set(model.__dict__)
    formats = {n: p.stride() for n, p in model.named_parameters()}

    attach(model, adapter)
    running = run(model)
    with live.disabled(model):
        disabled = run(model)
    live.merge(model)
    merged = run(model)
    live.unmerge(model)
    absorbed, left = copy.deepcopy(model), copy.deepcopy(model)
    live.absorb(absorbed)
    detach(left)
    back = detach(model)

    assert not torch.allclose(running, plain, atol=1e-3)
    torch.testing.assert_close(disabled, plain)
    torch.testing.assert_close(merged, running, **CLOSE)
    torch.testing.assert_close(run(absorbed), running, **CLOSE)
    assert state(absorbed).keys() == before.keys()
    assert {n: p.stride() for n, p in absorbed.named_parameters()} == formats
    assert {n: f for n, (_, f) in state(absorbed).items()} == {n: f for n, (_, f) in before.items()}
    assert state(model) == state(left) == before
    assert set(model.__dict__) == notes
    assert back.whole.keys() == adapter.whole.keys()


@pytest.mark.parametrize(
    "adapter",
    [
        Adapter({"0": lora(4, 4)}, {"zz.bias": torch.zeros(4)}),
        Adapter({"0": lora(4, 4)}, {"0.bias": torch.zeros(5)}),
    ],
    ids=["no-such-tensor", "wrong-shape"],
)
def test_an_attach_that_fails_leaves_the_model_as_it_was(adapter: Adapter):
    """Neither wrappers nor flags nor notes stay behind, beside an adapter that was there and without one."""
    model = nn.Sequential(nn.Linear(4, 4))
    for name in ("first", "second"):
        before, notes = state(model), set(model.__dict__)
        with pytest.raises(AdaptKitError):
            attach(model, adapter, name=name)
        assert state(model) == before
        assert set(model.__dict__) == notes
        if name == "first":
            attach(model, LoRA(r=2), Select("0"), name="there")


@pytest.mark.parametrize("where", ["lm_head", r".*embed_tokens"])
def test_rows_of_a_tied_matrix_are_trained_alone(where: str):
    """The other end would see what is not its own; both orders are refused, and nothing changes."""
    model, _, rows = CASES["tokens-tied"]()
    attach(model, rows)
    before = model(IDS).logits
    with pytest.raises(Mismatch, match="tied to an embedding"):
        attach(model, LoRA(r=2), Select(where), name="second")
    torch.testing.assert_close(model(IDS).logits, before)
    detach(model)
    attach(model, LoRA(r=2), Select(where), name="second")
    with pytest.raises(Mismatch, match="tied to an embedding"):
        attach(model, rows)
    assert live.attached(model) == {"second"}


def test_what_is_replaced_trains_only_while_it_acts():
    """A bias that goes with one adapter is the base's own while another acts, and frozen then."""
    model, _, adapter = with_whole()
    attach(model, adapter)
    attach(model, LoRA(r=2), Select("0"), name="other")
    live.set_active(model, "other")
    assert not model[0].bias.requires_grad
    live.set_active(model, "default")
    assert model[0].bias.requires_grad
    detach(model)
    assert not model[0].bias.requires_grad


def test_memory_shared_with_a_buffer_is_not_written_to():
    """Merging for good gives the layer a weight of its own when something else of the model looks at the old one."""
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("view", model[0].weight.data)
    kept = model.view.clone()
    attach(model, Adapter({"0": lora(4, 4)}))
    live.absorb(model)
    assert torch.equal(model.view, kept)
    assert not torch.equal(model[0].weight, kept)


@pytest.mark.parametrize("how", [live.merge, live.absorb])
def test_merging_that_is_interrupted_leaves_a_model_that_computes_the_same(how: Any):
    """What was summed counts as merged; the next merge goes on."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    attach(model, Adapter({"0": lora(4, 4), "1": lora(4, 4)}))
    running = model(x)

    def once(paths):
        yield next(iter(paths))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        how(model, watch=once)
    torch.testing.assert_close(model(x), running, **CLOSE)
    live.absorb(model)
    torch.testing.assert_close(model(x), running, **CLOSE)


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_overflow_in_float16_is_refused_and_every_weight_is_what_it_was(value: float):
    """The second of two layers overflows; the first is not left merged."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    before = state(model)
    second = Site(LoRA(r=2), {"A": torch.ones(2, 4), "B": torch.full((4, 2), value)})
    attach(model, Adapter({"0": lora(4, 4), "1": second}))
    for how in (live.absorb, live.merge):
        with pytest.raises(Corrupt, match=re.escape("1.weight: merged values overflow float16")):
            how(model)
    detach(model)
    assert state(model) == before


def test_a_model_that_moved_while_merged_gets_its_weights_back_where_it_is_now():
    """Old weights and replaced tensors follow the model's dtype."""
    model, _, adapter = with_whole()
    attach(model, adapter)
    live.merge(model)
    model.double()
    live.unmerge(model)
    detach(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_an_adapter_named_twice_acts_once():
    """In set_active and in merge."""
    model, x, adapter = in_two_places()
    attach(model, adapter)
    once = model(x)
    live.set_active(model, ["default", "default"])
    torch.testing.assert_close(model(x), once)
    live.merge(model, ["default", "default"])
    torch.testing.assert_close(model(x), once, **CLOSE)


def test_virtual_tokens_are_no_place_for_adapters():
    """A selection does not see the module that makes them."""
    model = llama()
    attach(model, PromptTuning(tokens=3))
    assert not [p for p in unwrapped(model) if p.startswith("virtual_tokens")]


@pytest.mark.parametrize("rows", [["__base__", "default"], ["default", "__base__"]])
def test_samples_do_not_differ_through_a_module_that_reads_several_tensors(rows: list[str]):
    """Keys and values would have to be taken apart as queries are."""
    model, x, adapter = on_attention()
    attach(model, adapter)
    with pytest.raises(Mismatch, match="adapter_names cannot differ"), live.by_rows(model, rows):
        model(x)


def test_mistakes_on_live_models_are_sentences():
    """Names that are no names, batches without names, weights without numbers."""
    model, x, adapter = in_two_places()
    with pytest.raises(Usage, match="a string"):
        attach(model, adapter, name=None)
    with pytest.raises(Usage, match="the model is a str"):
        attach("model", adapter)
    with pytest.raises(Usage, match="the tuner is a str"):
        attach(model, "lora", Select(names=["0"]))
    with pytest.raises(Mismatch, match="a selection says which modules"):
        attach(model, LoRA(r=2), "0")
    attach(model, adapter)
    for names in ([], "default"):
        with pytest.raises(Usage, match="list of names"), live.by_rows(model, names):
            model(x)
    with pytest.raises(Mismatch, match="meta device"):
        live.merge(model.to("meta"))
