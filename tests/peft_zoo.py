"""Tiny random models of several shapes, and a PEFT adapter of every kind that has a merged weight, for them.

Everything is made once per folder (a session's), on first use. Adapters are stirred, so that each of them acts.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as lora_configs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("safetensors", "bin", "sharded-safetensors", "sharded-bin")
IDS = torch.tensor([[5, 17, 3, 40, 9, 22, 61, 8], [1, 2, 33, 4, 50, 6, 7, 11]])
PICTURES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))

Sizes = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32,
}  # fmt: skip


def llama(**more: Any) -> nn.Module:
    """Grouped queries, biases everywhere."""
    config = transformers.LlamaConfig(**Sizes, num_key_value_heads=2, attention_bias=True, mlp_bias=True, **more)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    """Weights stored as (in, out), ends tied."""
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def bert() -> nn.Module:
    """An encoder with a classification head."""
    return transformers.BertForSequenceClassification(transformers.BertConfig(**Sizes, num_labels=3))


def t5() -> nn.Module:
    """Encoder and decoder, with one embedding for all ends."""
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    )


def vit() -> nn.Module:
    """Other names on disk than in the model; a convolution."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)
    )


def mixtral() -> nn.Module:
    """Experts: a matrix each on disk, a stack in the model."""
    sizes = Sizes | {
        "intermediate_size": 24,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))


def opt() -> nn.Module:
    """Tied ends under `model.decoder`, an embedding narrower than the layers."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(**sizes, max_position_embeddings=32, word_embed_proj_dim=16)
    )


def neox() -> nn.Module:
    """A head that is called otherwise on disk."""
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**Sizes))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": functools.partial(llama, tie_word_embeddings=False),
    "llama-tied": functools.partial(llama, tie_word_embeddings=True),
    "gpt2": gpt2, "bert": bert, "t5": t5, "vit": vit, "mixtral": mixtral, "opt": opt, "neox": neox,
}  # fmt: skip
CLASSES = {
    "bert": "AutoModelForSequenceClassification", "t5": "AutoModelForSeq2SeqLM", "vit": "AutoModelForImageClassification",
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    formula: whether `reference` knows it.    near: allowed difference from PEFT's outputs, of the largest, for float32 weights.
    peft_merges: whether PEFT's own merge computes what its forward does.    ends: whether the file holds both ends.
    """

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    ia3: bool = False
    formula: bool = True
    near: float = 2e-6
    peft_merges: bool = True
    ends: bool | str = "auto"


Q_V = ["q_proj", "v_proj"]
ALL_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SPECTRAL = {"formula": False, "near": 2e-5}  # a float32 decomposition lies between the two


def _lora(family: str, targets: Any, config: dict[str, Any] | None = None, **more: Any) -> Kind:
    return Kind(family, {"r": 4, "lora_alpha": 8, "target_modules": targets} | (config or {}), **more)


def _ia3(family: str, attention: list[str], feedforward: list[str], **more: Any) -> Kind:
    return Kind(
        family, {"target_modules": attention + feedforward, "feedforward_modules": feedforward}, ia3=True, **more
    )


PLAIN = {
    "plain": _lora("llama", [*Q_V, "down_proj"]),
    "plain-tied": _lora("llama-tied", [*Q_V, "o_proj"]),
    "plain-gpt2": _lora("gpt2", ["c_attn", "c_proj", "c_fc"], {"fan_in_fan_out": True}),
    "plain-bert": _lora("bert", ["query", "value", "output.dense"], {"task_type": "SEQ_CLS"}),
    "plain-t5": _lora("t5", ["q", "v", "wi", "wo"], near=1e-5),
    "plain-vit": _lora("vit", [*Q_V, "fc2"], {"modules_to_save": ["classifier"]}),
    "plain-mixtral": _lora("mixtral", Q_V),
    "plain-opt": _lora("opt", [*Q_V, "fc1", "fc2"]),
    "plain-neox": _lora("neox", ["query_key_value", "dense", "dense_4h_to_h"]),
}
VECTORS = {
    "ia3": _ia3("llama", ["k_proj", "v_proj"], ["down_proj"]),
    "ia3-tied": _ia3("llama-tied", ["q_proj", "o_proj"], ["up_proj"]),
    "ia3-gpt2": _ia3("gpt2", ["c_attn"], ["mlp.c_proj"]),
    "ia3-bert": _ia3("bert", ["key", "value"], ["output.dense"]),
    "ia3-t5": _ia3("t5", ["k", "v"], ["wo"], near=1e-5),
    "ia3-vit": _ia3("vit", ["k_proj", "v_proj"], ["fc2"]),
    "ia3-mixtral": _ia3("mixtral", ["k_proj"], ["o_proj"]),
    "ia3-opt": _ia3("opt", ["k_proj", "v_proj"], ["fc2"]),
    "ia3-neox": _ia3("neox", ["query_key_value"], ["dense_4h_to_h"]),
    "ia3-conv": _ia3("vit", ["projection"], []),
    "ia3-conv-feedforward": _ia3("vit", [], ["projection"]),
    "ia3-square": _ia3("llama", ["o_proj"], ["q_proj"]),
    "ia3-regex": Kind(
        "llama",
        {"target_modules": r".*\.(k_proj|down_proj)", "feedforward_modules": r".*\.down_proj"},
        ia3=True,
        formula=False,
    ),
    "ia3-saved": Kind(
        "llama", {"target_modules": ["k_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head"]}, ia3=True
    ),
}
ODD = {
    "rslora": _lora("llama", Q_V, {"use_rslora": True}),
    "patterns": _lora(
        "llama", ALL_LLAMA,
        {"rank_pattern": {"q_proj": 2, r"layers\.1\..*\.v_proj": 3}, "alpha_pattern": {"q_proj": 5, "1.mlp.down_proj": 32}},
    ),
    "rslora-patterns": _lora("llama", Q_V, {"use_rslora": True, "rank_pattern": {"v_proj": 6}}),
    "regex": _lora("llama", r".*\.1\.self_attn\.(q|o)_proj"),
    "all-linear": _lora("llama", "all-linear", {"task_type": "CAUSAL_LM"}),
    "dora": _lora("llama", [*Q_V, "down_proj"], {"use_dora": True}),
    "dora-rslora-patterns": _lora("llama", Q_V, {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "dora-gpt2": _lora("gpt2", ["c_attn", "c_proj"], {"use_dora": True, "fan_in_fan_out": True}),
    "dora-bert": _lora("bert", ["query"], {"use_dora": True, "task_type": "SEQ_CLS"}),
    "dora-vit": _lora("vit", ["q_proj"], {"use_dora": True}),
    "dora-conv": _lora("vit", ["projection"], {"use_dora": True}),
    "dora-embedding": _lora("llama", ["embed_tokens"], {"use_dora": True}),
    "lora-bias": _lora("llama", [*Q_V, "down_proj"], {"lora_bias": True}),
    "lora-bias-gpt2": _lora("gpt2", ["c_attn"], {"lora_bias": True, "fan_in_fan_out": True}),
    "bias-all": _lora("llama", Q_V, {"bias": "all"}),
    "bias-all-bert": _lora("bert", ["query"], {"bias": "all"}),
    "bias-all-vit": _lora("vit", ["q_proj"], {"bias": "all"}),
    "bias-lora-only": _lora("llama", Q_V, {"bias": "lora_only"}),
    "bias-lora-only-opt": _lora("opt", ["fc1"], {"bias": "lora_only"}),
    "saved-head": _lora("llama", Q_V, {"modules_to_save": ["lm_head"]}),
    "saved-head-tied": _lora("llama-tied", Q_V, {"modules_to_save": ["lm_head"]}, peft_merges=False),
    "saved-norm": _lora("llama", Q_V, {"modules_to_save": ["model.norm", "embed_tokens"]}),
    "saved-neox": _lora("neox", ["dense"], {"modules_to_save": ["lm_head"]}),
    "saved-mixtral-gate": _lora("mixtral", ["q_proj"], {"modules_to_save": ["mlp.gate"]}),
    "tokens": _lora("llama", Q_V, {"trainable_token_indices": [5, 3, 40]}),
    "tokens-tied": _lora("llama-tied", Q_V, {"trainable_token_indices": {"embed_tokens": [5, 3, 40]}}),
    "tokens-gpt2": _lora("gpt2", ["c_attn"], {"trainable_token_indices": {"wte": [61, 5]}, "fan_in_fan_out": True}),
    "embedding": _lora("llama", ["embed_tokens", "q_proj"]),
    "embedding-full-path": _lora("llama", ["model.embed_tokens"]),
    "embedding-tied": _lora("llama-tied", ["model.embed_tokens"], peft_merges=False),
    "embedding-positions": _lora("gpt2", ["wpe"]),
    "embedding-gpt2": _lora("gpt2", ["wte"], peft_merges=False),
    "embedding-neox": _lora("neox", ["embed_in"]),
    "head": _lora("llama", ["lm_head", "v_proj"]),
    "head-tied": _lora("llama-tied", ["lm_head"], peft_merges=False, ends=False),
    "head-tied-and-base": _lora("llama-tied", ["lm_head"], peft_merges=False),
    "head-neox": _lora("neox", ["lm_head"]),
    "conv": _lora("vit", ["projection"]),
    "experts": _lora("mixtral", [], {"target_parameters": EXPERTS}),
    "experts-and-attention": _lora("mixtral", Q_V, {"target_parameters": EXPERTS}),
    "experts-gate-up": _lora("mixtral", [], {"target_parameters": EXPERTS[:1]}),
    "experts-down": _lora("mixtral", [], {"target_parameters": EXPERTS[1:], "use_rslora": True}),
    "experts-router": _lora("mixtral", [], {"target_parameters": ["mlp.gate.weight"]}),
    "experts-patterns": _lora(
        "mixtral", [],
        {"target_parameters": EXPERTS, "rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"gate_up_proj": 3}},
    ),
    "layers": _lora("llama", Q_V, {"layers_to_transform": [1]}),
    "layers-pattern": _lora("gpt2", ["c_attn"], {"layers_to_transform": 0, "layers_pattern": "h", "fan_in_fan_out": True}),
    "excluded": _lora("llama", Q_V, {"exclude_modules": r".*\.0\..*"}),
    "pissa": _lora("llama", Q_V, {"init_lora_weights": "pissa"}, **SPECTRAL),
    "pissa-gpt2": _lora("gpt2", ["c_attn"], {"init_lora_weights": "pissa", "fan_in_fan_out": True}, **SPECTRAL),
    "olora": _lora("llama", [*Q_V, "down_proj"], {"init_lora_weights": "olora"}, **SPECTRAL),
    # PEFT cannot start OLoRA on a Conv1D that is not square
    "olora-gpt2": _lora("gpt2", ["attn.c_proj"], {"init_lora_weights": "olora", "fan_in_fan_out": True}, **SPECTRAL),
    "olora-vit": _lora("vit", ["q_proj"], {"init_lora_weights": "olora"}, **SPECTRAL),
    "kasa": _lora("llama", [*Q_V, "down_proj"], {"kasa_config": {}}, **SPECTRAL),
    "bdlora": _lora(
        "llama", [*Q_V, "o_proj"],
        {"use_bdlora": {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": Q_V, "nblocks": 2, "match_strict": True}},
    ),
    "mica": _lora("llama", Q_V, {"init_lora_weights": "mica"}),
    "gaussian": _lora("llama", Q_V, {"init_lora_weights": "gaussian"}),
    "dora-embedding-tied": _lora("llama-tied", ["model.embed_tokens"], {"use_dora": True}, peft_merges=False),
    "saved-embedding-tied": _lora("llama-tied", Q_V, {"modules_to_save": ["embed_tokens"]}, peft_merges=False),
    "saved-ends-tied": _lora("llama-tied", Q_V, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, peft_merges=False),
    "targeted-ends-tied": _lora(
        "llama-tied", ["q_proj", "lm_head"], {"ensure_weight_tying": True}, formula=False, peft_merges=False, ends=False
    ),
    "tokens-of-both-ends": _lora(
        "llama-tied", Q_V, {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3, 4]}},
        formula=False, peft_merges=False,
    ),
    "tokens-of-the-head": _lora("llama", Q_V, {"trainable_token_indices": {"lm_head": [3, 4]}}),
    "tokens-opt": _lora("opt", Q_V, {"trainable_token_indices": [5, 6]}),
    "embedding-opt": _lora("opt", ["model.decoder.embed_tokens"], peft_merges=False),
    "embedding-bert": _lora("bert", ["word_embeddings", "position_embeddings"]),
    "embedding-t5-positions": _lora("t5", ["relative_attention_bias"], near=1e-5),
    "saved-experts": _lora("mixtral", ["q_proj"], {"modules_to_save": ["mlp.experts"]}),
    "saved-norm-vit": _lora("vit", ["q_proj"], {"modules_to_save": ["layernorm_before", "classifier"]}),
    "all-linear-mixtral": _lora("mixtral", "all-linear", formula=False),
    "router-and-experts": _lora("mixtral", ["q_proj"], {"target_parameters": ["mlp.gate.weight", "mlp.experts.down_proj"]}),
    "parameter-of-a-linear": _lora("llama", [], {"target_parameters": ["q_proj.weight"]}),
    "parameter-of-a-conv1d": _lora("gpt2", [], {"target_parameters": ["c_attn.weight"]}, formula=False),
    "fan-in-fan-out-off": _lora("gpt2", ["c_attn", "c_proj"]),
    "fan-in-fan-out-on": _lora("llama", Q_V, {"fan_in_fan_out": True}),
    "bias-all-gpt2": _lora("gpt2", ["c_attn"], {"bias": "all", "fan_in_fan_out": True}),
    "pissa-patterns": _lora(
        "llama", Q_V, {"init_lora_weights": "pissa", "lora_alpha": 3, "rank_pattern": {"1.self_attn.q_proj": 2}}, **SPECTRAL
    ),
    "pissa-dora": _lora("llama", Q_V, {"init_lora_weights": "pissa", "use_dora": True}, **SPECTRAL),
    "olora-dora": _lora("llama", Q_V, {"init_lora_weights": "olora", "use_dora": True}, **SPECTRAL),
    "pissa-embedding": _lora("llama", ["model.embed_tokens"], {"init_lora_weights": "pissa"}),
    "velora": _lora("llama", Q_V, {"velora_config": {"num_groups": 4}}),
}  # fmt: skip
KINDS = PLAIN | VECTORS | ODD


class Zoo:
    """Models, adapters and what PEFT computes with them, made on first use below one folder."""

    def __init__(self, root: Path):
        self.root = root
        self._known: dict[tuple, Any] = {}

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._known[key] = make()
        return self._known[key]

    # -- on disk

    def base(self, family: str, dtype: str = "float32", layout: str = "safetensors") -> Path:
        """The folder of a base model."""
        return self._once(("base", family, dtype, layout), lambda: self._base(family, dtype, layout))

    def _base(self, family: str, dtype: str, layout: str) -> Path:
        folder = self.root / "models" / f"{family}-{dtype}-{layout}"
        torch.manual_seed(11)
        model = FAMILIES[family]()
        with torch.no_grad():
            for (
                name,
                p,
            ) in model.named_parameters():  # biases and norms start as zeros and ones, which would hide mistakes
                if p.dim() == 1:
                    p.add_(torch.randn_like(p) * 0.1)
                else:
                    p.mul_(3.0 if "embed" not in name else 1.0)  # far enough from the linear regime
        model.to(DTYPES[dtype]).save_pretrained(folder, max_shard_size="20KB" if "sharded" in layout else "5GB")
        if layout.endswith("bin"):
            _pickled(folder)
        return folder

    def adapter(self, kind: str, dtype: str = "float32", seed: int = 0, file: str = "safetensors") -> Path:
        """The folder of an adapter that real PEFT made on the float32 base, its tensors then cast to `dtype`."""
        return self._once(("adapter", kind, dtype, seed, file), lambda: self._adapter(kind, dtype, seed, file))

    def _adapter(self, kind: str, dtype: str, seed: int, file: str) -> Path:
        folder = self.root / "adapters" / f"{kind}-{dtype}-{seed}-{file}"
        model = self.model(self.base(KINDS[kind].family), KINDS[kind].family)
        torch.manual_seed(100 + seed)
        model = get_peft_model(model, config_of(kind))
        stir(model, seed)
        model.save_pretrained(folder, save_embedding_layers=KINDS[kind].ends)
        weights = folder / "adapter_model.safetensors"
        tensors = {n: t.to(DTYPES[dtype]) if t.is_floating_point() else t for n, t in load_file(weights).items()}
        weights.unlink()
        if file == "bin":
            torch.save(tensors, folder / "adapter_model.bin")
        else:
            save_file(tensors, weights, metadata={"format": "pt"})
        return folder

    # -- running

    def model(self, folder: Path, family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model in a folder, as transformers loads it; every tensor of the folder must find its place."""
        kind = getattr(transformers, CLASSES.get(family, "AutoModelForCausalLM"))
        more = {"experts_implementation": "eager"} if family == "mixtral" else {}
        model, info = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **more)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        return model.eval()

    def logits(self, folder: Path, family: str) -> np.ndarray:
        """What the model in a folder computes, in float64."""
        return logits(self.model(folder, family), family)

    def attached(self, kind: str, dtype: str, *adapters: Path) -> PeftModel:
        """PEFT's model, of the base as stored in `dtype` but loaded in float32, with adapters attached and active."""
        model = self.model(self.base(KINDS[kind].family, dtype), KINDS[kind].family)
        return _attach(model, adapters)

    def expected(self, kind: str, dtype: str, adapter_dtype: str = "float32", seed: int = 0) -> np.ndarray:
        """PEFT's outputs with the adapter attached, in float64."""
        return self._once(
            ("expected", kind, dtype, adapter_dtype, seed),
            lambda: logits(self.attached(kind, dtype, self.adapter(kind, adapter_dtype, seed)), KINDS[kind].family),
        )

    def plain(self, kind: str, dtype: str) -> np.ndarray:
        """The base's outputs, in float64."""
        family = KINDS[kind].family
        return self._once(("plain", family, dtype), lambda: self.logits(self.base(family, dtype), family))

    def peft_merged(self, kind: str, dtype: str, *adapters: Path) -> nn.Module:
        """PEFT's own merge, of the base in its stored dtype."""
        model = _attach(self.model(self.base(KINDS[kind].family, dtype), KINDS[kind].family, DTYPES[dtype]), adapters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model.merge_and_unload(adapter_names=[f"a{i}" for i in range(len(adapters))])


def config_of(kind: str) -> Any:
    """A fresh PEFT config: PEFT changes the one it is given."""
    k = KINDS[kind]
    settings = {
        n: list(v) if isinstance(v, list) else dict(v) if isinstance(v, dict) else v for n, v in k.config.items()
    }
    for name, cls in (("kasa_config", "KasaConfig"), ("velora_config", "VeloraConfig"), ("use_bdlora", "BdLoraConfig")):
        if name in settings:
            settings[name] = getattr(lora_configs, cls)(**settings[name])
    return (IA3Config if k.ia3 else LoraConfig)(**settings)


def stir(model: nn.Module, seed: int = 0) -> None:
    """Noise on all that is trained, so that the adapter acts."""
    torch.manual_seed(1000 + seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                spread = float(p.std()) if p.numel() > 1 else 0.0
                size = 0.4 * spread if spread > 1e-3 else 0.3 if "ia3_l" in name else 0.15
                p.add_(torch.randn_like(p) * size)


def _attach(model: nn.Module, adapters: tuple[Path, ...]) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
        for i, more in enumerate(adapters[1:], 1):
            peft.load_adapter(more, f"a{i}")
        if len(adapters) > 1:
            peft.base_model.set_adapter([f"a{i}" for i in range(len(adapters))])
    return peft.eval()


def logits(model: nn.Module, family: str) -> np.ndarray:
    """Outputs for fixed inputs, computed in float64: its noise is far below any rounding of a weight."""
    inputs = {"pixel_values": PICTURES.double()} if family == "vit" else {"input_ids": IDS}
    inputs |= {"decoder_input_ids": IDS[:, :5]} if family == "t5" else {}
    with torch.no_grad():
        return model.double()(**inputs).logits.numpy()


def _pickled(folder: Path) -> None:
    """The weights of a folder as PyTorch files, the way older programs wrote them."""

    def renamed(name: str) -> str:
        return name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")

    for file in sorted(folder.glob("*.safetensors")):
        torch.save(load_file(file), folder / renamed(file.name))
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        table = json.loads(index.read_text())
        table["weight_map"] = {k: renamed(v) for k, v in table["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(table))
        index.unlink()


# -- the mathematics again, from the adapter's file, in float64

PART = re.compile(
    r"(.*?)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l"
    r"|token_adapter\.trainable_tokens_delta|lora_velora_embed.*)"
)
Tensors = dict[str, Tensor]


def reference(kind: str, base: Tensors, folder: Path) -> Tensors:
    """The tensors that an adapter changes, by parameter name, in float64. base: the model's state dict."""
    config = json.loads((folder / "adapter_config.json").read_text()) | {"family": KINDS[kind].family}
    W = {n: t.double() for n, t in base.items() if t.is_floating_point()}
    out: Tensors = {}
    sites: dict[str, Tensors] = {}
    for name, t in load_file(folder / "adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.")
        if found := PART.fullmatch(name):
            sites.setdefault(found[1], {})[found[2]] = t.double()
        else:
            out[name.replace(".base_layer.", ".")] = t.double()
    for path, parts in sites.items():
        parameter = _parameter(config, path, W)
        path = path.replace(".base_layer", "")
        out |= _site(config, path, parameter, parts, W | out)
    return out


def _parameter(config: dict, path: str, W: Tensors) -> str:
    """The parameter behind a path: of two stacks of experts, the first is wrapped inside the second."""
    inner, path = path.count(".base_layer"), path.replace(".base_layer", "")
    if f"{path}.weight" in W:
        return f"{path}.weight"
    leaves = [n for n in ("gate_up_proj", "down_proj") if any(t.endswith(n) for t in config["target_parameters"])]
    return f"{path}.{leaves[-1 - inner]}"


def _site(config: dict, path: str, parameter: str, p: Tensors, W: Tensors) -> Tensors:
    turned = config["family"] == "gpt2" and path.rpartition(".")[2] in ("c_attn", "c_proj", "c_fc")
    if "token_adapter.trainable_tokens_delta" in p:
        return {parameter: _rows(config, p["token_adapter.trainable_tokens_delta"], W[parameter])}
    if "ia3_l" in p:
        return _vector(config, path, p["ia3_l"].reshape(-1), W, turned)
    return _factors(config, path, parameter, p, W, turned or "lora_embedding_A" in p)


def _rows(config: dict, rows: Tensor, weight: Tensor) -> Tensor:
    index = config["trainable_token_indices"]
    weight = weight.clone()
    weight[index if isinstance(index, list) else next(iter(index.values()))] = rows
    return weight


def _vector(config: dict, path: str, l: Tensor, W: Tensors, turned: bool) -> Tensors:
    """l times each output, its bias included, or times each input."""
    weight, bias = f"{path}.weight", f"{path}.bias"
    inputs = any(path.endswith(f) for f in config["feedforward_modules"])
    shape = [1] * W[weight].dim()
    shape[int(inputs != turned)] = -1
    changed = {weight: W[weight] * l.reshape(shape)}
    return changed | ({bias: W[bias] * l} if bias in W and not inputs else {})


def _factors(config: dict, path: str, parameter: str, p: Tensors, W: Tensors, turned: bool) -> Tensors:
    weight = W[parameter]
    named = path if parameter == f"{path}.weight" and not config.get("target_parameters") else parameter
    r, s = _scale(config, named)
    A, B = _dense(config, path, p)
    if weight.dim() == 3:
        n = weight.shape[0]
        return {parameter: torch.stack([weight[e] + s * B[:, e::n] @ A[e * r : (e + 1) * r] for e in range(n)])}
    D = s * (B.flatten(1) @ A.flatten(1))
    V = weight + (D.T if turned else D).reshape(weight.shape)
    if "lora_magnitude_vector" in p:
        V = _normed(V, p["lora_magnitude_vector"].reshape(-1), turned)
    bias = f"{path}.bias"
    return {parameter: V} | ({bias: W[bias] + s * p["lora_B.bias"]} if "lora_B.bias" in p else {})


def _normed(V: Tensor, m: Tensor, turned: bool) -> Tensor:
    rows = V.T if turned else V.flatten(1)
    rows = m[:, None] * rows / rows.norm(dim=1, keepdim=True)
    return (rows.T if turned else rows).reshape(V.shape)


def _scale(config: dict, path: str) -> tuple[int, float]:
    def found(patterns: dict, default: float) -> float:
        return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", path)), default)

    r, alpha = found(config["rank_pattern"], config["r"]), found(config["alpha_pattern"], config["lora_alpha"])
    return r, alpha / (r**0.5 if config["use_rslora"] else r)


def _dense(config: dict, path: str, p: Tensors) -> tuple[Tensor, Tensor]:
    if "lora_embedding_A" in p:
        return p["lora_embedding_A"], p["lora_embedding_B"]
    A, B = p["lora_A.weight"], p["lora_B.weight"]
    if blocks := config.get("use_bdlora"):
        n = blocks["nblocks"]
        if any(t in path for t in blocks["target_modules_bd_a"]):
            A = torch.block_diag(*A.chunk(n))
        elif any(t in path for t in blocks["target_modules_bd_b"]):
            B = torch.block_diag(*B.chunk(n))
    return A, B
