"""Every genuine file into every format and back: the same bits, the same to one rounding, or a refusal with the reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from format_kit import FORMATS, sample, trip
from places import FIXTURES, ROOT
from plugin_door import FOLDERS, door, opened

from adaptkit import AdaptKitError, registry
from adaptkit.formats.base import read

for needed in ("gguf", "onnxruntime"):
    pytest.importorskip(needed)
pytestmark = pytest.mark.filterwarnings("ignore::adaptkit.errors.AdaptKitWarning")

TARGETS = ("peft", "kohya", "diffusers", "mlx", "gguf", "onnx_adapter")
WRITABLE = ("peft", "kohya", "lycoris", "diffusers", "mlx", "gguf", "onnx_adapter")
CASES = sorted(
    (d.parent.name, d.name)
    for k in WRITABLE
    for d in (FORMATS / k).iterdir()
    if d.is_dir() and d.name not in ("keys", "base_llama")
)
HOME = {"lycoris": "kohya"}
DOC = ROOT / "docs" / "formats.md"


@pytest.fixture(scope="module", autouse=True)
def plugins(tmp_path_factory: pytest.TempPathFactory):
    """This process sees the plugins."""
    with opened(door(tmp_path_factory.mktemp("site"), FOLDERS)):
        yield


def base_of(kind: str, case: str) -> Path | None:
    """The model that a case is for, where one is needed."""
    if "gpt2" in case:
        return FORMATS / "bases" / "gpt2"
    return FORMATS / "bases" / "llama" if kind in ("peft", "mlx", "gguf", "onnx_adapter") else None


def row(kind: str, case: str, folder: Path) -> list[str]:
    """One line of the table."""
    base = base_of(kind, case)
    try:
        adapter = read(sample(kind, case), base=base)
    except AdaptKitError:
        return ["not read"] * len(TARGETS)
    assert adapter.meta["format"] == HOME.get(kind, "kohya" if "to_kohya" in case else kind)
    cells = []
    for target in TARGETS:
        (folder / target).mkdir()
        # an ONNX model is no base of the others, and theirs is none of its
        done = trip(adapter, target, folder / target, None if target == "onnx_adapter" else base)
        assert done.roundings <= 1, (target, done.roundings)
        assert done.refused == "" or len(done.refused) > 20
        cells.append(str(done))
    return cells


def table() -> dict[str, list[str]]:
    """The table in docs/formats.md, by case."""
    lines = re.findall(r"^\| (\w+/[\w.-]+) \| (.+) \|$", DOC.read_text(), re.M)
    return {case: cells.split(" | ") for case, cells in lines}


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_the_table_of_conversions_says_what_happens(kind: str, case: str, tmp_path: Path):
    """Each cell of the table in docs/formats.md is what converting there and back does now."""
    assert row(kind, case, tmp_path) == table().get(f"{kind}/{case}")


def test_the_table_has_a_line_for_each_case():
    """No more and no fewer."""
    assert sorted(table()) == sorted(f"{k}/{c}" for k, c in CASES)


MODELS = sorted(p.parent for p in FIXTURES.glob("models/*/config.json"))


@pytest.mark.parametrize("path", [*MODELS, *(p for m in MODELS for p in m.glob("*.safetensors"))], ids=lambda p: p.name)
def test_no_format_claims_a_model(path: Path):
    """Full checkpoints are nobody's adapter, as folders and as files."""
    assert claims(path) == []


def claims(path: Path) -> list[str]:
    return [n for n in registry.names("formats") if registry.load("formats", n)().sniff(path)]


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_every_file_has_one_format(kind: str, case: str):
    """All formats are asked, plugins too; one says yes."""
    assert claims(sample(kind, case)) == ["kohya" if kind == "lycoris" or "to_kohya" in case else kind]


@pytest.mark.parametrize(
    "folder", sorted(FIXTURES.glob("adapters/*/*/adapter_config.json")), ids=lambda p: p.parent.name
)
def test_pefts_own_are_pefts(folder: Path):
    """No newcomer claims an adapter that PEFT made."""
    assert claims(folder.parent) == ["peft"]


def test_a_models_gguf_is_no_adapter():
    """The base model in GGUF is not claimed."""
    assert claims(sample("gguf", "base_llama")) == []


if __name__ == "__main__":  # prints the table for docs/formats.md
    import sys
    import tempfile
    import warnings

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as t, opened(door(Path(t, "site"), FOLDERS)):
        print(f"| file | {' | '.join(TARGETS)} |\n|{'---|' * (len(TARGETS) + 1)}")
        for k, c in CASES:
            here = Path(t, k, c)
            here.mkdir(parents=True)
            print(f"| {k}/{c} | {' | '.join(row(k, c, here))} |")
    sys.exit()
