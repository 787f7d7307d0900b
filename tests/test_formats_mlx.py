"""MLX: factors the other way round, one scale and one rank for the whole file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from format_kit import apart, sample
from safetensors.numpy import load_file, save_file

from adaptkit import Adapter, AdaptKitError, AdaptKitWarning, LoRA, Site
from adaptkit.formats.base import read, write
from adaptkit.formats.mlx import Mlx
from adaptkit.testing import check_format, zoo

Q = "model.layers.0.self_attn.q_proj"


def lora(r: int = 2, alpha: float = 3.0, **more) -> Site:
    rng = np.random.default_rng(r)
    params = {"A": rng.standard_normal((r, 4)).astype("f4"), "B": rng.standard_normal((6, r)).astype("f4")}
    return Site(LoRA(r=r, alpha=alpha, **more), params)


def folder(path: Path, config: object, **tensors: np.ndarray) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapters.safetensors")
    return path


@pytest.mark.parametrize("kind", zoo())
def test_every_kind_is_held_or_refused(kind: str, tmp_path: Path):
    """LoRA and DoRA in every spelling; nothing else, and then nothing is left behind."""
    held = check_format(Mlx(), zoo()[kind], tmp_path / "x", may_refuse=True, may_fold=True)

    assert held == (kind in {"lora", "two ranks", "dora", "rslora", "half", "bfloat16", "meta", "only whole"})


@pytest.mark.parametrize("case", ["lora", "lora_default_keys_lastlayer"])
def test_an_mlx_adapter_is_written_again_as_it_was(case: str, tmp_path: Path):
    """Every tensor, and the scale."""
    assert write(read(sample("mlx", case)), tmp_path / "x", "mlx") == []

    before, after = (load_file(p / "adapters.safetensors") for p in (sample("mlx", case), tmp_path / "x"))
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == 20.0 and config["num_layers"] == -1


def test_the_scale_is_the_multiplier_itself():
    """Not divided by the rank: scale 20 of rank 4 is alpha 80."""
    site = read(sample("mlx", "lora")).sites[Q]
    assert (site.tuner.scale, site.tuner.alpha) == (20.0, 80.0)
    raw = load_file(sample("mlx", "lora") / "adapters.safetensors")
    assert np.array_equal(np.asarray(site.params["A"]), raw[f"{Q}.lora_a"].T)


def test_ranks_are_padded_and_scales_folded(tmp_path: Path):
    """Both are said; what is computed stays the same."""
    adapter = Adapter({Q: lora(2), Q.replace("q_", "v_"): lora(5, 1.0, rslora=True)})
    notes = write(adapter, tmp_path / "x", "mlx")

    assert {n.what for n in notes} == {"padded", "folded"}
    assert {v.shape for k, v in load_file(tmp_path / "x" / "adapters.safetensors").items() if k.endswith("a")} == {
        (4, 5)
    }
    assert apart(adapter, read(tmp_path / "x")) <= 1


def test_an_npz_without_its_scale_asks_for_it(tmp_path: Path):
    """The old files do not hold it; a line of settings beside them does."""
    np.savez(tmp_path / "adapters.npz", **{f"{Q}.lora_a": np.ones((4, 2), "f4"), f"{Q}.lora_b": np.ones((2, 6), "f4")})
    with pytest.raises(AdaptKitError, match="does not hold its scale"):
        read(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"lora_parameters": {"scale": 20.0}}')
    assert read(tmp_path).sites[Q].tuner.scale == 20.0


def test_dropping_is_said_and_must_be_asked_for(tmp_path: Path):
    """A trained head goes only when its kind is named; then a Note tells."""
    adapter = Adapter({Q: lora()}, {"lm_head.weight": np.ones((3, 4), "f4")})
    with pytest.raises(AdaptKitError, match="lm_head.weight.*--drop whole"):
        write(adapter, tmp_path / "x", "mlx")
    assert [(n.what, n.where) for n in write(adapter, tmp_path / "x", "mlx", drop=["whole"])] == [
        ("dropped", "lm_head.weight")
    ]
    with pytest.raises(AdaptKitError, match="no kind of part"):
        write(adapter, tmp_path / "y", "mlx", drop=["heads"])


@pytest.mark.parametrize(
    "parameters", [None, [], {}, {"scale": "2"}, {"scale": True}, {"scale": 2, "rank": 3}, {"scale": 2, "rank": 0}]
)
def test_settings_that_make_no_sense_are_a_sentence(parameters: object, tmp_path: Path):
    """The scale is never guessed, and a rank that lies is found."""
    tensors = {f"{Q}.lora_a": np.ones((4, 2), "f4"), f"{Q}.lora_b": np.ones((2, 6), "f4")}
    path = folder(tmp_path / "x", {"fine_tune_type": "lora", "lora_parameters": parameters}, **tensors)
    with pytest.raises(AdaptKitError):
        read(path)


@pytest.mark.parametrize("tensors", [
    {f"{Q}.lora_a": (4, 2)},
    {f"{Q}.lora_a": (4, 2), f"{Q}.lora_b": (3, 6)},
    {f"{Q}.lora_a": (4, 2), f"{Q}.lora_b": (2, 6), "lm_head.weight": (3, 4)},
    {"switch_mlp.lora_a": (2, 2, 4), "switch_mlp.lora_b": (2, 6, 2)},
    {"layers.0.attention.wq.lora_a": (4, 2), "layers.0.attention.wq.lora_b": (2, 6)},
    {"model.embed_tokens.lora_a": (8, 2), "model.embed_tokens.lora_b": (2, 4), "model.embed_tokens.m": (8,)},
])  # fmt: skip
def test_tensors_without_a_place_are_a_sentence(tensors: dict, tmp_path: Path):
    """Missing halves, other shapes, tensors of other kinds."""
    config = {"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0}}
    path = folder(tmp_path / "x", config, **{k: np.ones(v, "f4") for k, v in tensors.items()})
    with pytest.raises(AdaptKitError, match="adapters.safetensors: "):
        read(path)


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapters.npz"])
def test_a_cut_file_is_a_sentence(name: str, tmp_path: Path):
    """At any length."""
    path = tmp_path / "x"
    shutil.copytree(sample("mlx", "lora"), path)
    data = (path / "adapters.safetensors").read_bytes()
    if name.endswith("npz"):
        np.savez(path / name, **load_file(path / "adapters.safetensors"))
        data = (path / name).read_bytes()
        (path / "adapters.safetensors").unlink()
    for size in range(0, len(data), 301):
        (path / name).write_bytes(data[:size])
        with pytest.raises(AdaptKitError):
            read(path)


def test_dropout_is_kept_there_and_back(tmp_path: Path):
    """It changes no number, but whoever trains on finds it again."""
    write(Adapter({Q: lora(dropout=0.25)}), tmp_path / "x", "mlx")
    write(read(tmp_path / "x"), tmp_path / "y", "peft")

    assert json.loads((tmp_path / "y" / "adapter_config.json").read_text())["lora_dropout"] == 0.25


@pytest.mark.parametrize(
    ("path", "named", "turned"),
    [
        ("transformer.h.0.attn.c_attn", "model.h.0.attn.c_attn", True),
        ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn", False),  # GPT-BigCode
        ("gpt_neox.layers.3.attention.dense", "model.h.3.attention.dense", False),
        (Q, Q, False),
    ],
)
def test_modules_are_called_as_mlx_lm_calls_them(path: str, named: str, turned: bool, tmp_path: Path):
    """mlx-lm has GPT-2's and GPT-NeoX' layers under another name, and refuses tensors under transformers'."""
    notes = write(Adapter({path: lora(transposed=turned)}), tmp_path / "x", "mlx")

    assert set(load_file(tmp_path / "x" / "adapters.safetensors")) == {f"{named}.lora_a", f"{named}.lora_b"}
    assert [n.what for n in notes] == ["renamed"] * (named != path)
    assert {p: s.tuner.transposed for p, s in read(tmp_path / "x").sites.items()} == {path: turned}


def test_the_base_tells_gpt2_where_its_weights_do_not(tmp_path: Path):
    """An adapter that does not say how the weight is stored may be GPT-2's all the same."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    write(Adapter({"transformer.h.0.mlp.c_fc": lora()}), tmp_path / "x", "mlx", base=tmp_path)

    assert set(load_file(tmp_path / "x" / "adapters.safetensors")) == {f"model.h.0.mlp.c_fc.lora_{x}" for x in "ab"}


def test_an_embedding_that_is_the_head_too_is_refused(tmp_path: Path):
    """mlx-lm adds its update to the head as well, which PEFT does not: another model, to be said before it is written."""
    embedded = Adapter({"model.embed_tokens": lora(embedding=True, transposed=True), Q: lora()})
    tied, untied = (tmp_path / name for name in ("tied", "untied"))
    for folder in (tied, untied):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": folder is tied}))

    with pytest.raises(AdaptKitError, match="adds the update of model.embed_tokens to the head"):
        write(embedded, tmp_path / "x", "mlx", base=tied)
    assert not (tmp_path / "x").exists()
    assert write(embedded, tmp_path / "x", "mlx", base=untied) == []
    assert [n.what for n in write(embedded, tmp_path / "y", "mlx")] == ["kept"]
    assert write(embedded, tmp_path / "z", "mlx", base=tied, drop=["embedding"])[0].what == "dropped"
    with pytest.raises(AdaptKitError, match="to the head"):
        read(tmp_path / "x", base=tied)
    with pytest.warns(AdaptKitWarning, match="--base tells"):
        read(tmp_path / "x")
