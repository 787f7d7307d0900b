"""Table B: the index and the shards it names."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np

from . import sound
from .case import INDEX, WEIGHTS, Room, case
from .payload import payload_bin

HEAD = "lm_head.weight"  # lies in the last shard


def index_case(name: str, text: str, must: str):
    return case(name, text, must, layout="sharded")


@index_case("B01_absent_shard", "index names a shard that is not there", "corrupt")
def absent_shard(room: Room) -> None:
    room.change_index(**{HEAD: "model-00009-of-00009.safetensors"})


@index_case("B02_key_not_in_shard", "index promises a tensor that the shard lacks", "corrupt")
def key_not_in_shard(room: Room) -> None:
    room.change_index(**{"model.layers.9.mlp.up_proj.weight": sound.shard_name(3)})


@index_case("B03_unlisted_tensor", "a shard has a tensor the index does not list", "warn")
def unlisted_tensor(room: Room) -> None:
    part = sound.in_shards(sound.base())[sound.shard_name(3)]
    room.shard(3).write_bytes(sound.packed(part | {"model.extra.weight": np.ones(4, np.float32)}))


@index_case("B04_tensor_in_two_shards", "one tensor in two shards with different values", "corrupt")
def tensor_in_two_shards(room: Room) -> None:
    part = sound.in_shards(sound.base())[sound.shard_name(1)]
    room.shard(1).write_bytes(sound.packed(part | {HEAD: np.ones_like(sound.base()[HEAD])}))


@index_case("B05_dotdot", "weight_map path ../outside.safetensors (file exists and is sound)", "unsafe")
def dotdot(room: Room) -> None:
    _move_head(room, room.root / "outside.safetensors", "../outside.safetensors")


@index_case("B06_absolute", "weight_map path is absolute (file exists and is sound)", "unsafe")
def absolute(room: Room) -> None:
    _move_head(room, room.root / "outside.safetensors", str(room.root / "outside.safetensors"))


@index_case("B06b_absolute_inside", "weight_map path is absolute, to a file of the model folder", "unsafe")
def absolute_inside(room: Room) -> None:
    _move_head(room, room.base / "inside.safetensors", str(room.base / "inside.safetensors"))


@index_case("B07_symlinked_dir", "shard reached through a symlinked directory that leaves the model folder", "unsafe")
def symlinked_dir(room: Room) -> None:
    (room.root / "elsewhere").mkdir()
    (room.base / "sub").symlink_to("../elsewhere")
    _move_head(room, room.root / "elsewhere" / "head.safetensors", "sub/head.safetensors")


@index_case("B07b_symlinked_file", "shard is a symlink to a file outside the model folder", "unsafe")
def symlinked_file(room: Room) -> None:
    (room.base / "head.safetensors").symlink_to("../elsewhere.safetensors")
    _move_head(room, room.root / "elsewhere.safetensors", "head.safetensors")


def _move_head(room: Room, file: Path, named: str) -> None:
    """Take lm_head out of shard 3, into `file`, which the index calls `named`."""
    part = sound.in_shards(sound.base())[sound.shard_name(3)]
    file.write_bytes(sound.packed({HEAD: part.pop(HEAD)}))
    room.shard(3).write_bytes(sound.packed(part))
    room.change_index(**{HEAD: named})


@index_case("B08_symlink_loop", "shard is a symlink loop", "corrupt")
def symlink_loop(room: Room) -> None:
    room.shard(2).unlink()
    room.shard(2).symlink_to(room.shard(2).name)


@index_case("B09_index_not_json", "index is not JSON", "corrupt")
def index_not_json(room: Room) -> None:
    (room.base / INDEX).write_text('{"weight_map": {')


@index_case("B10_no_weight_map", "index without weight_map", "corrupt")
def no_weight_map(room: Room) -> None:
    room.write_index({"metadata": {"total_size": 1}})


@index_case("B11a_weight_map_list", "weight_map is a list", "corrupt")
def weight_map_list(room: Room) -> None:
    room.write_index({"metadata": {}, "weight_map": [sound.shard_name(1)]})


@index_case("B11b_weight_map_null_value", "weight_map value is null", "corrupt")
def weight_map_null_value(room: Room) -> None:
    room.change_index(**{HEAD: None})


@index_case("B11c_weight_map_empty", "weight_map is empty", "corrupt")
def weight_map_empty(room: Room) -> None:
    room.write_index({"weight_map": {}})


@index_case("B11d_index_is_list", "the index is a list", "corrupt")
def index_is_list(room: Room) -> None:
    room.write_index([1, 2])


@index_case("B12_total_size_wrong", "metadata.total_size is wrong", "warn")
def total_size_wrong(room: Room) -> None:
    room.write_index(sound.index_of(sound.in_shards(sound.base())) | {"metadata": {"total_size": 12345}})


@index_case("B13_single_and_index_disagree", "model.safetensors and an index with other values side by side", "corrupt")
def single_and_index_disagree(room: Room) -> None:
    other = sound.base()
    other[f"{sound.Q0}.weight"] += 1
    (room.base / WEIGHTS).write_bytes(sound.packed(other))


@index_case("B14_stale_shard", "left-over shard of an older run, not in the index", "warn")
def stale_shard(room: Room) -> None:
    stale = {"model.norm.weight": np.ones(64, np.float32)}
    (room.base / sound.shard_name(4, of=4)).write_bytes(sound.packed(stale))


@index_case("B15_one_shard_truncated", "shard 2 of 3 cut in the middle: found before anything is written", "corrupt")
def one_shard_truncated(room: Room) -> None:
    data = room.shard(2).read_bytes()
    room.shard(2).write_bytes(data[: len(data) // 2])


@index_case("B16_index_duplicate_key", "one name twice in weight_map, different shards", "corrupt")
def index_duplicate_key(room: Room) -> None:
    text = (room.base / INDEX).read_text()
    again = json.dumps(HEAD) + ": " + json.dumps(sound.shard_name(1))
    (room.base / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {' + again + ", ", 1))


@index_case("B17_index_to_pickle", "safetensors index points at a .bin with a payload", "unsafe")
def index_to_pickle(room: Room) -> None:
    (room.base / "evil.bin").write_bytes(payload_bin(room.marker))
    room.change_index(**{HEAD: "evil.bin"})


@index_case("B18_backslash", "weight_map path with backslashes", "unsafe")
def backslash(room: Room) -> None:
    room.change_index(**{HEAD: "..\\..\\x.safetensors"})


@index_case("B20_url", "weight_map value is a URL", "unsafe")
def url(room: Room) -> None:
    room.change_index(**{HEAD: "http://127.0.0.1:9/model.safetensors"})


@index_case("B21_nul_in_path", "NUL byte in a weight_map path", "unsafe")
def nul_in_path(room: Room) -> None:
    room.change_index(**{HEAD: "a\0b.safetensors"})


@index_case("B22_hf_cache_symlinks", "snapshot of symlinks into ../../blobs as huggingface_hub lays it out", "ok")
def hf_cache_symlinks(room: Room) -> None:
    snapshot = room.root / "hub" / "models--tiny--llama" / "snapshots" / ("0" * 40)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(room.base.iterdir())):
        shutil.move(file, blobs / f"{number:064x}")
        os.symlink(f"../../blobs/{number:064x}", snapshot / file.name)
    room.base.rmdir()
    room.base = snapshot


@case("B23_case_collision", "two tensors whose names differ in case only (valid)", "warn")
def case_collision(room: Room) -> None:
    room.write_model(sound.base() | {"model.NORM.weight": np.ones(64, np.float32)})


@index_case("B24_dot_segments", "weight_map path ./model-... (harmless but not canonical)", "ok")
def dot_segments(room: Room) -> None:
    room.change_index(**{HEAD: "./" + sound.shard_name(3)})
