"""Ids and paths, and which files of a repository matter: decided from names alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from adaptkit.errors import Corrupt, Mismatch, Usage
from adaptkit.store.hub import Ref, called, origin, place, ref_of
from adaptkit.store.hub.choose import chosen

IDS = {
    "user/name": Ref("user/name"),
    "user/name@main": Ref("user/name", "main"),
    "user/name@refs/pr/12": Ref("user/name", "refs/pr/12"),
    "user/name/sub/folder@v1.0": Ref("user/name", "v1.0", "sub/folder"),
    "user/name/lora.safetensors": Ref("user/name", None, "lora.safetensors"),
    "user/Name-1.5_x": Ref("user/Name-1.5_x"),
    "hf://gpt2": Ref("gpt2"),
    "hf://user/name@" + "a" * 40: Ref("user/name", "a" * 40),
}
PATHS = [
    "name", "./user/name", "../user/name", "/user/name", "~/name", "user/name/", "user//name", "C:\\user\\name", "C:/user/name",
    "user/name.safetensors", "user/model.bin", "user/..", "user/na me", "user/name@", "user/name@..", "user/name@-x", "", "user/.git",
    "user/na--me", "us\ner/name", "hf://", "hf:///etc/passwd", "user/ñame", "user/" + "x" * 97,
]  # fmt: skip


@pytest.mark.parametrize("text", IDS)
def test_ids(text: str, tmp_path, monkeypatch):
    """What an id says."""
    monkeypatch.chdir(tmp_path)

    assert ref_of(text) == IDS[text]


@pytest.mark.parametrize("text", PATHS)
def test_paths_are_no_ids(text: str, tmp_path, monkeypatch):
    """What looks like a path never goes to the Hub."""
    monkeypatch.chdir(tmp_path)

    assert ref_of(text) is None


def test_settings_may_name_a_base_by_one_word():
    """Adapters of the first days say "gpt2"."""
    assert ref_of("gpt2", bare=True) == Ref("gpt2")
    assert ref_of("/models/gpt2", bare=True) is None


@pytest.mark.parametrize("revision", ["../main", "/etc", "-x", "a b", ""])
def test_revisions_given_apart_are_checked_as_well(revision: str, tmp_path):
    """PEFT's revision=, which becomes the name of a file in the cache."""
    with pytest.raises(Usage, match="is no revision"):
        place("user/name", "adapter", revision=revision, cache_dir=tmp_path)


def test_where_a_folder_came_from(tmp_path):
    """From the layout of the cache, or from what `pull -o` wrote; anything else came from nowhere."""
    sha = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--user--name" / "snapshots" / sha / "style"
    cached.mkdir(parents=True)
    pulled, other = tmp_path / "pulled", tmp_path / "other"
    for folder, said in ((pulled, {"id": "user/x", "revision": sha}), (other, {"id": "../x", "revision": sha})):
        folder.mkdir()
        (folder / "adaptkit.json").write_text(json.dumps({"pulled": said}))

    assert origin(cached) == Ref("user/name", sha, "style")
    assert origin(pulled) == Ref("user/x", sha)
    assert origin(other) is None
    assert [called(p) for p in (cached, pulled, other)] == ["user/name/style", "user/x", "other"]


def index(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"t{k}": n for k, n in enumerate(names)}}).encode()


BASIC = ("config.json", "tokenizer.json", "README.md", ".gitattributes", "LICENSE")
KEPT = {"config.json", "tokenizer.json", "LICENSE"}
REPOSITORIES = {  # files, kind -> weights that matter
    "safetensors before PyTorch": (("model.safetensors", "pytorch_model.bin", "tf_model.h5"), "model", {"model.safetensors"}),
    "PyTorch when there is nothing else": (("pytorch_model.bin", "model.gguf", "rust_model.ot"), "model", {"pytorch_model.bin"}),
    "shards that the index names": (
        ("model.safetensors.index.json", "a.safetensors", "b.safetensors", "c.safetensors"), "model",
        {"model.safetensors.index.json", "a.safetensors", "b.safetensors"},
    ),
    "one file of another name": (("weights.safetensors", "optimizer.pt"), "model", {"weights.safetensors"}),
    "original weights stay": (("model.safetensors", "original/consolidated.00.pth"), "model", {"model.safetensors"}),
    "an adapter beside a model": (
        ("model.safetensors", "adapter_config.json", "adapter_model.bin"), "adapter", {"adapter_config.json", "adapter_model.bin"},
    ),
    "both, when both are wanted": (
        ("model.safetensors", "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"), "any",
        {"model.safetensors", "adapter_config.json", "adapter_model.safetensors"},
    ),
    "the modules of sentence-transformers": (
        ("model.safetensors", "modules.json", "2_Dense/model.safetensors", "2_Dense/config.json", "x/model.safetensors"), "model",
        {"model.safetensors", "modules.json", "2_Dense/model.safetensors", "2_Dense/config.json"},
    ),
}  # fmt: skip
READ = {
    "model.safetensors.index.json": index("a.safetensors", "b.safetensors"),
    "modules.json": b'[{"path": ""}, {"path": "2_Dense"}]',
}


@pytest.mark.parametrize("case", REPOSITORIES)
def test_what_matters(case: str):
    """One kind of weights, and what goes with them."""
    files, kind, wanted = REPOSITORIES[case]

    assert set(chosen(dict.fromkeys((*BASIC, *files), 1), kind, READ.__getitem__)) == KEPT | wanted


def test_a_model_is_no_adapter():
    """Said before anything is fetched."""
    with pytest.raises(Mismatch, match="this is a model"):
        chosen(dict.fromkeys((*BASIC, "model.safetensors"), 1), "adapter", READ.__getitem__)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"weight_map": 1}', index("absent"), index("../x"), b"[" * 9999])
def test_a_broken_index(raw: bytes):
    """Refused, whatever it holds."""
    with pytest.raises(Corrupt, match=r"model\.safetensors\.index\.json"):
        chosen({"config.json": 1, "model.safetensors.index.json": 1}, "model", lambda n: raw)


def test_large_files_beside_the_weights_stay():
    """A training log of gigabytes is no tokenizer."""
    found = chosen({"config.json": 1, "log.txt": 10**10, "model.safetensors": 1}, "model", READ.__getitem__)

    assert found == ["config.json", "model.safetensors"]


def test_ids_need_no_client():
    """Looking at a path does not import huggingface_hub."""
    code = "import sys; from adaptkit.store.hub import place; place('here'); print('huggingface_hub' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
