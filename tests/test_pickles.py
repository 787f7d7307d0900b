"""torch checkpoints are read, nothing is run: sound ones as torch reads them, hostile ones refused by class."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptkit.errors import AdaptKitError, AdaptKitWarning, Corrupt, Mismatch, Unsafe
from adaptkit.store import pickles, symbolic
from adaptkit.store.arrays import NUMPY
from adaptkit.store.entry import Entry

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
WILD = sorted(p for d in ("real", "samples") for p in (SHARED / d).rglob("*") if p.suffix in (".bin", ".pt", ".pth"))

# a hand assembler


def text(s: str | bytes) -> bytes:
    raw = s if isinstance(s, bytes) else s.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(n: int) -> bytes:
    raw = n.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + raw


def name(dotted: str) -> bytes:
    module, _, last = dotted.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def row(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def call(dotted: str, *args: bytes) -> bytes:
    return name(dotted) + row(*args) + b"R"


def ints(values: tuple[int, ...]) -> bytes:
    return row(*map(number, values))


def stored(
    key: str = "0", numel: int = 4, kind: str = "torch.FloatStorage", location: str = "cpu", more: bytes = b""
) -> bytes:
    return row(text("storage"), name(kind), text(key), text(location), number(numel), more) + b"Q"


def tensor(shape=(2, 2), strides=(2, 1), offset=0, storage: bytes | None = None) -> bytes:
    storage = stored() if storage is None else storage
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", storage, number(offset), ints(shape), ints(strides), b"\x89", hooks)


def table(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(k) + v for k, v in values.items()) + b"u"


def program(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


FOUR = np.arange(4, dtype="<f4").tobytes()


def archive(path: Path, pkl: bytes, storages: dict[str, bytes] | None = None, method: int = 0, **more: bytes) -> Path:
    """A zip as torch.save makes it, around any data.pkl."""
    with zipfile.ZipFile(path, "w", method) as z:
        z.writestr("archive/data.pkl", pkl)
        z.writestr("archive/byteorder", more.pop("byteorder", b"little"))
        for key, data in ({"0": FOUR} if storages is None else storages).items():
            z.writestr(f"archive/data/{key}", data)
        for member, data in more.items():
            z.writestr(member, data)
    return path


def spoiled(path: Path, value: bytes, storages: dict[str, bytes] | None = None) -> Path:
    return archive(path, program(value), storages)


# a reader of entries that shares no code with the package


def numbers(entry: Entry) -> bytes:
    raw = entry.file.read_bytes()
    if entry.packed:
        at, packed, _ = entry.packed
        raw = zlib.decompress(raw[at : at + packed], -15)
    if entry.strides is None:
        return raw[entry.offset : entry.offset + entry.nbytes]
    dtype = NUMPY[entry.dtype]
    strides = [s * dtype.itemsize for s in entry.strides]
    return np.ndarray(entry.shape, dtype, raw, entry.offset, strides).tobytes()


def raw(t: torch.Tensor) -> bytes:
    """The bytes of a tensor, row by row."""
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


def assert_same(entries: dict[str, Entry], expected: dict[str, torch.Tensor]) -> None:
    assert list(entries) == list(expected)
    for key, t in expected.items():
        entry = entries[key]
        assert (entry.name, entry.shape) == (key, tuple(t.shape))
        assert entry.nbytes == t.numel() * t.element_size()
        assert numbers(entry) == raw(t), key


def quietly(path: Path) -> dict[str, Entry]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdaptKitWarning)
        return pickles.read(path)


def refused(path: Path, error: type[AdaptKitError], match: str) -> None:
    """Reading raises exactly this class; the sentence names the file."""
    with pytest.raises(AdaptKitError, match=match) as caught:
        quietly(path)
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{path.name}: ") and "\n" not in str(caught.value)


# D01-D28: payloads


def payloads(marker: str) -> dict[str, tuple[str, bytes]]:
    """Row of the table -> what must be named, and the pickle of a value that would create the marker."""
    touch, write = text(f"touch {marker}"), text(f"open({marker!r}, 'w').close()")
    args = row(touch)
    return {
        "D01": ("calls os.system", call("os.system", touch)),
        "D02": ("calls posix.system", call("posix.system", touch)),
        "D03": ("calls builtins.exec", call("builtins.exec", write)),
        "D04": ("calls __builtin__.eval", call("__builtin__.eval", write)),
        "D05": ("calls subprocess.Popen", call("subprocess.Popen", b"](" + text("touch") + text(marker) + b"e")),
        "D06": ("calls builtins.open", call("builtins.open", text(marker), text("w"))),
        "D07": ("calls _io.FileIO", call("_io.FileIO", text(marker), text("w"))),
        "D08": ("calls logging.FileHandler", call("logging.FileHandler", text(marker))),
        "D09": ("calls timeit.timeit", call("timeit.timeit", write, text("pass"), name("time.time"), number(1))),
        "D10": ("calls runpy.run_path", call("runpy.run_path", text(f"{marker}.py"))),
        "D11": ("calls importlib.import_module", call("importlib.import_module", text("planted_module"))),
        "D12": ("calls pkgutil.resolve_name", call("pkgutil.resolve_name", text("os:system")) + args + b"R"),
        "D13": (
            "calls operator.attrgetter",
            call("operator.attrgetter", text("system"))
            + row(call("importlib.import_module", text("os")))
            + b"R"
            + args
            + b"R",
        ),
        "D14": ("calls functools.partial", call("functools.partial", name("os.system"), touch) + b")R"),
        "D15": ("calls torch.storage._load_from_bytes", call("torch.storage._load_from_bytes", b"C\x02\x80\x02")),
        "D16": ("calls _pickle.loads", call("_pickle.loads", b"C\x02N.")),
        "D17": ("calls torch.utils.collect_env.run", call("torch.utils.collect_env.run", touch)),
        "D18": ("calls cProfile.run", call("cProfile.run", write)),
        "D19": ("calls bdb.Bdb", call("bdb.Bdb") + b"}" + text("run") + write + b"sb"),
        "D20": ("calls numpy.f2py.crackfortran.getlincoef", call("numpy.f2py.crackfortran.getlincoef", write, b"}")),
        "D21": ("calls uuid._get_command_stdout", call("uuid._get_command_stdout", text("touch"), text(marker))),
        "D22": ("calls os.system", b"(" + touch + b"ios\nsystem\n"),
        "D23": ("calls os.system", b"(" + name("os.system") + touch + b"o"),
        "D24": ("calls os.system", text("os") + b"q\x070" + text("system") + b"q\x080h\x07h\x08\x93" + args + b"R"),
        "D25": ("holds types.SimpleNamespace", name("types.SimpleNamespace") + b")R}" + text("x") + touch + b"sb"),
        "newobj": (
            "calls subprocess.Popen",
            name("subprocess.Popen") + row(b"](" + text("touch") + text(marker) + b"e") + b"\x81",
        ),
        "kwargs": (
            "calls subprocess.Popen",
            name("subprocess.Popen") + row(b"](" + text("touch") + text(marker) + b"e") + b"}\x92",
        ),
    }


ROWS = list(payloads("x"))


@pytest.mark.parametrize("wrap", ["zip", "deflated", "bare", "legacy", "hidden", "popped"])
@pytest.mark.parametrize("which", ROWS)
def test_a_payload_is_refused_by_name_and_not_run(tmp_path, which, wrap):
    """Every payload, in every container, as a value or thrown away: Unsafe, named, no marker, no module imported."""
    marker = tmp_path / "MARKER"
    (tmp_path / "MARKER.py").write_text(f"open({str(marker)!r}, 'w')")
    named, value = payloads(str(marker))[which]
    path, before = tmp_path / "adapter_model.bin", set(sys.modules)
    if wrap in ("bare", "legacy"):
        path.write_bytes(program(value) if wrap == "bare" else legacy_head() + program(table(a=tensor(), b=value)))
    else:
        value = {"hidden": table(a=tensor(), b=value), "popped": value + b"0" + table(a=tensor())}.get(wrap, value)
        archive(path, program(value), method=8 if wrap == "deflated" else 0)
    refused(path, Unsafe, re.escape(f"refused, the pickle {named}"))
    assert not marker.exists() and set(sys.modules) == before


@pytest.mark.parametrize(
    "which", ["D01", "D02", "D03", "D06", "D07", "D08", "D09", "D10", "D12", "D14", "D18", "D22", "D23", "D24"]
)
def test_the_payloads_of_these_tests_are_live(tmp_path, which):
    """A control: Python's own unpickler runs them, so the tests above would notice a run."""
    marker = tmp_path / "MARKER"
    (tmp_path / "MARKER.py").write_text(f"open({str(marker)!r}, 'w')")
    pickle.loads(program(payloads(str(marker))[which][1]))
    assert marker.exists()


def test_a_planted_module_is_not_imported(tmp_path, monkeypatch):
    """D11: a module that the pickle names and that could be imported stays where it is."""
    marker = tmp_path / "MARKER"
    (tmp_path / "planted_module.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    refused(
        spoiled(tmp_path / "a.bin", call("planted_module.thing")), Unsafe, "calls planted_module.thing; nothing was run"
    )
    refused(spoiled(tmp_path / "b.bin", name("planted_module.Thing") + b")\x81"), Unsafe, "holds planted_module.Thing")
    assert not marker.exists() and "planted_module" not in sys.modules


def test_garbage_after_a_payload_does_not_hide_it(tmp_path):
    """D28: the payload comes before the pickle breaks."""
    path = archive(tmp_path / "a.bin", b"\x80\x02" + call("os.system", text(f"touch {tmp_path}/MARKER")) + b"\xff\xff")
    refused(path, Unsafe, "calls os.system")
    assert not (tmp_path / "MARKER").exists()


@pytest.mark.parametrize("container", ["zip", "bare"])
def test_a_second_stream_after_the_end_is_corrupt(tmp_path, container):
    """D29: whatever follows STOP is never reached by a reader, and never there by accident."""
    data = program(table(a=tensor())) + program(call("os.system", text(f"touch {tmp_path}/MARKER")))
    path = tmp_path / "a.bin"
    path.write_bytes(data) if container == "bare" else archive(path, data)
    refused(path, Corrupt, "bytes follow the end of the pickle")
    assert not (tmp_path / "MARKER").exists()


def test_the_tar_format_is_refused(tmp_path):
    """D30: torch's first format was a tar of pickles; its reader is where CVE-2025-32434 was."""
    path, data = tmp_path / "a.bin", program(call("os.system", text(f"touch {tmp_path}/MARKER")))
    with tarfile.open(path, "w") as tar:
        for member in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    refused(path, Unsafe, "tar format")
    assert pickles.is_pickle(path) and not (tmp_path / "MARKER").exists()


@pytest.mark.parametrize(
    "value, error, match",
    [
        (b"\x82\x01", Unsafe, "extension registry"),
        (b"\x84\x01\x00\x00\x00", Unsafe, "extension registry"),
        (text("os.system") + b"Q", Unsafe, "not a tensor storage"),
        (b"Pos.system\n", Unsafe, "not a tensor storage"),
        (
            row(text("module"), name("torch.Size"), text("x"), text("y"), text("z")) + b"Q",
            Unsafe,
            "not a tensor storage",
        ),
        (
            table(a=tensor(), args=name("argparse.Namespace") + b")\x81"),
            Unsafe,
            "holds argparse.Namespace, which is not tensor data",
        ),
        (table(a=tensor(), p=call("pathlib.PosixPath", text("x"))), Unsafe, "holds pathlib.PosixPath, which is not"),
        (name("__main__.Net") + b")\x81", Unsafe, "holds __main__.Net"),
        (text("x") + b")R", Unsafe, "something that has no name"),
        (name("os.sys\x1b[31m") + b")R", Unsafe, r"calls os.sys\\x1b"),
    ],
    ids=["D36", "D36_four", "D37", "D37_text", "module", "D38", "D39", "D66", "text_called", "escape"],
)
def test_other_refusals(tmp_path, value, error, match):
    """D36-D39, D66 and kin: the name is told, escaped."""
    refused(spoiled(tmp_path / "a.bin", value), error, match)


def test_a_whole_module_is_refused(tmp_path):
    """D66 as torch.save makes it."""
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.bin")
    refused(tmp_path / "a.bin", Unsafe, "holds torch.nn.modules.linear.Linear")


def test_a_torchscript_archive_is_refused(tmp_path):
    """D67: it holds code."""
    path = archive(
        tmp_path / "a.bin",
        program(table(a=tensor())),
        **{"archive/constants.pkl": program(b")"), "archive/code/x.py": b""},
    )
    refused(path, Unsafe, "TorchScript")


# D31-D35: the zip


def patched(path: Path, member: str, local: int | None, central: int | None, new: bytes) -> Path:
    """Overwrite a field of a member's two headers, at these places."""
    data = bytearray(path.read_bytes())
    info = zipfile.ZipFile(path).getinfo(member)
    at = data.index(b"PK\x01\x02" + data[info.header_offset + 4 : info.header_offset + 5])
    while data[at + 46 : at + 46 + len(member)] != member.encode():
        at = data.index(b"PK\x01\x02", at + 1)
    for start, place in ((info.header_offset, local), (at, central)):
        if place is not None:
            data[start + place : start + place + len(new)] = new
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "local, central, new, error, match",
    [
        (30, None, b"brchive", Unsafe, "disagree"),
        (None, 46, b"brchive", Unsafe, "disagree"),
        (6, 8, b"\x01\x00", Unsafe, "encrypted"),
        (None, 8, b"\x01\x00", Unsafe, "encrypted"),
        (6, None, b"\x01\x00", Unsafe, "disagree"),
        (14, None, b"\x01\x02\x03\x04", Unsafe, "disagree"),
        (22, None, b"\x01\x00\x00\x00", Unsafe, "disagree"),
        (8, None, b"\x08\x00", Unsafe, "disagree"),
        (8, 10, b"\x0c\x00", Corrupt, "method 12"),
        (None, 24, b"\x01\x00\x00\x00", Corrupt, "two sizes"),
        (None, 42, b"\xfe\xff\xff\xff", Corrupt, "truncated"),
        (None, 42, b"\xff\xff\xff\xff", Corrupt, "zip64 numbers"),
    ],
)
def test_zip_headers_must_agree(tmp_path, local, central, new, error, match):
    """D31, D32 and kin: a header that is told twice is the same twice."""
    path = patched(spoiled(tmp_path / "a.bin", table(a=tensor())), "archive/data.pkl", local, central, new)
    refused(path, error, match)


@pytest.mark.parametrize(
    "value, error, match",
    [(table(a=tensor()), Corrupt, "damaged .CRC"), (call("os.system", text("x")), Unsafe, "os.system")],
)
def test_a_wrong_crc_does_not_hide_a_payload(tmp_path, value, error, match):
    """D33: a wrong CRC on data.pkl is damage; on a payload it is a disguise, and the payload is what is told."""
    path = spoiled(tmp_path / "a.bin", value)
    refused(patched(path, "archive/data.pkl", 14, 16, b"\x01\x02\x03\x04"), error, match)


@pytest.mark.parametrize("member", ["../../evil", "archive/../evil", "/etc/evil", "a\\evil", "C:evil"])
def test_a_member_that_leaves_the_archive_is_corrupt(tmp_path, member):
    """D34: member names are plain."""
    refused(archive(tmp_path / "a.bin", program(table(a=tensor())), **{member: b"x"}), Corrupt, "not a plain name")


def test_a_member_that_is_not_there_is_corrupt(tmp_path):
    """The directory points at something that is no header."""
    path = patched(spoiled(tmp_path / "a.bin", table(a=tensor())), "archive/data/0", 0, None, b"XX")
    refused(path, Corrupt, "not where the zip directory says")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_corrupt(tmp_path):
    """The first-wins and the last-wins reader would read two files."""
    refused(archive(tmp_path / "a.bin", program(table(a=tensor())), **{"archive/data.pkl": b"x"}), Corrupt, "same name")


def test_two_pickles_are_corrupt(tmp_path):
    """Which one is meant cannot be known."""
    refused(archive(tmp_path / "a.bin", program(table(a=tensor())), **{"b/data.pkl": b"x"}), Corrupt, "2 data.pkl")


def test_members_that_overlap_are_corrupt(tmp_path):
    """A member may not reach into the next one: that is how small zips inflate without end."""
    path = spoiled(tmp_path / "a.bin", table(a=tensor()))
    for local, central in ((18, 20), (22, 24)):
        patched(path, "archive/data/0", local, central, struct.pack("<I", 64))
    refused(path, Corrupt, "overlaps")


KINDS = {
    b"": "empty",
    b"7z\xbc\xaf\x27\x1c" + bytes(40): "7z archive",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n": "git-lfs pointer",
    b"\n<!DOCTYPE html><html>": "HTML page",
    b"\x1f\x8b\x08" + bytes(20): "gzip",
    struct.pack("<Q", 640) + b"{" + b" " * 700: "safetensors",
    b"GGUF\x03\0\0\0": "GGUF",
    b"\x93NUMPY\x01\x00": "NumPy",
    b"hello, world": "not a torch checkpoint",
    b"\x80\x02": "cut short",
    b"PK\x03\x04": "too few for a zip",
    b"PK\x03\x04" + bytes(100): "no directory",
}


@pytest.mark.parametrize("data", KINDS, ids=list(KINDS.values()))
def test_what_else_the_file_is_is_told(tmp_path, data):
    """D35, D63 and kin: Corrupt, naming the kind."""
    (tmp_path / "a.bin").write_bytes(data)
    refused(tmp_path / "a.bin", Corrupt, KINDS[data])


def test_a_zip_without_a_pickle_is_named(tmp_path):
    """An .npz is a zip, too."""
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    refused(tmp_path / "a.npz", Corrupt, r"no data.pkl, not a torch checkpoint \(members: x.npy\)")
    assert not pickles.is_pickle(tmp_path / "a.npz")


def test_a_pipe_or_a_folder_is_corrupt_and_never_waits(tmp_path):
    """Nothing but a regular file is opened."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "absent"):
        for use in (pickles.read, pickles.check_crc):
            with pytest.raises(Corrupt):
                use(path)
        assert not pickles.is_pickle(path)


# D50-D65: lies about tensors


@pytest.mark.parametrize(
    "value, match",
    [
        (tensor((10**6, 10**6), (0, 0)), "its storage has 16 bytes"),
        (tensor(offset=3), "ends at byte 28 of a storage of 16"),
        (tensor(offset=-1), "no tensor has"),
        (tensor(strides=(-2, 1)), "no tensor has"),
        (tensor(shape=(2, -2)), "no tensor has"),
        (tensor(shape=(2,)), "no tensor has"),
        (tensor((2,) * 65, (0,) * 65), "no tensor has"),
        (tensor((2**62, 2**62), (0, 0)), "its storage has 16 bytes"),
        (tensor(storage=stored("7")), "'7' is not in the zip"),
        (tensor(storage=stored(numel=2)), "16 bytes, 8 expected"),
        (tensor(storage=stored(numel=8)), "16 bytes, 32 expected"),
        (tensor(storage=stored(numel=2**60)), "16 bytes, 4,611,"),
        (tensor(storage=stored(numel=-4)), "a length that is none"),
        (tensor(storage=stored("../data.pkl")), "is not in the zip"),
        (tensor(storage=stored("../../../data.pkl")), "is not in the zip"),
        (tensor(storage=stored(kind="torch.Size")), "has no storage"),
        (tensor(storage=b"N"), "has no storage"),
        (call("torch._utils._rebuild_tensor_v2", stored()), "not a tensor as torch writes it"),
        (call("torch._utils._rebuild_parameter", b"N", b"\x88", b"N"), "not a tensor as torch writes it"),
    ],
)
def test_a_tensor_must_lie_in_its_storage(tmp_path, value, match):
    """D50-D56: Corrupt, naming the tensor."""
    refused(spoiled(tmp_path / "a.bin", table(weight=value)), Corrupt, f"'weight': .*{match}")


def laughs() -> bytes:
    return b")q\x010" + b"h\x01h\x01\x86q\x010" * 40 + b"h\x01"


@pytest.mark.parametrize(
    "value, match",
    [
        (b"}r\x00\x00\x00\x80", "memo slot 2,147,483,648"),
        (b"X\x00\x00\x00\x80abc", "2,147,483,648 bytes wanted"),
        (b"\x8d" + b"\xff" * 8 + b"abc", "bytes wanted"),
        (b"\x8b\x00\x00\x10\x00", "integer of 1,048,576 bytes"),
        (b"L" + b"9" * 5000 + b"L\n", "integer of 5,001 digits"),
        (b"}" + laughs() + b"Ns", r"a key that is not text \(tuple\)"),
        (b"}" + number(1) + tensor() + b"s", r"a key that is not text \(int\)"),
        (b"](" + tensor() + b"e", "holds a list, not a state dict"),
        (tensor(), "holds a single tensor"),
        (table(), r"no tensors \(its keys: none\)"),
        (table(r=number(8)), r"no tensors \(its keys: r\)"),
        (b"}" + text(b"a\xed\xa0\x80") + tensor() + b"s", r"'a\\ud800' is not a tensor name"),
        (b"}" + text("") + tensor() + b"s", "is not a tensor name"),
        (b"}" + text(b"\xff") + tensor() + b"s", "UnicodeDecodeError"),
        (b"}(" + text("a") + tensor() + text("a") + tensor() + b"u", "one name twice"),
        (b"h\x05", "KeyError"),
        (b"t", "a mark that is not there"),
        (b"\x86", "a value that is not there"),
        (b"}(" + text("a") + b"u", "a key without a value"),
        (b")a", "takes a value that is not there"),
        (b"))a", "appends to what is not a list"),
        (b")" + text("k") + b"Ns", "not a dict"),
        (b"N}b", "sets attributes of what has none"),
        (name("torch.Size") + b"NR", "without arguments"),
        (b"NN\x93", "a name that is not text"),
        (b"S'\\400'\n", "not quoted as Python 2 quotes"),
        (b"Sabc\n", "not quoted as Python 2 quotes"),
        (b"Iabc\n", "ValueError"),
        (b"\x97", "no opcode"),
        (call("collections.OrderedDict", b"](Ne"), "not made of pairs"),
    ],
)
def test_a_pickle_that_lies_is_corrupt(tmp_path, value, match):
    """D59-D61, D64, D65, D91 and every way a pickle can break."""
    refused(spoiled(tmp_path / "a.bin", value), Corrupt, match)


def test_a_pickle_of_a_high_protocol_is_corrupt(tmp_path):
    """Protocol 6 does not exist."""
    refused(archive(tmp_path / "a.bin", b"\x80\x06N."), Corrupt, "protocol 6")


def test_one_list_copied_many_times_is_corrupt(tmp_path):
    """OrderedDict(rows) is the only thing that copies; copies are counted."""
    rows = b"](" + b"NN\x86" * 3000 + b"eq\x01"
    refused(
        spoiled(tmp_path / "a.bin", rows + (name("collections.OrderedDict") + b"h\x01\x85R") * 3000),
        Corrupt,
        "copies more than",
    )


def test_too_many_opcodes_are_corrupt(tmp_path, monkeypatch):
    """The work is bounded, whatever the size of the file."""
    monkeypatch.setattr(symbolic, "MOST", 1000)
    refused(spoiled(tmp_path / "a.bin", b"N0" * 600), Corrupt, "more than 1,000 opcodes")


def test_nesting_does_not_recurse(tmp_path):
    """A million lists in each other, left out of a sound state dict, are no trouble."""
    deep = b"]" * 10**6 + b"a" * (10**6 - 1)
    entries = quietly(spoiled(tmp_path / "a.bin", table(a=tensor(), deep=deep)))
    assert list(entries) == ["a"]


def test_laughs_that_are_left_out_are_no_trouble(tmp_path):
    """D61 as a value: 2**40 leaves that nobody visits."""
    assert list(quietly(spoiled(tmp_path / "a.bin", table(a=tensor(), laughs=laughs())))) == ["a"]


def test_a_zip_bomb_is_corrupt(tmp_path):
    """D58: a storage that inflates more than 20 times is refused before it is inflated."""
    size = 1 << 20
    value = table(a=tensor((size,), (1,), storage=stored(numel=size)))
    refused(archive(tmp_path / "a.bin", program(value), {"0": bytes(4 * size)}, 8), Corrupt, "more than 20 times")


def test_a_pickle_that_inflates_too_much_is_corrupt(tmp_path):
    """A small file may not cost much: neither memory nor opcodes."""
    path = archive(tmp_path / "a.bin", program(b"(" * (1 << 20)), method=8)
    refused(path, Corrupt, "takes 1,048,579 bytes, inflated from")


def test_a_storage_that_inflates_to_another_size_is_corrupt(tmp_path):
    """D58: the directory says 16 bytes, the stream has more; no more than a block is ever inflated."""
    path = archive(tmp_path / "a.bin", program(table(a=tensor())), {"0": bytes(5000)}, 8)
    patched(path, "archive/data/0", 22, 24, struct.pack("<I", 16))
    assert pickles.read(path)["a"].packed[2] == 16
    with pytest.raises(Corrupt, match="does not inflate to the 16 bytes"):
        pickles.check_crc(path)


def test_a_deflated_pickle_that_is_damaged_is_corrupt(tmp_path):
    """What zlib reports becomes our sentence."""
    path = archive(tmp_path / "a.bin", program(table(a=tensor())), method=8)
    data = bytearray(path.read_bytes())
    data[46:56] = b"\xff" * 10
    path.write_bytes(data)
    refused(path, Corrupt, "cannot be inflated")


# D57, D80-D91: sound and nearly sound files


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return {f"layers.{i}.lora_{ab}.weight": torch.randn(3, 5, generator=g) for i in range(3) for ab in "AB"}


@pytest.mark.parametrize("legacy", [False, True])
def test_every_dtype_is_read_as_torch_reads_it(tmp_path, legacy):
    """D80, D86, D88: all dtypes that safetensors names, scalars, empty tensors, parameters, views and tied tensors."""
    path, base = tmp_path / "a.bin", torch.arange(24.0)
    state: dict[str, torch.Tensor] = OrderedDict()
    for dtype in [
        "float32",
        "float64",
        "float16",
        "bfloat16",
        "complex64",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "bool",
    ]:
        state[dtype] = base.to(getattr(torch, dtype)).reshape(4, 6)
    for dtype in ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]:
        state[dtype] = base.to(torch.uint8).to(getattr(torch, dtype))
        state[dtype + "_view"] = state[dtype][6:12].reshape(2, 3).t()
    state |= {"scalar": torch.tensor(7), "empty": torch.zeros(0, 3), "parameter": torch.nn.Parameter(base[:3].clone())}
    state |= {
        "tied": base,
        "tied_too": base,
        "slice": base[3:7],
        "every_second": base[1::2],
        "turned": base.view(4, 6).t(),
    }
    state |= {
        "expanded": base[:1].expand(3, 4),
        "one_wide": base.as_strided((3, 1), (1, 99)),
        "rows": base.view(4, 6)[:, 1:3],
    }
    state["attributes"] = torch.nn.Parameter(base.clone())
    state["attributes"].note = "kept by torch as _rebuild_parameter_with_state"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    entries = pickles.read(path)
    assert_same(entries, state)
    assert entries["tied"].offset == entries["tied_too"].offset
    assert entries["slice"].strides is None and entries["one_wide"].strides is None
    assert entries["turned"].strides == (1, 6) and entries["every_second"].strides == (2,)
    assert pickles.is_pickle(path)
    pickles.check_crc(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state_dict"])
def test_a_wrapped_state_dict_is_unwrapped_with_a_warning(tmp_path, tensors, key, legacy):
    """D84: the nested tensors are taken, the warning names what is left out."""
    path = tmp_path / "a.pth"
    other = {
        "epoch": 3,
        "loss": np.float64(0.5),
        "lr": 1e-3,
        "seen": {1, 2},
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
    }
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"betas": (0.9, 0.999), "params": [0]}]}
    torch.save({key: tensors, **other, "optimizer": optimizer}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.warns(
        AdaptKitWarning, match=f"under '{key}'; left out: epoch, loss, lr, seen, dtype, device, optimizer"
    ):
        entries = pickles.read(path)
    assert_same(entries, tensors)


def test_what_is_not_a_tensor_is_left_out_with_a_warning(tmp_path, tensors):
    """A state dict with a few settings among the tensors."""
    torch.save({**tensors, "rank": 8}, tmp_path / "a.pt")
    with pytest.warns(AdaptKitWarning, match="a.pt: not everything is a tensor; left out: rank"):
        assert_same(pickles.read(tmp_path / "a.pt"), tensors)


def test_two_wrappers_are_a_question(tmp_path, tensors):
    """Never a guess between two readings."""
    torch.save({"model": tensors, "state_dict": tensors}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", Mismatch, "state_dict, model: which are meant")


def test_a_deflated_file_is_read(tmp_path, tensors):
    """D87: entries point into the inflated members."""
    torch.save(tensors, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as old, zipfile.ZipFile(tmp_path / "b.bin", "w", 8) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    entries = pickles.read(tmp_path / "b.bin")
    assert_same(entries, tensors)
    first = next(iter(entries.values()))
    assert first.offset == 0 and first.packed[2] == first.nbytes
    pickles.check_crc(tmp_path / "b.bin")


def test_a_file_without_checksums_is_read(tmp_path, tensors):
    """CRC 0 means not computed: torch can save without."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "a.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(pickles.read(tmp_path / "a.bin"), tensors)
    pickles.check_crc(tmp_path / "a.bin")


def test_a_zip64_member_is_read(tmp_path):
    """Sizes in the zip64 field, local and central, as writers that stream put them."""
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as z:
        for member, data in (("x/data.pkl", program(table(a=tensor()))), ("x/data/0", FOUR)):
            with z.open(member, "w", force_zip64=True) as f:
                f.write(data)
    assert numbers(pickles.read(tmp_path / "a.bin")["a"]) == FOUR


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(tmp_path, tensors, protocol):
    """torch.save(pickle_protocol=...)."""
    torch.save(tensors, tmp_path / "a.bin", pickle_protocol=protocol)
    assert_same(pickles.read(tmp_path / "a.bin"), tensors)


def test_strings_of_python_2_and_protocol_0_are_read(tmp_path):
    """Old writers spelled names as S, U and V, and ints as text."""
    python2 = (
        b"(dp0\nS'a\\x41'\np1\n"
        + tensor()
        + b"sU\x01b"
        + tensor()
        + b"sVc\n"
        + tensor()
        + b"sS'n'\nI01\nsS'm'\nL5L\nsS'x'\nF1.5\ns"
    )
    path = spoiled(tmp_path / "a.bin", python2)
    assert list(quietly(path)) == ["aA", "b", "c"]


def test_a_device_and_the_type_of_a_tensor_do_not_matter(tmp_path):
    """D57: a tensor saved on cuda:7 is read like any other; so is one with attributes."""
    typed = call("torch._tensor._rebuild_from_type_v2", name("torch._utils._rebuild_tensor"), name("torch.Tensor"),
                 row(stored(), number(0), call("torch.Size", ints((4,))), ints((1,))), b"}")  # fmt: skip
    away = tensor(storage=stored(kind="torch.cuda.FloatStorage", location="cuda:7"))
    entries = pickles.read(spoiled(tmp_path / "a.bin", table(a=away, b=typed)))
    assert [numbers(e) for e in entries.values()] == [FOUR, FOUR]
    assert entries["b"].shape == (4,)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:.*deprecated", "ignore:Sparse")
@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: torch.eye(3).to_sparse(), "'odd': is a sparse tensor"),
        (lambda: torch.eye(3).to_sparse_csr(), "is a sparse tensor"),
        (lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8), "is a quantized tensor"),
        (lambda: torch.zeros(2, dtype=torch.complex128), "has dtype complex128, which safetensors cannot hold"),
        (lambda: torch.zeros(2, dtype=torch.complex64).conj(), "is a conjugate or negative view"),
        (lambda: torch.zeros(2, dtype=torch.complex64).conj().imag, "is a conjugate or negative view"),
        (lambda: torch.zeros(2, device="meta"), "is a tensor without data"),
    ],
)
def test_a_tensor_we_cannot_hold_is_a_mismatch(tmp_path, make, match):
    """D85 and kin: sound files, refused by kind; but a payload behind them is still Unsafe."""
    torch.save({"fine": torch.zeros(2), "odd": make()}, tmp_path / "a.bin")
    refused(tmp_path / "a.bin", Mismatch, match)


def test_a_payload_behind_a_sparse_tensor_is_unsafe(tmp_path):
    """The whole pickle is judged before its tensors are."""
    value = table(a=call("torch._utils._rebuild_sparse_tensor", b"N"), b=call("os.system", text("x")))
    refused(spoiled(tmp_path / "a.bin", value), Unsafe, "os.system")


@pytest.mark.parametrize("order", [b"big", b"", b"\xff" * 100])
def test_another_byte_order_is_corrupt(tmp_path, order):
    """D89: only little-endian numbers are read."""
    refused(archive(tmp_path / "a.bin", program(table(a=tensor())), byteorder=order), Corrupt, "little-endian")


@pytest.mark.parametrize("method", [0, 8])
def test_a_flipped_bit_is_found_by_the_crc(tmp_path, method):
    """D90: the entries are sound, the bytes are not; torch accepts them."""
    data = np.random.default_rng(0).bytes(4 * (3 << 18))
    value = table(a=tensor((3 << 18,), (1,), storage=stored(numel=3 << 18)))
    path = archive(tmp_path / "a.bin", program(value), {"0": data}, method)
    pickles.check_crc(path)
    entry = pickles.read(path)["a"]
    spoilt = bytearray(path.read_bytes())
    spoilt[(entry.packed[0] if entry.packed else entry.offset) + (2 << 20)] ^= 1
    path.write_bytes(spoilt)
    assert list(pickles.read(path)) == ["a"]
    with pytest.raises(Corrupt, match="a.bin: archive/data/0"):
        pickles.check_crc(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_anywhere_is_corrupt(tmp_path, tensors, legacy):
    """D62: at every length but the whole."""
    torch.save(tensors, tmp_path / "a.bin", _use_new_zipfile_serialization=not legacy)
    data = (tmp_path / "a.bin").read_bytes()
    path = tmp_path / "cut.bin"
    for length in {*range(0, len(data), 97), len(data) - 1}:
        path.write_bytes(data[:length])
        with pytest.raises(Corrupt):
            pickles.read(path)


def legacy_head(little: bytes = b"\x88", protocol: int = 1001) -> bytes:
    magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
    return magic + program(number(protocol)) + program(table(protocol_version=number(1001), little_endian=little))


def legacy(state: bytes, keys: bytes, data: bytes, **head) -> bytes:
    return legacy_head(**head) + program(state) + program(keys) + data


ONE = b"](" + text("0") + b"e"


@pytest.mark.parametrize(
    "data, match",
    [
        (legacy(table(a=tensor()), ONE, number(4)[2:10] + FOUR + b"x"), "1 bytes follow the last storage"),
        (legacy(table(a=tensor()), ONE, number(4)[2:10] + FOUR[:-1]), "truncated"),
        (legacy(table(a=tensor()), ONE, number(3)[2:10] + FOUR), "not as long as the pickle says"),
        (legacy(table(a=tensor()), b"](" + text("0") * 2 + b"e", (number(4)[2:10] + FOUR) * 2), "there twice"),
        (legacy(table(a=tensor()), b"](" + text("1") + b"e", number(4)[2:10] + FOUR), "names one that no tensor has"),
        (legacy(table(a=tensor()), b"]", b""), "'a': its storage '0' is not in the file"),
        (legacy(table(a=tensor(), b=tensor(storage=stored(numel=5))), ONE, number(4)[2:10] + FOUR), "has two lengths"),
        (legacy(table(a=tensor()), ONE, number(4)[2:10] + FOUR, little=b"\x89"), "byte order"),
        (legacy(table(a=tensor()), ONE, number(4)[2:10] + FOUR, protocol=1002), "unknown protocol"),
        (program(table(a=tensor())), "this is a bare pickle"),
    ],
)
def test_a_legacy_file_that_lies_is_corrupt(tmp_path, data, match):
    """D88's bad brothers: what the pickles promise must be what follows them, to the last byte."""
    (tmp_path / "a.bin").write_bytes(data)
    refused(tmp_path / "a.bin", Corrupt, match)


def test_a_storage_view_of_the_oldest_files_is_a_mismatch(tmp_path):
    """Before torch 0.4 a storage could be a view of another."""
    view = tensor(storage=stored(more=row(text("1"), number(0), number(4))))
    (tmp_path / "a.bin").write_bytes(legacy(table(a=view), ONE, number(4)[2:10] + FOUR))
    refused(tmp_path / "a.bin", Mismatch, "view of another one")


# sniffing, cost, and everything at once


@pytest.mark.parametrize(
    "data, known",
    [
        (program(b"}"), True),
        (pickle.dumps({"a": 1}, 0), True),
        (pickle.dumps(OrderedDict(a=1), 0), True),
        (pickle.dumps({"a": 1}, 5), True),
        (legacy_head(), True),
        (struct.pack("<Q", 640) + b'{"a":', False),
        (b"PK\x03\x04" + bytes(80), False),
        (b"PK\x03\x04" + bytes(22) + b"\x10\0\0\0archive/data.pklcut", True),
        (b"", False),
        (b"class Thing:\n    pass\n", False),
        (b"{}", False),
    ],
)
def test_is_pickle_judges_by_content(tmp_path, data, known):
    """Also a damaged one is one: the reader then says what is wrong with it."""
    (tmp_path / "model.safetensors").write_bytes(data)
    assert pickles.is_pickle(tmp_path / "model.safetensors") is known


def test_torch_is_not_imported():
    """Names from headers alone."""
    code = "import sys, adaptkit.store.pickles; print('torch' in sys.modules or 'numpy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_only_headers_are_read(tmp_path, monkeypatch):
    """A file of 2 GB, mostly a hole: a few kilobytes of it are read."""
    path, size = tmp_path / "a.bin", 1 << 31
    info = zipfile.ZipInfo("x/data/0")
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("x/data.pkl", program(table(a=tensor((size // 4,), (1,), storage=stored(numel=size // 4)))))
        with z.open(info, "w") as f:
            f.write(b"x")
    with_hole(path, info.header_offset + 30 + len(info.filename), size)
    taken = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: taken.append(n) or pread(fd, n, at))
    assert pickles.read(path)["a"].nbytes == size
    assert sum(taken) < 10_000


def with_hole(path: Path, at: int, size: int) -> None:
    """Make the last member of an archive, whose data begins at `at`, `size` zero bytes long."""
    data = path.read_bytes()
    directory = bytearray(data[data.index(b"PK\x01\x02") :])
    last = directory.rindex(b"PK\x01\x02")
    fields = struct.pack("<3I", 0, size, size)
    directory[last + 16 : last + 28] = fields
    directory[-6:-2] = struct.pack("<I", at + size)
    with open(path, "r+b") as f:
        f.truncate(at)
        f.seek(data.rindex(b"PK\x03\x04") + 14)
        f.write(fields)
        f.seek(at + size)
        f.write(directory)


def sound_files(folder: Path) -> list[Path]:
    state = {
        "a": torch.arange(6.0).view(2, 3).t(),
        "b": torch.ones(3, dtype=torch.float8_e5m2),
        "p": torch.nn.Parameter(torch.ones(2)),
    }
    wrapped = {"state_dict": state, "epoch": 3, "x": np.float32(1), "d": torch.float16, "s": {1}}
    torch.save(wrapped, folder / "zip.bin")
    torch.save(wrapped, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    archive(folder / "deflated.bin", program(table(a=tensor())), method=8)
    (folder / "bare.bin").write_bytes(pickle.dumps({"a": 1.5, "b": [1, (2, 3)], "c": b"x"}, 0))
    return sorted(folder.glob("*.bin"))


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> tuple[Path, list[bytes]]:
    folder = tmp_path_factory.mktemp("seeds")
    return folder, [p.read_bytes() for p in sound_files(folder)]


EDIT = st.tuples(
    st.floats(0, 1, exclude_max=True), st.integers(0, 255), st.sampled_from(["set", "drop", "insert", "copy"])
)


def mutated(data: bytes, edits) -> bytes:
    out = bytearray(data)
    for place, value, how in edits:
        at = int(place * max(1, len(out)))
        if how == "set" and out:
            out[at] = value
        elif how == "drop":
            del out[at : at + 1 + value // 32]
        elif how == "insert":
            out[at:at] = bytes([value])
        else:
            out[at:at] = out[value : value + 8]
    return bytes(out)


@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(which=st.integers(0, 3), edits=st.lists(EDIT, min_size=1, max_size=4))
def test_a_mutated_file_gives_entries_or_our_error(seeds, which, edits):
    """Whatever is changed: entries that lie in the file, or an AdaptKitError, never another exception."""
    folder, files = seeds
    path = folder / "mutated"
    path.write_bytes(mutated(files[which], edits))
    assert_ours(path)


@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.sampled_from(
            [bytes([b]) for b in range(256)]
            + [*map(text, ("a", "0", "storage", "cpu")), b"ctorch\nFloatStorage\n", tensor(), stored()]
        ),
        max_size=30,
    )
)
def test_random_opcodes_give_entries_or_our_error(seeds, parts):
    """Programs of opcodes and whole tensors in any order, inside a sound zip."""
    assert_ours(archive(seeds[0] / "random", b"\x80\x02" + b"".join(parts) + b"."))


def assert_ours(path: Path) -> None:
    try:
        entries = quietly(path)
        pickles.check_crc(path)
    except AdaptKitError as e:
        assert type(e) in (Corrupt, Mismatch, Unsafe) and "\n" not in str(e)
        return
    size = path.stat().st_size
    for e in entries.values():
        end = e.offset + (e.nbytes if e.plain else 0)
        assert end <= (e.packed[2] if e.packed else size)


# files from the wild


@pytest.mark.skipif(not WILD, reason="the collected files are not here")
@pytest.mark.parametrize("path", WILD, ids=lambda p: "/".join(p.parts[-3:]))
def test_wild_files_are_listed_as_torch_lists_them(path):
    """Files made by others: the same names, shapes and bytes as torch's weights_only reader, or both refuse."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        refused(path, Unsafe, "refused, the pickle holds")
        return
    wrapper = next((loaded[k] for k in ("state_dict", "module") if isinstance(loaded.get(k), dict)), loaded)
    expected = {k: v for k, v in wrapper.items() if isinstance(v, torch.Tensor)}
    if not expected:
        refused(path, Corrupt, "holds no tensors")
        return
    assert_same(quietly(path), expected)
    pickles.check_crc(path)
