"""Prompts: a model and its virtual tokens by adapter name. It answers as a TunerModel does."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...adapter import Adapter
from ...errors import AdaptKitWarning, Mismatch, Usage, quoted, some
from ...live.adapted import Adapted
from ...live.encoders import Rows
from ...live.virtual import Acting, Virtual, check
from ...store.arrays import load
from .. import heads
from ..files import checked_name
from ..kinds import PeftType
from .config import PromptLearningConfig
from .encoders import encoder

TUNERS = {PeftType.PROMPT_TUNING: "prompt", PeftType.P_TUNING: "ptuning", PeftType.PREFIX_TUNING: "prefix"}
SAVED = "prompt_embeddings"


class Prompts:
    """A model with virtual tokens of one kind. One adapter acts at a time.

    model: given hooks.    encoders: adapter name -> its module; the owner holds it, so that its state dict has PEFT's names.
    """

    def __init__(self, model: nn.Module, peft_type: PeftType, encoders: nn.ModuleDict):
        self.model, self.peft_type, self.encoders = model, peft_type, encoders
        if any(isinstance(m, Adapted) for m in model.modules()) or "prepare_inputs_for_generation" in model.__dict__:
            raise Mismatch("this model carries adapters already", hint="call unload on it first")
        self.peft_config: dict[str, PromptLearningConfig] = {}
        self.active_adapters: list[str] = []
        self.enabled = True
        self.flags = {n: p.requires_grad for n, p in model.named_parameters()}
        self.virtual: Virtual | None = None

    @property
    def active_adapter(self) -> str | list[str]:
        """The adapter that acts."""
        return self.active_adapters[0] if self.active_adapters else []

    def known(self, names: Collection[str]) -> None:
        """Raise Mismatch for a name that no adapter has."""
        if lost := [n for n in names if n not in self.peft_config]:
            there = some(sorted(self.peft_config)) or "none"
            raise Mismatch(f"no adapter is named {some(lost)}; there are: {there}")

    def inject(self, name: str, config: PromptLearningConfig, adapter: Adapter | None = None) -> None:
        """Put one more adapter on, inactive and frozen. Rows that were trained before need no encoder: they are its result."""
        if checked_name(name) in self.peft_config or hasattr(self.encoders, name):
            raise Usage(f"an adapter named {quoted(name)!r} is there already", hint="choose another name")
        if config.peft_type != self.peft_type:
            raise Mismatch(f"{quoted(name)} is {config.peft_type}, this model carries {self.peft_type.value}")
        check(self.model, TUNERS[self.peft_type])
        config.fit(self.model)
        self._wide(config)
        settings = config if adapter is None else replace(config, inference_mode=True)
        made = encoder(settings, self.model.get_input_embeddings()).to(next(self.model.parameters()).device)
        if adapter is not None:
            _fill(made, adapter)
        self._heads(name, config, adapter)
        self.encoders[name], self.peft_config[name] = made.train(self.model.training), config
        self.set_requires_grad(name, False)
        self.virtual = self.virtual or Virtual(self.model, self.acting)

    def _wide(self, config: PromptLearningConfig) -> None:
        width = self.model.get_input_embeddings().weight.shape[-1]
        if self.peft_type is not PeftType.PREFIX_TUNING and config.token_dim != width:
            raise Mismatch(
                f"token_dim is {config.token_dim}, the model's embeddings are {width} wide",
                hint=f"give token_dim={width}",
            )

    def _heads(self, name: str, config: PromptLearningConfig, adapter: Adapter | None) -> None:
        """Copies of the modules to save, with the adapter's numbers; the model is as it was if those do not fit."""
        try:
            self.model.requires_grad_(False)
            heads.train_whole(self.model, name, heads.chosen(self.model, config.modules_to_save or ()))
            if adapter is not None:
                _fill_heads(self.model, name, adapter)
        except BaseException:
            heads.remove(self.model, name)
            if not self.peft_config:
                self._bare()
            raise

    def acting(self) -> Acting | None:
        """What acts at this moment."""
        if not self.active_adapters or not self.enabled:
            return None
        name = self.active_adapters[0]
        return Acting(TUNERS[self.peft_type], self.peft_config[name].num_virtual_tokens, self.encoders[name].rows)

    def set_requires_grad(self, adapter_names: str | Collection[str], requires_grad: bool = True) -> None:
        """Let adapters train, or freeze them."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.known(names)
        for name in names:
            self.encoders[name].requires_grad_(requires_grad)
            for _, _, value in heads.entries(self.model, name):
                value.requires_grad_(requires_grad and value.is_floating_point())

    def set_adapter(self, adapter_name: str | Collection[str], inference_mode: bool = False) -> None:
        """Choose the adapter that acts; it trains, unless inference_mode, and the others do not."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.known(names)
        if len(names) > 1:
            raise Mismatch(f"{some(names)} are {len(names)} sets of virtual tokens, one acts at a time")
        self.active_adapters = names
        heads.activate(self.model, names)
        self.set_requires_grad([n for n in self.peft_config if n not in names], False)
        self.set_requires_grad(names, not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off for good. When it was active, the first of the others becomes so."""
        self.known([adapter_name])
        del self.peft_config[adapter_name], self.encoders[adapter_name]
        heads.remove(self.model, adapter_name)
        if not self.peft_config:
            self._bare()
        elif adapter_name in self.active_adapters:
            left = min(self.peft_config)
            warnings.warn(f"{quoted(adapter_name)} was active; now {quoted(left)} is", AdaptKitWarning)
            self.set_adapter(left)

    def unload(self) -> nn.Module:
        """The model as it was before it met an adapter."""
        for name in list(self.peft_config):
            del self.peft_config[name], self.encoders[name]
            heads.remove(self.model, name)
        return self._bare()

    def _bare(self) -> nn.Module:
        self.active_adapters = []
        if self.virtual is not None:
            self.virtual.remove()
            self.virtual = None
        for name, p in self.model.named_parameters():
            p.requires_grad_(self.flags[name])
        return self.model

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without its adapters."""
        before, self.enabled = self.enabled, False
        heads.activate(self.model, ())
        try:
            yield
        finally:
            self.enabled = before
            if before and self.active_adapters:
                heads.activate(self.model, self.active_adapters)

    def to_save(self, name: str) -> Tensor:
        """P of one adapter, without the noise of a dropout.    Returns (rows, width)"""
        self.known([name])
        made = self.encoders[name]
        training = made.training
        try:
            with torch.no_grad():
                return made.eval().rows().detach().cpu().clone()
        finally:
            made.train(training)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What is saved, under PEFT's names."""
        whole = {f"base_model.{n}": v.detach() for _, n, v in heads.entries(self.model, name)}
        return {SAVED: self.to_save(name)} | whole

    def tensors_of(self, name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `tensors`, with values from the owner's state_dict()."""
        prefix = f"prompt_encoder.{name}."
        encoder_state = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        made = copy.deepcopy(self.encoders[name]).eval()
        made.load_state_dict(encoder_state)
        own = {f"base_model.{saved}": f"base_model.{here}" for here, saved, _ in heads.entries(self.model, name)}
        with torch.no_grad():
            return {SAVED: made.rows().detach().cpu().clone()} | {n: state[ours].detach() for n, ours in own.items()}

    def set_tensors(self, name: str, given: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Copy rows and heads into an adapter. Returns what is missing and what is left over.

        Raises Mismatch for rows that an encoder makes: its weights are not among them.
        """
        wanted = {f"base_model.{n}": v for _, n, v in heads.entries(self.model, name)}
        made = self.encoders[name]
        if SAVED in given and any(hasattr(made, n) for n in ("transform", "mlp_head")):
            raise Mismatch(
                f"the encoder of {quoted(name)} makes its rows, so they cannot be set",
                hint="load_adapter the folder, or load_state_dict the encoder",
            )
        wanted = {SAVED: made.embedding.weight} | wanted
        for n in [n for n in wanted if n in given]:
            if given[n].shape != wanted[n].shape:
                raise Mismatch(f"{quoted(n)} is {list(given[n].shape)}, the model has {list(wanted[n].shape)}")
        with torch.no_grad():
            for n in [n for n in wanted if n in given]:
                wanted[n].copy_(given[n])
        return [n for n in wanted if n not in given], [n for n in given if n not in wanted]


def _fill(made: Rows, adapter: Adapter) -> None:
    """Rows from a file."""
    P = torch.as_tensor(load(adapter.sites[""].params["P"], "f4"))
    if P.shape != made.embedding.weight.shape:
        raise Mismatch(
            f"prompt_embeddings is {list(P.shape)}, the settings and the model ask for {list(made.embedding.weight.shape)}",
            hint="is it made for another model?",
        )
    with torch.no_grad():
        made.embedding.weight.copy_(P)


def _fill_heads(model: nn.Module, name: str, adapter: Adapter) -> None:
    """Heads from a file: every tensor of both finds its other half, or it is refused."""
    wanted = {saved: value for _, saved, value in heads.entries(model, name)}
    for key, value in adapter.whole.items():
        path = next((p for p in (key.removeprefix("base_model."), f"model.{key}") if p in wanted), None)
        if path is None:
            raise Mismatch(f"holds {quoted(key)}, which modules_to_save does not name in this model")
        target = wanted.pop(path)
        there = torch.as_tensor(load(value, "f4" if target.is_floating_point() else None))
        if there.shape != target.shape:
            raise Mismatch(f"{quoted(key)} is {list(there.shape)}, the model has {list(target.shape)}")
        with torch.no_grad():
            target.copy_(there)
    if wanted:
        raise Mismatch(f"holds nothing for {some(sorted(wanted))}, which modules_to_save names")
