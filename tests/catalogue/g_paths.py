"""Table G: the output and the paths of the command."""

from __future__ import annotations

import os
import zlib

from . import sound
from .case import WEIGHTS, Room, case

ODD_NAME = "o u\nt '\"\u00e9\U0001f980"


@case("G00_sound_single", "sound model in one file, sound adapter (control)", "ok")
def sound_single(room: Room) -> None:
    """Nothing is spoilt."""


@case("G00_sound_sharded", "sound model in three shards, sound adapter (control)", "ok", "sharded")
def sound_sharded(room: Room) -> None:
    """Nothing is spoilt."""


@case("G01_output_is_input", "output folder = model folder", "usage")
def output_is_input(room: Room) -> None:
    room.out = room.base


@case("G01b_output_is_input_overwrite", "output folder = model folder, with --overwrite", "usage")
def output_is_input_overwrite(room: Room) -> None:
    room.out, room.options = room.base, ["--overwrite"]


@case("G01c_output_is_adapter_overwrite", "output folder = adapter folder, with --overwrite", "usage")
def output_is_adapter_overwrite(room: Room) -> None:
    room.out, room.options = room.adapter, ["--overwrite"]


@case("G02_output_inside_input", "output folder inside the model folder", "usage")
def output_inside_input(room: Room) -> None:
    room.out = room.base / "merged"


@case("G02b_input_inside_output", "model folder inside the output folder, with --overwrite", "usage")
def input_inside_output(room: Room) -> None:
    old = room.base
    room.out, room.base, room.options = room.root / "out", room.root / "out" / "base", ["--overwrite"]
    room.out.mkdir()
    old.rename(room.base)


@case("G03_output_exists", "output exists and has files; no --overwrite", "usage")
def output_exists(room: Room) -> None:
    room.out.mkdir()
    (room.out / "precious.txt").write_text("mine")


@case("G03b_output_exists_overwrite", "output exists and has files; with --overwrite", "ok")
def output_exists_overwrite(room: Room) -> None:
    room.out.mkdir()
    (room.out / "model.safetensors").write_bytes(sound.packed(sound.base()))
    room.options = ["--overwrite"]


@case("G04_output_is_file", "output path is a file", "usage")
def output_is_file(room: Room) -> None:
    room.out.write_text("mine")


@case("G06_parent_missing", "parent of the output does not exist: created", "ok")
def parent_missing(room: Room) -> None:
    room.out, room.new = room.root / "new" / "deep" / "out", ["new"]


@case("G07_output_symlink_to_input", "output is a symlink to the model folder", "usage")
def output_symlink_to_input(room: Room) -> None:
    room.out.symlink_to("base")


@case("G07b_output_symlink_to_input_overwrite", "output is a symlink to the model folder, with --overwrite", "usage")
def output_symlink_overwrite(room: Room) -> None:
    room.out.symlink_to("base")
    room.options = ["--overwrite"]


@case("G08_odd_output_name", "output name with space, newline, quotes, emoji", "ok")
def odd_output_name(room: Room) -> None:
    room.out, room.new = room.root / ODD_NAME, [ODD_NAME]


@case("G08b_name_too_long", "output name of 300 bytes", "usage")
def name_too_long(room: Room) -> None:
    room.out = room.root / ("o" * 300)


@case("G09_dangling_symlink", "output is a dangling symlink", "usage")
def dangling_symlink(room: Room) -> None:
    room.out.symlink_to("nowhere")


@case("G10_foreign_partial", "left-over partial folder of another job", "usage")
def foreign_partial(room: Room) -> None:
    room.partial.mkdir()
    (room.partial / "notes.txt").write_text("not made by a merge")


@case("G10b_partial_of_another_plan", "left-over partial folder of another merge", "usage")
def partial_of_another_plan(room: Room) -> None:
    plan = b'{"plan":"another"}'
    _left_over(room, b"%08x %s\n" % (zlib.crc32(plan), plan))


@case("G11_journal_garbage", "left-over partial folder with a torn journal", "warn")
def journal_garbage(room: Room) -> None:
    _left_over(room, b'0badc0de {"plan": "tor')


@case("G11b_journal_binary", "left-over partial folder whose journal is not text", "warn")
def journal_binary(room: Room) -> None:
    _left_over(room, bytes(range(256)) * 16)


def _left_over(room: Room, journal: bytes) -> None:
    """What a killed run leaves: a lock that nobody holds, a journal, half a shard."""
    room.partial.mkdir()
    (room.partial / ".lock").write_text("999999999 elsewhere\n")
    (room.partial / ".adaptkit.journal").write_bytes(journal)
    (room.partial / f".{WEIGHTS}.tmp").write_bytes(b"half")
    room.new = ["out", "out.partial"]


@case("G13_model_missing", "model path does not exist", "usage")
def model_missing(room: Room) -> None:
    room.base = room.root / "nope"


@case("G14_adapter_missing", "adapter path does not exist (must not be tried on the hub as a repo id)", "usage")
def adapter_missing(room: Room) -> None:
    room.adapter = "nope"


@case("G14b_adapter_missing_absolute", "absolute adapter path does not exist", "usage")
def adapter_missing_absolute(room: Room) -> None:
    room.adapter = room.root / "nope"


@case("G15_hardlinked_input", "output shard would replace a file hard-linked to the input: input must survive", "ok")
def hardlinked_input(room: Room) -> None:
    room.out.mkdir()
    os.link(room.base / WEIGHTS, room.out / WEIGHTS)
    room.options = ["--overwrite"]


@case("G17_unknown_option", "an option that does not exist", "usage")
def unknown_option(room: Room) -> None:
    room.options = ["--force-it"]


@case("G18_bad_dtype", "--dtype of an unknown name", "usage")
def bad_dtype(room: Room) -> None:
    room.options = ["--dtype", "float7"]


@case("G19_bad_shard_size", "--max-shard-size that is no size", "usage")
def bad_shard_size(room: Room) -> None:
    room.options = ["--max-shard-size", "many"]
