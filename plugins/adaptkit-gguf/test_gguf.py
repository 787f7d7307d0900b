import json

import numpy as np
import pytest

from adaptkit import Adapter, AdaptKitError, Corrupt, LoRA, Site, inspect
from adaptkit.testing import check_format, zoo

gguf = pytest.importorskip("gguf")
import adaptkit_gguf  # noqa: E402
from adaptkit_gguf import ARCHS, Gguf  # noqa: E402

LLAMA = {"model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": False}


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path / "base"


def lora(r=2, alpha=4.0, out=6, **more):
    rng = np.random.default_rng(r)
    params = {"A": rng.standard_normal((r, 4)).astype("f4"), "B": rng.standard_normal((out, r)).astype("f4")}
    return Site(LoRA(r=r, alpha=alpha, **more), params)


@pytest.mark.parametrize("kind", zoo())
def test_every_kind_is_held_or_refused(kind, tmp_path, base):
    adapter = zoo()[kind]
    held = check_format(Gguf(), adapter, tmp_path / "a.gguf", may_refuse=True, may_fold=True, base=base)

    assert held == (kind in {"lora", "two ranks", "rslora", "half", "bfloat16", "meta"})


@pytest.mark.parametrize("kind", sorted(ARCHS))
def test_names_are_those_of_the_library(kind):
    """Two tables by different hands: every module's name is what gguf's own map says."""
    arch = ARCHS[kind]
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch.name)
    theirs = gguf.get_tensor_name_map(number, 2)
    for name, module in arch.modules.items():
        known = theirs.get_name(module.replace("#", "1"))
        assert known in (name.replace("#", "1"), None), module
    assert theirs.get_name(arch.modules["blk.#.ffn_down"].replace("#", "1")) == "blk.1.ffn_down"


def test_q_and_k_are_moved_as_the_weights_are(base):
    """Rows 0..5 of one head of 6: its halves are interleaved."""
    model = adaptkit_gguf.model_of(base, {})
    rows = np.arange(6, dtype="f4").reshape(6, 1)
    there = adaptkit_gguf.moved("blk.0.attn_k", rows, model)

    assert there.ravel().tolist() == [0, 3, 1, 4, 2, 5]
    assert np.array_equal(adaptkit_gguf.moved("blk.0.attn_k", there, model, back=True), rows)
    assert np.array_equal(adaptkit_gguf.moved("blk.0.attn_v", rows, model), rows)


def test_one_alpha_is_written_as_it_is_and_two_are_folded(tmp_path, base):
    """rsLoRA with alpha 4 and rank 4 is scale 2, hence alpha 8; a second alpha makes the file's alpha 0."""
    one = Adapter({"model.layers.0.self_attn.v_proj": lora(4, rslora=True)})
    assert Gguf().write(one, tmp_path / "a.gguf", base=base) == []
    two = Adapter({**one.sites, "model.layers.1.self_attn.v_proj": lora(2)})
    assert {n.what for n in Gguf().write(two, tmp_path / "b.gguf", base=base)} == {"folded"}

    alphas = [gguf.GGUFReader(tmp_path / f).fields["adapter.lora.alpha"].contents() for f in ("a.gguf", "b.gguf")]
    assert alphas == [8.0, 0.0]


def test_without_the_heads_there_is_no_order(tmp_path, base):
    adapter = Adapter({"model.layers.0.self_attn.q_proj": lora()})
    with pytest.raises(AdaptKitError, match="--base"):
        Gguf().write(adapter, tmp_path / "a.gguf")
    Gguf().write(adapter, tmp_path / "a.gguf", base=base)
    with pytest.raises(AdaptKitError, match="--base"):
        Gguf().read(tmp_path / "a.gguf")


@pytest.mark.parametrize("config", [{}, {"model_type": "mamba"}, [], {"model_type": "llama"}])
def test_an_unknown_base_is_refused(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdaptKitError):
        Gguf().write(Adapter({"model.layers.0.self_attn.q_proj": lora()}), tmp_path / "a.gguf", base=tmp_path)
    assert not (tmp_path / "a.gguf").exists()


def test_a_head_that_is_the_embedding_is_refused(tmp_path, base):
    (base / "config.json").write_text(json.dumps(LLAMA | {"tie_word_embeddings": True}))
    with pytest.raises(AdaptKitError, match="both or neither"):
        Gguf().write(Adapter({"lm_head": lora()}), tmp_path / "a.gguf", base=base)


def test_a_cut_file_is_a_sentence(tmp_path, base):
    whole = tmp_path / "a.gguf"
    Gguf().write(Adapter({"model.layers.0.self_attn.v_proj": lora()}), whole, base=base)
    data = whole.read_bytes()
    for size in range(0, len(data) - 32, 37):
        whole.write_bytes(data[:size])
        with pytest.raises(AdaptKitError, match="a.gguf: "):
            Gguf().read(whole, base=base)


def test_numbers_that_are_none_are_refused(tmp_path, base):
    site = lora()
    site.params["B"][0, 0] = np.nan
    with pytest.raises(AdaptKitError, match="finite"):
        Gguf().write(Adapter({"model.layers.0.self_attn.v_proj": site}), tmp_path / "a.gguf", base=base)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_inspect_counts_what_was_read_and_takes_the_base(tmp_path, base):
    path = "model.layers.0.self_attn.q_proj"
    Gguf().write(Adapter({path: lora()}), tmp_path / "a.gguf", base=base)

    adapter = Gguf().read(tmp_path / "a.gguf", base=base)
    found = inspect(adapter)

    assert (found.tensors, found.parameters, found.bytes, found.dtypes) == (2, 20, 80, {"F32": 2})
    with pytest.raises(AdaptKitError, match=r"--base of inspect and convert"):
        Gguf().read(tmp_path / "a.gguf")


def test_a_cut_file_is_corrupt(tmp_path, base):
    path = "model.layers.0.self_attn.q_proj"
    Gguf().write(Adapter({path: lora()}), tmp_path / "a.gguf", base=base)
    whole = (tmp_path / "a.gguf").read_bytes()
    for size in (4, 30, len(whole) // 2, len(whole) - 50):
        (tmp_path / "b.gguf").write_bytes(whole[:size])
        with pytest.raises(Corrupt, match="is no sound GGUF file .*; fetch it again"):
            Gguf().read(tmp_path / "b.gguf", base=base)


def test_float64_is_said_to_be_rounded(tmp_path, base):
    site = lora()
    wide = Site(site.tuner, {k: v.astype("f8") for k, v in site.params.items()})

    notes = Gguf().write(Adapter({"model.layers.0.self_attn.q_proj": wide}), tmp_path / "a.gguf", base=base)

    assert {n.what for n in notes} == {"rounded"}
