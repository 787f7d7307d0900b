"""adapter_config.json: read strictly, since half of its keys change what the numbers mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import Corrupt, Mismatch, quoted, some
from ...select import fullmatches
from ...store.checkpoint import read_json, warn

LARGEST = 1_000_000
DEEPEST = 32
LARGEST_RANK = 65_536


def _text(v: Any) -> bool:
    return isinstance(v, str)


def _flag(v: Any) -> bool:
    return isinstance(v, bool)


def _number(v: Any) -> bool:
    return isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)


def _count(v: Any) -> bool:
    return type(v) is int and v > 0


def _names(v: Any) -> bool:
    return isinstance(v, str) or (isinstance(v, list) and all(isinstance(n, str) for n in v))


def _name_list(v: Any) -> bool:
    return isinstance(v, list) and all(isinstance(n, str) for n in v)


def _indices(v: Any) -> bool:
    return type(v) is int or (isinstance(v, list) and all(type(n) is int for n in v))


def _ranks(v: Any) -> bool:
    return isinstance(v, dict) and all(_count(n) for n in v.values())


def _numbers(v: Any) -> bool:
    return isinstance(v, dict) and all(_number(n) for n in v.values())


def _settings(v: Any) -> bool:
    return isinstance(v, dict)


def _anything(v: Any) -> bool:
    return True


def _tokens(v: Any) -> bool:
    return _index_list(v) or (isinstance(v, dict) and all(_index_list(n) for n in v.values()))


def _index_list(v: Any) -> bool:
    return isinstance(v, list) and all(type(n) is int and n >= 0 for n in v)


def _spans(v: Any) -> bool:
    return isinstance(v, list) and all(_index_list(s) and len(s) == 2 and s[0] < s[1] for s in v)


def _bias(v: Any) -> bool:
    return v in ("none", "all", "lora_only")


Check = Callable[[Any], bool]
COMMON: dict[str, Check] = {
    "peft_type": _text, "task_type": _text, "auto_mapping": _settings, "peft_version": _text, "inference_mode": _flag,
    "base_model_name_or_path": _text, "revision": _text, "modules_to_save": _name_list, "runtime_config": _anything,
}  # fmt: skip
TARGETS: dict[str, Check] = {"target_modules": _names, "exclude_modules": _names, "fan_in_fan_out": _flag}
VIRTUAL: dict[str, Check] = {
    "num_virtual_tokens": _count, "token_dim": _count, "num_transformer_submodules": _count, "num_attention_heads": _count,
    "num_layers": _count,
}  # fmt: skip
LORA: dict[str, Check] = {
    "r": _count, "lora_alpha": _number, "use_rslora": _flag, "rank_pattern": _ranks, "alpha_pattern": _numbers,
    "target_parameters": _name_list, "layers_to_transform": _indices, "layers_pattern": _names, "trainable_token_indices": _tokens,
    "bias": _bias, "lora_bias": _flag, "use_dora": _flag, "kasa_config": _settings, "use_bdlora": _settings,
    "arrow_config": _settings, "alora_invocation_tokens": _index_list, "use_qalora": _flag, "qalora_group_size": _count,
    "monteclora_config": _settings, "velora_config": _settings, "layer_replication": _spans, "init_lora_weights": _anything,
    "eva_config": _settings, "corda_config": _settings, "lora_ga_config": _settings, "loftq_config": _settings,
    "lora_dropout": _number, "megatron_config": _settings, "megatron_core": _text, "ensure_weight_tying": _flag,
}  # fmt: skip
# keys of old versions that changed nothing once the file was written
RETIRED: dict[str, Check] = {
    "merge_weights": _flag,
    "enable_lora": _anything,
    "postprocess_past_key_value_function": _anything,
}
SCHEMAS: dict[str, dict[str, Check]] = {
    "LORA": COMMON | TARGETS | LORA | RETIRED,
    "IA3": COMMON | TARGETS | RETIRED | {"feedforward_modules": _names, "init_ia3_weights": _flag},
    "PROMPT_TUNING": COMMON | VIRTUAL | RETIRED | {
        "prompt_tuning_init": _text, "prompt_tuning_init_text": _text, "tokenizer_name_or_path": _text, "tokenizer_kwargs": _settings,
    },
    "PREFIX_TUNING": COMMON | VIRTUAL | RETIRED | {"encoder_hidden_size": _count, "prefix_projection": _flag, "init_weights": _text},
    "P_TUNING": COMMON | VIRTUAL | RETIRED | {
        "encoder_reparameterization_type": _text, "encoder_hidden_size": _count, "encoder_num_layers": _count,
        "encoder_dropout": _number,
    },
}  # fmt: skip
SCHEMAS["TRAINABLE_TOKENS"] = COMMON | TARGETS | {"token_indices": _tokens, "init_weights": _flag}
SCHEMAS["ADALORA"] = SCHEMAS["LORA"] | {
    **dict.fromkeys(("target_r", "init_r", "tinit", "tfinal", "deltaT", "total_step"), _anything),
    **dict.fromkeys(("beta1", "beta2", "orth_reg_weight", "rank_pattern"), _anything),
}
# absent keys that change the numbers: say which default was taken
DEFAULTS = {"LORA": {"r": 8, "lora_alpha": 8}}


def read_config(path: Path) -> dict[str, Any]:
    """The settings, checked. Raises Corrupt for what no PEFT writes, Mismatch for what is not supported."""
    if path.exists() and path.stat().st_size > LARGEST:
        raise Corrupt(f"{path.stat().st_size:,} bytes, at most {LARGEST:,} are expected", where=path.name)
    config = read_json(path)
    try:
        _check(config)
    except (Corrupt, Mismatch) as e:
        raise e.at(path.name) from None
    return config


def _check(config: dict[str, Any]) -> None:
    if _depth(config) > DEEPEST:
        raise Corrupt("nested too deep")
    kind = config.get("peft_type")
    if kind is None and (other := whose(config)):
        raise Mismatch(
            f"these are the settings of {other}, not of PEFT", hint="convert the adapter to PEFT's format first"
        )
    if kind is None:
        raise Corrupt("does not say peft_type", hint="is it a PEFT adapter?")
    if not isinstance(kind, str):
        raise Corrupt(f"peft_type is {quoted(kind)}, a name is expected", hint="is it a PEFT adapter?")
    if kind not in SCHEMAS:
        raise Mismatch(f"peft_type {quoted(kind)!r} is not supported ({', '.join(SCHEMAS)} are)")
    _types(config, SCHEMAS[kind])
    _unknown(config, SCHEMAS[kind])
    if kind in ("LORA", "ADALORA"):
        _lora(config)
    for key, value in DEFAULTS.get(kind, {}).items():
        if key not in config:
            warn(f"adapter_config.json does not say {key}; PEFT's default {value} is taken")
            config[key] = value


def whose(config: dict[str, Any]) -> str | None:
    """The program that writes such settings, for those that use the same file name; None for PEFT."""
    if "peft_type" in config:
        return None
    marks = {"MLX": ("fine_tune_type",), "AdapterHub": ("model_class", "model_type", "hidden_size")}
    marks |= {
        "MLX ": ("lora_layers",),
        "MLX  ": ("lora_parameters",),
        "AdapterHub ": ("config", "model_name"),
        "transformers (a model)": ("architectures",),
    }
    return next((name.strip() for name, keys in marks.items() if all(k in config for k in keys)), None)


def _types(config: dict[str, Any], schema: dict[str, Check]) -> None:
    for key, right in schema.items():
        if config.get(key) is not None and not right(config[key]):
            raise Corrupt(f"{key} is {quoted(repr(config[key]))}, which is not what {key} can be")


def _unknown(config: dict[str, Any], schema: dict[str, Check]) -> None:
    unknown = sorted(config.keys() - schema.keys())
    if on := [k for k in unknown if config[k]]:
        raise Mismatch(
            f"{some(on)} {'is' if len(on) == 1 else 'are'} not known here and switched on: it may change what the numbers mean"
        )
    if unknown:
        warn(f"adapter_config.json: {some(unknown)} not known here, and off; kept")


REFUSED = {
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens, so no merged weight does the same",
    "arrow_config": "Arrow routes between adapters at run time, so no merged weight does the same",
    "use_qalora": "QALoRA is defined on GPTQ's groups, so it has no weight to merge into",
    "enable_lora": "PEFT 0.2 packed fused projections as grouped convolutions, which nothing reads today",
    "megatron_config": "Megatron's layers are split over devices, which is not supported",
}
HINTS = {"enable_lora": "load it with PEFT 0.2, or train it again"}
BASE_CHANGED = {
    "loftq": "LoftQ re-quantised the base",
    "corda": "CorDA changed the base by data that the file does not hold",
    "lora_ga": "LoRA-GA changed the base by data that the file does not hold",
}


def _lora(config: dict[str, Any]) -> None:
    if (config.get("r") or 1) > LARGEST_RANK:
        raise Corrupt(f"r is {config['r']:,}, which no adapter has")
    for key, why in REFUSED.items():
        if config.get(key):
            raise Mismatch(f"{key}: {why}", hint=HINTS.get(key, "serve it as an adapter"))
    if (config.get("megatron_core") or "megatron.core") != "megatron.core":
        raise Mismatch(f"megatron_core is {quoted(config['megatron_core'])}; no module named by a file is imported")
    start = config.get("init_lora_weights", True)
    if not isinstance(start, (bool, str)):
        raise Corrupt(f"init_lora_weights is {quoted(repr(start))}")
    kind = start.lower() if isinstance(start, str) else ""
    if kind in BASE_CHANGED:
        hint = "save it with PEFT's path_initial_model_for_weight_conversion first"
        raise Mismatch(f"init_lora_weights {start!r}: {BASE_CHANGED[kind]}", hint=hint)
    if kind.startswith("pissa_niter_"):
        hint = "save it with PEFT's path_initial_model_for_weight_conversion first"
        raise Mismatch(
            f"init_lora_weights {start!r} started from random numbers that the file does not hold", hint=hint
        )
    if isinstance(config.get("target_modules"), str):
        fullmatches(config["target_modules"], [])


# PEFT saves these with an adapter for such a task, whatever modules_to_save says
HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def with_heads(config: dict[str, Any]) -> dict[str, Any]:
    """The settings, with the heads that the task implies among modules_to_save; `implied_heads` tells them apart."""
    named = list(dict.fromkeys(config.get("modules_to_save") or []))
    implied = [h for h in HEADS.get(config.get("task_type") or "", []) if h not in named]
    return {**config, "modules_to_save": named + implied, "implied_heads": implied}


def _depth(value: Any, limit: int = DEEPEST + 1) -> int:
    if not isinstance(value, (dict, list)) or not limit:
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max((_depth(v, limit - 1) for v in inner), default=0)
