"""Which modules an adapter stands on when target_modules is not given, by the model's type."""

from __future__ import annotations

from typing import Any

from ..errors import Usage, quoted

QV = ["q_proj", "v_proj"]
BERT = ["query", "value"]
FUSED = ["query_key_value"]
LORA: dict[str, list[str] | str] = {
    "bart": QV, "bert": BERT, "bloom": FUSED, "deberta": ["in_proj"], "deberta-v2": ["query_proj", "value_proj"],
    "electra": BERT, "falcon": FUSED, "gemma": QV, "gemma2": QV, "gemma3_text": QV, "gpt2": ["c_attn"],
    "gpt_bigcode": ["c_attn"], "gpt_neo": QV, "gpt_neox": FUSED, "gptj": QV, "layoutlm": BERT, "llama": QV, "mistral": QV,
    "mixtral": QV, "mt5": ["q", "v"], "opt": QV, "phi": [*QV, "fc1", "fc2"], "qwen2": QV, "qwen3": QV, "roberta": BERT,
    "stablelm": QV, "t5": ["q", "v"], "xlm-roberta": BERT,
    "RefinedWeb": FUSED, "RefinedWebModel": FUSED, "blip-2": ["q", "v", *QV], "btlm": ["c_proj", "c_attn"], "chatglm": FUSED,
    "codegen": ["qkv_proj"], "gemma4": r".*language_model\..*\.(q_proj|v_proj)", "llama4": QV, "mpt": ["Wqkv"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"], "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
    "distilbert": ["q_lin", "v_lin"], "vit": ["query", "value", "q_proj", "v_proj"],  # PEFT has none for these two
}  # fmt: skip
# the modules, and those among them whose input is scaled
IA3: dict[str, tuple[list[str], list[str]]] = {
    "RefinedWeb": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "RefinedWebModel": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "bart": ([*QV, "fc2"], ["fc2"]),
    "deberta": (["in_proj", "output.dense"], ["output.dense"]),
    "deberta-v2": (["key_proj", "value_proj", "output.dense"], ["output.dense"]),
    "gpt_bigcode": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "gpt_neo": ([*QV, "c_proj"], ["c_proj"]),
    "llama4": ([*QV, "down_proj"], ["down_proj"]),
    "mixtral": (["k_proj", "v_proj", "w2"], ["w2"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "bloom": (["query_key_value", "mlp.dense_4h_to_h"], ["mlp.dense_4h_to_h"]),
    "falcon": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "gemma": ([*QV, "down_proj"], ["down_proj"]),
    "gemma2": ([*QV, "down_proj"], ["down_proj"]),
    "gemma3_text": ([*QV, "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "gpt_neox": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "gptj": ([*QV, "fc_out"], ["fc_out"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "mistral": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "mt5": (["k", "v", "wi_1"], []),
    "opt": (["q_proj", "k_proj", "fc2"], ["fc2"]),
    "phi": ([*QV, "fc2"], ["fc2"]),
    "qwen2": ([*QV, "down_proj"], ["down_proj"]),
    "qwen3": ([*QV, "down_proj"], ["down_proj"]),
    "roberta": (["key", "value", "output.dense"], ["output.dense"]),
    "t5": (["k", "v", "wo"], ["wo"]),
}


def of_model(table: dict[str, Any], model: Any) -> Any:
    """The entry for a model. Raises Usage for a type that is not in the table."""
    config = getattr(model, "config", None)
    kind = (config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)) or "custom"
    if kind not in table:
        raise Usage(f"no modules are known for models of type {quoted(kind)!r}", hint="give target_modules")
    return table[kind]
