"""Tensor names. Today `unet.<module>.lora_A.weight`; before PEFT `unet.<attention>.processor.to_q_lora.down.weight`.

transformers 5 took a level out of the names of CLIP's first text encoder. The older spelling, which all readers find,
is the one of module paths here: text_encoder.text_model.encoder.layers.0.self_attn.q_proj.
"""

from __future__ import annotations

import re

COMPONENTS = (
    "unet", "transformer", "transformer_2", "prior", "text_encoder", "text_encoder_2", "text_encoder_3", "connectors",
)  # fmt: skip
BODIES = ("down_blocks.", "up_blocks.", "mid_block.", "transformer_blocks.", "single_transformer_blocks.")
LANGUAGE = re.compile(r"transformer\.(?:h|layer|wte|wpe|word_embeddings|encoder|decoder)\.")  # models of that name
NAME = r"(?:\.(?!weight$|bias$)[^.]+)?"  # of the adapter, in raw dumps
PARTS = tuple(
    (re.compile(rf"(?P<path>.+?){ending}"), letter)
    for ending, letter in (
        (rf"\.lora_A{NAME}\.weight", "A"),
        (rf"\.lora_B{NAME}\.weight", "B"),
        (rf"\.lora_B{NAME}\.bias", "c"),
        (rf"\.lora_magnitude_vector{NAME}(?:\.weight)?", "m"),
        (r"(?:_lora|\.lora|\.lora_linear_layer)\.down\.weight", "A"),
        (r"(?:_lora|\.lora|\.lora_linear_layer)\.up\.weight", "B"),
        (r"(?:_lora|\.lora|\.lora_linear_layer)?\.alpha", "alpha"),
    )
)
CLIP = re.compile(r"(?P<encoder>text_encoder(?:_[23])?)\.(?P<rest>encoder\.layers\.|embeddings\.|final_layer_norm)")
ENCODER = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # as old files call them


def component(path: str) -> str:
    """The part of the pipeline; "" for a file of one component alone."""
    start = path.partition(".")[0]
    return start if start in COMPONENTS and not LANGUAGE.match(path) else ""


def parse(name: str) -> tuple[str, str] | None:
    """The module path and the letter of a tensor; None for what is no part of a LoRA."""
    for pattern, letter in PARTS:
        if found := pattern.fullmatch(name):
            return _module(found["path"]), letter
    return None


def _module(path: str) -> str:
    path = path.replace(".processor.", ".")
    home, _, leaf = path.rpartition(".")
    if leaf in ENCODER and component(path).startswith("text_encoder"):
        path = f"{home}.{ENCODER[leaf]}"
    elif leaf == "to_out":
        path = f"{path}.0"
    return CLIP.sub(r"\g<encoder>.text_model.\g<rest>", path) if CLIP.match(path) else path


def is_one(names: set[str]) -> bool:
    """Whether tensor names are those of a diffusers LoRA: all of them, with a component or a known first module."""
    return bool(names) and all(parse(n) is not None and (component(n) or n.startswith(BODIES)) for n in names)
