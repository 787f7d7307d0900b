"""Makes cases, asks AdaptKit for each, and says what is wrong with the answers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import adaptkit

from . import sound
from .case import Case, Room

DRIVER = Path(__file__).with_name("driver.py")
HERE = Path(adaptkit.__file__).parent.parent
LIMIT = 20
LONGEST_ERROR = 4096
BIG = 64 * 2**20

Snapshot = dict[str, object]


@dataclass
class Answer:
    """What was seen of one command, and of its folders before and after."""

    case: Case
    room: Room
    seen: dict
    before: Snapshot
    after: Snapshot


def snapshot(root: Path) -> Snapshot:
    """Every path below root with what it is: kind, mode, size, time and content."""
    return {str(path.relative_to(root)): _state(path) for path in sorted(root.rglob("*"))}


def _state(path: Path) -> object:
    info = path.lstat()
    if stat.S_ISLNK(info.st_mode):
        return os.readlink(path)
    if not stat.S_ISREG(info.st_mode):
        return info.st_mode
    content = None if info.st_size > BIG else hashlib.sha256(path.read_bytes()).hexdigest()
    return info.st_mode, info.st_size, info.st_mtime_ns, info.st_ino, content


def environment(home: Path) -> dict[str, str]:
    """Nothing of the user's but the import path: no token, no cache, no home."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "ADAPTKIT_", "PYTHON"))}
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    private = {"HOME": str(home), "HF_HOME": str(home / "hf"), "PYTHONPATH": paths, "PYTHONUTF8": "1"}
    return kept | private | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def run(command: list[str], home: Path, cwd: Path, limit: float) -> subprocess.CompletedProcess[bytes]:
    """A process of its own, its output caught."""
    return subprocess.run(command, cwd=cwd, env=environment(home), capture_output=True, timeout=limit, check=False)


def ask(cases: Iterable[Case], folder: Path) -> dict[str, Answer]:
    """The answer to each case. Refusals come first: a merge may import what a refusal must not."""
    ordered = sorted(cases, key=lambda case: case.code == 0)
    rooms = {case.id: case.make(folder / case.id.replace("/", ".")) for case in ordered}
    before = {case.id: snapshot(rooms[case.id].root) for case in ordered}
    seen = _drive([_request(case, rooms[case.id]) for case in ordered], folder)
    return {
        case.id: Answer(case, room := rooms[case.id], seen[case.id], before[case.id], snapshot(room.root))
        for case in ordered
    }


def _request(case: Case, room: Room) -> dict:
    """What the driver needs to know; a refusal must be light, that is, import no heavy library."""
    return {"id": case.id, "argv": room.argv, "cwd": str(room.cwd), "plant": room.plant, "light": case.code != 0}


def _drive(requests: list[dict], folder: Path) -> dict[str, dict]:
    """Run all commands in one process; if that dies, note on which command, and go on with the rest in another."""
    seen: dict[str, dict] = {}
    while rest := [request for request in requests if request["id"] not in seen]:
        code, answers = _one_driver(rest, folder)
        seen |= {answer["id"]: answer for answer in answers}
        if code:
            guilty = next(request["id"] for request in rest if request["id"] not in seen)
            seen[guilty] = dead(guilty, f"the process ended with {code}")
    return seen


def _one_driver(requests: list[dict], folder: Path) -> tuple[object, list[dict]]:
    source, answers = folder / "requests.json", folder / "answers.jsonl"
    source.write_text(json.dumps(requests))
    answers.write_text("")
    command = [sys.executable, str(DRIVER), str(source), str(answers)]
    try:
        process = run(command, folder, folder, 10 * LIMIT)
        code: object = process.returncode and f"{process.returncode}: {process.stderr.decode()[-500:]}"
    except subprocess.TimeoutExpired:
        code = "no answer"
    return code, [json.loads(line) for line in answers.read_text().splitlines()]


def dead(name: str, code: str) -> dict:
    return {"id": name, "code": code, "stdout": "", "stderr": "", "seconds": 0.0, "events": [], "heavy": []}


def ask_alone(case: Case, folder: Path, *python_options: str) -> Answer:
    """The answer of a process of its own, as a user's shell would start it."""
    room = case.make(folder / case.id.replace("/", "."))
    before = snapshot(room.root)
    command = [sys.executable, "-P", *python_options, "-m", "adaptkit", *room.argv]
    try:
        done = run(command, folder, room.cwd, LIMIT)
        seen = {"code": done.returncode, "stdout": done.stdout.decode(), "stderr": done.stderr.decode()}
    except subprocess.TimeoutExpired:
        seen = {"code": "too long", "stdout": "", "stderr": ""}
    return Answer(case, room, dead(case.id, "") | seen, before, snapshot(room.root))


def faults(answer: Answer) -> list[str]:
    """Everything that is wrong with an answer; nothing if it is what the table demands."""
    seen, code = answer.seen, answer.case.code
    found = [] if seen["code"] == code else [f"exit {seen['code']}, not {code}: {seen['stderr'][-300:].strip()!r}"]
    found += [f"forbidden: {event}" for event in seen["events"]]
    found += ["a traceback"] if "Traceback" in seen["stderr"] + seen["stdout"] else []
    found += [f"control character {c!r} on stderr" for c in sorted(set(seen["stderr"])) if is_control(c)]
    found += refusal_faults(answer) if code else success_faults(answer)
    return found


def is_control(c: str) -> bool:
    return c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs")


def refusal_faults(answer: Answer) -> list[str]:
    """A refusal says one line and leaves every file as it was."""
    text = answer.seen["stderr"]
    found = [] if text.startswith("error: ") and text.count("\n") == 1 else [f"not one error line: {text[:300]!r}"]
    found += [f"{len(text)} characters on stderr"] if len(text) > LONGEST_ERROR else []
    return found + changes(answer.before, answer.after)


def success_faults(answer: Answer) -> list[str]:
    """A merge writes the right numbers, and nothing outside its output."""
    case, room, lines = answer.case, answer.room, answer.seen["stderr"].splitlines()
    found = [f"an error line: {line!r}" for line in lines if line.startswith("error: ")]
    if case.must == "warn" and not any(line.startswith("warning: ") for line in lines):
        found.append(f"no warning line: {answer.seen['stderr'][:300]!r}")
    if answer.seen["code"] != 0:
        return found
    outside = changes(*(_outside(state, room) for state in (answer.before, answer.after)))
    found += [f"{room.partial.name} is left"] if room.partial.exists() else []
    found += [f"{n} was not copied" for n in room.copied if _content(room.out / n) != _content(room.base / n)]
    return found + outside + weight_faults(room)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _outside(state: Snapshot, room: Room) -> Snapshot:
    return {path: value for path, value in state.items() if path.split("/")[0] not in room.new}


def weight_faults(room: Room) -> list[str]:
    """The output holds the expected tensors, byte for byte."""
    got = sound.read_folder(room.out)
    found = [f"{name} is not in the output" for name in room.expect if name not in got]
    return found + [
        f"{name} differs from the exact merge"
        for name, array in room.expect.items()
        if name in got and not same(got[name], array)
    ]


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def changes(before: Snapshot, after: Snapshot) -> list[str]:
    """What came, went or changed between two snapshots."""
    found = [f"{path} is new" for path in after if path not in before]
    found += [f"{path} is gone" for path in before if path not in after]
    return found + [f"{path} has changed" for path in before if path in after and before[path] != after[path]]


def clear(folder: Path) -> None:
    """Take the rooms away; they are many."""
    shutil.rmtree(folder, ignore_errors=True)
