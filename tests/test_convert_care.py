"""Converting with care: no input is overwritten, rehearsals tell the truth, odd names and hostile files end in a sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from faults.running import tree
from format_kit import FORMATS, sample
from places import FIXTURES, SHARED
from plugin_door import FOLDERS, door, opened
from safetensors.numpy import load_file, save_file

import adaptkit
from adaptkit.cli.app import run
from adaptkit.verbs.detect import detect

LORA, LLAMA = FIXTURES / "adapters" / "llama" / "lora", FIXTURES / "models" / "llama"
KOHYA = sample("kohya", "sd1_tiny_fp16")
SAMPLES = SHARED / "samples"
TARGETS = ("peft", "kohya", "diffusers", "mlx", "gguf", "onnx_adapter", "safetensors", "pytorch")
SUFFIX = {"kohya": ".safetensors", "diffusers": ".safetensors", "gguf": ".gguf", "onnx_adapter": ".onnx_adapter"}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind", ["base", "config"])
def test_overwrite_never_replaces_what_is_read(kind: str, tmp_path: Path):
    """OUT may not be the base, nor the folder of the settings."""
    shutil.copytree(LLAMA if kind == "base" else LORA, tmp_path / "mine")
    before = tree(tmp_path)

    with pytest.raises(adaptkit.AdaptKitError, match="is also an input"):
        adaptkit.convert(LORA, tmp_path / "mine", "peft", overwrite=True, **{kind: tmp_path / "mine"})

    assert tree(tmp_path) == before


def test_overwrite_never_replaces_a_file_of_the_base(tmp_path: Path):
    """A format of one file is kept out of the files of the base, and is written beside its source."""
    shutil.copy(KOHYA, tmp_path / "x.safetensors")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"precious")

    for out, base in (("x.safetensors", None), ("base/model.safetensors", tmp_path / "base")):
        with pytest.raises(adaptkit.AdaptKitError, match="belongs to the input"):
            adaptkit.convert(tmp_path / "x.safetensors", tmp_path / out, "diffusers", base=base, overwrite=True)

    assert (tmp_path / "base" / "model.safetensors").read_bytes() == b"precious"
    adaptkit.convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "diffusers")
    assert adaptkit.read(tmp_path / "y.safetensors").meta["format"] == "diffusers"


KILLED = """
import os, sys
from adaptkit.verbs import convert
convert._swap = lambda *_: os._exit(9)
convert.convert(*sys.argv[1:4], overwrite=True)
"""


@pytest.mark.parametrize("to, name", [("peft", "out"), ("kohya", "out.safetensors")])
def test_a_run_that_dies_before_the_swap_is_no_hindrance(to: str, name: str, tmp_path: Path):
    """The old output stays; the same command again replaces it, and nothing is left beside it."""
    source, out = (LORA, tmp_path / name) if to == "peft" else (KOHYA, tmp_path / name)
    adaptkit.convert(source, out, to)
    old = tree(tmp_path)
    died = subprocess.run([sys.executable, "-c", KILLED, str(source), str(out), to])
    assert died.returncode == 9 and len(list(tmp_path.iterdir())) == 2
    assert {k: v for k, v in tree(tmp_path).items() if "adaptkit-new" not in k} == old

    adaptkit.convert(source, out, to, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_the_root_is_no_output(capfd: pytest.CaptureFixture[str]):
    """A sentence, not a bug."""
    assert run(["convert", str(LORA), "-o", "/", "--to", "peft"]) == 2
    assert "root of the file system" in capfd.readouterr().err


def test_a_dry_run_refuses_what_the_run_would_refuse(tmp_path: Path):
    """It notes what would be padded and folded, counts the bytes, and leaves nothing."""
    with pytest.raises(adaptkit.AdaptKitError, match="mlx cannot hold IA3"):
        adaptkit.convert(FIXTURES / "adapters" / "llama" / "ia3", tmp_path / "x", "mlx", dry_run=True)
    patterns = FIXTURES / "adapters" / "llama" / "rank-alpha-patterns"
    said = adaptkit.convert(patterns, tmp_path / "x", "mlx", dry_run=True)
    assert not list(tmp_path.iterdir())
    done = adaptkit.convert(patterns, tmp_path / "x", "mlx")
    assert {n.what for n in said.notes} >= {"padded"}
    assert said.notes == done.notes
    assert not said.written and said.bytes > 0


@pytest.mark.parametrize(
    "name", ["ünï/çode", "with space", "日本語", "a\nb", "\x1b[31m", "../up", "x" * 5000, "\u202eevil"]
)
def test_odd_module_names_are_kept_or_refused_in_one_line(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Whatever a module is called: what is written reads back the same, and no message breaks its line."""
    (tmp_path / "in").mkdir()
    tensors = {f"base_model.model.{name}.lora_{k}.weight": np.ones(s, "f4") for k, s in (("A", (2, 3)), ("B", (3, 2)))}
    save_file(tensors, tmp_path / "in" / "adapter_model.safetensors")
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [name]}))  # fmt: skip
    for to in ("peft", "mlx", "kohya", "diffusers"):
        out = tmp_path / f"{to}{SUFFIX.get(to, '')}"
        code = run(["convert", str(tmp_path / "in"), "-o", str(out), "--to", to, "--quiet"])
        said = capfd.readouterr().err
        assert code in (0, 3, 4) and len(said.splitlines()) == (code != 0), said
        assert "\x1b" not in said and "\u202e" not in said
        assert out.exists() == (code == 0)
        if code == 0:
            assert list(adaptkit.read(out).sites) == list(adaptkit.read(tmp_path / "in").sites)
    assert {p.name.partition(".")[0] for p in tmp_path.iterdir()} <= {"in", "peft", "mlx"}


@pytest.mark.parametrize("source", [KOHYA, sample("diffusers", "sd_pipeline")], ids=["kohya", "diffusers"])
def test_a_file_cut_anywhere_is_a_sentence(source: Path, tmp_path: Path):
    """Every length: recognised or not, it never converts and never leaves anything."""
    data = source.read_bytes()
    for size in [0, 1, 7, 8, 9, 20, *range(100, len(data), len(data) // 12), len(data) - 1]:
        (tmp_path / "x.safetensors").write_bytes(data[:size])
        with pytest.raises(adaptkit.AdaptKitError, match=r"x\.safetensors"):
            adaptkit.convert(tmp_path / "x.safetensors", tmp_path / "out", "peft")
        assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_any_dtype_goes_through_kohya_and_back(dtype: str, tmp_path: Path):
    """bfloat16 and float16 factors keep their bits where nothing is folded."""
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else "f2")
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    rng = np.random.default_rng(0)
    parts = {"lora_down.weight": (2, 4), "lora_up.weight": (4, 2)}
    tensors = {f"{name}.{k}": rng.standard_normal(s).astype(kind) for k, s in parts.items()}
    save_file(tensors, tmp_path / "a.safetensors")

    adaptkit.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    adaptkit.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", base=_sd1(tmp_path / "base"))

    found = load_file(tmp_path / "c.safetensors")
    assert {n: found[n].tobytes() for n in tensors} == {n: t.tobytes() for n, t in tensors.items()}


def _sd1(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return folder


@pytest.mark.parametrize("case", ["dcp", "deepspeed"])
def test_shards_report_how_far_they_are(case: str, tmp_path: Path):
    """Bytes go up to the total, while DCP's and DeepSpeed's shards are put together."""
    source = next(p for p in sorted((FIXTURES / "shards").iterdir()) if p.is_dir() and detect(p) == case)
    seen: list[tuple[int, int]] = []
    done = adaptkit.convert(source, tmp_path / "out", "safetensors", progress=lambda n, of: seen.append((n, of)))
    assert seen == sorted(seen)
    assert seen[-1] == (done.bytes, done.bytes)


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the collection of genuine files is not here")
@pytest.mark.parametrize("kind", sorted(p.name for p in SAMPLES.iterdir() if p.is_dir()) if SAMPLES.is_dir() else [])
def test_every_genuine_file_to_every_target_ends_well(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
):
    """Through the command: JSON and an output, or one line, an exit code that is not ours, and nothing left behind."""
    base = ["--base", str(FORMATS / "bases" / "llama")] if kind in ("peft", "mlx", "gguf", "onnx_adapter") else []
    with opened(door(tmp_path_factory.mktemp("site"), FOLDERS)):
        for source in [p for p in sorted((SAMPLES / kind).glob("*")) if p.suffix not in (".md", ".txt")]:
            for to in TARGETS:
                out = tmp_path / f"x{SUFFIX.get(to, '')}"
                more = base if to in TARGETS[:6] else []
                code = run(["convert", str(source), "-o", str(out), "--to", to, "--json", *more])
                said, err = capfd.readouterr()
                assert code in (0, 2, 3, 4, 5), (source, to, err)
                if code == 0:
                    assert json.loads(said)["target"] == to
                    shutil.rmtree(out) if out.is_dir() else out.unlink()
                else:
                    assert said == "" and len(err.splitlines()) == 1, (source, to, err)
                assert not list(tmp_path.iterdir()), (source, to)


@pytest.mark.parametrize("rehearsed", [False, True])
def test_what_is_left_out_is_not_counted(rehearsed: bool, tmp_path: Path):
    """The report says how many modules and tensors were written, not how many were there."""
    saved = FORMATS / "peft" / "lora_modules_to_save"
    done = adaptkit.convert(saved, tmp_path / "x", "mlx", drop=["whole"], dry_run=rehearsed)
    assert (done.sites, done.tensors) == (2, 4)

    dora = FORMATS / "peft" / "lora_dora"
    done = adaptkit.convert(dora, tmp_path / "x.onnx_adapter", "onnx_adapter", drop=["dora"], dry_run=rehearsed)
    assert done.tensors == 2 * done.sites

    embedding = FORMATS / "peft" / "lora_embedding_noemb"
    whole = adaptkit.inspect(embedding)
    done = adaptkit.convert(
        embedding, tmp_path / "y.onnx_adapter", "onnx_adapter", drop=["embedding"], dry_run=rehearsed
    )
    assert done.sites == sum(n for leaf, n in whole.targets.items() if leaf != "embed_tokens") < whole.sites
    assert done.tensors == 2 * done.sites


def test_a_file_in_a_folder_that_is_not_there_yet(tmp_path: Path):
    """Formats of one file make their folders, as those of a folder do, and as the rehearsal promises."""
    adaptkit.convert(KOHYA, tmp_path / "a" / "b" / "x.safetensors", "diffusers", dry_run=True)
    assert not (tmp_path / "a").exists()

    adaptkit.convert(KOHYA, tmp_path / "a" / "b" / "x.safetensors", "diffusers")
    assert (tmp_path / "a" / "b" / "x.safetensors").is_file()


def test_a_link_to_nowhere_is_something(tmp_path: Path):
    """The rehearsal refuses what the run would refuse; with overwrite the link is replaced."""
    out = tmp_path / "x.safetensors"
    out.symlink_to(tmp_path / "nowhere")
    for rehearsed in (True, False):
        with pytest.raises(adaptkit.AdaptKitError, match="exists"):
            adaptkit.convert(KOHYA, out, "diffusers", dry_run=rehearsed)

    adaptkit.convert(KOHYA, out, "diffusers", overwrite=True)
    assert out.is_file() and not out.is_symlink() and not (tmp_path / "nowhere").exists()


def test_inspect_reads_what_needs_the_base(tmp_path: Path):
    """A GGUF adapter of Llama is in the order of its model's heads; modules with a number are told with their name."""
    pytest.importorskip("gguf")
    with opened(door(tmp_path, FOLDERS)):
        found = adaptkit.inspect(sample("gguf", "lora-bf16"), base=FORMATS / "bases" / "llama")
        assert (found.sites, found.tensors, found.dtypes) == (14, 28, {"BF16": 28})
        with pytest.raises(adaptkit.AdaptKitError, match="--base: not found"):
            adaptkit.inspect(sample("gguf", "lora-bf16"), base=tmp_path / "nothing")

    targets = adaptkit.inspect(KOHYA).targets
    assert targets["to_out.0"] == targets["to_q"] and targets["net.2"] == targets["proj"]
    assert not [name for name in targets if name.isdecimal()]


def test_inspect_counts_every_number_once():
    """Factors that modules share, and norms that were reshaped when they were read: as many numbers as in the file."""
    for kind, case in (("kohya", "flux_tiny_fp32"), ("lycoris", "locon_dora"), ("diffusers", "sdxl_dora")):
        file = sample(kind, case)
        numbers = sum(v.size for n, v in load_file(file).items() if not n.endswith(".alpha"))
        assert adaptkit.inspect(file).parameters == numbers
