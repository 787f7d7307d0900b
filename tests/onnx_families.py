"""The smallest model of each family that differs in what an export must get right; and the table in docs/onnx.md.

python tests/onnx_families.py --write     exports them all and writes the table.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

from places import ROOT

WINDOW = 8  # tokens: greedy texts run past it
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 96}
TEXT = {
    **SMALL,
    "num_hidden_layers": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
HALVES = {
    "d_model": 32, "vocab_size": 96, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "init_std": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
PICTURE = {"image_size": 16, "patch_size": 8}
SIGHT = {
    **{k: SMALL[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")},
    "num_hidden_layers": 1,
    **PICTURE,
}
LONG = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# family -> class of the model, its configuration's class, and the settings
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "Llama, tied": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "Llama 3.1 (scaled positions)": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "rope_parameters": LONG}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": None}),
    "Mistral, sliding": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": WINDOW}),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", HEADS),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", HEADS),
    "Gemma 2 (sliding, soft caps)": ("Gemma2ForCausalLM", "Gemma2Config", {**HEADS, "num_hidden_layers": 2, "sliding_window": WINDOW}),
    "Gemma 3 text (sliding)": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**HEADS, "num_hidden_layers": 2, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "Phi": ("PhiForCausalLM", "PhiConfig", TEXT),
    "Phi 3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 96, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "OPT": ("OPTForCausalLM", "OPTConfig", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "init_std": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "BERT, features": ("BertModel", "BertConfig", TEXT),
    "BERT, classes": ("BertForSequenceClassification", "BertConfig", TEXT),
    "BERT, words masked": ("BertForMaskedLM", "BertConfig", TEXT),
    "BERT, answers": ("BertForQuestionAnswering", "BertConfig", TEXT),
    "RoBERTa, tokens": ("RobertaForTokenClassification", "RobertaConfig", {**TEXT, "pad_token_id": 1, "bos_token_id": 0}),
    "DistilBERT, classes": ("DistilBertForSequenceClassification", "DistilBertConfig", {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4, "vocab_size": 96, "initializer_range": 0.3}),
    "ModernBERT (local attention)": ("ModernBertModel", "ModernBertConfig", {**TEXT, "num_hidden_layers": 2, "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2, "initializer_range": 0.3}),
    "ViT, classes": ("ViTForImageClassification", "ViTConfig", {**SIGHT, "initializer_range": 0.3}),
    "CLIP": ("CLIPModel", "CLIPConfig", {"text_config": {**SMALL, "num_hidden_layers": 1, "max_position_embeddings": 16, "pad_token_id": 1, "bos_token_id": 94, "eos_token_id": 95}, "vision_config": SIGHT, "projection_dim": 16}),
    "T5": ("T5ForConditionalGeneration", "T5Config", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 96, "decoder_start_token_id": 0}),
    "BART": ("BartForConditionalGeneration", "BartConfig", {**HALVES, "max_position_embeddings": 64}),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {**HALVES, "max_source_positions": 20, "max_target_positions": 40, "num_mel_bins": 8, "suppress_tokens": None, "begin_suppress_tokens": None}),
}  # fmt: skip


def model_of(family: str, **others: Any) -> Any:
    """The smallest model of a family, with numbers at random. others: settings that differ."""
    import torch
    import transformers

    kind, config, settings = FAMILIES[family]
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**settings | others)).eval()


def exported(family: str, folder: Path, **options: Any) -> Any:
    """A family's model exported, live."""
    import adaptkit

    return adaptkit.export_onnx(model_of(family), (), folder, **options)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--write", action="store_true", help="into docs/onnx.md, between its markers")
    options = words.parse_args()
    lines = [
        "| family | prefill | decode | own noise | greedy equal | sizes tried |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for family in FAMILIES:
        lines.append(_row(family))
        print(lines[-1], flush=True)
    if options.write:
        _write("\n".join(lines))


def _row(family: str) -> str:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = exported(family, Path(folder, "out")).checked
    decode = f"{found.decode:.1e}" if found.decode else ""
    greedy = f"{found.greedy} of {found.of}" if found.of else ""
    sizes = ", ".join(f"{b}x{n}" for b, n in found.shapes)
    return f"| {family} | {found.prefill:.1e} | {decode} | {found.noise:.1e} | {greedy} | {sizes} |"


def _write(table: str) -> None:
    file = ROOT / "docs" / "onnx.md"
    before, _, rest = file.read_text().partition("<!-- families -->\n")
    after = rest.partition("<!-- end -->")[2]
    file.write_text(f"{before}<!-- families -->\n{table}\n<!-- end -->{after}")


if __name__ == "__main__":
    main()
