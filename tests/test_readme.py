"""What the README shows, works: its Python is run, in order, from the repository's folder."""

from __future__ import annotations

import re

import pytest
import torch
from places import FIXTURES, ROOT
from transformers import AutoModelForCausalLM

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def test_the_first_block_is_the_two_commands():
    """One line runs the main job, the other the tests; CI runs the same."""
    first = re.search(r"```\w*\n(.*?)```", TEXT, re.S)[1].split("\n")

    assert [line.split("#")[0].strip() for line in first if line] == ["bash fixtures/demo.sh", "bash tests/run.sh"]
    assert "tests/run.sh" in (ROOT / ".ci/run").read_text()


@pytest.mark.filterwarnings("ignore::adaptkit.AdaptKitWarning")
def test_the_python_blocks_run(tmp_path, monkeypatch, capsys):
    """Merging and verifying, training on a live model, and a tuner of one's own."""
    (tmp_path / "fixtures").symlink_to(FIXTURES)
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "models/llama", dtype=torch.float32)
    names = {"model": model, "train": lambda m: m(torch.arange(6)[None]).logits.sum().backward()}

    for block in BLOCKS:
        exec(block, names)

    assert "28 tensors changed" in capsys.readouterr().out
    assert (tmp_path / "my-lora/adapter_model.safetensors").exists()
    assert (names["Scaled"](c=2.0).weight(torch.ones(2, 2), {}) == 2).all()
