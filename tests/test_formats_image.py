"""kohya and diffusers: names by dictionary, alphas, fused q, k and v, and what is wrong with a file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import regex
from format_kit import FORMATS, apart, sample, update
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from adaptkit import Adapter, AdaptKitError, DoRA, LoRA, Site
from adaptkit.formats.base import read, write
from adaptkit.formats.diffusers.keys import parse
from adaptkit.formats.kohya.names import find, flat, prefix_of
from adaptkit.store.arrays import load

LISTS = sorted(FORMATS.glob("kohya/keys/*.gz"))
SD1 = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
pytestmark = pytest.mark.filterwarnings("ignore::adaptkit.errors.AdaptKitWarning")


def lora(out: int = 6, into: int = 4, r: int = 2, alpha: float = 3.0, seed: int = 0, **more) -> Site:
    rng = np.random.default_rng(seed)
    params = {"A": rng.standard_normal((r, into)).astype("f4"), "B": rng.standard_normal((out, r)).astype("f4")}
    return Site(LoRA(r=r, alpha=alpha, **more), params)


@pytest.mark.parametrize("file", LISTS, ids=lambda f: f.name.split(".")[0])
def test_every_name_of_a_full_model_is_found_and_spelled_back(file: Path):
    """The complete lists of sd-scripts, for SD 1.5 with convolutions, SDXL, SD 3 and FLUX."""
    names = gzip.decompress(file.read_bytes()).decode().split()
    assert len(names) > 300
    for name in names:
        prefix = prefix_of(name)
        found = find(prefix, name.removeprefix(prefix))
        assert found is not None, name
        for i, path in enumerate(found.paths):
            back, index, _, paths = flat(found.space, path)
            assert (prefix + back, index, paths) == (name, i, found.paths)


@pytest.mark.parametrize("case", ["sd1_tiny_fp16", "flux_tiny_fp32"])
def test_a_kohya_file_is_written_again_as_it_was(case: str, tmp_path: Path):
    """Every tensor, dtype and line of metadata; q, k and v are fused again, and the sum over the data agrees."""
    file = sample("kohya", case)
    assert write(read(file), tmp_path / "x.safetensors", "kohya") == []

    before, after = load_file(file), load_file(tmp_path / "x.safetensors")
    assert {k: (v.dtype, v.shape, v.tobytes()) for k, v in before.items()} == {
        k: (v.dtype, v.shape, v.tobytes()) for k, v in after.items()
    }
    with safe_open(file, "np") as a, safe_open(tmp_path / "x.safetensors", "np") as b:
        assert a.metadata() == b.metadata()


def test_flux_qkv_becomes_three_modules_of_the_same_sum():
    """Rows 0 to d are q's, d to 2 d k's, 2 d to 3 d v's; linear1 has the MLP after them."""
    file = sample("kohya", "flux_tiny_fp32")
    raw, adapter = load_file(file), read(file)
    for name, paths in {
        "double_blocks_0_txt_attn_qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
        "single_blocks_0_linear1": [
            *[f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"],
            "single_transformer_blocks.0.proj_mlp",
        ],
    }.items():
        up, down, alpha = (
            raw[f"lora_unet_{name}.{p}"].astype("f8") for p in ("lora_up.weight", "lora_down.weight", "alpha")
        )
        mine = np.concatenate([update(adapter.sites[f"transformer.{p}"]) for p in paths])
        np.testing.assert_allclose(mine, up @ down * alpha / len(down), rtol=1e-12)


def test_no_alpha_means_alpha_is_the_rank(tmp_path: Path):
    """sd-scripts' rule; and such a file stays without."""
    save_file(
        {f"{SD1}.lora_down.weight": np.ones((2, 4), "f4"), f"{SD1}.lora_up.weight": np.ones((4, 2), "f4")},
        tmp_path / "a.safetensors",
    )
    adapter = read(tmp_path / "a.safetensors")
    (site,) = adapter.sites.values()
    assert site.tuner.scale == 1

    write(adapter, tmp_path / "b.safetensors", "kohya", base=None)
    assert sorted(load_file(tmp_path / "b.safetensors")) == [f"{SD1}.lora_down.weight", f"{SD1}.lora_up.weight"]


def test_q_k_and_v_with_factors_of_their_own_are_fused_exactly(tmp_path: Path):
    """Block by block; a module that is not adapted gets zeros, other scales are folded."""
    home = "transformer.single_transformer_blocks.0"
    sites = {f"{home}.attn.to_q": lora(4, 4, seed=1), f"{home}.proj_mlp": lora(16, 4, r=3, alpha=1.0, seed=2)}
    adapter = Adapter(sites)
    notes = write(adapter, tmp_path / "x.safetensors", "kohya")

    assert {n.what for n in notes} == {"folded", "fused"}
    assert load_file(tmp_path / "x.safetensors")["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (28, 9)
    assert apart(adapter, read(tmp_path / "x.safetensors")) <= 1


def test_dora_scale_is_the_norm_of_outputs_only(tmp_path: Path):
    """(out, 1) is PEFT's magnitude vector; (1, in) is another DoRA, and refused."""
    adapter = read(FORMATS / "lycoris" / "locon_dora" / "locon_dora.safetensors")
    raw = load_file(FORMATS / "lycoris" / "locon_dora" / "locon_dora.safetensors")
    assert adapter.sites["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"].params["m"].shape == (16,)
    assert np.array_equal(
        load(adapter.sites["unet.mid_block.resnets.0.conv1"].params["m"]).ravel(),
        raw["lora_unet_mid_block_resnets_0_conv1.dora_scale"].ravel(),
    )
    raw[f"{SD1}.dora_scale"] = raw[f"{SD1}.dora_scale"].reshape(1, -1)
    save_file(raw, tmp_path / "x.safetensors")
    with pytest.raises(AdaptKitError, match="norm for each input"):
        read(tmp_path / "x.safetensors")


def test_tuckers_three_factors_become_two():
    """down'[p, i, h, w] = sum over q of mid[p, q, h, w] down[q, i], to one rounding."""
    raw = load_file(FORMATS / "lycoris" / "locon_tucker" / "locon_tucker.safetensors")
    name = "lora_unet_mid_block_resnets_0_conv1"
    site = read(FORMATS / "lycoris" / "locon_tucker" / "locon_tucker.safetensors").sites[
        "unet.mid_block.resnets.0.conv1"
    ]
    up, mid, down = (raw[f"{name}.lora_{x}.weight"].astype("f8") for x in ("up", "mid", "down"))
    whole = (
        np.einsum("op,pqhw,qi->oihw", up[:, :, 0, 0], mid, down[:, :, 0, 0]) * float(raw[f"{name}.alpha"]) / len(mid)
    )

    np.testing.assert_allclose(update(site).reshape(whole.shape), whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("case", "kind"), [("ia3", "IA3"), ("diag_oft", "OFT"), ("lokr_full", "LoKr")])
def test_other_algorithms_of_lycoris_are_refused_by_name(case: str, kind: str):
    """Never read as something that they are not."""
    with pytest.raises(AdaptKitError, match=kind):
        read(sample("lycoris", case))


def test_which_unet_it_is_must_be_known(tmp_path: Path):
    """Names of SD 1 and of SDXL differ, the modules do not: the base decides, or nothing is written."""
    adapter = Adapter({"unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": lora(4, 4)})
    with pytest.raises(AdaptKitError, match="--base"):
        write(adapter, tmp_path / "x.safetensors", "kohya")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    write(adapter, tmp_path / "x.safetensors", "kohya", base=tmp_path)

    assert all(n.startswith("lora_unet_output_blocks_3_1_") for n in load_file(tmp_path / "x.safetensors"))


def broken(kind: str) -> dict[str, np.ndarray]:
    """One module with something wrong."""
    t = {f"{SD1}.lora_down.weight": np.ones((2, 4), "f4"), f"{SD1}.lora_up.weight": np.ones((4, 2), "f4")}
    if kind == "half":
        del t[f"{SD1}.lora_up.weight"]
    elif kind == "alone":
        t = {f"{SD1}.alpha": np.array(1, "f4")}
    elif kind == "shapes":
        t[f"{SD1}.lora_up.weight"] = np.ones((4, 3), "f4")
    elif kind == "no rank":
        t = {f"{SD1}.lora_down.weight": np.ones((0, 4), "f4"), f"{SD1}.lora_up.weight": np.ones((4, 0), "f4")}
    elif kind == "alpha":
        t[f"{SD1}.alpha"] = np.array(np.nan, "f4")
    elif kind == "alphas":
        t[f"{SD1}.alpha"] = np.ones(3, "f4")
    elif kind == "integers":
        t[f"{SD1}.lora_up.weight"] = np.ones((4, 2), "i4")
    elif kind == "unknown":
        t = {k.replace("to_q", "to_z"): v for k, v in t.items()}
    return t


@pytest.mark.parametrize("kind", ["half", "alone", "shapes", "no rank", "alpha", "alphas", "integers", "unknown"])
def test_a_broken_kohya_file_is_a_sentence(kind: str, tmp_path: Path):
    """It names the file and what is wrong."""
    save_file(broken(kind), tmp_path / "x.safetensors")
    with pytest.raises(AdaptKitError, match="x.safetensors: "):
        read(tmp_path / "x.safetensors")


def test_numbers_that_are_none_are_not_passed_on(tmp_path: Path):
    """NaN in a factor would spoil the model; nothing is written."""
    site = lora(4, 4)
    site.params["B"][0, 0] = np.nan
    for name in ("kohya", "diffusers"):
        adapter = Adapter({"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": site})
        with pytest.raises(AdaptKitError, match="finite"):
            write(adapter, tmp_path / "x.safetensors", name)
        assert not list(tmp_path.iterdir())


def test_float16_that_overflows_is_refused(tmp_path: Path):
    """A scale of 1000 on 100 leaves float16; the sentence says which module and what to do."""
    site = Site(LoRA(r=1, alpha=1000.0), {"A": np.ones((1, 4), "f2"), "B": np.full((4, 1), 100, "f2")})
    with pytest.raises(AdaptKitError, match="overflows float16; use --dtype float32"):
        write(Adapter({"unet.mid_block.resnets.0.time_emb_proj": site}), tmp_path / "x.safetensors", "diffusers")


def test_diffusers_scale_comes_from_its_metadata(tmp_path: Path):
    """alpha 2 of rank 4 is scale 1/2; without metadata 1, as diffusers has it, and the user is told."""
    file = sample("diffusers", "sd_pipeline")
    assert {s.tuner.scale for s in read(file).sites.values()} == {0.5}
    save_file(load_file(file), tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match="taken as 1"):
        assert {s.tuner.scale for s in read(tmp_path / "x.safetensors").sites.values()} == {1.0}


def test_clips_missing_level_is_put_back(tmp_path: Path):
    """transformers 5 writes text_encoder.encoder, which older readers do not find."""
    adapter = read(sample("diffusers", "sd_pipeline"))
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1" in adapter.sites
    write(adapter, tmp_path / "x.safetensors", "diffusers")
    encoder = [n for n in load_file(tmp_path / "x.safetensors") if n.startswith("text_encoder.")]
    assert encoder and all(n.startswith("text_encoder.text_model.") for n in encoder)


@pytest.mark.parametrize("spelling", [
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.{}.weight",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.lora.{}.weight",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_linear_layer.{}.weight",
])  # fmt: skip
def test_old_spellings_are_read(spelling: str, tmp_path: Path):
    """Names from before PEFT; an alpha tensor beside them counts."""
    A, B = np.ones((2, 4), "f4"), np.ones((4, 2), "f4")
    save_file({spelling.format("down"): A, spelling.format("up"): B}, tmp_path / "x.safetensors")
    (path,) = read(tmp_path / "x.safetensors").sites
    assert path == "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"


@pytest.mark.parametrize(
    "text", ["[", "[]", '{"unet.r": "four"}', '{"unet.r": 3}', '{"unet.rank_pattern": 3}', '{"unet.lora_alpha": 1e999}']
)
def test_metadata_that_lies_is_a_sentence(text: str, tmp_path: Path):
    """Whatever the JSON is."""
    name = "unet.mid_block.attentions.0.proj_in.lora_{}.weight"
    save_file(
        {name.format("A"): np.ones((2, 4), "f4"), name.format("B"): np.ones((4, 2), "f4")},
        tmp_path / "x.safetensors",
        {"lora_adapter_metadata": text},
    )
    with pytest.raises(AdaptKitError, match="x.safetensors: "):
        read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("case", ["sd1_tiny_fp16"])
def test_diffusers_own_converter_agrees(case: str, tmp_path: Path):
    """What we read from kohya is what diffusers' converter makes of the file, module by module."""
    pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers as theirs
    from safetensors.torch import load_file as load_torch

    state, alphas = theirs(load_torch(sample("kohya", case)))
    mine = read(sample("kohya", case))
    found = {parse(name): value for name, value in state.items()}

    assert set(found) == {(path, letter) for path, site in mine.sites.items() for letter in site.params}
    assert len(alphas) == len(mine.sites)
    for (path, letter), value in found.items():
        assert torch.equal(value, torch.from_numpy(load(mine.sites[path].params[letter]))), (path, letter)


@pytest.mark.parametrize("dtypes", [("f2", "f4", "bfloat16"), ("f2", "f8", "f2"), ("bfloat16", "f2", "f2")])
def test_fused_modules_of_other_dtypes_keep_every_number(dtypes: tuple[str, ...], tmp_path: Path):
    """q, k and v of one FLUX block lie in one matrix, in a dtype that holds each of them exactly."""
    home = "transformer.transformer_blocks.0.attn"
    sites = {"transformer.single_transformer_blocks.0.proj_out": lora(8, 40)}
    for i, dtype in enumerate(dtypes):
        wanted = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        site = lora(8, 8, seed=i)
        sites[f"{home}.to_{'qkv'[i]}"] = Site(site.tuner, {k: v.astype(wanted) for k, v in site.params.items()})

    write(Adapter(sites), tmp_path / "x.safetensors", "kohya")

    assert apart(Adapter(sites), read(tmp_path / "x.safetensors")) == 0


def test_two_sites_that_are_one_module_for_kohya_are_refused(tmp_path: Path):
    """A path with its component and the same one without would lie in one module, and one of them would be lost."""
    path = "down_blocks.0.attentions.0.proj_in"

    with pytest.raises(AdaptKitError, match=f"unet.{path} and {path} would be one module"):
        write(Adapter({f"unet.{path}": lora(), path: lora()}), tmp_path / "x.safetensors", "kohya")


def test_a_fused_module_that_lacks_norms_names_the_modules(tmp_path: Path):
    """The layer's number, not the sign that stands for it in the table."""
    home = "transformer.transformer_blocks.7.attn"
    q = lora(8, 8)
    dora = Site(DoRA(r=2, alpha=3.0), {**q.params, "m": np.ones(8, "f4")})
    rest = {"transformer.single_transformer_blocks.0.proj_out": lora(8, 40)}

    with pytest.raises(AdaptKitError, match=r"needs norms for all of transformer_blocks\.7\.attn\.to_q"):
        write(Adapter({f"{home}.to_q": dora, **rest}), tmp_path / "x.safetensors", "kohya")


@pytest.mark.parametrize(
    ("module", "key"),
    [
        ("unet.mid_block.attentions.0.proj_in", "^mid_block.attentions.0.proj_in"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "^encoder.layers.0.mlp.fc1"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", r"^text_model\.encoder\.layers\.0\.mlp\.fc1"),
    ],
)
def test_patterns_of_diffusers_begin_inside_the_component(module: str, key: str, tmp_path: Path):
    """diffusers writes `^` and the path in the component before the rank and the alpha of a module that differs."""
    home = module.partition(".")[0]
    site, other = lora(r=3), f"{home}.x.proj"
    told = {"r": 2, "lora_alpha": 4, "rank_pattern": {key: 3}, "alpha_pattern": {key: 12}}
    metadata = {"lora_adapter_metadata": json.dumps({f"{home}.{k}": v for k, v in told.items()})}
    tensors = {f"{m}.lora_{k}.weight": s.params[k] for m, s in ((module, site), (other, lora())) for k in "AB"}
    save_file(tensors, tmp_path / "x.safetensors", metadata)

    sites = read(tmp_path / "x.safetensors", "diffusers").sites

    assert (sites[module].tuner.r, sites[module].tuner.scale, sites[other].tuner.scale) == (3, 4.0, 2.0)


def test_a_thousand_modules_of_their_own_rank_compile_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """PEFT's folder names each module whose rank differs; a pattern for each of them took minutes to match."""
    sites = {f"unet.down_blocks.{i}.attentions.0.proj_in": lora(r=1 + i % 3, seed=i) for i in range(60)}
    write(Adapter(sites), tmp_path / "x", "peft")
    compiled: list[str] = []
    monkeypatch.setattr(regex, "compile", lambda *a, **k: compiled.append(a[0]))

    back = read(tmp_path / "x")

    assert {p: s.tuner.r for p, s in back.sites.items()} == {p: s.tuner.r for p, s in sites.items()}
    assert compiled == []


def test_sd3s_last_context_norm_is_refused_with_what_holds_it(tmp_path: Path):
    """A hint that can be followed: two formats keep the script's order of its rows."""
    adapter = Adapter({"transformer.joint_blocks.23.context_block.adaLN_modulation.1": lora()})

    with pytest.raises(AdaptKitError, match="another order of rows in diffusers; --to kohya and --to peft hold it"):
        write(adapter, tmp_path / "x.safetensors", "diffusers")
    for name, to in (("y.safetensors", "kohya"), ("z", "peft")):
        write(adapter, tmp_path / name, to)
        assert apart(adapter, read(tmp_path / name)) == 0
