"""Table E: adapter_config.json."""

from __future__ import annotations

import json

import numpy as np

from . import sound
from .c_config import planted
from .case import Room, case

REDOS = "(([a-z0-9._]+)+)+!"  # endless for `re`
ENDLESS = r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1[A-Z]"  # and for `regex`, which sees through the first


def changed(name: str, text: str, must: str, **keys: object) -> None:
    """A case that only changes keys of the file; `...` takes a key away."""
    case(name, text, must)(lambda room: room.change_adapter(**keys))


def rewritten(name: str, text: str, must: str, content) -> None:
    """A case that writes other bytes: a function of the sound text."""

    def build(room: Room) -> None:
        path = room.adapter / "adapter_config.json"
        path.write_bytes(content(path.read_text()))

    case(name, text, must)(build)


@case("E01_config_missing", "adapter_config.json missing", "corrupt")
def config_missing(room: Room) -> None:
    (room.adapter / "adapter_config.json").unlink()


rewritten("E02_config_empty", "0 bytes", "corrupt", lambda text: b"")
rewritten("E03_config_not_json", "not JSON", "corrupt", lambda text: text[:-3].encode())
rewritten("E04_config_list", "a JSON list", "corrupt", lambda text: b"[" + text.encode() + b"]")
changed("E05_config_nan", "NaN literal as lora_alpha", "corrupt", lora_alpha=float("nan"))
changed("E06_no_peft_type", "peft_type missing", "corrupt", peft_type=...)
changed("E07_unknown_peft_type", 'peft_type "FOO"', "mismatch", peft_type="FOO")
changed("E07b_peft_type_not_string", "peft_type is a list", "corrupt", peft_type=["LORA"])


@case("E08_unmergeable_type", "peft_type PREFIX_TUNING (cannot be merged)", "mismatch")
def prefix_tuning(room: Room) -> None:
    config = {
        "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "token_dim": 32,
        "num_transformer_submodules": 1, "num_attention_heads": 2, "num_layers": 2, "encoder_hidden_size": 32,
        "prefix_projection": False, "inference_mode": True, "base_model_name_or_path": None, "auto_mapping": None,
        "revision": None, "modules_to_save": None, "peft_version": "0.21.2",
    }  # fmt: skip
    (room.adapter / "adapter_config.json").write_text(json.dumps(config))
    room.write_adapter({"prompt_embeddings": np.ones((4, 2 * 2 * 32), np.float32)})


changed("E09a_r_zero", "r = 0", "corrupt", r=0)
changed("E09b_r_negative", "r = -4", "corrupt", r=-4)
changed("E09c_r_string", 'r = "4"', "corrupt", r="4")
changed("E09d_r_float", "r = 4.5", "corrupt", r=4.5)
changed("E09e_r_huge", "r = 10**9: must not allocate", "corrupt", r=10**9)
changed("E09f_r_bool", "r = true", "corrupt", r=True)
changed("E09g_r_whole_float", "r = 4.0: not an integer", "corrupt", r=4.0)
changed("E10a_alpha_missing", "lora_alpha missing (PEFT's default 8 is the true value here)", "warn", lora_alpha=...)


@case("E10b_alpha_zero", "lora_alpha = 0: the merge would be a no-op", "warn")
def alpha_zero(room: Room) -> None:
    room.change_adapter(lora_alpha=0)
    room.expect = sound.base()


changed("E10c_alpha_string", 'lora_alpha = "8"', "corrupt", lora_alpha="8")
rewritten(
    "E10d_alpha_overflow", "lora_alpha = 1e400", "corrupt",
    lambda text: text.replace('"lora_alpha": 8', '"lora_alpha": 1e400').encode(),
)  # fmt: skip
changed("E11a_target_none", "target_modules null (weights say q_proj, v_proj)", "warn", target_modules=None)
changed("E11b_target_empty", "target_modules []", "warn", target_modules=[])
changed("E11c_target_other", "target_modules names modules that do not exist", "mismatch", target_modules=["c_attn"])
changed("E11d_target_less", "target_modules lists only one of two", "mismatch", target_modules=["q_proj"])
changed("E11e_regex_invalid", 'target_modules is the invalid regex "*q_proj("', "corrupt", target_modules="*q_proj(")
changed("E11f_regex_redos", "target_modules is a regex with exponential backtracking", "mismatch", target_modules=REDOS)
changed("E11h_regex_endless", "target_modules is a regex that no matcher ends", "mismatch", target_modules=ENDLESS)
changed("E11g_target_empty_name", "target_modules has an empty name", "warn", target_modules=["q_proj", "v_proj", ""])
changed("E12_r_differs", "r=8, weights have rank 4: half the scaling", "mismatch", r=8)
changed("E13a_rank_pattern_wrong", "rank_pattern disagrees with the weights", "mismatch", rank_pattern={"q_proj": 8})
changed("E13b_alpha_pattern_nan", "alpha_pattern value is a string", "corrupt", alpha_pattern={"q_proj": "8"})
changed("E13c_rank_pattern_redos", "rank_pattern key is a ReDoS", "mismatch", rank_pattern={ENDLESS: 8})
changed("E13d_alpha_pattern_redos", "alpha_pattern key is a ReDoS", "mismatch", alpha_pattern={ENDLESS: 16})
changed("E13e_rank_pattern_unused", "rank_pattern key that hits nothing", "warn", rank_pattern={"k_proj": 16})
changed("E13g_rank_pattern_classic", "rank_pattern key is the ReDoS of E11f", "mismatch", rank_pattern={REDOS: 8})
changed("E13f_alpha_pattern_unused", "alpha_pattern key that hits nothing", "warn", alpha_pattern={"k_proj": 16})
changed("E14_dora_without_magnitude", "use_dora true, no magnitude vectors", "mismatch", use_dora=True)
changed("E16_fan_in_fan_out", "fan_in_fan_out true on a linear layer: corrected", "warn", fan_in_fan_out=True)
changed("E17_bias_all_missing", 'bias "all" but no bias tensors', "warn", bias="all")
changed("E18_modules_to_save_missing", "modules_to_save without weights", "mismatch", modules_to_save=["lm_head"])
changed("E19a_unknown_field", "unknown fields without a value", "ok", a_new=None, b_new={}, c_new=False)
changed("E19b_unknown_field_on", "unknown field that is switched on: may change the maths", "mismatch", shiny_new=True)
changed("E20_base_is_url", "base_model_name_or_path is a URL", "ok", base_model_name_or_path="http://127.0.0.1:9/x")
changed("E20b_base_outside", "base_model_name_or_path is a path outside", "ok", base_model_name_or_path="../../../etc")


@case("E21_auto_mapping_import", "auto_mapping.parent_library names a planted module", "ok")
def auto_mapping_import(room: Room) -> None:
    planted(room, room.root / "evil_planted.py")
    room.plant = True
    room.change_adapter(auto_mapping={"base_model_class": "Evil", "parent_library": "evil_planted"}, task_type=None)


@case("E22_megatron_import", "megatron_core names a planted module", "mismatch")
def megatron_import(room: Room) -> None:
    planted(room, room.root / "evil_planted.py")
    room.plant = True
    room.change_adapter(megatron_core="evil_planted", megatron_config={"tensor_model_parallel_size": 1})


rewritten(
    "E23_duplicate_key", "r twice: 4 then 64 (last one wins in most parsers)", "corrupt",
    lambda text: text.replace('"r": 4,', '"r": 4,\n  "r": 64,').encode(),
)  # fmt: skip
changed("E24_layers_out_of_range", "layers_to_transform [7]", "mismatch", layers_to_transform=[7])
rewritten("E26_utf16", "UTF-16 with BOM", "corrupt", lambda text: text.encode("utf-16"))
rewritten("E26b_utf8_bom", "UTF-8 with BOM (valid content)", "ok", lambda text: text.encode("utf-8-sig"))
rewritten("E27_deep", "100 000 nested lists", "corrupt", lambda text: b'{"r":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
rewritten("E27b_deep_in_sound", "1 000 nested lists in an unknown key", "corrupt",
          lambda text: text.replace("{", '{"x": ' + "[" * 1000 + "]" * 1000 + ",", 1).encode())  # fmt: skip
changed("E28_huge", "20 MB string in the config", "corrupt", base_model_name_or_path="x" * 20_000_000)
changed("E29_runtime_config", "runtime_config in the file", "ok", runtime_config={"ephemeral_gpu_offload": False})
changed(
    "E30_invocation_tokens", "aLoRA invocation tokens: cannot be merged", "mismatch", alora_invocation_tokens=[1, 2]
)
changed("E31_quantized_train", "qalora on", "mismatch", use_qalora=True)
