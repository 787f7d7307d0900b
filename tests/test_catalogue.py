"""Every bad or odd input gets the answer it is owed: exit code, one line, nothing touched, the right bytes."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from catalogue import CASES
from catalogue.ask import Answer, ask, ask_alone, clear, faults
from catalogue.case import ADAPTER_BIN

pytestmark = pytest.mark.xdist_group("catalogue")  # all cases are asked in one process, once

HEAVY = {"torch", "transformers", "peft", "huggingface_hub"}
ALONE = [
    "G00_sound_sharded", "A12_data_half/shard", "A40_fifo/single", "B05_dotdot", "C14_shadow_modules",
    "D01_os_system/adapter", "E07_unknown_peft_type", "E11f_regex_redos", "F32_swapped_args", "G03_output_exists",
]  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Answer]]:
    """What AdaptKit answered to each case, all asked in one process."""
    folder = tmp_path_factory.mktemp("catalogue")
    yield ask(CASES.values(), folder)
    clear(folder)


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_case_gets_the_answer_the_table_demands(name: str, answers: dict[str, Answer]) -> None:
    """Exit code, stderr, untouched inputs, no left-overs, nothing executed, and the right bytes where there are any."""
    assert faults(answers[name]) == []


@pytest.mark.parametrize("name", ALONE)
def test_a_process_of_its_own_answers_the_same(name: str, tmp_path: Path) -> None:
    """The command as a shell starts it."""
    assert faults(ask_alone(CASES[name], tmp_path)) == []


def test_no_refusal_imports_a_heavy_library(answers: dict[str, Answer]) -> None:
    """Refusals run first, and a process in which one imported such a library is not used for the next."""
    guilty = {
        name: answer.seen["heavy"] for name, answer in answers.items() if answer.case.code and answer.seen["heavy"]
    }
    assert guilty == {}


def test_a_refusal_imports_no_torch_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The list of imports that Python itself keeps names none of the heavy libraries."""
    imports = ask_alone(CASES["A12_data_half/single"], tmp_path, "-X", "importtime").seen["stderr"]
    names = {line.rpartition("|")[2].strip() for line in imports.splitlines() if line.startswith("import time:")}
    assert "adaptkit.errors" in names
    assert not names & HEAVY


def test_the_payload_is_live(tmp_path: Path) -> None:
    """A plain unpickler runs it: that no marker appears elsewhere means something."""
    room = CASES["D27_plain_pickle/adapter"].make(tmp_path)
    pickle.loads((room.adapter / ADAPTER_BIN).read_bytes())
    assert room.marker.read_text() == "ran\n"


@pytest.mark.peft
def test_peft_merges_the_sound_pair_to_the_same_bytes(tmp_path: Path) -> None:
    """The right output of this catalogue is not our invention."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    room = CASES["G00_sound_sharded"].make(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(room.base, dtype="auto")
    merged = peft.PeftModel.from_pretrained(model, room.adapter).merge_and_unload().state_dict()
    assert {name: tensor.numpy().tobytes() for name, tensor in merged.items()} == {
        name: array.tobytes() for name, array in room.expect.items()
    }
