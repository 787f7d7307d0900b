"""Table C: the model's config and the other files of its folder."""

from __future__ import annotations

from .case import Room, case

LEAVE_A_MARK = "import pathlib\npathlib.Path({!r}).write_text('ran')\n"
REMOTE_CODE = {"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM", "AutoConfig": "modeling_evil.EvilConfig"}
JINJA_ESCAPE = "{{ cycler.__init__.__globals__.os.system('echo ran') }}"


def planted(room: Room, path) -> None:
    """Write a module that leaves the marker when it is imported."""
    path.write_text(LEAVE_A_MARK.format(str(room.marker)))


@case("C01_config_missing", "no config.json", "corrupt")
def config_missing(room: Room) -> None:
    (room.base / "config.json").unlink()


@case("C02_config_not_json", "config.json is not JSON", "corrupt")
def config_not_json(room: Room) -> None:
    (room.base / "config.json").write_text('{"model_type": "llama",')


# Models with code of their own are common (DeepSeek, Phi, Qwen-VL); the code is copied as data and never run.
@case("C03_auto_map_remote_code", "auto_map + modeling_evil.py: code must not run", "warn")
def auto_map(room: Room) -> None:
    room.change_config(auto_map=REMOTE_CODE)
    planted(room, room.base / "modeling_evil.py")
    planted(room, room.root / "modeling_evil.py")
    room.plant = True


@case("C04_attn_impl_internal", "_attn_implementation_internal names a hub repo", "warn")
def attention_internal(room: Room) -> None:
    room.change_config(_attn_implementation_internal="evil/attention-kernel")


@case("C05_trust_remote_code_in_config", '"trust_remote_code": true inside config.json', "unsafe")
def trust_remote_code(room: Room) -> None:
    room.change_config(trust_remote_code=True, auto_map=REMOTE_CODE)
    planted(room, room.base / "modeling_evil.py")


@case("C06_hidden_size_lies", "config.hidden_size does not fit the weights", "warn")
def hidden_size_lies(room: Room) -> None:
    room.change_config(hidden_size=128)


@case("C07_layers_missing", "config says 4 layers, the file has 2", "warn")
def layers_missing(room: Room) -> None:
    room.change_config(num_hidden_layers=4)


@case("C08_unknown_model_type", "unknown model_type: streaming merge needs no architecture", "ok")
def unknown_model_type(room: Room) -> None:
    room.change_config(model_type="llama9", architectures=["Llama9ForCausalLM"])


@case("C09_huge_config", "vocab_size 10**12 in config: must not allocate", "warn")
def huge_config(room: Room) -> None:
    room.change_config(vocab_size=10**12)


@case("C12_quantized_base", "config has a bitsandbytes quantization_config", "mismatch")
def quantized_base(room: Room) -> None:
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    room.change_config(quantization_config=quantization)


@case("C13_hostile_template", "chat template with a Jinja escape: copied, never rendered", "ok")
def hostile_template(room: Room) -> None:
    (room.base / "chat_template.jinja").write_text(JINJA_ESCAPE)
    room.copied.append("chat_template.jinja")


@case("C14_shadow_modules", "torch.py, json.py and sitecustomize.py inside the model folder, run from there", "ok")
def shadow_modules(room: Room) -> None:
    for name in ("torch", "json", "sitecustomize", "numpy", "click"):
        planted(room, room.base / f"{name}.py")
    room.cwd = room.base


@case("C15_config_is_list", "config.json holds a list", "corrupt")
def config_is_list(room: Room) -> None:
    (room.base / "config.json").write_text("[]")


@case("C16_empty_folder", "the model folder holds a config and no weights", "corrupt")
def no_weights(room: Room) -> None:
    (room.base / "model.safetensors").unlink()
