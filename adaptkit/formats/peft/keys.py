"""The names of tensors in a PEFT file: `base_model.model.<module path>.<part>`.

Every version since 0.0.1: with and without the prefix, with the adapter's name in the key, parameters of heads under
`modules_to_save`, biases with and without `base_layer`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PREFIX = "base_model.model."
ALONE = "base_model."  # where PEFT wraps the model whole, since no module of it is adapted
NAME = r"(?:\.(?P<adapter>[^.]+))?"  # older files keep the adapter's name in the key
# part of the key -> our letter; the order matters, the first that fits wins
PARTS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf"(?:(?P<path>.*)\.)?{part}"), letter)
    for part, letter in (
        (rf"lora_A{NAME}\.weight", "A"),
        (rf"lora_B{NAME}\.weight", "B"),
        (rf"lora_B{NAME}\.bias", "c"),
        (rf"lora_A{NAME}", "aA"),
        (rf"lora_B{NAME}", "aB"),
        (rf"lora_E{NAME}", "aE"),
        (rf"lora_embedding_A{NAME}", "eA"),
        (rf"lora_embedding_B{NAME}", "eB"),
        (r"lora_magnitude_vector(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?", "m"),
        (rf"lora_diag{NAME}", "d"),
        (rf"ia3_l{NAME}", "l"),
        (rf"token_adapter\.trainable_tokens_delta{NAME}", "rows"),
        (rf"trainable_tokens_delta{NAME}", "rows"),
        (r"lora_velora_embed(?P<adapter>)(?:\..*)?", "training"),
        (r"lora_monteclora_sampler(?P<adapter>)\..*", "training"),
    )
)
SAVED = re.compile(r"(?P<path>.*)\.modules_to_save(?:\.(?P<adapter>[^.]+))?\.(?P<leaf>weight|bias)")
ORIGINAL = re.compile(r".*\.original_module\..*")


@dataclass(frozen=True)
class Key:
    """What one tensor of the file is.

    path: the module, without prefix and `base_layer`.     part: its letter, "whole", or "training" for what merging ignores.
    depth: how many `base_layer` stand before the part, for parameters wrapped one in another.
    """

    path: str
    part: str
    depth: int = 0


def parse(name: str, prefix: str = PREFIX) -> Key:
    """What a tensor is, from its name alone.    prefix: before a module's path; PREFIX, or ALONE beside virtual tokens."""
    body = name.removeprefix(prefix)
    if body == "prompt_embeddings":
        return Key("", "P")
    if ORIGINAL.fullmatch(body):
        return Key(body, "training")
    for pattern, letter in PARTS:
        if found := pattern.fullmatch(body):
            return _key(found["path"] or "", letter)
    if found := SAVED.fullmatch(body):
        return Key(f"{found['path']}.{found['leaf']}", "whole")
    return Key(body.replace(".base_layer.", "."), "whole")


def _key(path: str, letter: str) -> Key:
    depth = 0
    while path.endswith(".base_layer"):
        path, depth = path.removesuffix(".base_layer"), depth + 1
    return Key(path.replace(".base_layer.", "."), letter, depth)


def is_attention_output(name: str) -> bool:
    """nn.MultiheadAttention's out_proj, the only layer that PEFT wraps inside a wrapped layer."""
    return ".base_layer.out_proj.lora_" in name
