"""A transformers model without numbers: names, shapes and types of what config.json describes, on the meta device.

config.json is not trusted. Only keys that the config class declares reach it, none of them names code, files or
kernels, every number is bounded, and building stops once the model has more parts than its checkpoint could fill.
torch and transformers are imported when a model is asked for, not before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import AdaptKitError, Mismatch, quoted

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# a declared key can still choose code, a download or a kernel: these are dropped at every depth
REFUSED = re.compile(
    r"_|auto_map|trust|custom_|.*implementation|kernel_config|(use|disable)_.*kernels|quantization|.*dtype|backbone$"
    r"|use_.*backbone|backbone_kwargs|name_or_path|transformers_version|per_layer_config|timm|model_args|.*compile"
)
# declared by no class, but older files carry them and they decide shapes
INHERITED = {
    "model_type", "architectures", "num_labels", "rope_theta", "rope_scaling", "tie_word_embeddings",
    "out_features", "out_indices",
}  # fmt: skip
TEXT = re.compile(r"[\w .,+-]{0,200}")  # a word or two: no path, no address
SPECIAL = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}  # how transformers writes them
COUNTED = re.compile(r"layer|depth|block|stage|expert|head|label")  # keys that loops run over
MOST = {"count": 2**20, "number": 2**28, "nodes": 100_000, "depth": 12, "parts": 200_000}


def meta_model(config: Mapping[str, Any], parts: int = MOST["parts"]) -> PreTrainedModel:
    """The model that config.json describes, on meta; refused once it has more than `parts` modules or parameters."""
    try:
        text = json.dumps(_bounded(config), sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        raise Mismatch("is not plain JSON", where="config.json") from None
    return _built(text, parts)


def module_parameters(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's parameters (and of the buffers that are saved with them)."""
    return {name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}


def parameter_owner_types(config: Mapping[str, Any]) -> dict[str, str]:
    """Module path -> class name ("Linear", "Conv1D", "Embedding", ...), for every module of the model."""
    return {path: type(module).__name__ for path, module in meta_model(config).named_modules()}


def expert_modules(config: Mapping[str, Any]) -> dict[str, bool]:
    """Paths of the modules that hold 3-D expert parameters -> whether those are stored (expert, in, out)."""
    found = {}
    for path, module in meta_model(config).named_modules():
        # a convolution's weight is 3-D too, but no experts module is a torch class
        if not type(module).__module__.startswith("torch.") and any(p.ndim == 3 for p in module.parameters(False)):
            found[path] = bool(getattr(module, "is_transposed", False))
    return found


@lru_cache(maxsize=2)
def _built(text: str, parts: int) -> PreTrainedModel:
    config = json.loads(text)
    kind = config.get("model_type")
    try:
        settings = _config(kind, config)
        return _model(_model_class(settings, config.get("architectures")), settings, parts)
    except AdaptKitError:
        raise
    except Exception as error:  # whatever a third-party constructor raises on a strange config
        reason = quoted(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        raise Mismatch(f"transformers cannot build {quoted(kind)} from it ({reason})", where="config.json") from None


def _config(kind: object, raw: dict[str, Any]) -> PreTrainedConfig:
    cls = _config_class(kind)
    config = cls(**_declared(raw, cls))
    config._attn_implementation = "eager"
    return config


def _config_class(kind: object) -> type[PreTrainedConfig]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    # the static table: names that some code registered at run time are not transformers' own
    if isinstance(kind, str) and kind in CONFIG_MAPPING_NAMES and not kind.startswith("timm_"):
        return CONFIG_MAPPING[kind]
    hint = "update transformers, or use a checkpoint whose tensor names are the adapter's module paths"
    raise Mismatch(f"transformers {_version()} has no model type {quoted(kind)}", where="config.json", hint=hint)


def _model_class(config: PreTrainedConfig, architectures: object) -> type[PreTrainedModel]:
    import transformers

    names = architectures if isinstance(architectures, list) else []
    if not names:
        found = transformers.MODEL_MAPPING[type(config)]
        return found[0] if isinstance(found, (tuple, list)) else found
    name = names[0]
    cls = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and cls.config_class is type(config):
        return cls
    hint = "models with code of their own are not supported here"
    raise Mismatch(
        f"transformers {_version()} has no class {quoted(name)} for {quoted(config.model_type)}",
        where="config.json",
        hint=hint,
    )


def _model(cls: type[PreTrainedModel], config: PreTrainedConfig, parts: int) -> PreTrainedModel:
    import torch
    from transformers import initialization

    with ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(_no_hub_kernels())
        stack.enter_context(_at_most(parts))
        stack.enter_context(torch.device("meta"))
        for name in ("no_init_weights", "meta_device_safe_creation_ops"):
            if hasattr(initialization, name):
                stack.enter_context(getattr(initialization, name)())
        return cls._from_config(config, attn_implementation="eager", dtype=torch.float32)


def _bounded(value: Any, key: str = "", depth: int = 0, budget: list[int] | None = None) -> Any:
    """The config with every refused key left out; a number or text past its bound is refused."""
    budget = budget if budget is not None else [MOST["nodes"]]
    budget[0] -= 1
    if depth > MOST["depth"] or budget[0] < 0:
        raise Mismatch("is nested too deep or too long to be a model's settings", where="config.json")
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        return SPECIAL.get(str(value["__float__"]))
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if isinstance(k, str) and not REFUSED.match(k)}
        return {k: _bounded(v, k, depth + 1, budget) for k, v in kept.items()}
    if isinstance(value, (list, tuple)):
        return [_bounded(v, key, depth + 1, budget) for v in value]
    if isinstance(value, int) and not isinstance(value, bool):
        _check_number(key, value)
    return value


def _check_number(key: str, value: int) -> None:
    most = MOST["count"] if COUNTED.search(key) else MOST["number"]
    if abs(value) > most and "theta" not in key:
        raise Mismatch(
            f"{quoted(key)} is {quoted(value)}, more than the {most} that any model has",
            where="config.json",
            hint="correct the config",
        )


def _declared(raw: Mapping[str, Any], cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """What the class declares, nested configs by the classes they name; and sizes, which can choose nothing."""
    allowed = _keys(cls)
    kept = {k: v for k, v in raw.items() if k in allowed or type(v) in (int, float)}
    return {k: _nested(k, v, cls) if isinstance(v, dict) else _plain(v) for k, v in kept.items()}


def _nested(key: str, value: dict[str, Any], cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """A dict by its class: the one the outer class gives it, else the one its model_type names."""
    spec = cls.sub_configs_defaults.get(key)
    if spec is not None and _is_config(spec.config_class):
        return _declared(value, spec.config_class)
    kind = value.get("model_type") or (spec.model_type if spec is not None else None)
    return _plain(value) if kind is None else _declared(value, _config_class(kind))


def _is_config(cls: type) -> bool:
    from transformers import PreTrainedConfig

    return issubclass(cls, PreTrainedConfig)


def _keys(cls: type[PreTrainedConfig]) -> set[str]:
    keys = {f.name for f in fields(cls)} | set(cls.attribute_map) | set(cls.attribute_map.values()) | INHERITED
    # flat files of composite models (Qwen2-VL) hold the text model's settings at the top
    for sub in filter(_is_config, cls.sub_configs.values()):
        keys |= {f.name for f in fields(sub)}
    return keys


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, str) and not TEXT.fullmatch(value) else value


def _version() -> str:
    import transformers

    return transformers.__version__


@contextmanager
def _at_most(parts: int) -> Iterator[None]:
    """Stop a model that grows past `parts` while it is being built, whichever setting made it grow."""
    from torch.nn.modules import module as hooks

    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1
        if count > parts:
            raise Mismatch(
                f"describes a model of more than {parts} parts, more than its checkpoint could fill",
                where="config.json",
                hint="correct the config, its layer and expert counts first",
            )

    handles = [
        hooks.register_module_module_registration_hook(counted),
        hooks.register_module_parameter_registration_hook(counted),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _no_hub_kernels() -> Iterator[None]:
    """Some models fetch compiled kernels while they are built; names and shapes do not need them."""
    from transformers.integrations import hub_kernels

    before = getattr(hub_kernels, "_kernels_enabled", None)
    hub_kernels._kernels_enabled = False
    try:
        yield
    finally:
        hub_kernels._kernels_enabled = before


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
