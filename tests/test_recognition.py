"""What a path holds is told by its contents: genuine files of every program, broken ones, and models, which are nobody's adapter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from places import FIXTURES, SHARED
from safetensors.numpy import save_file

import adaptkit
from adaptkit import registry
from adaptkit.errors import Corrupt
from adaptkit.verbs.detect import detect, strange

pytestmark = pytest.mark.filterwarnings("ignore")
SAMPLES, REAL = SHARED / "samples", SHARED / "real" / "adapters"
collection = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the collection of genuine files is not here")
GLOBS = {  # what a path of the collection is -> where such paths lie; None is refused
    "peft": ("peft/[!_]*", "peft/*/adapter_model.*", "peft/*/style", "torchtune/*", "torchtune/*/adapter_model.pt",
             "torchtune/*/peft_export", "adapterhub/*"),
    "kohya": ("kohya/*/", "kohya/*/*.safetensors", "kohya/*/*.pt", "lycoris/*", "lycoris/*/*.safetensors",
              "diffusers/*kohya", "diffusers/*kohya/*.safetensors"),
    "diffusers": ("diffusers/*[!a]", "diffusers/*/pytorch_lora_weights.safetensors"),
    "mlx": ("mlx/lora*", "mlx/*/*.safetensors"),
    "gguf": ("gguf/lora*.gguf",),
    "onnx_adapter": ("onnx_adapter/*.onnx_adapter",),
    "deepspeed": ("deepspeed/*/", "deepspeed/*/global_step1"),
    "dcp": ("fsdp/*/", "fsdp/*/*", "full_checkpoints/torch_dcp"),
    "safetensors": ("full_checkpoints/h*safetensors", "full_checkpoints/*tied*", "full_checkpoints/*/*.safetensors",
                    "full_checkpoints/torch_dcp_hf_writer", "peft/_base*", "peft/_base*/*.safetensors",
                    "onnx_adapter/*.safetensors"),
    "pytorch": ("full_checkpoints/hub_sharded_bin", "full_checkpoints/*/*.bin", "full_checkpoints/pth/*", "litgpt/_base",
                "litgpt/*/*.pth", "litgpt/*/*.lora", "loralib/*.pt"),
    None: ("gguf/base*", "gguf", "kohya", "lycoris", "full_checkpoints", "full_checkpoints/dtypes",
           "full_checkpoints/pth", "full_checkpoints/onnx*", "full_checkpoints/onnx*/model.onnx", "onnx_adapter",
           "deepspeed/*/*/*_states.pt", "fsdp/*/*/*.distcp", "loralib"),
}  # fmt: skip
WILD = {"57": "mlx", "58": "mlx", "61": "kohya", "62": "diffusers", "63": "diffusers", "70": "diffusers"}
WILD |= {"71": "safetensors", "77": "pytorch", "84": "safetensors", "85": "pytorch"}
# whose adapters no format reads
PROGRAMS = {
    "adapterhub/lora/adapter.safetensors": "AdapterHub",
    "adapterhub/seq_bn/adapter.safetensors": "AdapterHub",
    "litgpt/lora_qkv_all/lit_model.pth.lora": "litgpt",
    "loralib/lora_ckpt.pt": "loralib",
}


def paths() -> list[tuple[Path, str | None]]:
    """What of the collection is something, and what it is."""
    found = [(p, kind) for kind, globs in GLOBS.items() for glob in globs for p in SAMPLES.glob(glob)]
    return [
        (p, kind)
        for p, kind in found
        if p.suffix not in (".md", ".json") and not ("kohya" in p.name and kind == "diffusers")
    ]


@collection
def test_every_genuine_file_is_recognised_as_what_it_is():
    """Files and folders, 200 and more; what is nothing that can be converted is refused in a sentence."""
    wrong = []
    for path, kind in paths():
        try:
            got = detect(path)
        except adaptkit.AdaptKitError:
            got = None
        wrong += [(str(path.relative_to(SAMPLES)), got, kind)] * (got != kind)
    assert wrong == []
    assert len(paths()) > 200


@pytest.mark.skipif(not REAL.is_dir(), reason="the collection of real adapters is not here")
def test_adapters_from_the_wild_are_recognised():
    """Folders of strangers: what is not named here is PEFT's."""
    found = {p.name[:2]: detect(p) for p in REAL.iterdir()}
    assert found == {n: WILD.get(n, "peft") for n in found}
    assert len(found) > 20


@collection
def test_whose_adapter_it_is_stands_in_the_refusal(tmp_path: Path):
    """An adapter that no format reads is not called a model."""
    for name, program in PROGRAMS.items():
        with pytest.raises(adaptkit.AdaptKitError, match=f"of {program}"):
            adaptkit.convert(SAMPLES / name, tmp_path / "x", "peft")
    assert not list(tmp_path.iterdir())


@collection
def test_no_model_of_the_collection_is_an_adapter():
    """Every format is asked about every full checkpoint, folder and file."""
    models = [p for p in SAMPLES.glob("full_checkpoints/**/*") if p.is_file() or p.is_dir()]
    models += [*SAMPLES.glob("peft/_base*"), *SAMPLES.glob("litgpt/_base"), SAMPLES / "gguf" / "base_llama-f32.gguf"]
    formats = [registry.load("formats", n)() for n in registry.names("formats")]
    assert [(f.name, p.name) for p in models for f in formats if f.sniff(p)] == []


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("model.layers.0.self_attn.q_proj.loras.task.lora_A", "AdapterHub"),
        ("bert.encoder.layer.0.output.adapters.task.adapter_down.0.weight", "AdapterHub"),
        ("layers.0.attn.q_proj.lora_a.weight", "torchtune"),
        ("transformer.h.0.attn.qkv.lora_A", "litgpt"),
        ("fc.lora_A", "loralib"),
        ("unet:3:up", "cloneofsimo's lora"),
        ("diffusion_model.layers.0.attention.to_q.lora_A.weight", "ComfyUI"),
        ("double_blocks.0.processor.proj_lora1.up.weight", "a program not known here"),
        ("<my-cat>", "textual inversion"),
        ("model.layers.0.self_attn.q_proj.weight", ""),
        ("florals.up.weight", ""),
        ("adapter.norm.weight", ""),
    ],
)
def test_names_tell_the_program(name: str, program: str):
    """One name is enough; names of models tell nothing."""
    assert strange([name, "norm.weight"])[0] == program


@pytest.mark.parametrize("length", [640, 896, 1152])
def test_a_header_that_begins_like_a_pickle_is_a_header(length: int, tmp_path: Path):
    """Lengths whose bytes are those of a pickle's first opcode: 80 02, 80 03, 80 04."""
    head = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    (tmp_path / "x.bin").write_bytes(length.to_bytes(8, "little") + head + bytes(4))
    assert (tmp_path / "x.bin").read_bytes()[0] == 0x80
    assert detect(tmp_path / "x.bin") == "safetensors"


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt", "x.pth"])
@pytest.mark.parametrize(
    "data", [b"", b"{}", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x02", b"PK\x03\x04"]
)
@pytest.mark.parametrize("to", ["safetensors", "peft"])
def test_a_broken_weight_file_says_what_is_wrong_with_it(name: str, data: bytes, to: str, tmp_path: Path):
    """Not that it is of no known kind: code 3, 4 or 5, with its name."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(adaptkit.AdaptKitError, match=name) as e:
        adaptkit.convert(tmp_path / name, tmp_path / "out", to)
    assert e.value.code in (3, 4, 5)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "name", ["__0_0.distcp", "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"]
)
def test_one_piece_of_a_run_asks_for_its_folder(name: str, tmp_path: Path):
    """A shard alone is no checkpoint."""
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(adaptkit.AdaptKitError, match="is a piece of a checkpoint in shards.*give its folder"):
        detect(tmp_path / name)


def test_a_folder_of_loose_files_asks_for_one(tmp_path: Path):
    """Several files without an index, or files of several programs, are not chosen from."""
    for folder, others in (("two", ["b.safetensors"]), ("mixed", ["b.onnx_adapter"])):
        (tmp_path / folder).mkdir()
        for name in ("a.safetensors", *others):
            save_file({"w": np.ones(2, "f4")}, tmp_path / folder / name)
        with pytest.raises(adaptkit.AdaptKitError, match="give one of its files"):
            detect(tmp_path / folder)


def test_an_adapter_in_a_container_of_its_own_is_not_copied(tmp_path: Path):
    """GGUF has no tensors that safetensors could take as they are; the sentence says what can be done."""
    source = next(FIXTURES.glob("formats/gguf/lora-f32/*.gguf"))
    with pytest.raises(adaptkit.AdaptKitError, match=r"is an adapter \(gguf\).*choose an adapter's format"):
        adaptkit.convert(source, tmp_path / "x", "safetensors", from_="gguf")
    assert not list(tmp_path.iterdir())


def test_config_is_used_or_refused(tmp_path: Path):
    """--config stands for the settings beside an adapter; formats that have none of that name refuse it."""
    folder = FIXTURES / "adapters" / "llama" / "lora"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    with pytest.raises(adaptkit.AdaptKitError, match="adapter_config.json: not found.*--config"):
        adaptkit.convert(tmp_path / "in", tmp_path / "out", "peft")
    adaptkit.convert(tmp_path / "in", tmp_path / "out", "peft", config=folder)
    made, source = adaptkit.read(tmp_path / "out"), adaptkit.read(folder)
    assert {p: s.tuner for p, s in made.sites.items()} == {p: s.tuner for p, s in source.sites.items()}

    with pytest.raises(adaptkit.AdaptKitError, match="--config: is for adapters under PEFT's names"):
        adaptkit.convert(FIXTURES / "formats" / "mlx" / "lora", tmp_path / "y", "peft", config=folder)
    with pytest.raises(adaptkit.AdaptKitError, match="--config: holds no adapter_config.json"):
        adaptkit.convert(tmp_path / "in", tmp_path / "y", "peft", config=tmp_path)


@pytest.mark.parametrize("place", ["x.safetensors", "pytorch_lora_weights.safetensors", "x.pth"])
def test_an_empty_file_is_called_empty_by_every_reader(place: str, tmp_path: Path):
    """Not "no format recognises it": nothing would."""
    (tmp_path / place).touch()
    for path in (tmp_path / place, tmp_path) if place.endswith(".safetensors") else (tmp_path / place,):
        with pytest.raises(Corrupt, match="0 bytes|file is empty"):
            adaptkit.inspect(path)
