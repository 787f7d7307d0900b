"""Adapters from one format to another: what was read is what is written, or the report says what became of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.running import COMMAND, tree
from models import inputs_of
from places import FIXTURES, adapter_folders
from safetensors.torch import load_file, save_file
from test_merge_against_peft import base_of

import adaptkit
from adaptkit.cli.app import run
from adaptkit.store.arrays import load
from adaptkit.verbs.detect import detect

LORA = FIXTURES / "adapters" / "llama" / "lora"
LLAMA = FIXTURES / "models" / "llama"
pytestmark = pytest.mark.filterwarnings("ignore::adaptkit.AdaptKitWarning", "ignore::UserWarning")
KEPT_APART = {  # what PEFT's format holds, and is not written
    "kasa": "not kasa",
    "bdlora": "not bdlora",
    "alora": "alora_invocation_tokens",
    "conv-grouped": "2 groups",
}
FOLDERS = [pytest.param(p, id=f"{p.parent.name}-{p.name}") for p in adapter_folders()]


def equal(a: adaptkit.Adapter, b: adaptkit.Adapter) -> bool:
    """Same places, tuners and numbers."""
    places = a.sites.keys() == b.sites.keys() and a.whole.keys() == b.whole.keys()
    return (
        places
        and all(
            s.tuner == b.sites[p].tuner and all(_same(v, b.sites[p].params[k]) for k, v in s.params.items())
            for p, s in a.sites.items()
        )
        and all(_same(v, b.whole[n]) for n, v in a.whole.items())
    )


def _same(a, b) -> bool:
    return np.array_equal(load(a).ravel(), load(b).ravel()) and load(a).dtype == load(b).dtype


@pytest.mark.parametrize("folder", FOLDERS)
def test_peft_to_peft_loses_nothing(folder: Path, tmp_path: Path):
    """Every adapter that real PEFT made: read, written and read again it is the same, or refused with the reason."""
    reason = next((why for name, why in KEPT_APART.items() if folder.name == name), None)
    if reason:
        with pytest.raises(adaptkit.AdaptKitError, match=reason):
            adaptkit.convert(folder, tmp_path / "out", "peft")
        assert not list(tmp_path.iterdir())
        return

    done = adaptkit.convert(folder, tmp_path / "out", "peft")

    source, made = adaptkit.read(folder), adaptkit.read(tmp_path / "out")
    assert equal(source, made)
    assert done.sites == len(source.sites)
    assert done.source_format == done.target == "peft"


@pytest.mark.peft
@pytest.mark.slow
@pytest.mark.parametrize("folder", [p for p in FOLDERS if p.values[0].parent.name in ("llama", "gpt2", "mixtral")])
def test_real_peft_computes_the_same_with_what_was_written(folder: Path, tmp_path: Path):
    """PEFT loads the converted adapter and gives what it gave with the original, to the bit where it is stored so."""
    if folder.name in KEPT_APART:
        pytest.skip("not written")
    adaptkit.convert(folder, tmp_path / "out", "peft")

    expected, got = (peft_outputs(folder, adapter) for adapter in (folder, tmp_path / "out"))

    np.testing.assert_allclose(got, expected, atol=1e-6 * max(1.0, np.abs(expected).max()))


def peft_outputs(folder: Path, adapter: Path) -> np.ndarray:
    """Logits of real PEFT for an adapter on the model that `folder` was made for."""
    from models import loaded
    from peft import PeftModel

    expect = json.loads((folder / "expect.json").read_text())
    model = loaded(base_of(folder), folder.parent.name)
    if folder.name == "grown":
        model.resize_token_embeddings(grown_size(folder))
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return model(**inputs_of(expect["inputs"])).logits.float().numpy()


def grown_size(folder: Path) -> int:
    sizes = [t.shape[0] for n, t in load_file(folder / "adapter_model.safetensors").items() if "embed_tokens" in n]
    return max(sizes)


@pytest.mark.peft
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AdaLoraConfig", "TrainableTokensConfig"])
def test_kinds_that_peft_has_and_others_lack(kind: str, tmp_path: Path):
    """AdaLoRA becomes the LoRA that does the same, trained tokens stay what they are: PEFT says the same with both."""
    import peft
    from models import loaded

    settings = {
        "AdaLoraConfig": {"init_r": 4, "target_r": 2, "lora_alpha": 8, "total_step": 10, "target_modules": ["q_proj"]},
        "TrainableTokensConfig": {"token_indices": [5, 3], "target_modules": ["embed_tokens"]},
    }[kind]
    torch.manual_seed(2)
    model = peft.get_peft_model(loaded(LLAMA, "llama"), getattr(peft, kind)(**settings)).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.3 if p.requires_grad else 0
    model.save_pretrained(tmp_path / "in")
    ids = {"input_ids": torch.tensor([[1, 5, 3, 8]])}

    adaptkit.convert(tmp_path / "in", tmp_path / "out", "peft")
    again = peft.PeftModel.from_pretrained(loaded(LLAMA, "llama"), tmp_path / "out").eval()

    with torch.no_grad():
        plain, expected, got = (m(**ids).logits for m in (loaded(LLAMA, "llama"), model, again))
    assert not torch.allclose(plain, expected, atol=1e-2)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_numbers_keep_their_dtype_or_get_the_one_asked_for(tmp_path: Path):
    """bfloat16 stays bfloat16; --dtype rounds once, as torch does."""
    adaptkit.convert(FIXTURES / "adapters" / "llama" / "bf16", tmp_path / "kept", "peft")
    adaptkit.convert(LORA, tmp_path / "half", "peft", dtype="float16")

    kept = load_file(tmp_path / "kept" / "adapter_model.safetensors")
    half, source = (load_file(p / "adapter_model.safetensors") for p in (tmp_path / "half", LORA))
    assert {t.dtype for t in kept.values()} == {torch.bfloat16}
    assert half.keys() == source.keys()
    assert all(torch.equal(half[n], t.half()) for n, t in source.items())


def test_an_adapters_overflow_is_refused(tmp_path: Path):
    """A factor that float16 cannot hold ends the conversion."""
    tensors = load_file(LORA / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = 1e6
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "adapter_model.safetensors")
    (tmp_path / "in" / "adapter_config.json").write_text((LORA / "adapter_config.json").read_text())

    with pytest.raises(adaptkit.AdaptKitError, match="1 values overflow F16"):
        adaptkit.convert(tmp_path / "in", tmp_path / "out", "peft", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_the_container_of_an_adapter_changes_alone(tmp_path: Path):
    """adapter_model.bin becomes adapter_model.safetensors, with the settings beside it, and back."""
    source = FIXTURES / "adapters" / "llama" / "bin"

    adaptkit.convert(source, tmp_path / "st", "safetensors")
    adaptkit.convert(tmp_path / "st", tmp_path / "pt", "pytorch")

    assert {p.name for p in (tmp_path / "st").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    assert (tmp_path / "pt" / "adapter_model.bin").exists()
    assert equal(adaptkit.read(source), adaptkit.read(tmp_path / "st"))
    assert equal(adaptkit.read(source), adaptkit.read(tmp_path / "pt"))


def test_a_loose_file_and_its_settings_are_an_adapter(tmp_path: Path):
    """A file of any name, with --config for the scale; names as trainers write them, wrappers and all."""
    names = load_file(LORA / "adapter_model.safetensors")
    raw = {
        "_orig_mod."
        + n.replace("lora_A.weight", "lora_A.default.weight").replace("lora_B.weight", "lora_B.default.weight"): t
        for n, t in names.items()
    }
    save_file(raw, tmp_path / "weights.safetensors")

    with pytest.raises(adaptkit.AdaptKitError, match="no adapter_config.json lies beside it"):
        adaptkit.convert(tmp_path / "weights.safetensors", tmp_path / "out", "peft")
    adaptkit.convert(tmp_path / "weights.safetensors", tmp_path / "out", "peft", config=LORA / "adapter_config.json")

    assert equal(adaptkit.read(LORA), adaptkit.read(tmp_path / "out"))


def test_an_adapter_with_a_name_of_its_own_is_found_in_its_folder(tmp_path: Path):
    """PEFT saves adapters not called "default" one folder deeper."""
    (tmp_path / "saved").mkdir()
    adaptkit.convert(LORA, tmp_path / "saved" / "style", "peft")

    adaptkit.convert(tmp_path / "saved", tmp_path / "out", "peft")

    assert equal(adaptkit.read(LORA), adaptkit.read(tmp_path / "out"))


# what is it?


def test_everything_is_recognised_by_its_contents():
    """Models are containers, adapters are PEFT's, shards are what made them; files without endings count as well."""
    assert {detect(p) for p in (FIXTURES / "models").iterdir() if p.is_dir()} == {"safetensors"}
    assert {detect(p) for p in adapter_folders()} == {"peft"}
    assert detect(FIXTURES / "shards" / "fsdp_ws2") == "dcp"
    assert detect(FIXTURES / "shards" / "zero3_full_ws2") == "deepspeed"


def test_a_weight_file_is_recognised_under_any_name(tmp_path: Path):
    """The first bytes tell, not the ending."""
    save_file({"w": torch.ones(2)}, tmp_path / "a.bin")
    torch.save({"w": torch.ones(2)}, tmp_path / "b.safetensors")

    assert detect(tmp_path / "a.bin") == "safetensors"
    assert detect(tmp_path / "b.safetensors") == "pytorch"


def test_what_can_be_read_in_two_ways_asks_for_from(tmp_path: Path):
    """A folder with a model and an adapter: the sentence names both, --from decides."""
    folder = tmp_path / "both"
    folder.mkdir()
    for source in (LLAMA, LORA):
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())

    with pytest.raises(
        adaptkit.AdaptKitError, match="can be read as peft and as safetensors; choose with --from"
    ) as caught:
        adaptkit.convert(folder, tmp_path / "out", "peft")
    assert caught.value.code == 2
    assert adaptkit.convert(folder, tmp_path / "a", "peft", from_="peft").sites
    assert "model.safetensors" in adaptkit.convert(folder, tmp_path / "b", "safetensors", from_="safetensors").files


def test_an_adapter_beside_its_shards_is_the_adapter(tmp_path: Path):
    """A trainer's checkpoint folder holds both: the adapter is what is meant."""
    folder = tmp_path / "checkpoint-1"
    adaptkit.convert(LORA, folder, "peft")
    shutil.copytree(FIXTURES / "shards" / "zero3_full_ws2" / "global_step1", folder / "global_step1")
    (folder / "latest").write_text("global_step1")

    assert detect(folder) == "peft"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere", "--to", "peft"], "nowhere: not found"),
        ([str(LORA), "--to", "nothing"], "--to: 'nothing' is not one of "),
        ([str(LORA), "--to", "dcp"], "--to: 'dcp' is not one of "),
        ([str(LORA), "--to", "peft", "--from", "nothing"], "--from: 'nothing' is not one of "),
        ([str(LLAMA), "--to", "peft"], "this is a model, not an adapter; adaptkit extract makes an adapter of one"),
        ([str(LORA), "--to", "peft", "--max-shard-size", "5GB"], "--max-shard-size: is for whole checkpoints"),
        ([str(LLAMA), "--to", "pytorch", "--drop", "bias"], "--drop: is for adapters"),
        ([str(LORA), "--to", "peft", "--drop", "biases"], "--drop: biases is no kind of part"),
        ([str(LORA), "--to", "safetensors", "--for", "vllm"], "--to: vllm reads peft"),
        ([str(LORA), "--to", "peft", "--base", "nowhere"], "--base: not found"),
    ],
)
def test_wishes_that_make_no_sense_end_with_a_sentence(words: list[str], sentence: str, tmp_path: Path, capfd):
    """One line, exit code 2, nothing left behind."""
    code = run(["convert", *words, "-o", str(tmp_path / "out")])

    err = capfd.readouterr().err
    assert (code, len(err.splitlines())) == (2, 1), err
    assert sentence in err
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_told(tmp_path: Path):
    """Nothing to convert is a sentence, not a guess."""
    (tmp_path / "in").mkdir()

    with pytest.raises(adaptkit.AdaptKitError, match="is nothing that can be converted.*it is empty"):
        adaptkit.convert(tmp_path / "in", tmp_path / "out", "safetensors")


def test_output_is_replaced_in_one_step_or_not_at_all(tmp_path: Path):
    """--overwrite swaps; a failure leaves the old output as it was."""
    adaptkit.convert(LORA, tmp_path / "out", "peft")
    before = tree(tmp_path / "out")

    with pytest.raises(adaptkit.AdaptKitError, match="is not empty"):
        adaptkit.convert(LORA, tmp_path / "out", "peft")
    with pytest.raises(adaptkit.AdaptKitError, match="not kasa"):
        adaptkit.convert(FIXTURES / "adapters" / "llama" / "kasa", tmp_path / "out", "peft", overwrite=True)
    assert tree(tmp_path / "out") == before
    adaptkit.convert(FIXTURES / "adapters" / "llama" / "rslora", tmp_path / "out", "peft", overwrite=True)
    assert tree(tmp_path / "out") != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_command_prints_a_table_and_json(tmp_path: Path, capsys):
    """A short table for people; the whole result for programs, also without writing."""
    words = ["convert", str(FIXTURES / "adapters" / "llama" / "rslora"), "--to", "peft", "--for", "vllm"]

    assert run([*words, "-o", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert run([*words, "-o", str(tmp_path / "b"), "--json", "--dry-run"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert "rsLoRA" in said
    assert f"into {tmp_path / 'a'}" in said
    assert found["sites"] == len(adaptkit.read(tmp_path / "a").sites)
    assert not found["written"]
    assert {"what", "where", "text"} == found["notes"][0].keys()
    assert not (tmp_path / "b").exists()


def test_plugins_say_what_formats_do(capsys):
    """Reading, writing, and what a format cannot hold."""
    found = next(p for p in adaptkit.plugins() if (p.kind, p.name) == ("format", "peft"))

    assert found.can == ["read", "write"]
    assert found.cannot
    assert run(["plugins"]) == 0
    assert "read, write" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_adapter_conversion_leaves_nothing_that_looks_finished(tmp_path: Path):
    """SIGKILL before the weights get their name: no OUT, and the same command ends well."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "faults")}
    words = [*COMMAND, "convert", str(LORA), "-o", "out", "--to", "peft"]
    faults = {"FAULTS": "rename,SIGKILL,1,.safetensors.tmp"}

    killed = subprocess.run(words, cwd=tmp_path, env=env | faults, capture_output=True, timeout=60)

    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert equal(adaptkit.read(LORA), adaptkit.read(tmp_path / "out"))
