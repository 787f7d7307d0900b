"""Table F: the adapter's weights."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from . import sound
from .case import ADAPTER, ADAPTER_BIN, Room, case
from .payload import payload_bin
from .sound import Q0, V0, Tensors, a_name, b_name

A_Q0, B_Q0, A_V0, B_V0 = a_name(Q0), b_name(Q0), a_name(V0), b_name(V0)


def weights(name: str, text: str, must: str, spoil) -> None:
    """A case with other adapter tensors: a function of the sound ones."""

    def build(room: Room) -> None:
        tensors = spoil(sound.adapter())
        room.write_adapter(tensors, expect=None if must in ("ok", "warn") else {})

    case(name, text, must)(build)


def without(tensors: Tensors, *parts: str) -> Tensors:
    """The tensors whose names hold none of `parts`."""
    return {name: array for name, array in tensors.items() if not any(part in name for part in parts)}


def cast(tensors: Tensors, dtype: object) -> Tensors:
    return {name: array.astype(dtype) for name, array in tensors.items()}


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new): array for name, array in tensors.items()}


def poked(tensors: Tensors, name: str, value: float) -> Tensors:
    tensors[name][1, 1] = value
    return tensors


def zero_b(tensors: Tensors) -> Tensors:
    return {name: array * (0 if "lora_B" in name else 1) for name, array in tensors.items()}


def wider(tensors: Tensors) -> Tensors:
    return {name: np.hstack([array, array]) if "lora_A" in name else array for name, array in tensors.items()}


def mixed(tensors: Tensors) -> Tensors:
    return {n: a.astype(np.float16 if "lora_A" in n else ml_dtypes.bfloat16) for n, a in tensors.items()}


def swapped(tensors: Tensors) -> Tensors:
    return renamed(renamed(renamed(tensors, "q_proj", "x_proj"), "v_proj", "q_proj"), "x_proj", "v_proj")


weights("F01_A_without_B", "lora_B of one module missing", "mismatch", lambda t: without(t, B_Q0))
weights("F02_B_without_A", "lora_A of one module missing", "mismatch", lambda t: without(t, A_Q0))
weights("F03_layer_missing", "no tensors for layer 1 although target_modules covers it", "warn",
        lambda t: without(t, "layers.1."))  # fmt: skip
weights("F04_other_width", "adapter of a wider model", "mismatch", wider)
weights("F05_other_arch", "names of another architecture", "mismatch",
        lambda t: renamed(t, "model.layers", "transformer.h"))  # fmt: skip
weights("F06_deeper_model", "extra layer 7 that the model lacks", "mismatch",
        lambda t: t | renamed({A_Q0: t[A_Q0], B_Q0: t[B_Q0]}, "layers.0", "layers.7"))  # fmt: skip
weights("F07a_nan_in_B", "NaN in lora_B", "corrupt", lambda t: poked(t, B_Q0, np.nan))
weights("F07b_inf_in_A", "Inf in lora_A", "corrupt", lambda t: poked(t, A_Q0, np.inf))
weights("F07c_all_zero_B", "every lora_B is zero: merge is a no-op", "warn", zero_b)


@case("F08_overflow_fp16", "update overflows float16", "corrupt")
def overflow_fp16(room: Room) -> None:
    room.write_model(cast(sound.base(), np.float16))
    room.write_adapter({n: a * (1e6 if n in (A_Q0, B_Q0) else 1) for n, a in sound.adapter().items()}, expect={})


weights("F09_rank_A_B_differ", "A has rank 4, B has rank 8", "mismatch", lambda t: t | {B_Q0: np.hstack([t[B_Q0]] * 2)})
weights("F10_transposed_A", "A is transposed", "mismatch", lambda t: t | {A_Q0: t[A_Q0].T.copy()})
weights("F11a_int8", "int8 tensors", "mismatch", lambda t: cast(t, np.int8))
weights("F11b_bool", "bool tensors", "mismatch", lambda t: cast(t, np.bool_))
weights("F11c_complex", "complex tensors", "mismatch", lambda t: cast(t, np.complex64))
weights("F11d_float64", "float64 tensors (valid, unusual)", "ok", lambda t: cast(t, np.float64))
weights("F11e_mixed", "A float16, B bfloat16 (valid, unusual)", "ok", mixed)
weights("F12_zero_d", "lora_A is a 0-d tensor", "mismatch", lambda t: t | {A_Q0: np.array(1, np.float32)})
weights("F13_rank_zero", "A [0,64], B [64,0]", "mismatch",
        lambda t: t | {A_Q0: t[A_Q0][:0].copy(), B_Q0: t[B_Q0][:, :0].copy()})  # fmt: skip
weights("F14_unknown_tensor", "a tensor that belongs to no LoRA slot", "mismatch",
        lambda t: t | {A_Q0.replace("lora_A", "lora_C"): t[A_Q0]})  # fmt: skip


@case("F15_prefix_missing", "names without base_model.model.", "ok")
def prefix_missing(room: Room) -> None:
    room.write_adapter(renamed(sound.adapter(), sound.PREFIX, ""), expect=room.expect)


@case("F16_two_weight_files", "adapter_model.safetensors (sound) next to adapter_model.bin (payload)", "warn")
def two_weight_files(room: Room) -> None:
    (room.adapter / ADAPTER_BIN).write_bytes(payload_bin(room.marker))


@case("F17_adapter_name_infix", "names with .default. in them", "ok")
def adapter_name_infix(room: Room) -> None:
    infixed = renamed(renamed(sound.adapter(), "lora_A.", "lora_A.default."), "lora_B.", "lora_B.default.")
    room.write_adapter(infixed, expect=room.expect)


weights("F19_collision", "same slot under two spellings with other values", "corrupt",
        lambda t: t | {A_Q0.replace("lora_A.", "lora_A.default."): t[A_Q0] * 2})  # fmt: skip


@case("F20_adapter_lfs_pointer", "adapter weights are a git-lfs pointer", "corrupt")
def adapter_lfs_pointer(room: Room) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'1f' * 32}\nsize 9472\n"
    (room.adapter / ADAPTER).write_text(pointer)


@case("F21_weights_missing", "adapter_config.json without any weights", "corrupt")
def weights_missing(room: Room) -> None:
    (room.adapter / ADAPTER).unlink()


@case("F22_embed_resized", "modules_to_save embedding with 2 more rows than the model", "mismatch")
def embed_resized(room: Room) -> None:
    rows = np.ones((sound.VOCAB + 2, sound.HIDDEN), np.float32)
    room.change_adapter(modules_to_save=["embed_tokens"])
    room.write_adapter(sound.adapter() | {f"{sound.PREFIX}model.embed_tokens.weight": rows}, expect={})


weights("F23_conv_4d", "4-d lora_A for a linear layer", "mismatch", lambda t: t | {A_Q0: t[A_Q0][:, :, None, None]})
weights("F24_3d_moe_like", "lora_A with a leading expert dimension", "mismatch", lambda t: t | {A_Q0: t[A_Q0][None]})
weights("F25_empty_adapter", "no tensors at all", "mismatch", lambda t: {})
weights("F26_dora_unannounced", "magnitude vectors present, use_dora false", "mismatch",
        lambda t: t | {f"{sound.PREFIX}{m}.lora_magnitude_vector": np.ones(s[0], np.float32)
                       for m, s in sound.ADAPTED.items()})  # fmt: skip
weights("F27_swapped_modules", "q_proj and v_proj names swapped: shapes differ (GQA)", "mismatch", swapped)
weights("F28_hostile_name", "LoRA slot name with ESC and newline", "mismatch",
        lambda t: t | renamed({A_Q0: t[A_Q0], B_Q0: t[B_Q0]}, "q_proj", "q\x1b[31m\nerror: fake\u202e"))  # fmt: skip
weights("F29_very_long_name", "1 MB tensor name: message must be shortened", "mismatch",
        lambda t: t | renamed({A_Q0: t[A_Q0], B_Q0: t[B_Q0]}, "q_proj", "q" * 1_000_000))  # fmt: skip


@case("F30_truncated_adapter", "adapter file cut by 100 bytes", "corrupt")
def truncated_adapter(room: Room) -> None:
    path = room.adapter / ADAPTER
    path.write_bytes(path.read_bytes()[:-100])


@case("F31_zero_adapter_data", "adapter of the right size, all bytes zero after the header", "warn")
def zero_adapter_data(room: Room) -> None:
    room.write_adapter({name: np.zeros_like(array) for name, array in sound.adapter().items()})


@case("F32_swapped_args", "adapter given as model and model as adapter", "usage")
def swapped_args(room: Room) -> None:
    room.base, room.adapter = room.adapter, room.base


@case("F33_model_twice", "adapter path is a full model", "usage")
def model_twice(room: Room) -> None:
    room.adapter = room.base
