"""gguf and onnx_adapter against what llama.cpp's converter and Olive made of the same PEFT adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from format_kit import FORMATS, apart, sample
from plugin_door import FOLDERS, door, opened

import adaptkit
from adaptkit.formats.base import read, write

gguf = pytest.importorskip("gguf")
ort = pytest.importorskip("onnxruntime")
LLAMA = FORMATS / "bases" / "llama"


@pytest.fixture(scope="module", autouse=True)
def plugins(tmp_path_factory: pytest.TempPathFactory):
    """This process sees the plugins."""
    with opened(door(tmp_path_factory.mktemp("site"), FOLDERS)):
        yield


def tensors(file: Path) -> dict[str, tuple]:
    """Kind, shape and bytes of each tensor of a GGUF file."""
    return {t.name: (t.tensor_type, tuple(t.shape), t.data.tobytes()) for t in gguf.GGUFReader(file).tensors}


def alpha(file: Path) -> float:
    return gguf.GGUFReader(file).fields["adapter.lora.alpha"].contents()


@pytest.mark.parametrize("case", ["lora", "lora_embedding_noemb"])
def test_a_gguf_adapter_is_what_llama_cpp_makes(case: str, tmp_path: Path):
    """Names, permuted rows, turned embeddings, alpha: every byte of every tensor."""
    write(read(sample("peft", case)), tmp_path / "x.gguf", "gguf", base=LLAMA)
    theirs = sample("gguf", f"{case}-f32")

    assert tensors(tmp_path / "x.gguf") == tensors(theirs)
    assert alpha(tmp_path / "x.gguf") == alpha(theirs)


def test_rslora_is_right_where_llama_cpps_converter_is_not(tmp_path: Path):
    """alpha 8 of rank 4 is scale 4 with the root, hence alpha 16; the converter writes 8."""
    adapter = read(sample("peft", "lora_rslora"))
    write(adapter, tmp_path / "x.gguf", "gguf", base=LLAMA)

    assert (alpha(tmp_path / "x.gguf"), alpha(sample("gguf", "lora_rslora-f32"))) == (16.0, 8.0)
    assert apart(adapter, read(tmp_path / "x.gguf", base=LLAMA)) == 0


def test_the_base_may_be_given_as_gguf(tmp_path: Path):
    """Heads are read from its header; the same file comes of it."""
    adapter = read(sample("peft", "lora"))
    write(adapter, tmp_path / "a.gguf", "gguf", base=LLAMA)
    write(adapter, tmp_path / "b.gguf", "gguf", base=sample("gguf", "base_llama"))

    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_gpt2_is_not_turned(tmp_path: Path):
    """Its weights lie the other way round, LoRA's factors do not: A stays (r, in)."""
    adapter = read(sample("peft", "lora_gpt2_conv1d"))
    write(adapter, tmp_path / "x.gguf", "gguf", base=FORMATS / "bases" / "gpt2")

    found = {t.name: tuple(t.data.shape) for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    for path, site in adapter.sites.items():
        name = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_proj": "ffn_down"}[
            path.split("h.0.")[1]
        ]
        assert found[f"blk.0.{name}.weight.lora_a"] == tuple(site.params["A"].shape)
        assert found[f"blk.0.{name}.weight.lora_b"] == tuple(site.params["B"].shape)


def test_an_onnx_adapter_is_what_olive_makes(tmp_path: Path):
    """Names, transposed factors, the folded scale: every byte of every tensor; and ONNX Runtime loads it."""
    write(read(sample("peft", "lora")), tmp_path / "x.onnx_adapter", "onnx_adapter")
    mine, theirs = (
        {n: v.numpy().tobytes() for n, v in ort.AdapterFormat.read_adapter(str(f)).get_parameters().items()}
        for f in (tmp_path / "x.onnx_adapter", sample("onnx_adapter", "olive_lora"))
    )

    assert mine == theirs
    ort.LoraAdapter().Load(str(tmp_path / "x.onnx_adapter"))


@pytest.mark.parametrize("case", ["gguf/lora-f32", "onnx_adapter/olive_lora"])
def test_an_adapter_of_any_format_merges(case: str, tmp_path: Path):
    """The same bytes as from the PEFT folder that it was made of; formats that need the model are read with it."""
    adaptkit.merge(LLAMA, FORMATS / "peft" / "lora", tmp_path / "expected")
    adaptkit.merge(LLAMA, FORMATS / case, tmp_path / "found")

    a, b = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("expected", "found"))
    assert a == b


def test_gguf_becomes_an_onnx_adapter_though_only_one_needs_the_base(tmp_path: Path):
    """The heads that GGUF's order needs are in config.json; a folder without an ONNX model gives Olive's names."""
    base = FORMATS / "bases" / "llama"
    adapter = read(sample("gguf", "lora-f32"), base=base)
    notes = write(adapter, tmp_path / "x.onnx_adapter", "onnx_adapter", base=base)

    assert ("kept", "names") in {(n.what, n.where) for n in notes}
    assert apart(adapter, read(tmp_path / "x.onnx_adapter")) <= 1
