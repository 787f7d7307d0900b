"""Where things lie in the repository."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"
SHARED = ROOT.parent / "shared"


def adapter_folders() -> list[Path]:
    """Every adapter that real PEFT made for a model of ours."""
    return sorted(p.parent for p in FIXTURES.glob("adapters/*/*/adapter_config.json"))
