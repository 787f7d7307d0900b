"""What training left in shards becomes one checkpoint, or the adapter in it; torch and the samples are the judges."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from places import FIXTURES
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import adaptkit
from adaptkit.store.arrays import load
from adaptkit.store.dcp import covered, part
from adaptkit.store.entry import Entry, Part
from adaptkit.store.parts import fill
from adaptkit.store.shards import kind, open_shards

SHARDS = FIXTURES / "shards"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def saved(folder: Path, state: dict) -> Path:
    """A DCP checkpoint of one process, by torch."""
    dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    return folder


def model_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"model.embed.weight": torch.randn(11, 6), "model.layers.0.weight": torch.randn(6, 6).bfloat16()}


def test_a_dcp_checkpoint_becomes_safetensors(tmp_path: Path):
    """A flat state dict by torch.distributed.checkpoint, and one under "model" beside an optimizer's."""
    saved(tmp_path / "flat", model_state())
    saved(tmp_path / "nested", {"model": model_state(), "optimizer": {"state": {"exp_avg": torch.ones(3)}}, "step": 7})

    for name in ("flat", "nested"):
        done = adaptkit.convert(tmp_path / name, tmp_path / f"{name}-out", "safetensors")
        found = load_file(tmp_path / f"{name}-out" / "model.safetensors")
        assert found.keys() == model_state().keys()
        assert all(torch.equal(found[n], t) for n, t in model_state().items())
        assert done.source_format == "dcp"
    assert [n.text for n in done.notes] == ["2 entries that are not of the model (optimizer.state.exp_avg, step)"]


def test_other_kinds_of_entries_and_empty_folders_are_told(tmp_path: Path):
    """A DCP checkpoint without a model is refused, and so is a folder whose shards are missing."""
    saved(tmp_path / "gone", model_state())
    os.unlink(tmp_path / "gone" / "__0_0.distcp")

    with pytest.raises(
        adaptkit.AdaptKitError, match="its file __0_0.distcp is not there; copy the shards of all machines"
    ):
        adaptkit.convert(tmp_path / "gone", tmp_path / "out", "safetensors")
    assert not (tmp_path / "out").exists()


class Evil:
    """Creates a file when a pickle of it is executed."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_metadata_is_not_executed(tmp_path: Path):
    """A .metadata that calls something is refused by the name of what it calls."""
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "mark")))

    with pytest.raises(adaptkit.AdaptKitError, match="the pickle calls posix.mkdir; nothing was run") as caught:
        adaptkit.convert(tmp_path / "evil", tmp_path / "out", "safetensors")

    assert caught.value.code == 5
    assert not (tmp_path / "mark").exists()


def test_damaged_metadata_ends_with_a_sentence(tmp_path: Path):
    """Five hundred flipped bytes: each is read as before, or refused in a sentence."""
    saved(tmp_path / "sound", model_state())
    sound = (tmp_path / "sound" / ".metadata").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0

    for at, value in zip(rng.integers(0, len(sound), 500), rng.integers(0, 256, 500), strict=True):
        (tmp_path / "sound" / ".metadata").write_bytes(sound[:at] + bytes([value]) + sound[at + 1 :])
        try:
            open_shards(tmp_path / "sound")
        except adaptkit.AdaptKitError:
            refused += 1
    assert refused > 100


ODD = [None, 7, "text", [], {}, [[1]], (1, 2), torch.ones(3), [torch.ones(2, 2)], {"a": 1}, {"a": [1]}, -1, 2**70, True]


@pytest.mark.parametrize(
    "key",
    [
        "zero_stage",
        "partition_count",
        "fp32_flat_groups",
        "param_shapes",
        "frozen_param_shapes",
        "module",
        "shared_params",
    ],
)
def test_odd_states_of_deepspeed_end_with_a_sentence(key: str, tmp_path: Path):
    """Whatever stands where DeepSpeed writes something else, there is no traceback."""
    zero_three(tmp_path / "step", 2)
    file = "optim" if key in ("zero_stage", "partition_count", "fp32_flat_groups") else "model"
    path = next((tmp_path / "step").glob(f"zero_pp_rank_0_*_{file}_states.pt"))
    state = torch.load(path, weights_only=False)
    answers = 0

    for odd in ODD:
        (state["optimizer_state_dict"] if file == "optim" else state)[key] = odd
        torch.save(state, path)
        try:
            open_shards(tmp_path / "step")
        except adaptkit.AdaptKitError:
            answers += 1
    assert answers > 2 or key in ("module", "shared_params", "frozen_param_shapes")


def test_a_truncated_shard_is_corrupt(tmp_path: Path):
    """A .distcp that was cut is told with its name."""
    saved(tmp_path / "cut", model_state())
    file = tmp_path / "cut" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(adaptkit.AdaptKitError, match="__0_0.distcp is shorter than") as caught:
        adaptkit.convert(tmp_path / "cut", tmp_path / "out", "safetensors")
    assert caught.value.code == 3


def test_two_ranks_of_fsdp_are_put_together(tmp_path: Path):
    """Uneven shards of two processes equal what torch puts together."""
    folder = SHARDS / "fsdp_ws2"
    dcp_to_torch_save(folder / "pytorch_model_fsdp_0", tmp_path / "torch.pt")
    expected = torch.load(tmp_path / "torch.pt", weights_only=True)["model"]

    found = open_shards(folder).entries

    assert found.keys() == expected.keys()
    assert all(np.array_equal(load(e), expected[n].numpy()) for n, e in found.items())


@pytest.mark.parametrize("stage", ["zero2_full_ws1", "zero3_full_ws2"])
def test_zero_is_put_together(stage: str, tmp_path: Path):
    """The trained and the frozen parameters have their values again: those of the base, or of the module saved whole."""
    adaptkit.convert(SHARDS / stage, tmp_path / "out", "safetensors")

    found = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(SHARDS / "base" / "model.safetensors")
    frozen = {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): t for n, t in found.items() if "lora" not in n
    }
    assert len(found) == 29
    assert frozen.keys() == base.keys()
    assert all(torch.equal(frozen[n], base[n]) for n in base)
    module = SHARDS / "zero2_full_ws1" / "global_step1" / "mp_rank_00_model_states.pt"
    whole = torch.load(module, weights_only=True)["module"]
    assert all(torch.allclose(found[n], whole[n], atol=1e-8) for n in whole)


@pytest.mark.parametrize("source", ["zero3_exclude_frozen_ws2", "zero3_full_ws2", "zero2_full_ws1"])
def test_the_adapter_in_zero_is_a_peft_adapter_again(source: str, tmp_path: Path):
    """--to peft writes what real PEFT loads, and names the base's tensors that stayed behind."""
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(CONFIG))

    done = adaptkit.convert(SHARDS / source, tmp_path / "out", "peft", config=config)

    assert (done.sites, done.tensors) == (4, 8)
    assert any("tensors of the base model" in n.text for n in done.notes) == ("full" in source)
    assert loads_in_peft(tmp_path / "out")


def test_the_adapter_in_fsdp_shards_is_a_peft_adapter_again(tmp_path: Path):
    """The settings may lie in the folder of --base."""
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "adapter_config.json").write_text(json.dumps(CONFIG | {"r": 3, "lora_alpha": 6}))

    source = SHARDS / "fsdp_ws2"
    done = adaptkit.convert(source, tmp_path / "out", "peft", base=tmp_path / "settings")

    assert done.sites == 4
    assert loads_in_peft(tmp_path / "out")
    with pytest.raises(adaptkit.AdaptKitError, match="no adapter_config.json lies beside it.*--config"):
        adaptkit.convert(source, tmp_path / "none", "peft")


def loads_in_peft(folder: Path) -> bool:
    """Whether PEFT finds every key of an adapter for the samples' Llama, and the values arrive."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(SHARDS / "base"), folder)
    mine = load_file(folder / "adapter_model.safetensors")
    theirs = {n.replace(".default", ""): t for n, t in model.state_dict().items() if "lora" in n}
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n].float()) for n in mine)


def test_a_lost_rank_is_told(tmp_path: Path):
    """One file of two is not half a model."""
    folder = tmp_path / "zero" / "global_step1"
    folder.mkdir(parents=True)
    source = SHARDS / "zero3_full_ws2" / "global_step1"
    for name in ("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (folder / name).write_bytes((source / name).read_bytes())
    (tmp_path / "zero" / "latest").write_text("global_step1\n")

    with pytest.raises(adaptkit.AdaptKitError, match="1 of 2 ranks are there; copy the files of all machines"):
        adaptkit.convert(tmp_path / "zero", tmp_path / "out", "safetensors")


def zero_three(folder: Path, ranks: int, bf16: bool = False) -> dict[str, torch.Tensor]:
    """A ZeRO-3 checkpoint with a frozen and two trained parameters, as DeepSpeed lays it out."""
    torch.manual_seed(ranks)
    trained = {"a.weight": torch.randn(5, 3), "b.weight": torch.randn(7)}
    frozen = {"c.weight": torch.randn(3, 5).bfloat16()}
    folder.mkdir(parents=True)
    for rank in range(ranks):

        def share(t: torch.Tensor, rank: int = rank) -> torch.Tensor:
            size = -(-t.numel() // ranks)
            return torch.cat([t.reshape(-1), torch.zeros(size * ranks - t.numel(), dtype=t.dtype)])[rank * size :][
                :size
            ].clone()

        shapes = {n: t.shape for n, t in trained.items()}
        model = {"module": {}, "param_shapes": [shapes], "buffer_names": [], "shared_params": {}}
        model |= {"frozen_param_shapes": {n: t.shape for n, t in frozen.items()}}
        model |= {"frozen_param_fragments": {n: share(t) for n, t in frozen.items()}, "ds_version": "0.19.8"}
        flat = [share(t) for t in trained.values()]  # one group for each, cut at different places
        state = {"zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": flat}
        prefix = "bf16_" if bf16 else ""
        torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save({"optimizer_state_dict": state}, folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return trained | frozen


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shares_of_any_number_of_ranks(ranks: int, tmp_path: Path):
    """Padding at the end of each parameter is left out, also for bf16 and for parameters that do not divide."""
    expected = zero_three(tmp_path / "step", ranks, bf16=ranks == 3)

    found = open_shards(tmp_path / "step").entries

    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert np.array_equal(load(found[name]).astype("f4"), t.float().numpy())


def zero_two(folder: Path, ranks: int) -> dict[str, torch.Tensor]:
    """A ZeRO-2 checkpoint of two groups, padded to twice the ranks as DeepSpeed pads."""
    torch.manual_seed(ranks)
    groups = [{"a": torch.randn(5, 3), "b": torch.randn(7)}, {"c": torch.randn(3)}]
    folder.mkdir(parents=True)
    flats = []
    for group in groups:
        flat = torch.cat([t.reshape(-1) for t in group.values()])
        flat = torch.cat([flat, torch.zeros(-len(flat) % (2 * ranks))])
        flats.append(flat.chunk(ranks))
    shapes = [{n: t.shape for n, t in g.items()} for g in groups]
    buffer = {"buffer": torch.arange(3.0)}
    torch.save(
        {"module": buffer, "buffer_names": ["buffer"], "param_shapes": shapes, "shared_params": {"tied": "a"}},
        folder / "mp_rank_00_model_states.pt",
    )
    for rank in range(ranks):
        state = {"zero_stage": 2, "partition_count": [ranks] * 2}
        state |= {"single_partition_of_fp32_groups": [f[rank].clone() for f in flats]}
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return groups[0] | groups[1] | buffer | {"tied": groups[0]["a"]}


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_groups_dealt_out_to_ranks(ranks: int, tmp_path: Path):
    """A parameter may begin on one rank and end on another; buffers and shared names come along."""
    expected = zero_two(tmp_path / "step", ranks)

    adaptkit.convert(tmp_path / "step", tmp_path / "out", "pytorch")

    found = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items())


def test_an_adapter_without_numbers_says_where_they_are(tmp_path: Path):
    """ZeRO-3 saves empty tensors when nobody gathers them: the sentence names the folder with the real ones."""
    folder = tmp_path / "checkpoint-500"
    zero_three(folder / "global_step500", 2)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    names = [f"base_model.model.layers.0.q_proj.lora_{x}.weight" for x in "AB"]
    save_file({n: torch.zeros(0) for n in names}, folder / "adapter_model.safetensors")

    with pytest.raises(adaptkit.AdaptKitError) as caught:
        adaptkit.convert(folder, tmp_path / "out", "peft")

    assert "2 of 2 tensors hold no numbers" in str(caught.value)
    assert "the numbers are in checkpoint-500/global_step500" in str(caught.value)
    assert "adaptkit convert checkpoint-500/global_step500 --to peft" in str(caught.value)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_rectangles_are_gathered_in_any_pieces(dim: int, tmp_path: Path):
    """A tensor cut along any dimension, read in pieces of any length, is the tensor."""
    whole = np.arange(4 * 6 * 5, dtype="<i2").reshape(4, 6, 5)
    parts = []
    for i, at in enumerate(range(0, whole.shape[dim], 2)):
        piece = np.take(whole, range(at, min(at + 2, whole.shape[dim])), axis=dim)
        (tmp_path / str(i)).write_bytes(piece.tobytes())
        entry = Entry("w", "I16", piece.shape, tmp_path / str(i), 0, piece.nbytes)
        offsets = tuple(at if d == dim else 0 for d in range(3))
        parts.append(part(entry, whole.shape, offsets, piece.shape))
    covered(parts, whole.shape)

    for step in (1, 7, 11, 64, 1000):
        got = bytearray(whole.nbytes)
        for at in range(0, len(got), step):
            fill(parts, 2, memoryview(got)[at : at + step], at, read_some)
        assert bytes(got) == whole.tobytes()


def read_some(path: Path, buffer: memoryview, offset: int) -> None:
    with io.FileIO(path) as f:
        f.seek(offset)
        assert f.readinto(buffer) == len(buffer)


def sliced(folder: Path, ranks: int = 3) -> dict[str, torch.Tensor]:
    """What torch's HuggingFaceStorageWriter writes from several ranks, rows dealt out, the last share shorter."""
    torch.manual_seed(0)
    whole = {"a.weight": torch.randn(7, 4), "b.weight": torch.randn(5).bfloat16()}
    folder.mkdir()
    for rank in range(ranks):
        pieces, told = {}, {}
        for name, t in whole.items():
            share = -(-len(t) // ranks)
            pieces[name] = t[rank * share : (rank + 1) * share].clone()
            told[name] = {"saved_offsets": [rank * share, *[0] * (t.ndim - 1)]}
        metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(told)}
        save_file(pieces, folder / f"shard-{rank:05}-model-00001-of-00001.safetensors", metadata)
    return whole


def test_slices_in_safetensors_files_are_put_together(tmp_path: Path):
    """Every rank wrote its own file: the tensors are whole again, and one file alone is refused."""
    whole = sliced(tmp_path / "in")

    assert adaptkit.convert(tmp_path / "in", tmp_path / "out", "safetensors").source_format == "dcp"

    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[n], t) for n, t in whole.items())
    one = next((tmp_path / "in").iterdir())
    with pytest.raises(adaptkit.AdaptKitError, match="holds slices of tensors.*give the folder"):
        adaptkit.convert(one, tmp_path / "one", "safetensors")
    os.unlink(tmp_path / "in" / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(adaptkit.AdaptKitError, match="'a.weight': its parts hold 16 of 28 elements"):
        adaptkit.convert(tmp_path / "in", tmp_path / "two", "safetensors")


def test_parts_that_overlap_or_leave_holes_are_corrupt():
    """Every number is in exactly one part."""
    a, b = (Part(Path("x"), 0, (0, 2), columns, 4) for columns in ((0, 2), (2, 4)))

    covered([a, b], (2, 4))
    with pytest.raises(adaptkit.AdaptKitError, match="hold 4 of 8 elements"):
        covered([a], (2, 4))
    with pytest.raises(adaptkit.AdaptKitError, match="overlap"):
        covered([a, a], (2, 4))


def test_shards_are_recognised():
    """Each folder of shards is what it is, and nothing else is taken for shards."""
    assert {p.name: kind(p) for p in SHARDS.iterdir() if p.is_dir()} == {
        "base": None,
        "fsdp_ws2": "dcp",
        "zero2_full_ws1": "deepspeed",
        "zero3_exclude_frozen_ws2": "deepspeed",
        "zero3_full_ws2": "deepspeed",
    }
    assert {kind(p) for p in FIXTURES.glob("*/*")} - {None} == {"dcp", "deepspeed"}
