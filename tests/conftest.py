"""Fixtures shared by all tests. Names of folders are nouns; nothing here touches the network."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may look for the Hub
os.environ.setdefault("OMP_NUM_THREADS", "2")

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Models and adapters made by other programs; never written to."""
    return FIXTURES


@pytest.fixture(scope="session")
def inputs() -> dict:
    """The inputs that every expected.npy was computed from."""
    return json.loads((FIXTURES / "inputs.json").read_text())


def adapter_folders() -> list[Path]:
    """Every adapter that real PEFT made for a model of ours."""
    return sorted(p.parent for p in FIXTURES.glob("adapters/*/*/adapter_config.json"))
