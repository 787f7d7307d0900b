"""What an export leaves on disk: names, axes, files, nothing of the machine; and what the commands print."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from onnx_families import exported, model_of
from places import FIXTURES

import adaptkit

pytestmark = [pytest.mark.xdist_group("onnx-folder"), pytest.mark.slow]  # each model is exported once: in one process
VOCAB = 9000  # a matrix that the optimiser does not turn around and store once more


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tied Llama of one layer with an adapter, exported by the command, in a home of its own."""
    folder = tmp_path_factory.mktemp("onnx")
    model = model_of("Llama, tied", vocab_size=VOCAB)
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    model.save_pretrained(folder / "base")
    (folder / "base" / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "base" / name).write_bytes((FIXTURES / "models" / "llama" / name).read_bytes())
    adaptkit.write(adapter_for(model), folder / "lora")
    home = folder / "home"
    home.mkdir()
    env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    env |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "HF_HUB_OFFLINE": "1"}
    words = ["export-onnx", "base", "lora", "-o", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "adaptkit", *words], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    return folder, done


def adapter_for(model):
    """A LoRA that was trained a little."""
    import torch

    adaptkit.attach(model, adaptkit.LoRA(r=4, alpha=8), adaptkit.Select(r".*\.(q|v)_proj"))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "adapter_" in name:
            p.data.normal_(std=0.3)
    return adaptkit.detach(model)


def test_the_command_says_what_it_made_and_how_far_it_is_from_torch(made):
    """Two lines on stdout, nothing on stderr when nobody looks."""
    _, done = made
    lines = done.stdout.splitlines()

    assert (done.returncode, done.stderr, len(lines)) == (0, "", 2)
    assert lines[0].startswith(
        "exported model.onnx (text-generation, float32, opset 20) with 1 adapter merged into out ("
    )
    assert "80 of 80 greedy tokens equal" in lines[1] and "the model's own noise" in lines[1]


def test_the_folder_is_what_runtimes_look_for(made):
    """Graph and data beside the settings, the tokenizer and the template; nothing of the way there."""
    folder, _ = made

    assert sorted(p.name for p in (folder / "out").iterdir()) == [
        "adaptkit.json", "chat_template.jinja", "config.json", "genai_config.json", "generation_config.json", "model.onnx",
        "model.onnx_data", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert sorted(p.name for p in folder.iterdir()) == ["base", "home", "lora", "out"]
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {"model.onnx": 1}


def test_no_telemetry_is_left_in_the_home(made):
    """onnxruntime's device id and database are not there."""
    folder, _ = made

    assert [p for p in (folder / "home").rglob("*") if "Microsoft" in p.parts or "onnx" in p.name.lower()] == []


def test_the_graph_has_the_names_that_programs_know(made):
    """Inputs, outputs and axes as optimum, transformers.js and onnxruntime-genai spell them."""
    import onnx

    graph = onnx.load(made[0] / "out" / "model.onnx", load_external_data=False).graph
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.output)
    }

    assert shapes == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        "past_key_values.0.key": ["batch_size", 2, "past_sequence_length", 8],
        "past_key_values.0.value": ["batch_size", 2, "past_sequence_length", 8],
        "logits": ["batch_size", "sequence_length", VOCAB],
        "present.0.key": ["batch_size", 2, "total_sequence_length", 8],
        "present.0.value": ["batch_size", 2, "total_sequence_length", 8],
    }
    onnx.checker.check_model(str(made[0] / "out" / "model.onnx"), full_check=True)


def test_the_graph_says_nothing_of_the_machine_it_was_made_on(made):
    """Tracing writes stack traces with paths and lines of source into every node."""
    raw = (made[0] / "out" / "model.onnx").read_bytes()

    assert not [
        word for word in (b"site-packages", b".py", os.fsencode(Path.home()), os.fsencode(made[0])) if word in raw
    ]
    assert len(raw) < 100_000
    assert b"/tmp" not in (made[0] / "out" / "adaptkit.json").read_bytes()


def test_tied_weights_are_stored_once(made):
    """The data has the size of the parameters, within what tracing folds of small matrices."""
    import onnx

    graph = onnx.load(made[0] / "out" / "model.onnx", load_external_data=False).graph
    data, base = made[0] / "out" / "model.onnx_data", made[0] / "base" / "model.safetensors"

    assert [list(i.dims) for i in graph.initializer].count([VOCAB, 32]) == 1
    assert data.stat().st_size <= 1.01 * base.stat().st_size


def test_the_graph_is_the_merged_model_for_generate(made):
    """Oracle: transformers' own generate on what adaptkit merge writes, token for token."""
    import torch
    from transformers import AutoModelForCausalLM

    from adaptkit.export.players import Session

    folder, _ = made
    adaptkit.merge(folder / "base", folder / "lora", folder / "merged", overwrite=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    ids = torch.tensor([[5, 17, 40, 33]])
    wanted = model.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=-1, pad_token_id=0)[0].tolist()
    session, past, got, new = Session(folder / "out" / "model.onnx"), {}, ids[0].tolist(), ids.numpy()
    past = {n: session.empty(n, 1) for n in session.inputs if n.startswith("past")}
    while len(got) < len(wanted):
        seen = len(got)
        feeds = {
            "input_ids": new,
            "attention_mask": np.ones((1, seen), np.int64),
            "position_ids": np.arange(seen - new.shape[1], seen)[None],
        }
        said = session.run({**feeds, **past})
        past = {n.replace("present", "past_key_values"): v for n, v in said.items() if n.startswith("present")}
        got.append(int(said["logits"][0, -1].argmax()))
        new = np.array([[got[-1]]])

    assert got == wanted


def test_the_receipt_says_what_was_made_of_what(made):
    """adaptkit.json: names, versions, what checking found."""
    found = json.loads((made[0] / "out" / "adaptkit.json").read_text())

    assert (found["base"], found["adapters"], found["made"]["opset"]) == ("base", ["lora"], 20)
    assert set(found["versions"]) >= {"torch", "transformers", "onnx", "onnxscript", "onnxruntime"}
    assert found["verified"]["provider"] == "CPU"


def test_genai_settings_name_the_graph_and_its_shapes(made):
    """What onnxruntime-genai needs to run a graph that it did not build."""
    found = json.loads((made[0] / "out" / "genai_config.json").read_text())
    decoder = found["model"]["decoder"]

    assert (found["model"]["type"], found["model"]["vocab_size"], found["search"]["temperature"]) == (
        "llama",
        VOCAB,
        0.5,
    )
    assert (decoder["head_size"], decoder["num_key_value_heads"], decoder["num_hidden_layers"]) == (8, 2, 1)
    assert decoder["inputs"]["past_key_names"] == "past_key_values.%d.key"
    assert found["search"]["past_present_share_buffer"] is False


def test_a_live_model_is_exported_and_is_what_it_was(tmp_path: Path):
    """The module, its adapters, its flags and its mode come back; without checking, the receipt says so."""
    import torch

    model = model_of("Llama").train()
    adapter = adapter_for(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    made = adaptkit.export_onnx(model, [adapter], tmp_path / "out", opset=18, no_verify=True)

    assert (made.checked, made.opset, made.adapters) == (None, 18, 1)
    assert "not verified" in (tmp_path / "out" / "adaptkit.json").read_text()
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(torch.equal(before[n], after[n]) for n in before)
    assert model.training and all(p.requires_grad for p in model.parameters())

    seen = [weakref.ref(p) for p in model.parameters()]
    del model, after, adapter
    gc.collect()
    assert not [w for w in seen if w() is not None], "tracing leaves nothing behind that holds a model's numbers"


def test_the_direct_route_gives_the_same_graph(tmp_path: Path):
    """torch.onnx alone, for the day on which transformers' exporter is another one: same names, same numbers."""
    import torch

    from adaptkit.export import names, players, trace, verify
    from adaptkit.export.build import decoder
    from adaptkit.export.exam import exam
    from adaptkit.export.write import save

    model = model_of("Mixtral")
    graph = decoder(model)
    asked = exam(model, "decoder", ["logits"], lambda text: None)
    with trace.quiet(), torch.no_grad():
        made = trace._torch(graph, 20)
    names.settle(made, graph)
    save(made, tmp_path / "model.onnx")
    found = verify.compared(asked, players.Runtime({"model": tmp_path / "model.onnx"}, "decoder"))

    assert found.ok and found.greedy == 80
    assert found.prefill < 1e-5


def test_the_two_decoders_of_a_quantised_encoder_decoder_share_their_numbers(tmp_path: Path):
    """The graph for later steps holds next to nothing of its own; test_onnx_families sees to those of floats."""
    import onnx

    made, out = exported("BART", tmp_path / "out", quantize="int8"), tmp_path / "out"
    own = out / "decoder_with_past_model.onnx_data"
    assert made.checked.ok and made.checked.greedy == 80
    assert (own.stat().st_size if own.exists() else 0) < 0.2 * (out / "decoder_model.onnx_data").stat().st_size
    onnx.checker.check_model(str(out / "decoder_with_past_model.onnx"))
    assert made.quantized.typical > 0.9


def test_genai_continues_a_text_as_transformers_does(tmp_path: Path):
    """Oracle: onnxruntime-genai, where it is installed, on a graph that it did not build."""
    genai = pytest.importorskip("onnxruntime_genai")
    import torch

    model = model_of("Mistral, sliding", eos_token_id=95)
    adaptkit.export_onnx(model, (), tmp_path / "out", no_verify=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "out" / name).write_bytes((FIXTURES / "models" / "llama" / name).read_bytes())
    ids = [[5, 17, 40, 33]]
    running = genai.Model(str(tmp_path / "out"))
    how = genai.GeneratorParams(running)
    how.set_search_options(max_length=24, do_sample=False)
    text = genai.Generator(running, how)
    text.append_tokens(np.array(ids, np.int32))
    while not text.is_done():
        text.generate_next_token()

    wanted = model.generate(torch.tensor(ids), do_sample=False, max_length=24, eos_token_id=95, pad_token_id=0)
    assert [int(i) for i in text.get_sequence(0)] == wanted[0].tolist()
