"""A sound base model, a sound LoRA adapter and their exact merge, as arrays and as the bytes of files.

Every number is a small multiple of a power of two: the merge is exact in float32, whatever the order of the sums,
so "the right output" is one string of bytes.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

Tensors = dict[str, np.ndarray]
Header = dict[str, object]

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "C64": np.complex64, "I64": np.int64, "I8": np.int8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}

HIDDEN, MLP, VOCAB, KV, RANK, ALPHA = 64, 96, 128, 32, 4, 8
PREFIX = "base_model.model."
Q, V = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj"
Q0, Q1, V0, V1 = Q.format(0), Q.format(1), V.format(0), V.format(1)
ADAPTED = {Q0: (HIDDEN, HIDDEN), V0: (KV, HIDDEN), Q1: (HIDDEN, HIDDEN), V1: (KV, HIDDEN)}

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": MLP,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB,
    "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32",
}  # fmt: skip

ADAPTER_CONFIG = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": None, "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": ALPHA, "lora_bias": False, "lora_dropout": 0.0,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": RANK,
    "rank_pattern": {}, "revision": None, "target_modules": ["q_proj", "v_proj"], "target_parameters": None,
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_bdlora": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False, "velora_config": None,
}  # fmt: skip


def dyadic(seed: int, shape: tuple[int, ...], step: float) -> np.ndarray:
    """Multiples of `step` between -8 and 8 of them, none zero."""
    random = np.random.default_rng(seed)
    return (random.integers(1, 9, shape) * random.choice([-1, 1], shape) * step).astype(np.float32)


def base_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a two-layer Llama with grouped queries, so that q_proj and v_proj differ in shape."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in (0, 1):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}self_attn.{n}_proj.weight": (rows, HIDDEN)
            for n, rows in zip("qkvo", (HIDDEN, KV, KV, HIDDEN), strict=True)
        }
        shapes |= {f"{at}mlp.gate_proj.weight": (MLP, HIDDEN), f"{at}mlp.up_proj.weight": (MLP, HIDDEN)}
        shapes |= {f"{at}mlp.down_proj.weight": (HIDDEN, MLP)}
        shapes |= {f"{at}{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def base() -> Tensors:
    """The sound model."""
    return {name: dyadic(i, shape, 1 / 256) for i, (name, shape) in enumerate(base_shapes().items())}


def adapter() -> Tensors:
    """The sound LoRA, in PEFT's names."""
    tensors = {}
    for i, (module, (rows, columns)) in enumerate(ADAPTED.items()):
        tensors[a_name(module)] = dyadic(100 + i, (RANK, columns), 1 / 64)
        tensors[b_name(module)] = dyadic(200 + i, (rows, RANK), 1 / 64)
    return tensors


def a_name(module: str) -> str:
    return f"{PREFIX}{module}.lora_A.weight"


def b_name(module: str) -> str:
    return f"{PREFIX}{module}.lora_B.weight"


def merged(model: Tensors, lora: Tensors, scale: float = ALPHA / RANK) -> Tensors:
    """W + scale * B A for every module of which `lora` has both factors."""
    result = dict(model)
    for module in ADAPTED:
        if a_name(module) in lora and b_name(module) in lora:
            delta = lora[b_name(module)].astype(np.float64) @ lora[a_name(module)].astype(np.float64)
            whole = model[f"{module}.weight"].astype(np.float64) + scale * delta
            result[f"{module}.weight"] = whole.astype(model[f"{module}.weight"].dtype)
    return result


def header_of(tensors: Tensors, metadata: Header | None = None) -> Header:
    """The header of a safetensors file that holds `tensors` in their order."""
    header: Header = {"__metadata__": {"format": "pt"} if metadata is None else metadata}
    at = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]
        }  # fmt: skip
        at += array.nbytes
    return header


def data_of(tensors: Tensors) -> bytes:
    return b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())


def as_text(header: Header) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode("utf-8", "surrogatepass")


def framed(header: bytes, data: bytes, pad: int = 8) -> bytes:
    """Length, header, data; the header is filled up with spaces to a multiple of `pad`."""
    header += b" " * (-len(header) % pad)
    return struct.pack("<Q", len(header)) + header + data


def packed(tensors: Tensors, metadata: Header | None = None) -> bytes:
    """A sound safetensors file."""
    return framed(as_text(header_of(tensors, metadata)), data_of(tensors))


def unpacked(data: bytes) -> Tensors:
    """The tensors of a sound safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return {name: _array(entry, data[8 + length :]) for name, entry in header.items()}


def _array(entry: dict, data: bytes) -> np.ndarray:
    begin, end = entry["data_offsets"]
    return np.frombuffer(data[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])


def read_folder(folder: Path) -> Tensors:
    """Every tensor of every safetensors file of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: array for file in files for name, array in unpacked(file.read_bytes()).items()}


def shard_name(number: int, of: int = 3) -> str:
    return f"model-{number:05}-of-{of:05}.safetensors"


def in_shards(model: Tensors, count: int = 3) -> dict[str, Tensors]:
    """The model cut into `count` shards of neighbouring tensors: file name -> its tensors."""
    names = np.array_split(np.array(list(model)), count)
    return {shard_name(i): {str(n): model[str(n)] for n in part} for i, part in enumerate(names, 1)}


def index_of(shards: dict[str, Tensors]) -> Header:
    """What model.safetensors.index.json says about these shards."""
    total = sum(array.nbytes for part in shards.values() for array in part.values())
    weight_map = {name: file for file, part in shards.items() for name in part}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
