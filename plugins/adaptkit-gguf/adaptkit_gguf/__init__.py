"""LoRA adapters as llama.cpp reads them: one .gguf file, in the tensor names of the base model's own GGUF file.

    dW = (alpha / r) b a     a: (r, in)   b: (out, r)     alpha 0: dW = b a

One alpha serves the whole file, so where sites differ (rsLoRA, patterns) their scales are multiplied into b and alpha is 0.
For architectures whose GGUF has rotary pairs side by side, the rows of q's and k's b are moved as those of q and k are.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's convert_lora_to_gguf.py
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from adaptkit import Adapter, AdaptKitError, Corrupt, Format, LoRA, Note, Site, appearing, fold

LLAMA = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    **{f"blk.#.attn_{x}": f"model.layers.#.self_attn.{x}_proj" for x in "qkv"},
    "blk.#.attn_output": "model.layers.#.self_attn.o_proj",
    **{f"blk.#.ffn_{x}": f"model.layers.#.mlp.{x}_proj" for x in ("gate", "up", "down")},
}
PHI3 = LLAMA | {
    "blk.#.attn_qkv": "model.layers.#.self_attn.qkv_proj",
    "blk.#.ffn_up": "model.layers.#.mlp.gate_up_proj",
}
PHI2 = LLAMA | {
    "blk.#.attn_output": "model.layers.#.self_attn.dense",
    "blk.#.ffn_up": "model.layers.#.mlp.fc1",
    "blk.#.ffn_down": "model.layers.#.mlp.fc2",
}
STARCODER2 = LLAMA | {"blk.#.ffn_up": "model.layers.#.mlp.c_fc", "blk.#.ffn_down": "model.layers.#.mlp.c_proj"}
GPT2 = {
    "token_embd": "transformer.wte",
    "output": "lm_head",
    "blk.#.attn_qkv": "transformer.h.#.attn.c_attn",
    "blk.#.attn_output": "transformer.h.#.attn.c_proj",
    "blk.#.ffn_up": "transformer.h.#.mlp.c_fc",
    "blk.#.ffn_down": "transformer.h.#.mlp.c_proj",
}


@dataclass(frozen=True)
class Arch:
    """How llama.cpp names an architecture, its modules, and whether its GGUF moves the rows of q and k."""

    name: str
    modules: dict
    moved: bool


# by model_type of config.json; a family that is not here may reorder or fuse weights, so it is refused
ARCHS = {t: Arch(n, LLAMA, True) for t, n in {
    "llama": "llama", "mistral": "llama", "arcee": "arcee", "smollm3": "smollm3", "granite": "granite", "olmo": "olmo",
}.items()} | {t: Arch(n, LLAMA, False) for t, n in {
    "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3", "olmo2": "olmo2",
}.items()} | {
    "phi3": Arch("phi3", PHI3, False),
    "phi": Arch("phi2", PHI2, False),
    "starcoder2": Arch("starcoder2", STARCODER2, False),
    "gpt2": Arch("gpt2", GPT2, False),
}  # fmt: skip
KEPT = ("general.name", "general.description", "general.author", "general.license", "general.version")


@dataclass(frozen=True)
class Model:
    """What must be known of the base model: its architecture and its heads."""

    arch: Arch
    heads: int
    kv_heads: int
    tied: bool = False


class Gguf(Format):
    """llama.cpp: one .gguf file with a LoRA for a language model."""

    name = "gguf"
    suffix = ".gguf"
    cannot = (
        "anything but LoRA on matrices and token embeddings",
        "a scale for each module (folded, which changes nothing beyond a rounding)",
        f"models other than {', '.join(sorted(ARCHS))}",
    )

    def sniff(self, path):
        path = self.file(path)
        if not path.is_file():
            return False
        with open(path, "rb") as f:
            head = f.read(1 << 16)
        return head[:4] == b"GGUF" and b"general.type" in head and b"adapter.type" in head

    def read(self, path, *, base=None):
        gguf, path = library(), self.file(path)
        try:
            file = gguf.GGUFReader(path)
            said = {k: f.contents() for k, f in file.fields.items()}
            tensors = {t.name: numbers(gguf, t) for t in file.tensors}
        except Exception as e:  # the reader lets whatever it stumbles over through
            raise unsound(e, path.name) from None
        try:
            return adapter_of(said, tensors, base)
        except AdaptKitError as e:
            raise e.at(path.name) from None

    def write(self, adapter, path, *, base=None, drop=()):
        sites, _, notes = fold.chosen(adapter, "gguf", {"embedding"}, drop)
        model = model_of(base, adapter.meta)
        alpha, sites = one_alpha(sites, notes)
        tensors = {}
        for place, site in sites.items():
            tensors |= named(place, site, model, notes)
        save(path, model, alpha, tensors, adapter.meta)
        return notes


def unsound(error, where):
    return Corrupt(f"is no sound GGUF file ({type(error).__name__}: {error})", where=where, hint="fetch it again")


def library():
    try:
        import gguf
    except ImportError:
        raise AdaptKitError("format 'gguf' needs gguf", hint="pip install adaptkit[gguf]") from None
    return gguf


# the base model


def model_of(base, meta):
    """The base model: a folder with config.json, a .gguf file of it, or what was noted when the adapter was read."""
    if base is None and "gguf/model" in meta:
        kept = json.loads(meta["gguf/model"])
        return Model(ARCHS[kept["type"]], kept["heads"], kept["kv_heads"], kept["tied"])
    base = base or (meta.get("base") if Path(meta.get("base") or ".", "config.json").is_file() else None)
    if base is None:
        hint = "give the base model, or a folder with its config.json (--base)"
        raise AdaptKitError("a GGUF adapter is in the order of its model's heads, which are not known", hint=hint)
    return from_gguf(base) if Path(base).suffix == ".gguf" else from_config(base)


def from_config(base):
    file = Path(base, "config.json") if Path(base).is_dir() else Path(base)
    try:
        config = json.loads(file.read_text())
        kind = config["model_type"]
        arch = ARCHS[kind]
        heads = int(config.get("num_attention_heads") or config["n_head"])
        kv = int(config.get("num_key_value_heads") or heads)
    except (OSError, ValueError, TypeError, AttributeError) as e:
        why = getattr(e, "strerror", None) or e
        raise AdaptKitError(f"config.json cannot be read ({why})", where=base) from None
    except KeyError as e:
        raise AdaptKitError(
            f"{e} is not there, or no model whose GGUF is known here", where=base, hint=known()
        ) from None
    return Model(arch, heads, kv, bool(config.get("tie_word_embeddings", kind == "gpt2" or kind.startswith("gemma"))))


def from_gguf(base):
    try:
        file = library().GGUFReader(base)
        said = {k: f.contents() for k, f in file.fields.items()}
        name, names = said["general.architecture"], {t.name for t in file.tensors}
        heads = said[f"{name}.attention.head_count"]
        kv = said.get(f"{name}.attention.head_count_kv", heads)
        return Model(arch_named(name), int(heads), int(kv), "output.weight" not in names)
    except AdaptKitError:
        raise
    except Exception as e:
        raise unsound(e, base) from None


def arch_named(name):
    for arch in ARCHS.values():
        if arch.name == name:
            return arch
    raise AdaptKitError(f"architecture {name!r} may move or fuse weights in a way not known here", hint=known())


def known():
    return f"known are {', '.join(sorted(ARCHS))}"


# names and rows


def named(place, site, model, notes):
    """The two tensors of a site."""
    name = gguf_name(place, model)
    A, B = (narrowed(fold.stored(site.params[k]), f"{place}.{k}", notes) for k in "AB")
    if site.tuner.embedding != (name == "token_embd"):
        raise AdaptKitError(
            f"{place} is LoRA on {'an embedding' if site.tuner.embedding else 'a matrix'}, {name} is not"
        )
    if name in ("token_embd", "output") and model.tied:
        raise AdaptKitError(
            f"{place}: the model's embedding is its head too, and llama.cpp would change both or neither"
        )
    if site.tuner.embedding:
        return {f"{name}.weight.lora_a": A.T, f"{name}.weight.lora_b": B}
    return {f"{name}.weight.lora_a": A, f"{name}.weight.lora_b": moved(name, B, model)}


def gguf_name(place, model):
    for name, module in model.arch.modules.items():
        if found := re.fullmatch(re.escape(module).replace(r"\#", r"(\d+)"), place):
            return name.replace("#", found[1]) if "#" in name else name
    raise AdaptKitError(f"{place} is no module of {model.arch.name} that llama.cpp takes a LoRA for")


def module_name(name, model):
    """The module of a tensor such as blk.0.attn_q."""
    number = re.search(r"\.(\d+)\.", name)
    module = model.arch.modules.get(re.sub(r"\.\d+\.", ".#.", name))
    if module is None:
        raise AdaptKitError(f"{name!r} is no module of {model.arch.name} that is known here")
    return module.replace("#", number[1]) if number else module


def moved(name, B, model, back=False):
    """B's rows in the order of the GGUF's q and k: the halves of each head, which rotate together, interleaved."""
    heads = {"attn_q": model.heads, "attn_k": model.kv_heads}.get(name.rpartition(".")[2])
    if not model.arch.moved or heads is None:
        return B
    if len(B) % (2 * heads):
        raise AdaptKitError(f"{name}: {len(B)} rows do not divide into {heads} heads of an even size")
    halves = (heads, len(B) // heads // 2, 2) if back else (heads, 2, len(B) // heads // 2)
    return B.reshape(*halves, -1).swapaxes(1, 2).reshape(B.shape)


# numbers


def one_alpha(sites, notes):
    """The alpha of the file: what all sites have, or 0 with their scales folded."""
    alphas = {s.tuner.scale * s.tuner.r for s in sites.values()}
    alpha = next(iter(alphas))
    if len(alphas) == 1 and alpha and float(np.float32(alpha)) == alpha:
        return alpha, sites
    text = "gguf has one alpha for all, so this scale went into lora_b"
    notes += [Note("folded", p, text) for p, s in sites.items() if s.tuner.scale != 1]
    return 0.0, {p: fold.with_scale(s, 1.0, p) for p, s in sites.items()}


def narrowed(array, where, notes):
    if not np.isfinite(array.astype("f4")).all():
        raise AdaptKitError(f"{where} has numbers that are not finite, or too large for float32")
    if array.dtype != np.float64:
        return np.ascontiguousarray(array)
    notes.append(Note("rounded", where, "float64 was rounded to float32, the widest that llama.cpp computes with"))
    return array.astype("f4")


def numbers(gguf, tensor):
    kind = gguf.GGMLQuantizationType
    if tensor.tensor_type in (kind.F32, kind.F16):
        return np.array(tensor.data)
    if tensor.tensor_type == kind.BF16:
        return np.array(tensor.data).view(ml_dtypes.bfloat16)
    return gguf.dequantize(tensor.data, tensor.tensor_type)  # exact in float32


def save(path, model, alpha, tensors, meta):
    gguf = library()
    with appearing(path) as beside:
        file = gguf.GGUFWriter(beside, model.arch.name)
        file.add_type("adapter")
        file.add_string("adapter.type", "lora")
        file.add_float32("adapter.lora.alpha", alpha)
        file.add_quantization_version(2)
        for key in KEPT:
            if f"gguf:{key}" in meta:
                file.add_string(key, meta[f"gguf:{key}"])
        for name, array in tensors.items():
            wide = {"raw_dtype": gguf.GGMLQuantizationType.BF16} if array.dtype == ml_dtypes.bfloat16 else {}
            array = np.ascontiguousarray(array)
            file.add_tensor(name, array.view("u1") if wide else array, **wide)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()


# reading


def adapter_of(said, tensors, base):
    if said.get("general.type") != "adapter" or said.get("adapter.type") != "lora":
        raise AdaptKitError("is not a LoRA adapter but something else in GGUF")
    if "adapter.alora.invocation_tokens" in said:
        raise AdaptKitError("is an aLoRA, which acts only after its invocation tokens")
    model = reading_model(said, base)
    alpha = float(said.get("adapter.lora.alpha") or 0.0)
    if not np.isfinite(alpha):
        raise AdaptKitError(f"adapter.lora.alpha is {alpha}, a number is expected")
    meta = {f"gguf:{k}": said[k] for k in KEPT if isinstance(said.get(k), str)}
    kind = next(t for t, a in ARCHS.items() if a == model.arch)
    kept = {"type": kind, "heads": model.heads, "kv_heads": model.kv_heads, "tied": model.tied}
    meta["gguf/model"] = json.dumps(kept)
    return Adapter(
        {module_name(n, model): site(n, *pair, alpha, model) for n, pair in pairs(tensors).items()}, meta=meta
    )


def reading_model(said, base):
    """The model; without `base` only where no rows were moved."""
    name = said.get("general.architecture", "?")
    if base is None:
        arch = arch_named(name)
        if arch.moved:
            hint = "give the base model, or a folder with its config.json (--base of inspect and convert)"
            raise AdaptKitError(
                f"{name}'s q and k are in the order of its heads, whose number is not in the file", hint=hint
            )
        return Model(arch, 1, 1)
    model = model_of(base, {})
    if model.arch.name != name:
        raise AdaptKitError(f"is for the architecture {name!r}, the base model is {model.arch.name!r}")
    return model


def pairs(tensors):
    """The two factors of each tensor that is adapted."""
    found = {}
    for key, array in tensors.items():
        name, _, part = key.rpartition(".weight.")
        if part not in ("lora_a", "lora_b"):
            raise AdaptKitError(f"{key!r} is no part of a LoRA")
        found.setdefault(name, {})[part] = array
    if not found:
        raise AdaptKitError("holds no tensors")
    for name, both in found.items():
        if len(both) == 1:
            raise AdaptKitError(f"{name} has only {next(iter(both))}; it is incomplete", hint="fetch it again")
    return {name: (both["lora_a"], both["lora_b"]) for name, both in found.items()}


def site(name, A, B, alpha, model):
    embedding = name == "token_embd"
    A = A.T if embedding else A
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise AdaptKitError(f"{name}: lora_a {list(A.shape)} and lora_b {list(B.shape)} do not fit each other")
    r = A.shape[0]
    conv1d = model.arch.name == "gpt2" and name.startswith("blk.")  # stored as (in, out) in transformers
    tuner = LoRA(r=r, alpha=alpha or float(r), transposed=embedding or conv1d, embedding=embedding)
    return Site(tuner, {"A": A, "B": moved(name, B, model, back=True)})
