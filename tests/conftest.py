"""Fixtures shared by all tests. Names of folders are nouns; nothing here touches the network."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from places import FIXTURES

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may look for the Hub
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Models and adapters made by other programs; never written to."""
    return FIXTURES


@pytest.fixture(scope="session")
def inputs() -> dict:
    """The inputs that every expected.npy was computed from."""
    return json.loads((FIXTURES / "inputs.json").read_text())
