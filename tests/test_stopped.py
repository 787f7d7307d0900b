"""combine, resize and extract, stopped: what the line says, and what is left."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from places import FIXTURES
from safetensors.numpy import save_file

from adaptkit.cli.app import run
from adaptkit.store import output

LORA = str(FIXTURES / "adapters" / "llama" / "lora")
COMMANDS = {"combine": [LORA, LORA], "resize": [LORA, "--rank", "2"], "extract": ["new", "base", "--rank", "2"]}


@pytest.fixture(autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the current folder: a model with three numbers, and one with other three."""
    place = tmp_path_factory.mktemp("models")
    for name, number in (("new", 1), ("base", 2)):
        (place / name).mkdir()
        save_file({"net.0.weight": np.full((3, 4), number, "f4")}, place / name / "model.safetensors")
        (place / name / "config.json").write_text("{}")
    monkeypatch.chdir(place)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_nothing_and_says_so(
    command: str, file: str, number: int, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """A signal that comes while one of the two files is written."""
    made = output.Output.file

    def stopped(self: output.Output, name: str, *args, **how):
        if name == file:
            os.kill(os.getpid(), number)
        return made(self, name, *args, **how)

    monkeypatch.setattr(output.Output, "file", stopped)
    code = run([command, *COMMANDS[command], "-o", str(tmp_path / "deep" / "out")])

    assert code == 128 + number
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"(interrupted|terminated)( after \d+%)?; nothing was written", line)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_in_the_making_of_a_class_is_an_interrupt(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """Imports make classes, and before Python 3.12 they wrap what comes while they do in a RuntimeError."""

    class Interrupted:
        def __set_name__(self, *_):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(output.Output, "file", lambda *_, **__: type("Made", (), {"field": Interrupted()}))
    code = run(["combine", *COMMANDS["combine"], "-o", str(tmp_path / "out")])

    assert code == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith("nothing was written")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_device_that_is_not_there_is_one_sentence(command: str, tmp_path: Path, capsys):
    """Said before anything is read or written."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert run([command, *COMMANDS[command], "-o", str(tmp_path / "out"), "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "error: --device: no CUDA device was found by torch; use --device cpu\n"
    assert list(tmp_path.iterdir()) == []
