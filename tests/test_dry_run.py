"""--dry-run of merge and extract: what the run would refuse at once is refused there, in the same words."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import FIXTURES

from adaptkit import registry
from adaptkit.cli.app import run

MODEL, LORA = str(FIXTURES / "models" / "llama"), str(FIXTURES / "adapters" / "llama" / "lora")
MERGE, EXTRACT = ["merge", MODEL, LORA], ["extract", MODEL, MODEL, "--rank", "2"]
CASES = {
    "no workers": [*MERGE, "--workers", "0"],
    "an engine that is not there": [*MERGE, "--engine", "ray"],
    "no repository": [*MERGE, "--push", "no name"],
    "a device that is not there": [*MERGE, "--device", "cuda"],
    "no workers for extract": [*EXTRACT, "--workers", "0"],
    "no device for extract": [*EXTRACT, "--device", "cuda"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_refuses_what_the_run_refuses(case: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Options are looked at, used or not."""
    import torch

    if ("device" in case and torch.cuda.is_available()) or ("engine" in case and "ray" in registry.names("engines")):
        pytest.skip("it is there")
    words = [*CASES[case], "-o", str(tmp_path / "out")]

    codes = run([*words, "--dry-run"]), run(words)
    dry, real = capsys.readouterr().err.splitlines()
    assert codes[0] == codes[1] != 0 and dry == real
    assert not list(tmp_path.iterdir())
