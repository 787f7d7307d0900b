"""PeftModel: a model with adapters, as scripts written for PEFT know it. And get_peft_model, which makes one."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import AdaptKitWarning, Mismatch, Usage, quoted, some
from ..formats.base import read
from ..live.attach import by_rows, checked_module
from ..live.virtual import cache
from ..tuners.experts import LAYOUT
from .config import PeftConfig
from .files import WEIGHTS, folder_of, grown, placed
from .kinds import PeftType, TaskType
from .prompts.tuner import Prompts
from .saved import missing, trained
from .signed import INSIDE, blank, public, signed
from .state import LoadResult, get_peft_model_state_dict
from .tuner import MODELS, TunerModel


class PeftModel(nn.Module):
    """A model with adapters. What is not here is the model's own.

    model: changed in place.    adapter: numbers that were trained before; fresh ones when left out.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        adapter: Adapter | None = None,
    ):
        super().__init__()
        _usable(model, peft_config)
        if isinstance(model, (PeftModel, TunerModel)):
            raise Mismatch("this model carries adapters already", hint="add_adapter and load_adapter put on more")
        _float32(model, autocast_adapter_dtype)
        if peft_config.is_prompt_learning:
            self._with_prompts(model, peft_config, adapter_name, adapter)
        else:
            kind = MODELS[PeftType(peft_config.peft_type)]
            self.base_model = kind(model, peft_config, adapter_name, adapter=adapter)
        self.register_state_dict_post_hook(_apart)
        self.__class__ = signed(type(self), type(model))
        if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            model.enable_input_require_grads()  # a checkpoint whose inputs need no gradient gives its adapters none

    def _with_prompts(self, model: nn.Module, config: PeftConfig, name: str, adapter: Adapter | None) -> None:
        """Virtual tokens stand beside the model, not in it: base_model is the model, as PEFT has it."""
        self.prompt_encoder = nn.ModuleDict()
        self._prompts = Prompts(model, PeftType(config.peft_type), self.prompt_encoder)
        self.base_model = model
        self.tuner.inject(name, config, adapter)
        self.tuner.set_adapter(name, config.inference_mode)

    @property
    def tuner(self) -> TunerModel | Prompts:
        """What puts adapters on and takes them off."""
        return self.__dict__.get("_prompts") or self.base_model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_model", "prompt_encoder"):
                raise
            if name in WITHOUT_WEIGHTS and "_prompts" in self.__dict__:
                return getattr(self._prompts, name, None) or partial(_no_weights, name)
            return getattr(self.base_model, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        inside = getattr(type(self), INSIDE, None)
        return super().__reduce_ex__(protocol) if inside is None else (blank, inside, self.__dict__)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._by_rows(kwargs):
            return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate, with the adapters acting."""
        with self._by_rows(kwargs, repeated=True):
            return self.get_base_model().generate(*args, **kwargs)

    def _by_rows(self, kwargs: dict[str, Any], repeated: bool = False) -> Any:
        """Takes adapter_names, one adapter for each sample of the batch, out of a call's arguments."""
        names = kwargs.pop("adapter_names", None)
        return contextlib.nullcontext() if names is None else by_rows(self.get_base_model(), names, repeated=repeated)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        subfolder: str | None = None,
        torch_device: str | None = None,
        **hub: Any,
    ) -> PeftModel:
        """A model with an adapter from a folder, for inference unless is_trainable."""
        _nothing(ephemeral_gpu_offload=ephemeral_gpu_offload, key_mapping=key_mapping)
        checked_module(model)
        folder = folder_of(model_id, subfolder, hub)
        settings = _settings(folder, is_trainable, config)
        kind = CLASSES.get(settings.task_type, PeftModel) if public(cls) is PeftModel else cls
        adapter = _trained(model, settings, folder)
        made = kind(model, settings, adapter_name, autocast_adapter_dtype, adapter=adapter)
        _missing(model, settings, adapter)
        return made if is_trainable else made.eval()

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        subfolder: str | None = None,
        **hub: Any,
    ) -> LoadResult:
        """One more adapter from a folder; set_adapter makes it act."""
        _nothing(ephemeral_gpu_offload=ephemeral_gpu_offload, key_mapping=key_mapping)
        _float32(self.get_base_model(), autocast_adapter_dtype)
        folder = folder_of(model_id, subfolder, hub)
        settings = _settings(folder, is_trainable, None)
        adapter = _trained(self.get_base_model(), settings, folder)
        self.tuner.inject(adapter_name, settings, adapter)
        if is_trainable:
            self.set_requires_grad(adapter_name)
        else:
            self.eval()
        return LoadResult(_missing(self.get_base_model(), settings, adapter), [])

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write adapters as PEFT does: default into the folder itself, any other into a folder of its name."""
        if not safe_serialization:
            raise Mismatch("adapters are written as safetensors only", hint="leave safe_serialization=True")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        names = [names] if isinstance(names, str) else list(names)
        self.tuner.known(names)
        if not names:
            raise Usage("there is no adapter to save", hint="save the model that merge_and_unload or unload returned")
        for name in names:
            config = self.peft_config[name]
            base = config.base_model_name_or_path or getattr(self.get_base_model(), "name_or_path", None) or None
            ends = grown(self.get_base_model(), base) if save_embedding_layers == "auto" else save_embedding_layers
            tensors = get_peft_model_state_dict(self, state_dict, name, save_embedding_layers=ends)
            if is_main_process:
                folder = Path(save_directory) if name == "default" else Path(save_directory, name)
                _write(folder, tensors)
                _for_file(config, self.get_base_model(), base).save_pretrained(folder)

    def push_to_hub(self, repo_id: str, **how: Any) -> str:
        """Push the adapters to the Hub in one commit, with a card, and return its URL. how: see `push.pushed`."""
        from .push import pushed

        return pushed(self, repo_id, **how)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """One more adapter, fresh; set_adapter makes it act and train."""
        _float32(self.get_base_model(), autocast_adapter_dtype)
        _usable(self.get_base_model(), peft_config)
        _told(self.get_base_model(), peft_config)
        self.tuner.inject(adapter_name, peft_config)

    def set_adapter(self, adapter_name: str | Collection[str], inference_mode: bool = False) -> None:
        """Choose the adapter that acts and trains, or several."""
        self.tuner.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Collection[str], requires_grad: bool = True) -> None:
        """Let adapters train, or freeze them."""
        self.tuner.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off for good."""
        self.tuner.delete_adapter(adapter_name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The model as it is without adapters."""
        with self.tuner.disabled():
            yield

    @property
    def word_embeddings(self) -> nn.Module:
        """The embeddings of the model's tokens."""
        return self.get_base_model().get_input_embeddings()

    def get_prompt(self, batch_size: int, task_ids: Any = None, max_cache_len: int | None = None) -> Any:
        """What virtual tokens put before a batch: embeddings (batch, rows, width), or a cache of keys and values."""
        acting = self._prompts_only("get_prompt").acting()
        if acting is None:
            raise Mismatch("no adapter is active")
        if acting.name == "prefix":
            return cache(self.get_base_model(), acting, batch_size)
        return acting.rows().expand(batch_size, -1, -1)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The rows that save_pretrained writes: what the encoder makes of them, without the noise of a dropout."""
        return self._prompts_only("get_prompt_embedding_to_save").to_save(adapter_name)

    def _prompts_only(self, what: str) -> Prompts:
        if "_prompts" not in self.__dict__:
            raise Mismatch(f"{what} is about virtual tokens, this model carries {self.peft_type.value}")
        return self._prompts

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Settings by adapter name."""
        return self.tuner.peft_config

    @property
    def peft_type(self) -> PeftType:
        """The kind of the adapters."""
        return self.tuner.peft_type

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that act, in order."""
        return list(self.tuner.active_adapters)

    @property
    def active_adapter(self) -> str | list[str]:
        """The adapter that acts; a list when several do."""
        return self.tuner.active_adapter

    @property
    def active_peft_config(self) -> PeftConfig:
        """The settings of the first adapter that acts."""
        if not self.active_adapters:
            raise Mismatch("no adapter is active")
        return self.peft_config[self.active_adapters[0]]

    def get_base_model(self) -> nn.Module:
        """The model that carries the adapters."""
        return self.tuner.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers train, of how many."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print get_nb_trainable_parameters, as PEFT does."""
        trains, of = self.get_nb_trainable_parameters()
        print(f"trainable params: {trains:,d} || all params: {of:,d} || trainable%: {100 * trains / of:.4f}")


class PeftModelForCausalLM(PeftModel):
    """A language model with adapters."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        **kwargs: Any,
    ) -> Any:
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        return super().forward(**{k: v for k, v in named.items() if v is not None}, **kwargs)


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder and decoder with adapters."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        decoder_inputs_embeds: Any = None,
        labels: Any = None,
        **kwargs: Any,
    ) -> Any:
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        named |= {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask}
        named |= {"decoder_inputs_embeds": decoder_inputs_embeds}
        return super().forward(**{k: v for k, v in named.items() if v is not None}, **kwargs)


class PeftModelForFeatureExtraction(PeftModel):
    """An encoder with adapters."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, **kwargs: Any
    ) -> Any:
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        return super().forward(**{k: v for k, v in named.items() if v is not None}, **kwargs)


class _WithHead(PeftModel):
    """A model whose head is trained whole, beside the adapter."""

    heads: ClassVar[tuple[str, ...]] = ("classifier", "score")

    def __init__(self, model: nn.Module, peft_config: PeftConfig, *args: Any, **kwargs: Any):
        self._headed(peft_config)
        super().__init__(model, peft_config, *args, **kwargs)

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        """One more adapter and head, fresh; set_adapter makes them act and train."""
        self._headed(peft_config)
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)

    def _headed(self, config: PeftConfig) -> None:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *self.heads]))

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        token_type_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "token_type_ids": token_type_ids,
        }
        return super().forward(**{k: v for k, v in named.items() if v is not None}, **kwargs)


class PeftModelForSequenceClassification(_WithHead):
    """A classifier of texts with adapters."""


class PeftModelForTokenClassification(_WithHead):
    """A classifier of tokens with adapters."""


class PeftModelForQuestionAnswering(_WithHead):
    """A model that finds the place of an answer, with adapters."""

    heads = ("qa_outputs",)

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        **kwargs: Any,
    ) -> Any:
        named = {"position_ids": position_ids, "start_positions": start_positions, "end_positions": end_positions}
        kwargs |= {k: v for k, v in named.items() if v is not None}
        return super().forward(input_ids, attention_mask, inputs_embeds, None, token_type_ids, **kwargs)


CLASSES: dict[TaskType | None, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
}


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """A model with a fresh adapter, which trains. The settings learn which model it is."""
    _nothing(mixed=mixed)
    _usable(model, peft_config)
    _told(model, peft_config)
    peft_config.revision = revision or peft_config.revision
    kind = CLASSES.get(peft_config.task_type, PeftModel)
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype)


def _apart(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Trainers write a state dict as safetensors, which takes no tensor twice: of tied ends, the second is a copy."""
    seen: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or value.is_meta or not value.numel():
            continue
        if value.data_ptr() in seen:
            state[name] = value.clone()
        seen.add(value.data_ptr())


def _usable(model: Any, config: Any) -> None:
    """Raises Usage for what is no model, and for settings of another library: their options would not be checked."""
    checked_module(model)
    if not isinstance(config, PeftConfig) or type(config) is PeftConfig:
        kind = f"{type(config).__module__}.{type(config).__name__}"
        raise Usage(f"peft_config is a {kind}", hint="make a LoraConfig, or another, of adaptkit.peft")


def _told(model: nn.Module, config: PeftConfig) -> None:
    """Write into the settings which model they are for, and how its stacks of experts will be packed."""
    config.peft_version = LAYOUT
    name = model.__dict__.get("name_or_path") or None
    if config.base_model_name_or_path not in (None, name):
        was = quoted(config.base_model_name_or_path)
        warnings.warn(f"the settings were for {was}, now they are for {quoted(name)}", AdaptKitWarning)
    config.base_model_name_or_path = name


def _for_file(config: PeftConfig, model: nn.Module, base: str | None) -> PeftConfig:
    """The settings as they are saved: for inference, and naming the model's class where no task does."""
    kind = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    mapping = kind if config.task_type is None else config.auto_mapping
    return replace(config, inference_mode=True, base_model_name_or_path=base, auto_mapping=mapping)


def _trained(model: nn.Module, settings: PeftConfig, folder: Path) -> Adapter:
    if not settings.is_prompt_learning:
        return trained(model, folder, settings)
    if not settings.inference_mode and (
        settings.peft_type is PeftType.P_TUNING or getattr(settings, "prefix_projection", False)
    ):
        warnings.warn("the encoder is not in the folder, so its rows are trained themselves", AdaptKitWarning)
    return read(folder, "peft")


def _missing(model: nn.Module, settings: PeftConfig, adapter: Adapter) -> list[str]:
    return [] if settings.is_prompt_learning else missing(model, settings, adapter)


# what only adapters in weights can do
WITHOUT_WEIGHTS = ("merge_and_unload", "merge_adapter", "unmerge_adapter", "unload", "add_weighted_adapter")


def _no_weights(name: str, *args: Any, **kwargs: Any) -> None:
    raise Mismatch(
        f"{name} is not for virtual tokens: no weight holds them",
        hint="adaptkit merge puts prompt tuning and P-tuning into a checkpoint; a prefix is exported to ONNX",
    )


def _settings(folder: Path, is_trainable: bool, given: PeftConfig | None) -> PeftConfig:
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = not is_trainable
    if given is not None and replace(given, inference_mode=config.inference_mode) != config:
        raise Mismatch("config differs from the one in the folder", where=folder, hint="leave it out")
    return config


def _nothing(**options: Any) -> None:
    if on := [k for k, v in options.items() if v]:
        raise Mismatch(f"{some(on)} is not there yet")


def _float32(model: nn.Module, autocast: bool) -> None:
    """Adapters are float32 always, which is what autocast_adapter_dtype asks for."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if not autocast and dtypes - {torch.float32}:
        raise Usage("autocast_adapter_dtype=False is not there yet: adapters are float32")


def _write(folder: Path, tensors: dict[str, Tensor]) -> None:
    whole = {n: t.cpu().contiguous().clone() for n, t in tensors.items()}  # tied ends are written twice, as PEFT does
    placed(folder / WEIGHTS, lambda p: save_file(whole, p, metadata={"format": "pt"}))
