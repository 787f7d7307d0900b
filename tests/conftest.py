"""Fixtures shared by all tests. Names of folders are nouns; nothing here touches the network."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from places import FIXTURES

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may look for the Hub
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported: it writes into the home folder
# One thread per worker: threads of two workers that wait for each other on two cores take a hundred times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts background jobs deaf to Ctrl-C; the tests send it to themselves and to their children.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Models and adapters made by other programs; never written to."""
    return FIXTURES


@pytest.fixture(scope="session")
def inputs() -> dict:
    """The inputs that every expected.npy was computed from."""
    return json.loads((FIXTURES / "inputs.json").read_text())


@pytest.fixture(scope="session")
def _server():
    from hub.server import Server

    server = Server()
    yield server
    server.close()


@pytest.fixture
def hub(_server):
    """An empty Hub on the loopback interface."""
    _server.reset()
    return _server


@pytest.fixture
def shell(hub, tmp_path):
    """adaptkit as a command, with an empty home, that knows no other Hub."""
    from hub.running import Shell

    return Shell(hub, tmp_path)


# many quick tests each, and together most of the time: the fast part leaves them to the whole run
THOROUGH = (
    "bake", "catalogue", "combine_every", "hub_pull", "hub_push", "hub_streaming", "matrix", "output", "peft_options",
    "peft_prompts", "plugins", "real",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is thorough is slow."""
    files = {f"test_{name}.py" for name in THOROUGH}
    for item in items:
        if item.path.name in files:
            item.add_marker(pytest.mark.slow)
