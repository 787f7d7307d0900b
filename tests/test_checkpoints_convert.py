"""Whole checkpoints in another container: torch, safetensors and transformers read what was written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.running import COMMAND, tree
from places import FIXTURES
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model

import adaptkit
from adaptkit.store import torchzip
from adaptkit.store.crc import combined

pytestmark = pytest.mark.filterwarnings("ignore:.*hold no numbers:adaptkit.AdaptKitWarning")
FAULTS = Path(__file__).parent / "faults"
DTYPES = [
    "float32", "float64", "float16", "bfloat16", "bool", "uint8", "int8", "int16", "int32", "int64", "complex64",
    "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz",
]  # fmt: skip


def numbers(seed: int = 0, layers: int = 4) -> dict[str, torch.Tensor]:
    """A small state dict with shapes that do not divide anything."""
    torch.manual_seed(seed)
    found = {"embed.weight": torch.randn(37, 13), "scalar": torch.tensor(3.5), "none": torch.zeros(0, 4)}
    return found | {f"layers.{i}.weight": torch.randn(13, 17).bfloat16() for i in range(layers)}


def held(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the programs that own the formats."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    for file in sorted(folder.glob("*.bin")):
        found |= torch.load(file, weights_only=True)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and raw(a[n]) == raw(b[n]) for n in a
    )


def raw(t: torch.Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


def test_a_pickle_becomes_safetensors_and_a_pickle_again(tmp_path: Path):
    """There and back every bit stays, and torch reads the file with weights_only, mapped or not."""
    torch.save(numbers(), tmp_path / "model.pth")

    adaptkit.convert(tmp_path / "model.pth", tmp_path / "st", "safetensors")
    adaptkit.convert(tmp_path / "st", tmp_path / "pt", "pytorch")

    assert same(load_file(tmp_path / "st" / "model.safetensors"), numbers())
    assert same(held(tmp_path / "pt"), numbers())
    assert same(torch.load(tmp_path / "pt" / "pytorch_model.bin", weights_only=True, mmap=True), numbers())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_torch_goes_both_ways(dtype: str, tmp_path: Path):
    """Bits, dtype and shape stay, for all dtypes that both containers hold."""
    kind = getattr(torch, dtype)
    tensors = {"w": torch.arange(24, dtype=torch.uint8).view(kind).reshape(3, -1) if kind.itemsize <= 8 else None}
    if dtype == "bool":
        tensors = {"w": torch.tensor([[True, False, True]])}
    save_file(tensors, tmp_path / "model.safetensors")

    adaptkit.convert(tmp_path / "model.safetensors", tmp_path / "pt", "pytorch")
    adaptkit.convert(tmp_path / "pt", tmp_path / "st", "safetensors")

    assert same(held(tmp_path / "pt"), tensors)
    assert same(held(tmp_path / "st"), tensors)


def test_the_written_zip_is_sound(tmp_path: Path):
    """Python's zipfile finds every checksum right, and the numbers lie aligned as torch aligns them."""
    save_file(numbers(), tmp_path / "model.safetensors")

    adaptkit.convert(tmp_path / "model.safetensors", tmp_path / "pt", "pytorch")

    with zipfile.ZipFile(tmp_path / "pt" / "pytorch_model.bin") as z:
        assert z.testzip() is None
        for info in z.infolist():
            z.fp.seek(info.header_offset + 26)
            lengths = np.frombuffer(z.fp.read(4), "<u2")
            assert (info.header_offset + 30 + lengths.sum()) % torchzip.ALIGN == 0


def test_numbers_beyond_four_gigabytes_use_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the limit lowered, sizes and offsets stand in the zip64 fields, and torch still reads them."""
    monkeypatch.setattr(torchzip, "MASK", 0xFFFFFFFF)
    at_limit = torchzip._listed(torchzip.Member("a/data/0", 5 << 30, None, 6 << 30, 0), 7)
    end = torchzip._directory([torchzip.Member("a/data/0", 5 << 30, None, 6 << 30, 0)], [7], 11 << 30)

    info = zipfile.ZipInfo("a/data/0")
    info.extra = at_limit[46 + len("a/data/0") :]
    info.file_size = info.compress_size = info.header_offset = 0xFFFFFFFF
    info._decodeExtra(0) if sys.version_info >= (3, 12) else info._decodeExtra()
    assert (info.file_size, info.header_offset) == (5 << 30, 6 << 30)
    assert end.count(b"PK\6\6") == end.count(b"PK\6\7") == 1


def test_views_and_transposes_become_ordinary_tensors(tmp_path: Path):
    """Slices of one storage and transposed matrices are written out in order."""
    whole = torch.randn(12, 10)
    state = {"t": whole.t(), "rows": whole[3:7], "columns": whole[:, 2:5], "step": whole[::2], "one": whole}
    torch.save(state, tmp_path / "model.bin")

    done = adaptkit.convert(tmp_path / "model.bin", tmp_path / "st", "safetensors")

    assert same(held(tmp_path / "st"), {n: t.contiguous() for n, t in state.items()})
    assert done.tensors == 5


def tied_model(folder: Path, **settings) -> torch.nn.Module:
    """A small Llama, tied or not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2, **settings)).eval()
    folder.mkdir()
    model.config.save_pretrained(folder)
    return model


def loads_equal(folder: Path, model: torch.nn.Module) -> bool:
    """Whether transformers loads a folder without a complaint and computes the same."""
    from transformers import AutoModelForCausalLM

    again, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9, 3]])
    return not any(info[k] for k in ("missing_keys", "unexpected_keys")) and torch.equal(
        again(ids).logits, model(ids).logits
    )


@pytest.mark.filterwarnings("ignore")
def test_tied_ends_stay_one_tensor(tmp_path: Path):
    """A .bin with both names of one storage becomes safetensors with the embedding alone, and loads the same."""
    model = tied_model(tmp_path / "base", tie_word_embeddings=True)
    torch.save(model.state_dict(), tmp_path / "base" / "pytorch_model.bin")

    done = adaptkit.convert(tmp_path / "base", tmp_path / "st", "safetensors")

    assert "lm_head.weight" not in held(tmp_path / "st")
    assert [(n.what, n.where) for n in done.notes] == [("dropped", "lm_head.weight")]
    assert loads_equal(tmp_path / "st", model)


@pytest.mark.filterwarnings("ignore")
def test_the_head_that_save_model_kept_gets_both_names_in_a_pickle(tmp_path: Path):
    """safetensors' save_model keeps lm_head and notes the embedding; the pickle holds both, in one storage."""
    model = tied_model(tmp_path / "base", tie_word_embeddings=True)
    save_model(model, str(tmp_path / "base" / "model.safetensors"), metadata={"format": "pt"})

    adaptkit.convert(tmp_path / "base", tmp_path / "pt", "pytorch")
    adaptkit.convert(tmp_path / "base", tmp_path / "st", "safetensors")

    found = held(tmp_path / "pt")
    ends = found["lm_head.weight"], found["model.embed_tokens.weight"]
    assert ends[0].untyped_storage().data_ptr() == ends[1].untyped_storage().data_ptr()
    assert loads_equal(tmp_path / "pt", model)
    assert loads_equal(tmp_path / "st", model)


@pytest.mark.filterwarnings("ignore")
def test_names_that_nothing_ties_again_are_written_out(tmp_path: Path):
    """Without tie_word_embeddings a second name of one storage becomes a tensor of its own, and the report says so."""
    model = tied_model(tmp_path / "base", tie_word_embeddings=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    torch.save(model.state_dict(), tmp_path / "base" / "pytorch_model.bin")

    done = adaptkit.convert(tmp_path / "base", tmp_path / "st", "safetensors")

    assert {"lm_head.weight", "model.embed_tokens.weight"} <= held(tmp_path / "st").keys()
    assert [(n.what, n.where) for n in done.notes] == [("kept", "lm_head.weight")]
    assert loads_equal(tmp_path / "st", model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["safetensors", "pytorch"])
def test_a_model_is_split_again_and_loads_the_same(to: str, tmp_path: Path):
    """--max-shard-size makes files and an index that transformers reads, with everything beside the weights."""
    model = tied_model(tmp_path / "base", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")

    done = adaptkit.convert(tmp_path / "base", tmp_path / "out", to, max_shard_size="4kB")

    index = json.loads(next((tmp_path / "out").glob("*.index.json")).read_text())
    assert len(done.files) > 3
    assert set(index["weight_map"].values()) == set(done.files)
    assert index["metadata"]["total_size"] == done.bytes
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert loads_equal(tmp_path / "out", model)
    again = adaptkit.convert(tmp_path / "out", tmp_path / "one", "safetensors", max_shard_size="1GB")
    assert again.files == ["model.safetensors"]
    assert loads_equal(tmp_path / "one", model)


def test_dtype_rounds_once_and_config_says_so(tmp_path: Path):
    """float32 becomes torch's bfloat16, whole numbers stay, and config.json names the new dtype."""
    model = FIXTURES / "models" / "llama"

    adaptkit.convert(model, tmp_path / "out", "pytorch", dtype="bfloat16")

    source, found = load_file(model / "model.safetensors"), held(tmp_path / "out")
    assert all(torch.equal(found[n], t.bfloat16()) for n, t in source.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_overflow_is_refused_and_underflow_counted(tmp_path: Path):
    """A number above float16's largest ends the conversion; numbers that become zero are counted in the report."""
    save_file({"w": torch.tensor([1e-9, 1.0, -3e-9, 0.0])}, tmp_path / "small.safetensors")
    save_file({"w": torch.tensor([1.0, 70000.0])}, tmp_path / "large.safetensors")

    with pytest.warns(adaptkit.AdaptKitWarning, match="2 numbers in 1 tensors became zero in float16"):
        done = adaptkit.convert(tmp_path / "small.safetensors", tmp_path / "small", "pytorch", dtype="float16")
    assert [n.text for n in done.notes] == ["2 numbers became zero in float16"]
    with pytest.raises(adaptkit.AdaptKitError, match=r"1 values overflow F16 \(largest 7e\+04\)"):
        adaptkit.convert(tmp_path / "large.safetensors", tmp_path / "large", "safetensors", dtype="float16")
    assert not list(tmp_path.glob("large*/*"))
    assert not (tmp_path / "large.partial").exists()


@pytest.mark.parametrize("to", ["safetensors", "pytorch"])
def test_a_flipped_bit_is_found_while_copying(to: str, tmp_path: Path):
    """The checksum of each storage is compared on the way, and nothing is published."""
    torch.save({"w": torch.randn(700, 700)}, tmp_path / "model.bin")
    data = bytearray((tmp_path / "model.bin").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "model.bin").write_bytes(data)

    with pytest.raises(adaptkit.AdaptKitError, match=r"w is damaged \(CRC") as caught:
        adaptkit.convert(tmp_path / "model.bin", tmp_path / "out", to)

    assert caught.value.code == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.bin"]


def test_metadata_of_the_source_stays(tmp_path: Path):
    """What a safetensors file says of itself is kept, and "format" added where it lacks."""
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"author": "nobody"})

    adaptkit.convert(tmp_path / "model.safetensors", tmp_path / "out", "safetensors")

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        assert f.metadata() == {"author": "nobody", "format": "pt"}


def test_dtypes_that_pickles_lack_are_refused(tmp_path: Path):
    """F4 has no tensor of its own in a .bin: the sentence names it, and nothing is left."""
    header = json.dumps({"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\1\2")

    with pytest.raises(adaptkit.AdaptKitError, match="'w' has dtype F4, which PyTorch files cannot hold"):
        adaptkit.convert(tmp_path / "model.safetensors", tmp_path / "out", "pytorch")
    assert not (tmp_path / "out").exists()


def large(folder: Path) -> None:
    """A model of six shards."""
    from huggingface_hub import save_torch_state_dict

    torch.manual_seed(3)
    state = {f"layers.{i}.weight": torch.randn(300, 300) for i in range(6)}
    folder.mkdir()
    save_torch_state_dict(state, folder, safe_serialization=False, max_shard_size=400_000)


def command(place: Path, *options: str, faults: str = "") -> subprocess.CompletedProcess:
    env = dict(os.environ)
    if faults:
        env |= {"PYTHONPATH": str(FAULTS), "FAULTS": faults}
    words = [*COMMAND, "convert", "base", "-o", "out", *options]
    return subprocess.run(words, cwd=place, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["safetensors", "pytorch"])
def test_a_killed_conversion_goes_on_with_the_same_command(to: str, tmp_path: Path):
    """SIGKILL before the fourth shard gets its name: OUT is not there, the rerun keeps three, the bytes are the same."""
    large(tmp_path / "base")
    ending = ".safetensors.tmp" if to == "safetensors" else ".bin.tmp"
    assert command(tmp_path, "--to", to).returncode == 0
    whole = tree(tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / "whole")

    killed = command(tmp_path, "--to", to, faults=f"rename,SIGKILL,4,{ending}")
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    again = command(tmp_path, "--to", to)

    assert "3 files were there already" in again.stdout
    assert {n: h for n, h in tree(tmp_path / "out").items() if n != "adaptkit.json"} == {
        n: h for n, h in whole.items() if n != "adaptkit.json"
    }


@pytest.mark.slow
def test_memory_does_not_depend_on_the_model(tmp_path: Path):
    """240 MB in one tensor are converted both ways in well under that."""
    save_file({"w": torch.zeros(60_000_000)}, tmp_path / "base.safetensors")
    code = (
        "import sys, adaptkit; adaptkit.convert(sys.argv[1], sys.argv[2], sys.argv[3]);"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    source = tmp_path / "base.safetensors"
    for to in ("pytorch", "safetensors"):
        words = [sys.executable, "-c", code, str(source), str(tmp_path / to), to]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
        assert int(done.stdout) * 1024 < 200_000_000
        source = tmp_path / "pytorch"


def test_a_dry_run_says_what_it_would_write(tmp_path: Path):
    """Files, tensors and bytes are told, and nothing is there afterwards."""
    save_file(numbers(), tmp_path / "model.safetensors")

    done = adaptkit.convert(tmp_path / "model.safetensors", tmp_path / "out", "pytorch", dry_run=True)

    assert (done.written, done.files, done.tensors) == (False, ["pytorch_model.bin"], len(numbers()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]


def test_pieces_of_a_checksum_add_up():
    """CRC-32 of pieces, in any order, is that of the whole."""
    rng = np.random.default_rng(5)
    data = rng.bytes(50_000)
    cuts = [0, *sorted(rng.choice(50_000, 9, replace=False).tolist()), 50_000]
    pieces = [(a, b - a, zlib.crc32(data[a:b])) for a, b in zip(cuts, cuts[1:], strict=False)]

    assert combined(reversed(pieces)) == (zlib.crc32(data), len(data))


def test_a_shard_that_is_a_link_out_of_the_folder_is_called_that(tmp_path: Path):
    """Its name is plain, so the refusal must say what else is wrong with it."""
    (tmp_path / "model").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "elsewhere.safetensors")
    (tmp_path / "model" / "model-00001-of-00001.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    table = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(table))

    with pytest.raises(adaptkit.AdaptKitError, match=r"a symlink that leaves the folder \(of w\)"):
        adaptkit.convert(tmp_path / "model", tmp_path / "out", "pytorch")
