"""Every parameter, put together from the tensors on disk along the edges, is the live parameter bit for bit."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest

from adaptkit.errors import Mismatch
from adaptkit.store.conversions import edges
from adaptkit.store.metamodel import expert_modules, meta_model, module_parameters, parameter_owner_types

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
MOE = {**TEXT, "num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4}
SHARED = {**MOE, "shared_expert_intermediate_size": 12}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_VISION = {
    "depth": 2,
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}}

MODELS = {
    "mixtral": {"architectures": ["MixtralForCausalLM"], **TEXT, "num_local_experts": 12},
    "qwen2_moe": {"architectures": ["Qwen2MoeForCausalLM"], **SHARED},
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], **MOE},
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        **TEXT,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
    },
    "olmoe": {"architectures": ["OlmoeForCausalLM"], **TEXT, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": {"architectures": ["GPTNeoXForCausalLM"], **TEXT},
    "vit": {"architectures": ["ViTForImageClassification"], **VISION},
    "dinov2": {"architectures": ["Dinov2Model"], **VISION, "use_swiglu_ffn": True},
    "nomic_bert": {"architectures": ["NomicBertModel"], **TEXT},
    "llava": {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **VISION, "projection_dim": 8},
    },
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {"model_type": "gemma3_text", **TEXT, "head_dim": 4},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "mm_tokens_per_image": 4,
    },
    "qwen2_vl": {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "text_config": {"model_type": "qwen2_vl_text", **TEXT, **MROPE},
        "vision_config": {"model_type": "qwen2_vl_vision", **QWEN_VISION, "embed_dim": 16, "hidden_size": 16},
    },
    "qwen2_5_vl": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "text_config": {"model_type": "qwen2_5_vl_text", **TEXT, **MROPE},
        "vision_config": {
            "model_type": "qwen2_5_vl_vision",
            **QWEN_VISION,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [1],
        },
    },
    "qwen3_vl_moe": {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "text_config": {"model_type": "qwen3_vl_moe_text", **MOE, "num_experts": 4, "moe_intermediate_size": 12},
        "vision_config": {
            "model_type": "qwen3_vl_moe_vision",
            **QWEN_VISION,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
    "phimoe": {"architectures": ["PhimoeForCausalLM"], **TEXT, "num_local_experts": 4},
    "jamba": {
        "architectures": ["JambaForCausalLM"],
        **TEXT,
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
    },
}


def live_model(settings):
    """The model of those settings, with random numbers everywhere."""
    torch = pytest.importorskip("torch")
    import transformers

    cls = getattr(transformers, settings["architectures"][0])
    torch.manual_seed(0)
    model = cls(cls.config_class(**{k: v for k, v in copy.deepcopy(settings).items() if k != "model_type"}))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """kind -> (config.json, live tensors, disk in the old layout, disk in the model's layout)."""
    made = {}

    def save(kind):
        if kind not in made:
            from safetensors.numpy import load_file

            folder = tmp_path_factory.mktemp(kind)
            model = live_model(MODELS[kind])
            model.save_pretrained(folder / "old")
            model.save_pretrained(folder / "new", save_original_format=False)
            config = json.loads((folder / "old" / "config.json").read_text())
            live = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
            disks = [load_file(folder / layout / "model.safetensors") for layout in ("old", "new")]
            made[kind] = (config, live, *disks)
        return made[kind]

    return save


def shapes(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def assembled(found, disk, shape, dtype):
    """The tensor of that shape that the edges say the disk holds, and how often each element was written."""
    import numpy as np

    whole, written = np.zeros(shape, dtype), np.zeros(shape, int)
    for edge in found:
        block = disk[edge.disk]
        block = block if edge.disk_expert is None else block[edge.disk_expert]
        block = block if edge.disk_rows is None else block[slice(*edge.disk_rows)]
        block = block.T if edge.transposed else block
        for array, value in ((whole, block), (written, written.dtype.type(1))):
            place = array if edge.expert is None else array[edge.expert]
            place = place if edge.rows is None else place[slice(*edge.rows)]
            if edge.permutation is None:
                place[...] = value if array is whole else place + 1
            else:
                place[list(edge.permutation)] = value if array is whole else place + 1
    return whole, written


def same(found, disk, expected):
    import numpy as np

    whole, written = assembled(found, disk, expected.shape, expected.dtype)
    return bool((written == 1).all()) and np.array_equal(whole, expected)


def untied(live):
    """Live tensors, less a head that is tied: a save leaves it out, and nothing on disk carries its name."""
    embedded = {tensor.tobytes() for name, tensor in live.items() if "lm_head" not in name}
    return {name: tensor for name, tensor in live.items() if "lm_head" not in name or tensor.tobytes() not in embedded}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", ["old", "new"])
def test_every_parameter_is_found_on_disk_bit_for_bit(saved, kind, layout):
    """Assembling along the edges gives each live parameter exactly, whichever layout is on disk."""
    config, live, old, new = saved(kind)
    disk = old if layout == "old" else new
    live = untied(live)
    found = edges(config, shapes(disk), live)
    assert sorted(found) == sorted(live)
    assert [name for name in live if not same(found[name], disk, live[name])] == []


@pytest.mark.parametrize("kind", MODELS)
def test_every_old_name_is_found_in_the_new_layout_bit_for_bit(saved, kind):
    """A name of the old layout finds its rows, expert and orientation inside the fused tensors of the new one."""
    config, _, old, new = saved(kind)
    assert set(old) != set(new) or kind == "qwen3_vl_moe"  # whose names stay
    wanted = [name for name in old if name not in new]
    found = edges(config, shapes(new), wanted)
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if not same(found[name], new, old[name])] == []


def test_experts_stored_transposed_under_the_same_name_are_turned(saved):
    """The published Qwen3-VL-MoE files hold (expert, in, out) where the model has (expert, out, in)."""
    config, live, old, _ = saved("qwen3_vl_moe")
    experts = [name for name in live if ".mlp.experts." in name]
    disk = {**old, **{name: live[name].transpose(0, 2, 1) for name in experts}}
    found = edges(config, shapes(disk), experts)
    assert [name for name in experts if not same(found[name], disk, live[name])] == []
    assert {edge.transposed for name in experts for edge in found[name]} == {True}


def test_names_without_the_base_prefix_are_found_too(saved):
    """An adapter of MixtralModel on a checkpoint of MixtralForCausalLM, and the other way round."""
    config, live, old, new = saved("mixtral")
    bare = {name.removeprefix("model."): tensor for name, tensor in old.items()}
    fused, expert = "layers.1.mlp.experts.down_proj", "layers.1.block_sparse_moe.experts.11.w3.weight"
    assert same(edges(config, shapes(bare), [f"model.{fused}"])[f"model.{fused}"], bare, live[f"model.{fused}"])
    assert same(edges(config, shapes(new), [expert])[expert], new, old[f"model.{expert}"])


def test_an_expert_is_a_slice_of_the_fused_tensor(saved):
    """The eleventh expert of twelve comes eleventh, although its name sorts third; up lies below gate."""
    config, _, _, new = saved("mixtral")
    name = "model.layers.0.block_sparse_moe.experts.10.w3.weight"
    (edge,) = edges(config, shapes(new), [name])[name]
    assert (edge.disk, edge.disk_expert) == ("model.layers.0.mlp.experts.gate_up_proj", 10)
    assert (edge.disk_rows, edge.rows, edge.expert) == ((24, 48), None, None)


def test_a_name_that_is_nowhere_is_left_out(saved):
    """The caller lists what is missing; an empty list would look like an answer."""
    config, _, old, _ = saved("mixtral")
    assert edges(config, shapes(old), ["model.layers.7.mlp.experts.down_proj", "nonsense", ""]) == {}


def test_a_missing_expert_is_refused(saved):
    """Eleven of twelve experts do not make the parameter."""
    config, _, old, _ = saved("mixtral")
    disk = {n: s for n, s in shapes(old).items() if ".experts.3.w2." not in n}
    with pytest.raises(Mismatch, match=r"is \(12, 16, 24\) by config.json and \(11, 16, 24\) on disk"):
        edges(config, disk, ["model.layers.0.mlp.experts.down_proj"])


def test_two_tensors_for_one_parameter_are_refused(saved):
    """With both of two names on disk, which one counts would be a guess."""
    config, _, old, _ = saved("gpt_neox")
    disk = {**shapes(old), "lm_head.weight": (40, 16)}
    with pytest.raises(Mismatch, match="both claim to be lm_head.weight"):
        edges(config, disk, ["lm_head.weight"])


@pytest.fixture
def registered():
    """Register a conversion for a class with transformers, and take it back."""
    mapping = pytest.importorskip("transformers.conversion_mapping")
    names = []

    def register(name, rules):
        mapping.register_checkpoint_conversion_mapping(name, rules)
        names.append(name)

    yield register
    for name in names:
        mapping._checkpoint_conversion_mapping_cache.pop(name)
        mapping.USER_REGISTERED_MAPPINGS.discard(name)


QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **TEXT, "num_key_value_heads": 4}


def written_by(rules, registered, folder):
    """A Qwen2 saved through such rules: (config, live tensors, disk)."""
    from safetensors.numpy import load_file

    registered("Qwen2ForCausalLM", rules)
    model = live_model(QWEN)
    model.save_pretrained(folder)
    live = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    return json.loads((folder / "config.json").read_text()), live, load_file(folder / "model.safetensors")


def test_a_fused_projection_with_permuted_heads_is_unpicked(registered, tmp_path):
    """Rows of q and k lie in another order on disk, those of v do not; biases likewise."""
    from transformers.core_model_loading import Chunk, PermuteForRope, WeightConverter

    parts = [f".self_attn.{p}_proj." for p in "qkv"]
    rule = WeightConverter(
        ".self_attn.wqkv.", parts, [Chunk(0), PermuteForRope(permute_layer_names=["q_proj", "k_proj"])]
    )
    config, live, disk = written_by([rule], registered, tmp_path)
    assert "model.layers.0.self_attn.wqkv.bias" in disk
    found = edges(config, shapes(disk), live)
    assert [name for name in live if not same(found[name], disk, live[name])] == []
    assert found["model.layers.0.self_attn.q_proj.weight"][0].permutation is not None
    assert found["model.layers.0.self_attn.v_proj.weight"][0].permutation is None
    name = "model.layers.1.self_attn.wqkv.weight"
    assert same(edges(config, shapes(live), [name])[name], live, disk[name])


def test_interleaved_rows_become_a_permutation(registered, tmp_path):
    """Interleave alone only reorders the rows of one tensor."""
    from transformers.core_model_loading import Interleave, WeightConverter

    rule = WeightConverter(".mlp.w13.weight", ".mlp.up_proj.weight", [Interleave(0)])
    config, live, disk = written_by([rule], registered, tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    (edge,) = edges(config, shapes(disk), [name])[name]
    assert same([edge], disk, live[name])
    assert edge.permutation is not None


def test_rows_of_two_parameters_that_alternate_are_refused(registered, tmp_path):
    """Gate and up row by row in one tensor cannot be said as one span of rows each."""
    from transformers.core_model_loading import Chunk, Interleave, WeightConverter

    parts = [".mlp.gate_proj.weight", ".mlp.up_proj.weight"]
    config, _, disk = written_by(
        [WeightConverter(".mlp.w13.weight", parts, [Interleave(0), Chunk(0)])], registered, tmp_path
    )
    with pytest.raises(Mismatch, match="gate_proj.weight alternate with others in model.layers.0.mlp.w13.weight"):
        edges(config, shapes(disk), ["model.layers.0.mlp.gate_proj.weight"])


def test_an_operation_that_cannot_be_followed_is_named(registered):
    """Arithmetic on the numbers is not a slice of a tensor on disk."""
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class MinusOne(ConversionOps):
        def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
            return {target_patterns[0]: next(iter(input_dict.values()))[0] - 1}

    registered("Qwen2ForCausalLM", [WeightConverter(".mlp.w2.weight", ".mlp.down_proj.weight", [MinusOne()])])
    disk = {"model.layers.0.mlp.w2.weight": (16, 24), "model.norm.weight": (16,)}
    assert list(edges(QWEN, disk, ["model.norm.weight"])) == ["model.norm.weight"]
    with pytest.raises(Mismatch, match="loads qwen2 cannot be followed: MinusOne"):
        edges(QWEN, disk, ["model.layers.0.mlp.down_proj.weight"])


MIXTRAL = {"model_type": "mixtral", **MODELS["mixtral"]}
DISK = {f"model.layers.{i}.input_layernorm.weight": (16,) for i in range(2)}
HOSTILE = {
    "a vocabulary of a million million": ({"vocab_size": 10**12}, "vocab_size is 1000000000000, more than"),
    "a thousand million layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than"),
    "more layers than the file could fill": ({"num_hidden_layers": 10**6}, "more than 4128 parts"),
    "more layers, hidden in a list": ({"layer_types": [10**9]}, "layer_types is 1000000000"),
    "no heads": ({"num_attention_heads": 0}, "cannot build mixtral"),
    "a negative size": ({"hidden_size": -4}, "cannot build mixtral"),
    "a size that is text": ({"hidden_size": "huge"}, "cannot build mixtral"),
    "an activation that is code": ({"hidden_act": "__import__('os').abort()"}, "cannot build mixtral"),
    "no such type": ({"model_type": "gpt9"}, "has no model type gpt9"),
    "a type that is a path": ({"model_type": "../../evil"}, "has no model type ../../evil"),
    "a type that is a list": ({"model_type": ["mixtral"]}, "has no model type"),
    "no such class": ({"architectures": ["EvilForCausalLM"]}, "has no class EvilForCausalLM for mixtral"),
    "a class that is a function": ({"architectures": ["pipeline"]}, "has no class pipeline for mixtral"),
    "a class of another model": ({"architectures": ["LlamaForCausalLM"]}, "has no class LlamaForCausalLM for mixtral"),
    "a class that is a number": ({"architectures": [7]}, "has no class 7 for mixtral"),
    "terminal escapes": ({"model_type": "a\x1b[31m"}, r"has no model type a\\x1b\[31m"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_config_is_refused_in_a_sentence(case):
    """No hang, no memory, no traceback."""
    change, message = HOSTILE[case]
    with pytest.raises(Mismatch, match=message):
        edges({**MIXTRAL, **change}, DISK, ["model.layers.0.mlp.experts.down_proj"])


def test_a_config_nested_without_end_is_refused():
    """Depth and length are bounded before anything looks inside."""
    nested = {}
    for _ in range(500):
        nested = {"text_config": nested}
    for config in (nested, {"layer_types": ["full_attention"] * 10**6}):
        with pytest.raises(Mismatch, match="nested too deep or too long"):
            edges({**MIXTRAL, **config}, DISK, ["x"])


def test_a_name_too_long_to_be_searched_is_refused():
    """The patterns of transformers run over every name."""
    with pytest.raises(Mismatch, match="more than 400 characters"):
        edges(MIXTRAL, {"experts." * 100_000: (1,)}, ["x"])


def test_code_beside_the_config_never_runs(tmp_path, monkeypatch):
    """auto_map, trust_remote_code, kernels and attention implementations never leave config.json."""
    marker = tmp_path / "ran"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    evil = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling_evil.Evil")
    config = {
        **MIXTRAL,
        "auto_map": evil,
        "trust_remote_code": True,
        "_name_or_path": str(tmp_path),
        "_attn_implementation_internal": "evil/kernel",
        "attn_implementation": "evil/kernel",
        "experts_implementation": "evil/kernel",
        "quantization_config": {"quant_method": "gptq", "bits": 4},
        "torch_dtype": "modeling_evil",
        "use_kernels": True,
    }
    assert len(edges(config, {"model.embed_tokens.weight": (40, 16)}, ["model.embed_tokens.weight"])) == 1
    model = meta_model(config)
    assert (model.config._attn_implementation, model.config.__dict__.get("auto_map")) == ("eager", None)
    assert not marker.exists()
    assert "modeling_evil" not in sys.modules


def test_the_meta_model_knows_names_shapes_and_types(saved):
    """What the live model has, without a number of it."""
    config, live, _, _ = saved("mixtral")
    assert module_parameters(config) == shapes(live)
    types = parameter_owner_types(config)
    assert (types["lm_head"], types["model.embed_tokens"]) == ("Linear", "Embedding")
    assert {p.device.type for p in meta_model(config).parameters()} == {"meta"}


def test_experts_say_whether_they_are_transposed(saved):
    """GPT-OSS stores (expert, in, out); Mixtral (expert, out, in)."""
    gpt_oss = {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        **TEXT,
        "head_dim": 4,
        "num_local_experts": 4,
        "layer_types": ["full_attention"] * 2,
    }
    assert expert_modules(gpt_oss) == {f"model.layers.{i}.mlp.experts": True for i in range(2)}
    assert expert_modules(saved("mixtral")[0]) == {f"model.layers.{i}.mlp.experts": False for i in range(2)}


def test_importing_it_imports_neither_torch_nor_transformers():
    """Only asking for edges pays for them."""
    code = "import sys, adaptkit.store.conversions; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_infinity_as_transformers_writes_it_is_read():
    """{"__float__": "Infinity"} is a number, not a nested config."""
    limit = [0.0, {"__float__": "Infinity"}]
    config = {"model_type": "mamba2", "num_hidden_layers": 1, "time_step_limit": limit}
    assert list(meta_model(config).config.time_step_limit) == [0.0, float("inf")]


@pytest.mark.parametrize("kind", ["timm_backbone", "timm_wrapper", "evil"])
def test_a_nested_model_is_bounded_like_the_outer_one(kind):
    """A vision tower of a library that can load files, or of no known type, is refused by name."""
    config = {"model_type": "llava", **copy.deepcopy(MODELS["llava"])}
    config["vision_config"] = {"model_type": kind, "architecture": "resnet18", "model_args": {"checkpoint_path": "x"}}
    with pytest.raises(Mismatch, match=f"has no model type {kind}"):
        meta_model(config)
