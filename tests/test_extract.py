"""extract: the base with the extracted adapter is the fine-tuned model, in our merge and in real PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from models import loaded
from places import FIXTURES
from safetensors.torch import load_file, save_file

import adaptkit
from adaptkit.cli.app import cli, run

MODELS = FIXTURES / "models"
Change = Callable[[str, torch.Tensor], torch.Tensor]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def tuned(family: str, folder: Path, change: Change, config: dict | None = None) -> Path:
    """A copy of a model of the fixtures with other weights."""
    shutil.copytree(MODELS / family, folder)
    save_file(
        {n: change(n, w).contiguous() for n, w in weights(folder).items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    if config:
        at = folder / "config.json"
        at.write_text(json.dumps(json.loads(at.read_text()) | config))
    return folder


def shaken(rank: int | None = None, only: Callable[[str], bool] = lambda name: True, size: float = 0.05) -> Change:
    """Adds noise to tensors, to matrices one of some rank."""

    def change(name: str, w: torch.Tensor) -> torch.Tensor:
        if not only(name) or not w.is_floating_point():
            return w
        g = torch.Generator().manual_seed(len(name) * 1000 + sum(map(ord, name)))
        if rank is None or w.ndim != 2:
            noise = torch.randn(w.shape, generator=g)
        else:
            noise = torch.randn(w.shape[0], rank, generator=g) @ torch.randn(rank, w.shape[1], generator=g)
        return (w.float() + size * noise).to(w.dtype)

    return change


def merged(base: str, adapter: Path, out: Path, dtype: str | None = "float32") -> dict[str, torch.Tensor]:
    adaptkit.merge(MODELS / base, adapter, out, dtype=dtype)
    return weights(out)


def is_matrix(name: str) -> bool:
    return name.endswith("weight") and any(
        k in name for k in ("proj", "attn.c_", "mlp.c_", "query", "key", "value", "dense")
    )


FAMILIES = ["llama", "gpt2", "bert", "llama-untied-tiny"]


@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_rank_the_merge_is_the_finetuned_model(family: str, tmp_path: Path):
    """Every tensor within float32 rounding: matrices, biases, norms, embeddings and heads."""
    new = tuned(family, tmp_path / "new", shaken())
    found = adaptkit.extract(new, MODELS / family, tmp_path / "lora", rank=10_000)
    got, expected = merged(family, tmp_path / "lora", tmp_path / "merged"), weights(new)

    assert got.keys() == expected.keys()
    for name, w in expected.items():
        torch.testing.assert_close(got[name].float(), w.float(), atol=2e-6, rtol=2e-6, msg=name)
    assert found.error < 1e-5
    assert found.unchanged == 0
    assert not found.left


@pytest.mark.peft
@pytest.mark.parametrize("family", FAMILIES)
def test_real_peft_loads_it_and_merges_to_the_finetuned_model(family: str, tmp_path: Path):
    """Same names in the model, same scale, same saved modules: PEFT's merged weights are the fine-tuned ones."""
    from peft import PeftModel

    new = tuned(family, tmp_path / "new", shaken(size=0.02))
    adaptkit.extract(new, MODELS / family, tmp_path / "lora", rank=10_000)
    model = PeftModel.from_pretrained(loaded(MODELS / family, family), tmp_path / "lora")
    got = model.merge_and_unload().state_dict()

    expected = loaded(new, family).state_dict()
    assert got.keys() == expected.keys()
    for name, w in expected.items():
        torch.testing.assert_close(got[name].float(), w.float(), atol=1e-5, rtol=1e-5, msg=name)


KINDS = {"gpt2": "AutoModelForCausalLM", "vit": "AutoModelForImageClassification", "opt": "AutoModelForCausalLM",
         "mixtral": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM"}  # fmt: skip
BARE = {"vit": ("cls_token", "position_embeddings"), "mixtral": ("experts",)}


@pytest.mark.peft
@pytest.mark.parametrize("kind", KINDS)
def test_names_on_disk_become_names_in_the_model(kind: str, tmp_path: Path):
    """Without the prefix, renamed, fused: the adapter has the model's names, and both merges give the fine-tuned model."""
    import peft_zoo
    import transformers

    loader = getattr(transformers, KINDS[kind])
    torch.manual_seed(0)
    model = getattr(peft_zoo, kind)()
    model.save_pretrained(tmp_path / "base")
    if kind == "gpt2":
        bare = {n.removeprefix("transformer."): w for n, w in weights(tmp_path / "base").items()}
        save_file(bare, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    for name, p in model.named_parameters():
        if not any(part in name for part in BARE.get(kind, ())):
            p.data += 0.05 * torch.randn_like(p)
    model.save_pretrained(tmp_path / "new")
    _extracted(kind, tmp_path)

    for found in (_by_us(tmp_path, loader), *([_by_peft(tmp_path, loader)] if kind != "t5" else [])):
        for name, w in model.state_dict().items():
            torch.testing.assert_close(found[name], w, atol=1e-5, rtol=1e-5, msg=name)


def _extracted(kind: str, folder: Path) -> None:
    if kind != "t5":
        adaptkit.extract(folder / "new", folder / "base", folder / "lora", rank=1000)
        return
    with pytest.warns(adaptkit.AdaptKitWarning, match="one tensor under several names"):
        adaptkit.extract(folder / "new", folder / "base", folder / "lora", rank=1000)


def _by_us(folder: Path, loader) -> dict[str, torch.Tensor]:
    adaptkit.merge(folder / "base", folder / "lora", folder / "merged", dtype="float32")
    return loader.from_pretrained(folder / "merged").state_dict()


def _by_peft(folder: Path, loader) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    model = loader.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(model, folder / "lora").merge_and_unload().state_dict()


@pytest.mark.parametrize("part", ["norm.weight", "bias"])
def test_a_model_whose_matrices_stayed_still_merges(part: str, tmp_path: Path):
    """An adapter without sites, and a word about PEFT."""
    base = "llama-untied-tiny"
    new = tuned(base, tmp_path / "new", shaken(only=lambda n: n.endswith(part)))
    with pytest.warns(adaptkit.AdaptKitWarning, match="refuses an adapter without sites"):
        found = adaptkit.extract(new, MODELS / base, tmp_path / "lora", rank=2)
    got = merged(base, tmp_path / "lora", tmp_path / "merged")

    assert not found.sites
    assert all((got[n] == w).all() for n, w in weights(new).items())


def test_a_merged_lora_is_recovered_within_rounding_noise(tmp_path: Path):
    """From bfloat16 weights, at its own rank: the update is nearer to the original than the noise that rounding added."""
    adapter = FIXTURES / "adapters" / "llama" / "lora"
    adaptkit.merge(MODELS / "llama", adapter, tmp_path / "new")
    rank = adaptkit.inspect(adapter).rank
    found = adaptkit.extract(tmp_path / "new", MODELS / "llama", tmp_path / "back", rank=rank)
    true, back = adaptkit.read(adapter), adaptkit.read(tmp_path / "back")

    assert set(back.sites) == set(true.sites)
    for s in found.sites:
        D, E = (dense(a.sites[s.name]) for a in (true, back))
        assert np.linalg.norm(E - D) < 1.1 * s.error * s.norm / np.sqrt(1 - s.error**2) + 0.1 * np.linalg.norm(D)
        assert s.rank == rank


def dense(site) -> np.ndarray:
    L, R, s = site.tuner.factors({k: np.asarray(v, "f8") for k, v in site.params.items()})
    return s * (L @ R)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_what_is_said_of_the_error_is_the_error(rank: int, tmp_path: Path):
    """For each site, and over all, against the matrices themselves."""
    new = tuned("llama", tmp_path / "new", shaken(6, is_matrix))
    found = adaptkit.extract(new, MODELS / "llama", tmp_path / "lora", rank=rank)
    adapter, a, b = adaptkit.read(tmp_path / "lora"), weights(new), weights(MODELS / "llama")

    total = 0.0
    for s in found.sites:
        D = (a[f"{s.name}.weight"].double() - b[f"{s.name}.weight"].double()).numpy()
        error, values = np.linalg.norm(D - dense(adapter.sites[s.name])), np.linalg.svd(D, compute_uv=False)
        assert s.norm == pytest.approx(np.linalg.norm(D), rel=1e-6)
        assert s.error == pytest.approx(error / np.linalg.norm(D), rel=1e-3, abs=1e-6)
        assert error <= 1.01 * np.sqrt((values[rank:] ** 2).sum()) + 1e-6 * s.norm
        total += error**2
    assert found.error == pytest.approx(
        np.sqrt(total) / np.sqrt(sum(s.norm**2 for s in found.sites)), rel=1e-3, abs=1e-6
    )


def test_energy_chooses_a_rank_for_each_site(tmp_path: Path):
    """The ranks differ, are in rank_pattern, and hold what was asked for."""
    new = tuned("llama", tmp_path / "new", lambda n, w: shaken(3 if "q_proj" in n else 9, is_matrix)(n, w))
    found = adaptkit.extract(new, MODELS / "llama", tmp_path / "lora", energy=0.95)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())

    assert {s.rank for s in found.sites if "q_proj" in s.name} <= {2, 3}
    assert len({s.rank for s in found.sites}) > 1
    assert config["rank_pattern"]
    assert all(s.energy >= 0.95 for s in found.sites)
    capped = adaptkit.extract(new, MODELS / "llama", tmp_path / "capped", energy=0.95, max_rank=2)
    assert max(s.rank for s in capped.sites) == 2


def test_convolutions_of_one_and_two_dimensions(tmp_path: Path):
    """A kernel is a matrix of its output channels; what is no layer's weight is named."""
    base = weights(MODELS / "custom")
    kernels = [n for n, w in base.items() if w.ndim > 2]
    new = tuned("custom", tmp_path / "new", shaken(only=lambda n: n in kernels))
    found = adaptkit.extract(new, MODELS / "custom", tmp_path / "lora", rank=1000)
    got = merged("custom", tmp_path / "lora", tmp_path / "merged")

    assert any(s.shape in {tuple(base[n].shape) for n in kernels} for s in found.sites)
    for name, w in weights(new).items():
        torch.testing.assert_close(got[name].float(), w.float(), atol=2e-6, rtol=2e-6, msg=name)


def test_a_grown_vocabulary_comes_with_its_tokenizer(tmp_path: Path):
    """New rows are saved whole, ends that were tied stay tied, and merging grows the base."""
    rows = weights(MODELS / "llama")["model.embed_tokens.weight"].shape[0] + 3

    def change(name: str, w: torch.Tensor) -> torch.Tensor:
        return torch.cat([w, w[:3]]) if "embed_tokens" in name or "lm_head" in name else w

    new = tuned("llama", tmp_path / "new", change, {"vocab_size": rows})
    found = adaptkit.extract(new, MODELS / "llama", tmp_path / "lora", rank=4)
    got = merged("llama", tmp_path / "lora", tmp_path / "merged", dtype=None)

    assert "model.embed_tokens.weight" in found.whole
    assert (tmp_path / "lora" / "tokenizer.json").exists()
    assert got.keys() == weights(new).keys()
    assert all((got[n] == w).all() for n, w in weights(new).items())
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == rows


@pytest.mark.filterwarnings("ignore::adaptkit.AdaptKitWarning")
@pytest.mark.parametrize("untied", ["base", "new"])
def test_ends_that_one_model_ties_and_the_other_does_not(untied: str, tmp_path: Path):
    """The head that is its own tensor in one model is compared with the embedding of the other."""
    shutil.copytree(MODELS / "llama", tmp_path / "tied")
    apart = tuned("llama", tmp_path / "apart", lambda n, w: w, {"tie_word_embeddings": False})
    w = weights(apart)
    head = shaken(size=0.1)("head", w["model.embed_tokens.weight"])
    save_file(w | {"lm_head.weight": head}, apart / "model.safetensors", {"format": "pt"})
    base, new = (apart, tmp_path / "tied") if untied == "base" else (tmp_path / "tied", apart)

    found = adaptkit.extract(new, base, tmp_path / "lora", rank=2)
    adaptkit.merge(base, tmp_path / "lora", tmp_path / "merged")
    got, expected = (loaded(f, "llama").state_dict() for f in (tmp_path / "merged", new))

    assert found.whole == ["lm_head.weight"]
    assert all((got[n] == w).all() for n, w in expected.items())


@pytest.mark.filterwarnings("ignore::adaptkit.AdaptKitWarning")
def test_what_the_selection_leaves_out_is_refused_or_reported(tmp_path: Path):
    """Never silently: the error names it, and --partial reports it."""
    new = tuned("llama", tmp_path / "new", shaken(2, is_matrix))

    with pytest.raises(adaptkit.AdaptKitError, match=r"24 changed tensors would not be in the adapter.*--partial"):
        adaptkit.extract(new, MODELS / "llama", tmp_path / "lora", rank=2, target_modules="q_proj")
    assert not (tmp_path / "lora").exists()
    with pytest.warns(adaptkit.AdaptKitWarning, match="is not the fine-tuned model"):
        found = adaptkit.extract(
            new,
            MODELS / "llama",
            tmp_path / "lora",
            rank=2,
            target_modules=r".*\.[qv]_proj",
            layers="1-2",
            partial=True,
        )
    assert len(found.sites) == 4
    assert len(found.left) == 24


def test_experts_are_named_when_no_site_can_hold_them(tmp_path: Path):
    """Experts that the model stacks and the file does not are refused, or left out and reported; the rest works."""
    new = tuned("mixtral", tmp_path / "new", shaken(2, lambda n: "q_proj" in n or "experts" in n))

    with pytest.raises(adaptkit.AdaptKitError, match=r"changed tensors would not be in the adapter.*experts"):
        adaptkit.extract(new, MODELS / "mixtral", tmp_path / "lora", rank=2)
    with pytest.warns(adaptkit.AdaptKitWarning, match="experts"):
        found = adaptkit.extract(new, MODELS / "mixtral", tmp_path / "lora", rank=2, partial=True)
    assert [s.name for s in found.sites] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


def experts_shaken(rank: int, only: Callable[[str], bool]) -> Change:
    """Each expert's matrix gets its own update; the second expert keeps its numbers."""
    rng = np.random.default_rng(5)

    def change(name: str, w: torch.Tensor) -> torch.Tensor:
        if not only(name):
            return w
        L, R = (rng.standard_normal(s).astype("f4") for s in ((len(w), w.shape[1], rank), (len(w), rank, w.shape[2])))
        L[1] = 0
        return w + torch.from_numpy(0.05 * L @ R).to(w.dtype)

    return change


@pytest.mark.peft
@pytest.mark.parametrize("which", ["experts", "down_proj"])
def test_a_stack_of_experts_is_one_site(which: str, tmp_path: Path):
    """Merged by us it is the fine-tuned model, and real PEFT answers as that does."""
    from models import inputs_of, outputs
    from peft import PeftModel

    new = tuned("mixtral-fused", tmp_path / "new", experts_shaken(2, lambda n: f".{which}" in n and "layers.1" in n))
    found = adaptkit.extract(new, MODELS / "mixtral-fused", tmp_path / "lora", rank=3)
    got, expected = merged("mixtral-fused", tmp_path / "lora", tmp_path / "merged"), weights(new)
    model = PeftModel.from_pretrained(loaded(MODELS / "mixtral-fused", "mixtral"), str(tmp_path / "lora")).eval()
    with torch.no_grad():
        theirs = model(**inputs_of("mixtral")).logits.numpy()

    assert len(found.sites) == (2 if which == "experts" else 1)
    assert found.error < 1e-5
    for name, w in expected.items():
        torch.testing.assert_close(got[name], w, atol=2e-6, rtol=2e-6, msg=name)
    np.testing.assert_allclose(theirs, outputs(new, "mixtral", "mixtral"), atol=1e-4)


def test_experts_stored_as_in_and_out_are_turned(tmp_path: Path):
    """gpt-oss keeps (in, out), also where a stack is square and no shape tells; combined and resized, it stays so."""
    rng, base, new = np.random.default_rng(0), tmp_path / "base", tmp_path / "new"
    W, L, R = (rng.standard_normal(s).astype("f4") for s in ((3, 8, 8), (3, 8, 2), (3, 2, 8)))
    name = "model.layers.0.mlp.experts.down_proj"
    for folder, w in ((base, W), (new, W + L @ R)):
        folder.mkdir()
        save_file({name: torch.from_numpy(w)}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    adaptkit.extract(new, base, tmp_path / "lora", rank=2)
    adaptkit.resize(tmp_path / "lora", tmp_path / "small", rank=2)
    adaptkit.combine([tmp_path / "lora"] * 2, tmp_path / "both", weights=[0.25, 0.75])

    for adapter in ("lora", "small", "both"):
        adaptkit.merge(base, tmp_path / adapter, tmp_path / f"{adapter}-merged")
        got = weights(tmp_path / f"{adapter}-merged")[name]
        torch.testing.assert_close(got, torch.from_numpy(W + L @ R), atol=1e-5, rtol=1e-5)


def test_a_finetuned_model_stored_with_another_precision(tmp_path: Path):
    """What only rounding changed is not a change; what changed is told from it."""
    base = "llama-untied-tiny"
    change = shaken(2, lambda n: "q_proj.weight" in n)
    new = tuned(base, tmp_path / "new", lambda n, w: change(n, w).bfloat16())
    found = adaptkit.extract(new, MODELS / base, tmp_path / "lora", rank=4)

    assert {s.name.rpartition(".")[2] for s in found.sites} == {"q_proj"}
    assert not found.whole


def test_pickled_and_sharded_models_give_the_same_adapter(tmp_path: Path):
    """How the numbers are stored does not matter, nor how many threads there are."""
    new = tuned("llama", tmp_path / "new", shaken(3, is_matrix))
    adaptkit.extract(new, MODELS / "llama", tmp_path / "a", rank=2, workers=1)
    pickled = tmp_path / "pickled"
    shutil.copytree(new, pickled)
    torch.save(weights(new), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    adaptkit.extract(pickled, MODELS / "llama", tmp_path / "b", rank=2, workers=4)

    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (
        tmp_path / "b/adapter_model.safetensors"
    ).read_bytes()


def test_the_gpu_road_gives_the_same_adapter(tmp_path: Path, monkeypatch):
    """On torch's CPU device, which runs the same lines."""
    from adaptkit.verbs import extract

    new = tuned("llama", tmp_path / "new", shaken(None, is_matrix))
    one = adaptkit.extract(new, MODELS / "llama", tmp_path / "a", rank=4)
    monkeypatch.setattr(extract, "checked", lambda device: torch.device("cpu"))
    other = adaptkit.extract(new, MODELS / "llama", tmp_path / "b", rank=4, device="cuda")

    assert other.error == pytest.approx(one.error, rel=1e-3)
    assert [s.name for s in one.sites] == [s.name for s in other.sites]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_in_half_the_size(dtype: str, tmp_path: Path):
    """The factors are rounded, what is saved whole keeps the fine-tuned model's dtype."""
    new = tuned("llama", tmp_path / "new", shaken(2, lambda n: "q_proj" in n or n == "model.norm.weight"))
    adaptkit.extract(new, MODELS / "llama", tmp_path / "lora", rank=2, dtype=dtype)
    found = weights(tmp_path / "lora")

    assert {str(w.dtype) for n, w in found.items() if "lora_" in n} == {f"torch.{dtype}"}
    assert found["base_model.model.model.norm.weight"].dtype == torch.bfloat16


REFUSED = {
    "neither": (["--energy", "2"], 2, "--energy: 2.0 is not a share"),
    "both": (["--rank", "2", "--energy", "0.5"], 2, "give either --rank or --energy"),
    "rank": (["--rank", "0"], 2, "--rank: 0 is not a rank"),
    "a bound for a rank": (["--rank", "4", "--max-rank", "2"], 2, "--max-rank: bounds what --energy asks for"),
    "selection": (["--rank", "2", "--target-modules", "nope"], 4, "no module matches"),
    "same": (["--rank", "2"], 4, "the two models are the same"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line_and_writes_nothing(case: str, tmp_path: Path, capsys):
    """The exit code and the sentence."""
    options, code, text = REFUSED[case]

    assert run(["extract", str(MODELS / "llama"), str(MODELS / "llama"), "-o", str(tmp_path / "out"), *options]) == code
    assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_models_of_two_families_and_broken_numbers_are_refused(tmp_path: Path):
    """Names and shapes that do not fit, and NaN, by the name of the tensor."""
    with pytest.raises(adaptkit.AdaptKitError, match="different tensors: .* only in the fine-tuned model"):
        adaptkit.extract(MODELS / "gpt2", MODELS / "llama", tmp_path / "out", rank=2)
    nan = tuned("llama", tmp_path / "nan", lambda n, w: w * float("nan") if "layers.1.mlp.up" in n else w)
    with pytest.raises(adaptkit.AdaptKitError, match=r"layers\.1\.mlp\.up_proj.* NaN or infinity"):
        adaptkit.extract(nan, MODELS / "llama", tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_the_modules_and_writes_nothing(tmp_path: Path):
    """From headers alone."""
    words = ["extract", str(MODELS / "llama"), str(MODELS / "llama"), "-o", str(tmp_path / "out"), "--rank", "2"]
    found = CliRunner().invoke(cli, [*words, "--dry-run"])

    assert "28 modules would become sites" in found.output
    assert "nothing was written" in found.output
    assert not list(tmp_path.iterdir())


def test_the_report_names_the_worst_sites(tmp_path: Path):
    """On stdout, and with --json every site."""
    new = tuned("llama", tmp_path / "new", shaken(None, is_matrix))
    words = ["extract", str(new), str(MODELS / "llama"), "-o", str(tmp_path / "out"), "--rank", "2"]
    shown = CliRunner().invoke(cli, words).output
    told = json.loads(CliRunner().invoke(cli, [*words, "--json", "--overwrite"]).output)

    assert "extracted 28 sites" in shown
    assert len(told["sites"]) == 28
    assert 0.5 < told["error"] < 1


def test_factors_that_do_not_fit_the_dtype_are_refused(tmp_path: Path):
    """float16 ends at 65504."""
    new = tuned(
        "llama", tmp_path / "new", lambda n, w: w + 1e30 * torch.eye(*w.shape) if "0.self_attn.q_proj" in n else w
    )
    with pytest.raises(adaptkit.AdaptKitError, match=r"layers\.0\.self_attn\.q_proj.*overflow F16"):
        adaptkit.extract(new, MODELS / "llama", tmp_path / "lora", rank=2, dtype="float16")
    assert not (tmp_path / "lora").exists()


def test_a_pattern_that_is_none_is_a_mistake_of_the_command(tmp_path: Path):
    """Not of a file."""
    with pytest.raises(adaptkit.errors.Usage, match="--target-modules: '\\(' is not a regular expression"):
        adaptkit.extract(MODELS / "llama", MODELS / "llama", tmp_path / "lora", rank=2, target_modules="(")


@pytest.mark.peft
def test_stacks_of_several_ranks_are_loaded_by_peft(tmp_path: Path):
    """Each parameter has its own rank, which stands in rank_pattern; PEFT uses it, though it warns that it does not."""
    from models import inputs_of, outputs
    from peft import PeftModel

    down, up = (experts_shaken(r, lambda n, k=k: k in n) for r, k in ((1, "down_proj"), (3, "gate_up_proj")))
    new = tuned("mixtral-fused", tmp_path / "new", lambda n, w: up(n, down(n, w)))
    found = adaptkit.extract(new, MODELS / "mixtral-fused", tmp_path / "lora", energy=0.9999)
    model = PeftModel.from_pretrained(loaded(MODELS / "mixtral-fused", "mixtral"), str(tmp_path / "lora")).eval()
    with torch.no_grad():
        got = model(**inputs_of("mixtral")).logits.numpy()

    assert {s.rank for s in found.sites} == {1, 3}
    np.testing.assert_allclose(got, outputs(new, "mixtral", "mixtral"), atol=1e-4)
