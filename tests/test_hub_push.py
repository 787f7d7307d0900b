"""Pushing: checked first, one commit or one pull request, a card, and nothing told that is nobody's business."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub import made
from hub.state import READ, WRITE
from places import FIXTURES
from safetensors.numpy import save

from adaptkit import AdaptKitError
from adaptkit.verbs.push import sound

MODEL, LORA = FIXTURES / "models" / "llama", FIXTURES / "adapters" / "llama" / "lora"
PLAIN = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def tree(folder: Path) -> dict[str, bytes]:
    """name -> bytes of a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def front(text: bytes) -> dict:
    """The front matter of a card."""
    return yaml.safe_load(text.decode().split("---")[1])


@pytest.fixture
def model(shell) -> Path:
    """A model's folder."""
    return Path(shutil.copytree(MODEL, shell.home / "model"))


@pytest.fixture
def lora(shell) -> Path:
    """An adapter's folder, as PEFT writes it beside a base from the Hub."""
    folder = shell.home / "lora"
    folder.mkdir()
    for name in ADAPTER:
        shutil.copy(LORA / name, folder / name)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "user/base"}))
    return folder


def test_push_and_pull_give_the_same_bytes(hub, shell, model):
    """There and back."""
    pushed = shell("push", model, "user/new")
    pulled = shell("pull", "user/new", "-o", "back")

    assert (pushed.code, pulled.code) == (0, 0), pushed.err + pulled.err
    assert {n: b for n, b in tree(shell.home / "back").items() if n != "adaptkit.json"} == tree(model)
    assert pushed.out.startswith(f"{hub.url}/user/new/commit/")
    assert len(hub.state.repo("user/new").commits) == 2


def test_a_hub_that_knows_no_xet_is_not_asked_for_it(hub, shell, model):
    """The client would use that protocol with any Hub, and fail."""
    done = shell("push", model, "user/new", HF_HUB_DISABLE_XET=None)

    assert done.code == 0, done.err
    assert hub.seen("objects/batch")


def test_where_xet_is_asked_for_and_not_known_the_message_says_what_to_set(hub, shell, model):
    """Not that there is no network."""
    pytest.importorskip("hf_xet")

    done = shell("push", model, "user/new", HF_HUB_DISABLE_XET="0")

    assert done.code == 7
    assert "does not take uploads by Xet" in done.err
    assert "set HF_HUB_DISABLE_XET=1" in done.err


def test_an_adapter_gets_a_card(hub, shell, lora):
    """base_model, library, licence and languages of the base's card."""
    hub.state.put("user/base", {"README.md": b"---\nlicense: apache-2.0\nlanguage:\n- fr\n---\n"})

    done = shell("push", lora, "user/style")

    found = front(hub.state.repo("user/style").bytes()["README.md"])
    assert done.code == 0, done.err
    assert found == {
        "base_model": "user/base", "library_name": "peft", "license": "apache-2.0", "language": ["fr"],
        "tags": ["adaptkit", "adapter"],
    }  # fmt: skip


def test_a_card_that_is_there_is_kept(hub, shell, lora):
    """In the folder, or in the repository."""
    (lora / "README.md").write_text("# by hand\n")
    assert shell("push", lora, "user/style").code == 0
    (lora / "README.md").unlink()
    assert shell("push", lora, "user/style", "--message", "again").code == 0

    assert hub.state.repo("user/style").bytes()["README.md"] == b"# by hand\n"


def test_a_base_without_a_card_is_no_obstacle(hub, shell, lora):
    """A warning, and a card without a licence."""
    done = shell("push", lora, "user/style")

    assert done.code == 0, done.err
    assert "the card of user/base could not be read" in done.err
    assert "license" not in front(hub.state.repo("user/style").bytes()["README.md"])


def test_the_card_says_how_it_was_made(hub, shell, model):
    """Commits, weights, versions, the largest changes, checksums of inputs and outputs; links to the commits."""
    lora = hub.state.put("user/many", {f"style/{n}": (LORA / n).read_bytes() for n in ADAPTER})
    base = hub.state.put("user/llama", tree(MODEL))

    done = shell("merge", "user/llama", "user/many/style", "-o", "out", "--weights", "0.5", "--push", "user/new")

    held = hub.state.repo("user/new").bytes()
    said, card = json.loads(held["adaptkit.json"]), held["README.md"].decode()
    assert done.code == 0, done.err
    assert f"[user/llama]({hub.url}/user/llama/tree/{base}) at `{base}`" in card
    assert f"[user/many/style]({hub.url}/user/many/tree/{lora}/style) at `{lora}` | 0.5 |" in card
    assert f"| model.safetensors | `{hub.state.repo('user/new').files()['model.safetensors'].oid}` |" in card
    assert f"numpy {np.__version__}" in card
    name, norm = max(said["norms"].items(), key=lambda item: item[1])
    assert f"| {name} | {norm:.4g} |" in card
    for given in said["inputs"]:
        for file in given["files"]:
            assert f"| {given['name']}/{file['name']} | `{file['sha256']}` |" in card


@pytest.mark.parametrize("verb", ["combine", "resize", pytest.param("extract", marks=pytest.mark.slow), "convert"])
def test_what_other_verbs_made_keeps_base_and_commits(hub, shell, verb):
    """The card names base, licence and inputs; an extracted adapter's base is found by its commit again."""
    base = hub.state.put("user/base", {**tree(MODEL), "README.md": b"---\nlicense: mit\n---\n"})
    config = json.loads((LORA / "adapter_config.json").read_text()) | {"base_model_name_or_path": "user/base"}
    files = {"adapter_config.json": json.dumps(config).encode(), ADAPTER[1]: (LORA / ADAPTER[1]).read_bytes()}
    lora = hub.state.put("user/lora", files)
    if verb == "extract":
        assert shell("merge", "user/lora", "--push", "user/tuned", "--streaming").code == 0
    how = {
        "combine": ("user/lora", "user/lora"), "resize": ("user/lora", "--rank", "2"), "convert": ("user/base", "--to", "pytorch"),
        "extract": ("user/tuned", "user/base", "--rank", "8"),
    }  # fmt: skip

    made = shell(verb, *how[verb], "-o", "out")
    done = shell("push", "out", "user/new")

    card = hub.state.repo("user/new").bytes()["README.md"]
    assert (made.code, done.code) == (0, 0), made.err + done.err
    assert front(card)["base_model"] == "user/base"
    assert front(card)["license"] == "mit"
    assert (base if verb in ("extract", "convert") else lora) in card.decode()
    if verb == "extract":
        assert json.loads((shell.home / "out" / "adapter_config.json").read_text())["revision"] == base
        assert shell("merge", "out", "-o", "again").code == 0


def test_a_push_of_what_is_there_already_says_so(hub, shell, model):
    """No commit, no pull request, and no success that is none."""
    assert shell("push", model, "user/new").code == 0

    again, proposed = shell("push", model, "user/new"), shell("push", model, "user/new", "--create-pr")

    repo = hub.state.repo("user/new")
    assert (again.code, proposed.code) == (0, 0), again.err + proposed.err
    assert (
        again.out
        == proposed.out
        == f"{hub.url}/user/new/commit/{repo.branches['main']} (all of it was there already)\n"
    )
    assert (len(repo.commits), repo.pulls) == (2, [])
    figures = json.loads(shell("push", model, "user/new", "--json").out)
    assert (figures["files"], figures["bytes"]) == (0, 0)


@pytest.mark.parametrize("branch", ["two words", "../../main", "-x"])
def test_a_branch_that_can_be_none_is_refused_here(hub, shell, model, branch):
    """As after the @ of an id, before anybody is asked."""
    done = shell("push", model, "user/new", f"--revision={branch}")

    assert done.code == 2 and done.err == f"error: --revision: {branch!r} is not the name of a branch\n"
    assert ("model", "user/new") not in hub.state.repos


@pytest.mark.parametrize("before", [(8 << 20) - 9, 65 << 20])
def test_a_token_is_found_wherever_it_stands(lora, before):
    """Between two blocks, and far down a long file."""
    with open(lora / "notes.txt", "wb") as file:
        file.seek(before)
        file.write(b" hf_" + b"a" * 30)

    with pytest.raises(AdaptKitError, match="notes.txt: holds what looks like a Hub token"):
        sound(lora)


def test_a_pull_request_leaves_main_alone(hub, shell, model):
    """--create-pr."""
    hub.state.put("user/new", {"notes.txt": b"mine"})

    done = shell("push", model, "user/new", "--create-pr")

    repo = hub.state.repo("user/new")
    assert done.code == 0, done.err
    assert done.out.startswith(f"{hub.url}/user/new/discussions/1")
    assert repo.bytes() == {"notes.txt": b"mine"}
    assert set(PLAIN) <= set(repo.bytes("refs/pr/1"))


def test_branch_privacy_and_message(hub, shell, model):
    """--revision, --private, --message."""
    done = shell("push", model, "user/new", "--revision", "v2", "--private", "--message", "second try")

    repo = hub.state.repo("user/new")
    assert done.code == 0, done.err
    assert repo.private
    assert repo.commits[repo.branches["v2"]][1] == "second try"
    assert repo.bytes("main") == {}


def test_a_push_that_was_cut_does_not_send_again_what_arrived(hub, shell, model):
    """Uploads are found by their hash."""
    hub.fail("POST .*/commit/", status=403)
    assert shell("push", model, "user/new").code == 7
    hub.asked.clear()

    done = shell("push", model, "user/new")

    assert done.code == 0, done.err
    assert not hub.seen("PUT")
    assert set(PLAIN) <= set(hub.state.repo("user/new").bytes())


def test_a_killed_push_shows_nothing_and_goes_on(hub, shell, model):
    """Killed in an upload of several files."""
    (model / "model.safetensors").unlink()
    weights = {f"w{k}": np.full((100, 1024), k, np.float32) for k in range(3)}
    names = {k: f"model-{i:05}-of-00003.safetensors" for i, k in enumerate(weights, 1)}
    for key, name in names.items():
        (model / name).write_bytes(save({key: weights[key]}))
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    hub.fail("PUT", times=99, wait=0.1)
    shell.killed("push", model, "user/new", when=lambda: len(hub.seen("lfs/complete")) == 2)
    hub.faults.clear()
    there = set(hub.state.repo("user/new").objects)
    assert not hub.state.repo("user/new").bytes()
    hub.asked.clear()

    done = shell("push", model, "user/new")

    assert done.code == 0, done.err
    assert there
    assert not [a for a in hub.seen("PUT") if any(oid in a.path for oid in there)]
    assert {n: b for n, b in hub.state.repo("user/new").bytes().items() if n != "README.md"} == tree(model)


def half_written(folder: Path) -> str:
    (folder / ".adaptkit.journal").write_text("")
    return "is half-written"


def cut_short(folder: Path) -> str:
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-10])
    return "truncated?"


def shard_missing(folder: Path) -> str:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "which is not there"


def other_size(folder: Path) -> str:
    (folder / "adaptkit.json").write_text(json.dumps({"files": [{"name": "config.json", "size": 3}]}))
    return "adaptkit.json says 3"


def no_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "no weights"


def token_inside(folder: Path) -> str:
    (folder / "notes.txt").write_text(f"token: {WRITE}")
    return "looks like a Hub token"


def place_in_card(folder: Path) -> str:
    (folder / "README.md").write_text("---\nbase_model: /home/me/models/llama\n---\n")
    return "by a path of this machine"


def place_in_config(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": str(MODEL)}))
    return "config.json: names its base model by a path of this machine"


def place_in_subfolder(folder: Path) -> str:
    (folder / "style").mkdir()
    (folder / "style" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../llama"}))
    return "style/adapter_config.json: names its base model by a path of this machine"


HARMS = [
    half_written, cut_short, shard_missing, other_size, no_weights, token_inside, place_in_card, place_in_config,
    place_in_subfolder,
]  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_not_whole_or_tells_too_much_is_refused(hub, shell, model, harm):
    """Before anything is asked of the Hub; the token itself is not shown."""
    words = harm(model)

    done = shell("push", model, "user/new")

    assert done.code in (3, 4, 5), done.err
    assert words in done.err
    assert len(done.err.splitlines()) == 1
    assert WRITE not in done.err
    assert not hub.asked


def test_an_adapter_that_names_its_base_by_a_path_is_refused(hub, shell, lora):
    """The path would tell about this machine, and be of no use on another."""
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(MODEL)}))

    done = shell("push", lora, "user/style")

    assert done.code == 5
    assert "adapter_config.json: names its base model by a path of this machine" in done.err
    assert str(MODEL) not in done.err


def test_training_state_stays_here(hub, shell, lora):
    """Optimizer and checkpoints beside an adapter are not published."""
    (lora / "optimizer.pt").write_bytes(b"x")
    (lora / "checkpoint-9").mkdir()
    (lora / "checkpoint-9" / "model.safetensors").write_bytes(b"x")

    done = shell("push", lora, "user/style")

    assert done.code == 0, done.err
    assert set(hub.state.repo("user/style").bytes()) == {*ADAPTER, "README.md"}
    assert "optimizer.pt" in done.err


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, "nobody is logged in; log in"),
        ("hf_wrongwrongwrongwrong", "rejected (401)"),
        (READ, "may not do that (403)"),
    ],
    ids=["none", "wrong", "may only read"],
)
def test_who_may_not_push(hub, shell, model, token, words):
    """No token, a wrong one, one that may only read; none of them is printed."""
    done = shell("push", model, "user/new", HF_TOKEN=token)

    assert done.code == 7, done.err
    assert words in done.err
    assert not hub.state.repos
    assert not token or token not in done.err


def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(hub, shell, model):
    """The message says where to look."""
    hub.fail("POST .*/commit/", lost=True)

    done = shell("push", model, "user/new", "--create-pr")

    assert done.code == 7
    assert "look at its pull requests before you push again" in done.err
    assert len(hub.state.repo("user/new").pulls) == 1


PEFT = """
from transformers import AutoModelForCausalLM
from adaptkit.peft import AutoPeftModelForCausalLM, PeftModel
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("user/base"), "user/many", subfolder="style", revision="v1")
print(model.push_to_hub("user/pushed", commit_message="hello", private=True, tags=["mine"]))
again = AutoPeftModelForCausalLM.from_pretrained("user/pushed")
print(again.push_to_hub("own"))
print(again.push_to_hub("user/pushed", token="hf_wrongwrongwrongwrong"))
"""


@pytest.mark.slow
def test_a_model_of_the_peft_room_goes_there_and_back(hub, shell, lora):
    """from_pretrained by id, push_to_hub, and AutoPeftModel with what was pushed; a token that is given is the one used."""
    hub.state.put("user/base", tree(MODEL))
    hub.state.repo("user/many").tags["v1"] = hub.state.put(
        "user/many", {f"style/{n}": d for n, d in tree(lora).items()}
    )

    done = subprocess.run([sys.executable, "-c", PEFT], env=shell.env, capture_output=True, text=True, timeout=100)

    repo = hub.state.repo("user/pushed")
    assert done.stdout.count("/commit/") == 2, done.stderr
    assert repo.private
    assert repo.commits[repo.branches["main"]][1] == "hello"
    assert (
        repo.bytes()[ADAPTER[1]] == (LORA / ADAPTER[1]).read_bytes() == hub.state.repo("user/own").bytes()[ADAPTER[1]]
    )
    assert front(repo.bytes()["README.md"])["tags"] == ["adaptkit", "adapter", "mine"]
    assert "hub: user/pushed: the token was rejected (401)" in done.stderr.splitlines()[-1]


def test_offline_pushes_nothing(hub, shell, model):
    """HF_HUB_OFFLINE: one sentence."""
    done = shell("push", model, "user/new", HF_HUB_OFFLINE="1")

    assert done.code == 7
    assert "HF_HUB_OFFLINE is set" in done.err
    assert not hub.asked


# -- merging with ids


@pytest.fixture
def there(hub, tmp_path_factory):
    """user/base (old and new) and user/lora, which names the old one."""
    top = tmp_path_factory.mktemp("made")
    old = hub.state.put("user/base", made.model(top / "base", 3))
    lora = made.adapter(top / "lora", range(1))
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "revision": old}))
    hub.state.put("user/lora", lora)
    hub.state.put("user/base", {"model-00001-of-00003.safetensors": b"new, and not even a model"})
    hub.local = top
    return hub


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def test_a_lone_adapter_names_its_base_and_the_revision(there, shell):
    """merge ADAPTER: base and commit from its settings; the receipt holds both commits, and verify finds the merge right."""
    from adaptkit import merge

    done = shell("merge", "user/lora", "-o", "out")

    merge(there.local / "base", there.local / "lora", shell.home / "mine")
    said = json.loads((shell.home / "out" / "adaptkit.json").read_text())
    old = json.loads((there.local / "lora" / "adapter_config.json").read_text())["revision"]
    assert done.code == 0, done.err
    assert weights(shell.home / "out") == weights(shell.home / "mine")
    assert said["hub"][0] == {"id": "user/base", "revision": old}
    assert said["base"] == "user/base"
    checked = shell("verify", "out", "--base", f"user/base@{old}", "--adapter", "user/lora")
    assert checked.code == 0, checked.err


def test_what_was_pulled_into_a_folder_is_still_known(there, shell):
    """The receipt of a merge from pulled folders holds the commits."""
    old = json.loads((there.local / "lora" / "adapter_config.json").read_text())["revision"]
    assert shell("pull", f"user/base@{old}", "-o", "b").code == 0
    assert shell("pull", "user/lora", "-o", "a").code == 0

    done = shell("merge", "b", "a", "-o", "out")

    said = json.loads((shell.home / "out" / "adaptkit.json").read_text())
    assert done.code == 0, done.err
    assert [r["id"] for r in said["hub"]] == ["user/base", "user/lora"]
    assert (said["base"], said["adapters"]) == ("user/base", ["user/lora"])


@pytest.mark.parametrize("base", ["/home/somebody/llama", "../llama", "C:\\llama", "models/llama/7b/", ""])
def test_a_base_on_somebody_elses_machine(there, shell, base):
    """The message says what to give; the path never goes to the Hub."""
    made.adapter(shell.home / "lora", range(1), base)

    done = shell("merge", "lora", "-o", "out")

    assert done.code == 2
    assert "give the base: adaptkit merge BASE ADAPTER -o OUT" in done.err
    assert not there.asked


def test_merge_and_push_in_one_go(there, shell):
    """-o and --push: the folder is there, and at the Hub."""
    done = shell("merge", there.local / "base", "user/lora", "-o", "out", "--push", "user/merged", "--private")

    held = there.state.repo("user/merged")
    assert done.code == 0, done.err
    assert held.private
    assert {n: b for n, b in held.bytes().items() if n != "README.md"} == tree(shell.home / "out")
    assert f"pushed to {there.url}/user/merged/commit/" in done.out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("merge", "user/base@OLD", "user/lora", "--dry-run"), "2 of 21 tensors would change"),
        (("merge", "user/lora", "--dry-run"), "2 of 21 tensors would change"),
        (("targets", "user/base@OLD"), "model.layers.1.self_attn.q_proj"),
        (("extract", "user/base@OLD", "user/base@OLD", "-o", "x", "--rank", "4", "--dry-run"), "14 modules"),
        (("inspect", "user/base@OLD"), "LlamaForCausalLM"),
    ],
    ids=["dry run", "dry run of a lone adapter", "targets", "dry run of extract", "inspect"],
)
def test_to_look_at_a_model_only_headers_are_fetched(there, shell, command, words):
    """A model of the Hub is not downloaded to be looked at."""
    old = json.loads((there.local / "lora" / "adapter_config.json").read_text())["revision"]

    done = shell(*(word.replace("OLD", old) for word in command))

    weights = {f.oid for f in there.state.repo("user/base").files(old).values() if f.lfs}
    assert done.code == 0, done.err
    assert words in done.out
    asked = [a for a in there.seen("GET /object") if a.path[-64:] in weights]
    assert asked
    assert all(a.sent <= 1 << 16 for a in asked)
