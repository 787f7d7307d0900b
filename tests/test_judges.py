"""Other programs read what convert writes, and compute what we claim. Each is optional: a skip says which one is missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from format_kit import sample, update
from places import FIXTURES
from safetensors.numpy import load_file, save_file

import adaptkit
from adaptkit import Adapter, LoRA, Site
from adaptkit.formats.base import write
from adaptkit.formats.fold import without
from adaptkit.store.arrays import load

pytestmark = pytest.mark.filterwarnings("ignore")
LLAMA = FIXTURES / "models" / "llama"
IDS = [[1, 5, 9, 3]]


def needed(*names: str) -> list:
    """The modules, or a skip that names the one that is missing."""
    return [pytest.importorskip(n, reason=f"{n.partition('.')[0]} is not installed") for n in names]


# mlx-lm: language models


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "rank-alpha-patterns", "layers", "bf16"])
def test_mlx_lm_computes_what_peft_computes(kind: str, tmp_path: Path):
    """Logits of mlx-lm with our folder are those of PEFT with the original, to float32."""
    mx, utils, tuner = needed("mlx.core", "mlx_lm.utils", "mlx_lm.tuner.utils")
    adapter = FIXTURES / "adapters" / "llama" / kind
    adaptkit.convert(adapter, tmp_path / "mlx", "mlx")

    model, _ = utils.load_model(LLAMA)
    model.set_dtype(mx.float32)
    plain = np.array(model(mx.array(IDS)))
    got = np.array(tuner.load_adapters(model, str(tmp_path / "mlx"))(mx.array(IDS)))

    expected = peft_logits(adapter)
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_lm_computes_what_peft_computes_of_gpt2(kind: str, tmp_path: Path):
    """Under mlx-lm's names for its layers, whose weights transformers stores the other way round."""
    mx, utils, tuner = needed("mlx.core", "mlx_lm.utils", "mlx_lm.tuner.utils")
    gpt2, adapter = FIXTURES / "models" / "gpt2", FIXTURES / "adapters" / "gpt2" / kind
    adaptkit.convert(adapter, tmp_path / "mlx", "mlx")
    (tmp_path / "base").mkdir()  # with the names of the Hub's gpt2, which mlx-lm expects
    weights = load_file(gpt2 / "model.safetensors")
    held = {n.removeprefix("transformer."): v for n, v in weights.items()}
    save_file(held, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    config = json.loads((gpt2 / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({"n_ctx": config["n_positions"], **config}))

    model, _ = utils.load_model(tmp_path / "base")
    model.set_dtype(mx.float32)
    plain = np.array(model(mx.array(IDS)))
    got = np.array(tuner.load_adapters(model, str(tmp_path / "mlx"))(mx.array(IDS)))

    expected = peft_logits(adapter, gpt2)
    assert np.abs(expected - plain).max() > 1e-3
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def peft_logits(adapter: Path, base: Path = LLAMA) -> np.ndarray:
    """What PEFT computes, in float32."""
    torch, peft, transformers = needed("torch", "peft", "transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, adapter).float().eval()
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


# diffusers: pipelines of images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "source", "to"),
    [
        ("sd1", ("diffusers", "sd_pipeline"), "diffusers"),
        ("sd1", ("kohya", "sd1_tiny_fp16"), "diffusers"),
        ("sd1", ("kohya", "sd1_tiny_fp16"), "kohya"),
        ("sdxl", ("diffusers", "sdxl_dora"), "diffusers"),
        ("sdxl", ("diffusers", "sdxl_dora"), "kohya"),
        ("flux", ("diffusers", "flux_pipeline"), "diffusers"),
        ("flux", ("kohya", "flux_tiny_fp32"), "diffusers"),
    ],
)
def test_a_pipeline_of_diffusers_adds_what_we_claim(family: str, source: tuple[str, str], to: str, tmp_path: Path):
    """load_lora_weights finds a module for every site, and in each the update, and DoRA's norm, that we read."""
    needed("diffusers", "peft")
    adapter = adaptkit.read(sample(*source))
    if (family, to) == (
        "sdxl",
        "kohya",
    ):  # of kohya's files for SDXL, diffusers reads no DoRA, and CLIP only as a whole
        adapter = Adapter({p: without(s, {"dora"}) for p, s in adapter.sites.items() if p.startswith("unet.")})
        (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    write(adapter, tmp_path / "x.safetensors", to, base=tmp_path)

    pipe = pipeline(family)
    pipe.load_lora_weights(tmp_path / "x.safetensors", adapter_name="ours")

    found = loaded(pipe)
    assert set(found) == {plain(path) for path in adapter.sites}
    for path, site in adapter.sites.items():
        delta, norm = found[plain(path)]
        want = update(site).reshape(delta.shape)
        np.testing.assert_allclose(delta, want, atol=2e-3 * np.abs(want).max(), err_msg=path)
        if "m" in site.params:
            assert np.array_equal(norm.ravel(), load(site.params["m"]).ravel()), path


@pytest.mark.slow
def test_diffusers_takes_our_flux_file_apart_as_we_put_it_together(tmp_path: Path):
    """q, k, v and the MLP in kohya's fused names, at FLUX's own width: diffusers' converter gives each module's update."""
    torch, d = needed("torch", "diffusers")
    rng, one, two = (
        np.random.default_rng(0),
        "transformer.transformer_blocks.0",
        "transformer.single_transformer_blocks.0",
    )
    sizes = {
        f"{one}.attn.{n}": (3072, 3072) for n in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    }
    sizes |= {f"{two}.attn.{n}": (3072, 3072) for n in ("to_q", "to_k", "to_v")}
    sizes |= {f"{two}.proj_mlp": (12288, 3072), f"{two}.proj_out": (3072, 15360), f"{one}.norm1.linear": (18432, 3072)}
    sites = {
        p: Site(LoRA(r=2, alpha=1.0 + i), {k: rng.standard_normal(s).astype("f4") for k, s in (("A", (2, n)), ("B", (m, 2)))})
        for i, (p, (m, n)) in enumerate(sizes.items())
    }  # fmt: skip
    write(Adapter(sites), tmp_path / "x.safetensors", "kohya")

    state = d.FluxPipeline.lora_state_dict(tmp_path / "x.safetensors")
    assert {n.rpartition(".lora_")[0] for n in state} == set(sites)
    for path, site in sites.items():
        x = rng.standard_normal(sizes[path][1])
        got = state[f"{path}.lora_B.weight"].double().numpy() @ (state[f"{path}.lora_A.weight"].double().numpy() @ x)
        want = site.tuner.scale * (site.params["B"].astype("f8") @ (site.params["A"].astype("f8") @ x))
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), err_msg=path)


def plain(path: str) -> str:
    """A module's path, without the level that transformers 5 took away."""
    return path.replace(".text_model.", ".")


def loaded(pipe) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """What a pipeline adds to the weight of each module, and the norm that DoRA gives it."""
    found = {}
    for name, component in pipe.components.items():
        for path, module in component.named_modules() if hasattr(component, "named_modules") else ():
            if "ours" in getattr(module, "lora_A", {}):
                norm = module.lora_magnitude_vector["ours"].weight if module.lora_magnitude_vector else None
                delta = module.get_delta_weight("ours")
                found[plain(f"{name}.{path}")] = (numpy(delta), None if norm is None else numpy(norm))
    return found


def numpy(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def pipeline(family: str):
    """A random pipeline in the sizes that the fixtures were trained for."""
    torch, d = needed("torch", "diffusers")
    torch.manual_seed(0)
    vae = d.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    none = {"tokenizer": None, "scheduler": d.FlowMatchEulerDiscreteScheduler()}
    if family == "flux":
        return d.FluxPipeline(
            vae=vae, text_encoder=None, text_encoder_2=None, tokenizer_2=None, transformer=flux(), **none
        )
    if family == "sd1":
        more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return d.StableDiffusionPipeline(vae=vae, text_encoder=clip(24), unet=unet(), **none, **more)
    two = {"text_encoder_2": clip(24, projected=True), "tokenizer_2": None}
    return d.StableDiffusionXLPipeline(vae=vae, text_encoder=clip(24), unet=unet_xl(), **none, **two)


def clip(wide: int, projected: bool = False):
    (transformers,) = needed("transformers")
    config = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=wide, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, projection_dim=16
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def unet():
    (d,) = needed("diffusers")
    return d.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def unet_xl():
    (d,) = needed("diffusers")
    cross = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    return d.UNet2DConditionModel(
        block_out_channels=(8, 16, 16), layers_per_block=2, cross_attention_dim=16, attention_head_dim=2,
        norm_num_groups=4, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64, down_block_types=("DownBlock2D", cross[0], cross[0]),
        up_block_types=(cross[1], cross[1], "UpBlock2D"),
    )  # fmt: skip


def flux():
    (d,) = needed("diffusers")
    return d.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


# LyCORIS


@pytest.mark.parametrize(
    "source", [("kohya", "sd1_tiny_fp16"), ("lycoris", "locon_dora"), ("lycoris", "locon_tucker")], ids=lambda s: s[1]
)
def test_lycoris_computes_what_we_claim(source: tuple[str, str], tmp_path: Path):
    """Modules of LyCORIS, made from our file and from the original, do the same; without DoRA, what we read of it."""
    torch, safetensors, _ = needed("torch", "safetensors.torch", "lycoris.modules")
    adapter = adaptkit.read(sample(*source))
    write(adapter, tmp_path / "x.safetensors", "kohya")
    original, written = (safetensors.load_file(f) for f in (sample(*source), tmp_path / "x.safetensors"))

    names = {path: flat(path) for path in adapter.sites}
    assert set(names.values()) == {n.partition(".")[0] for n in written}
    for path, site in adapter.sites.items():
        torch.manual_seed(0)
        layer, x = layer_of(site)
        was, now = (lycoris_output(state, names[path], layer, x) for state in (original, written))
        torch.testing.assert_close(now, was, rtol=1e-5, atol=1e-5, msg=path)
        if "m" not in site.params:
            delta = torch.from_numpy(update(site)).float().reshape(layer.weight.shape)
            layer.weight.data += delta
            torch.testing.assert_close(now, layer(x), rtol=1e-4, atol=1e-4)


def flat(path: str) -> str:
    """The name that LyCORIS gives to a module of SD 1."""
    component, _, rest = path.partition(".")
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component] + rest.replace(".", "_")


def layer_of(site: Site):
    """A random layer that a site fits, and an input for it."""
    (torch,) = needed("torch")
    into, out, kernel = site.params["A"].shape[1], site.params["B"].shape[0], tuple(site.params["A"].shape[2:])
    if not kernel:
        return torch.nn.Linear(into, out, bias=False), torch.randn(3, into)
    return torch.nn.Conv2d(into, out, kernel, bias=False), torch.randn(1, into, 5, 5)


def lycoris_output(state: dict, name: str, layer, x):
    from lycoris.modules import get_module, make_module

    module = make_module(*get_module(state, name), name, layer)
    return module.eval()(x).detach()
