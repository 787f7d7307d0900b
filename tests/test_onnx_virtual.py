"""Virtual tokens built into graphs, against real PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import peft
import pytest
import torch
import transformers
from graphs import Decoder, batch, generated, onnxruntime, positions
from torch import Tensor, nn

import adaptkit
from adaptkit.errors import Mismatch

pytestmark = [pytest.mark.slow, pytest.mark.peft, pytest.mark.filterwarnings("ignore")]
NEAR = 1e-5
TOKENS = 5
KINDS: dict[str, Any] = {
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=TOKENS),
    "ptuning": lambda task: peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=TOKENS, encoder_hidden_size=16),
    "prefix": lambda task: peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=TOKENS, prefix_projection=True, encoder_hidden_size=16
    ),
}


def every(mask: Tensor) -> Tensor:
    """Positions as PEFT counts them after a prompt: padding has some as well."""
    return torch.arange(mask.shape[1]).expand(len(mask), -1)


def trained(model: nn.Module, kind: str, task: str, folder: Path) -> nn.Module:
    """PEFT's model, with its base and its adapter in folders."""
    model.eval().save_pretrained(folder / "base")
    made = peft.get_peft_model(model, KINDS[kind](task))
    stir = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "prompt_encoder" in name or "classifier" in name:
                p.normal_(0, 0.6, generator=stir)
    made.save_pretrained(folder / kind)
    return made.eval()


@pytest.mark.parametrize(("family", "kind"), [("llama", "ptuning"), ("gpt2", "prefix")])
def test_a_decoder_says_what_peft_says(family, kind, tmp_path):
    """Logits and 20 greedy tokens, of one text and of three padded ones, with the inputs of any other decoder."""
    model = trained(graphs.decoder(family), kind, "CAUSAL_LM", tmp_path)
    made = adaptkit.export_onnx(tmp_path / "base", tmp_path / kind, tmp_path / "out")
    graph = Decoder(tmp_path / "out", positions if kind == "prefix" else every)

    for ids, mask in (batch(1), batch(3)):
        with torch.no_grad():
            where = {"position_ids": positions(mask)} if kind == "prefix" else {}
            theirs = model(input_ids=ids, attention_mask=mask, **where).logits[:, -ids.shape[1] :]
        assert (graph.logits(ids, mask) - theirs)[mask > 0].abs().max() <= NEAR
        assert torch.equal(graph.greedy(ids, mask), generated(model, ids, mask))
    plain = {"input_ids", "attention_mask", "position_ids"}
    plain |= {f"past_key_values.{i}.{k}" for i in range(2) for k in ("key", "value")}
    assert {i.name for i in graph.session.get_inputs()} == plain
    assert made.virtual == TOKENS
    said = json.loads((tmp_path / "out" / "adaptkit.json").read_text())
    assert said["virtual_tokens"] == TOKENS
    assert said["verified"]["greedy"] == said["verified"]["of"] == 80
    if family == "llama":
        told = json.loads((tmp_path / "out" / "genai_config.json").read_text())
        assert told["model"]["context_length"] == 64 - TOKENS


def test_an_encoder_says_what_peft_says_and_its_trained_head_comes_along(tmp_path):
    """BERT after a prompt; the classifier that was trained with it lies in the adapter's folder."""
    sizes = {k: v for k, v in graphs.SIZES.items() if k != "num_key_value_heads"}
    torch.manual_seed(0)
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3))
    model = trained(bert, "prompt", "SEQ_CLS", tmp_path)
    adaptkit.export_onnx(tmp_path / "base", tmp_path / "prompt", tmp_path / "out")
    ids = torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    words = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        theirs = model(**words).logits

    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    mine = session.run(["logits"], {k: v.numpy() for k, v in words.items()})[0]

    assert np.abs(mine - theirs.numpy()).max() <= NEAR
    assert theirs.std() > 0.1


def test_an_encoder_decoder_says_what_peft_says(tmp_path):
    """A prompt before what the encoder reads: programs hand its longer states to the decoder and need not know."""
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(0)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    )
    model = trained(t5, "prompt", "SEQ_2_SEQ_LM", tmp_path)
    adaptkit.export_onnx(tmp_path / "base", tmp_path / "prompt", tmp_path / "out", no_verify=True)
    ids = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    spoken = torch.tensor([[0, 5, 7], [0, 9, 11]])
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask, decoder_input_ids=spoken).logits.numpy()

    first, second = (
        onnxruntime.InferenceSession(str(tmp_path / "out" / f"{n}.onnx")) for n in ("encoder_model", "decoder_model")
    )
    states = first.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    heard = {"encoder_hidden_states": states, "encoder_attention_mask": mask.numpy()}
    mine = second.run(["logits"], {"input_ids": spoken.numpy(), **heard})[0]

    assert states.shape[1] == ids.shape[1] + TOKENS
    assert np.abs(mine - theirs).max() <= NEAR * max(1, np.abs(theirs).max())


def test_virtual_tokens_on_a_live_model_are_built_in_and_stay_on_it(tmp_path):
    """A live model is exported as it runs, and is afterwards what it was."""
    from adaptkit.live.tokens import standing

    model = graphs.decoder("gpt2")
    tokens = torch.randn(TOKENS, 32, generator=torch.Generator().manual_seed(1))
    prompt = adaptkit.Adapter({"": adaptkit.Site(adaptkit.PromptTuning(TOKENS), {"P": tokens})})
    adaptkit.attach(model, prompt)
    ids, mask = batch(1)
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits[:, TOKENS:]

    adaptkit.export_onnx(model, [], tmp_path / "out", no_verify=True)

    assert (Decoder(tmp_path / "out").logits(ids, mask) - before).abs().max() <= NEAR
    assert standing(model).active == ["default"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits[:, TOKENS:], before)


@pytest.fixture(scope="module")
def soft(tmp_path_factory):
    """A base and a prompt for it."""
    folder = tmp_path_factory.mktemp("soft")
    trained(graphs.decoder("llama"), "prompt", "CAUSAL_LM", folder)
    return folder


@pytest.mark.parametrize(
    ("adapters", "options", "word"),
    [
        (["prompt"], {"swappable": True}, "without --swappable"),
        (["prompt", "prompt"], {}, "2 sets of virtual tokens"),
        (["prompt"], {"weights": [0.5]}, "whole"),
    ],
)
def test_what_virtual_tokens_cannot_do_is_refused(soft, adapters, options, word):
    """In a sentence, and nothing is left behind."""
    with pytest.raises(Mismatch, match=word):
        adaptkit.export_onnx(soft / "base", [soft / a for a in adapters], soft / "out", **options)

    assert sorted(p.name for p in soft.iterdir()) == ["base", "prompt"]
