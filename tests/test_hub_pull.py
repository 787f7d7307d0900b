"""Pulling: only what matters, checked against the listing, resumed, and never from elsewhere than asked."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hub.state import READ, WRITE
from places import FIXTURES
from safetensors.numpy import save

MODEL, ADAPTER = FIXTURES / "models" / "llama", FIXTURES / "adapters" / "llama" / "lora"
JUNK = {
    "README.md": b"---\nlicense: mit\n---\n", "pytorch_model.bin": b"no", "tf_model.h5": b"no", "flax_model.msgpack": b"no",
    "model.Q4.gguf": b"no", "onnx/model.onnx": b"no", "model.fp16.safetensors": b"no", ".gitattributes": b"*",
    "optimizer.pt": b"no", "runs/log.json": b"{}",
}  # fmt: skip
WANTED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def tree(folder: Path) -> dict[str, bytes]:
    """name -> bytes of a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def model(hub):
    """user/llama: a small model beside what other programs left in its repository."""
    return hub.state.put("user/llama", {**tree(MODEL), **JUNK})


@pytest.fixture
def adapter(hub):
    """user/lora, with all that PEFT's maker left there."""
    return hub.state.put("user/lora", {**tree(ADAPTER), "adapter_model.bin": b"no", "checkpoint-5/optimizer.pt": b"no"})


def test_pull_prints_a_folder_of_the_cache_with_what_matters(shell, model):
    """Config, safetensors and tokenizer; no second kind of weights, nothing of other programs."""
    done = shell("pull", "user/llama")

    folder = Path(done.out.strip())
    assert done.code == 0, done.err
    assert set(tree(folder)) == WANTED
    assert (folder / "model.safetensors").read_bytes() == (MODEL / "model.safetensors").read_bytes()
    assert folder == shell.home / "hf" / "hub" / "models--user--llama" / "snapshots" / model


def test_pull_into_a_folder(shell, model):
    """The folder holds the same, and says where it came from."""
    done = shell("pull", "user/llama", "-o", "here")

    found = tree(shell.home / "here")
    said = json.loads(found.pop("adaptkit.json"))
    assert (done.code, done.out) == (0, "here\n"), done.err
    assert set(found) == WANTED
    assert said["pulled"] == {"id": "user/llama", "revision": model}
    assert not list(shell.home.glob("here.partial"))


def test_pull_of_an_adapter(shell, adapter):
    """An adapter is its settings and its safetensors."""
    done = shell("pull", "user/lora", "-o", "here")

    assert done.code == 0, done.err
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(tree(shell.home / "here"))
    assert not {"adapter_model.bin", "checkpoint-5/optimizer.pt", "README.md"} & set(tree(shell.home / "here"))


def test_the_token_stays_at_the_hub(hub, shell, model):
    """The CDN is another origin: it sees requests, and no token; nothing we print or write holds it either."""
    done = shell("pull", "user/llama", "-o", "here")

    assert done.code == 0
    assert [a for a in hub.asked if a.cdn]
    assert not [a for a in hub.asked if a.cdn and a.token]
    assert all(a.token == WRITE for a in hub.asked if not a.cdn)
    assert WRITE not in done.out + done.err
    assert not [p for p in shell.home.rglob("*") if p.is_file() and WRITE.encode() in p.read_bytes()]


def test_a_second_pull_fetches_nothing_again(hub, shell, model):
    """What is in the cache is not asked for."""
    assert shell("pull", "user/llama").code == 0
    hub.asked.clear()

    again = shell("pull", "user/llama")

    assert again.code == 0
    assert not hub.seen("^GET /(object|.*resolve)")


def test_revisions_and_subfolders(hub, shell):
    """user/name/subfolder@revision, where a revision is a branch, a tag, a pull request or a commit."""
    old = hub.state.put("user/many", {f"style/{n}": d for n, d in tree(ADAPTER).items()})
    hub.state.repo("user/many").tags["v1"] = old
    hub.state.repo("user/many").branches["refs/pr/1"] = old
    hub.state.put("user/many", {"style/adapter_config.json": b"{}"})

    for revision in ("v1", "refs/pr/1", old):
        done = shell("inspect", f"user/many/style@{revision}", "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["rank"] == 8
    assert shell("inspect", "user/many/style").code == 3


def test_a_repository_of_folders_says_which_there_are(hub, shell):
    """Nothing at the top: the error names where something is."""
    hub.state.put("user/many", {f"style/{n}": d for n, d in tree(ADAPTER).items()})

    done = shell("inspect", "user/many")

    assert done.code == 7
    assert "there is style; write user/many/FOLDER" in done.err


def test_a_folder_that_exists_wins_over_an_id(hub, shell, adapter):
    """What is here is not asked for at the Hub; nor is a path with a slip in it, nor a Path."""
    (shell.home / "user").mkdir()
    (shell.home / "user" / "lora").symlink_to(ADAPTER)

    assert shell("inspect", "user/lora").code == 0
    for slip in ("user/lorra", "./nowhere", "/no/where", "~/lora", "nowhere", "nowhere/", "a/b.safetensors", "a\\b"):
        done = shell("inspect", slip)
        assert done.code == 2, (slip, done.err)
        assert "not found" in done.err
    assert not hub.asked


def test_hf_scheme_means_the_hub(hub, shell, adapter):
    """Where a folder of that name is in the way."""
    (shell.home / "user").mkdir()

    assert shell("inspect", "hf://user/lora").code == 0


@pytest.mark.parametrize("into", [[], ["-o", "here"]], ids=["cache", "folder"])
def test_a_killed_pull_goes_on_where_it_was(hub, shell, into):
    """The bytes that are there are not sent again."""
    data = save({"w": np.arange(3 << 18, dtype=np.float32)})
    hub.state.put("user/big", {"config.json": b"{}", "model.safetensors": data})
    fault = hub.fail("GET /object", reset=5 << 19)
    hub.fail("GET /object", times=9, wait=30)
    shell.killed("pull", "user/big", *into, when=lambda: not fault.times and len(hub.seen("^GET /object")) > 1)
    hub.faults.clear()
    hub.asked.clear()

    done = shell("pull", "user/big", *into)

    assert done.code == 0, done.err
    assert (shell.home / done.out.strip() / "model.safetensors").read_bytes() == data
    assert [a.range for a in hub.seen("^GET /object")] == [f"bytes={5 << 19}-"]


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 503},
        {"status": 429, "headers": {"RateLimit": '"api";r=0;t=1'}},
        {"reset": 1000},
        {"cut": 1000},
        {"flip": True},
    ],
    ids=["503", "429", "reset", "cut", "flipped byte"],
)
def test_what_passes_by_itself_is_asked_for_again(hub, shell, model, fault):
    """One failure of a download is not the end of it, nor a wrong byte."""
    hub.fail("^GET /object", **fault)

    done = shell("pull", "user/llama", "-o", "here")

    assert done.code == 0, done.err
    assert (shell.home / "here" / "model.safetensors").read_bytes() == (MODEL / "model.safetensors").read_bytes()
    assert done.err == ""


def test_a_download_that_the_hub_puts_off_for_an_hour_is_not_waited_for(hub, shell, model):
    """Said at once; nobody looks at a bar that stands still."""
    hub.fail("^GET /object", status=429, headers={"Retry-After": "3600"})

    done = shell("pull", "user/llama", "-o", "here")

    assert done.code == 7
    assert "too many requests (429), wait 3600 s" in done.err


@pytest.mark.parametrize("command", [("pull", "ID", "-o", "here"), ("merge", "user/llama", "ID", "-o", "out")])
def test_a_file_of_a_repository_comes_with_its_settings(hub, shell, model, command):
    """user/name/folder/file: without the settings beside it an adapter has no scale."""
    hub.state.put("user/many", {f"style/{n}": d for n, d in tree(ADAPTER).items()})

    done = shell(*(word.replace("ID", "user/many/style/adapter_model.safetensors") for word in command))

    assert done.code == 0, done.err
    assert command[0] == "merge" or set(tree(shell.home / "here")) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "adaptkit.json",
    }


def test_an_error_names_an_id_not_a_place_in_the_cache(hub, shell):
    """What is broken is at the Hub, and there it can be looked at."""
    hub.state.put("user/broken", {**tree(ADAPTER), "adapter_config.json": b"{"})

    done = shell("inspect", "user/broken")

    assert done.code == 3
    assert str(shell.home) not in done.err
    assert "user/broken" in done.err


def test_adapters_are_compared_by_their_ids(hub, shell, adapter):
    """Not by the commit that the cache calls their folders by."""
    hub.state.put("user/other", tree(ADAPTER))

    found = json.loads(shell("inspect", "user/lora", "user/other", "--json").out)

    assert found["pairs"][0]["adapters"] == ["user/lora", "user/other"]


def test_a_token_that_the_server_repeats_is_not_shown(hub, shell, model):
    """Of a Hub of one's own it may look like anything."""
    hub.fail("^GET /api/models/user/llama", status=403, headers={"X-Error-Message": "no rights for tiger-lily-42"})

    done = shell("pull", "user/llama", HF_TOKEN="tiger-lily-42")

    assert "no rights for hf_..." in done.err
    assert "tiger-lily-42" not in done.err


def test_a_range_that_is_ignored_begins_again(hub, shell, model):
    """A server that sends everything where the rest was asked for."""
    hub.fail("^GET /object", reset=700_000)
    hub.fail("^GET /object", whole=True)

    done = shell("pull", "user/llama", "-o", "here")

    assert done.code == 0, done.err
    assert (shell.home / "here" / "model.safetensors").read_bytes() == (MODEL / "model.safetensors").read_bytes()


def test_a_range_that_is_refused_begins_again(hub, shell, model):
    """416 in the middle of a file."""
    hub.fail("^GET /object", reset=700_000)
    hub.fail("^GET /object", status=416)

    done = shell("pull", "user/llama", "-o", "here")

    assert done.code == 0, done.err
    assert (shell.home / "here" / "model.safetensors").read_bytes() == (MODEL / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [(-5, "sends fewer bytes than it lists"), (+5, "sends more than the")],
    ids=["shorter", "longer"],
)
def test_a_file_of_another_size_than_listed_is_refused(hub, shell, model, change, words):
    """However often it is asked for."""
    objects = hub.state.repo("user/llama").objects
    oid, data = max(objects.items(), key=lambda item: len(item[1]))
    objects[oid] = data[:change] if change < 0 else data + b"x" * change

    done = shell("pull", "user/llama", "-o", "here")

    assert done.code == 7, done.err
    assert words in done.err
    assert not (shell.home / "here").exists()


@pytest.mark.parametrize("where", [[], ["-o", "here"]], ids=["cache", "folder"])
def test_bytes_that_stay_wrong_are_refused(hub, shell, model, where):
    """A wrong byte of the right size, twice: no folder appears."""
    hub.fail("^GET /object", times=9, flip=True)

    done = shell("pull", "user/llama", *where)

    assert done.code == 7
    assert "model.safetensors: arrived with sha256" in done.err
    assert len(done.err.splitlines()) == 1
    assert not (shell.home / "here").exists()
    assert not list(shell.home.glob("hf/hub/models--user--llama/snapshots/*/model.safetensors"))


def test_the_cache_is_the_one_that_other_programs_read(hub, shell, model):
    """huggingface_hub finds what we pulled, by branch and without a network."""
    folder = Path(shell("pull", "user/llama").out.strip())
    code = "import huggingface_hub as h; print(h.hf_hub_download('user/llama', 'model.safetensors', local_files_only=True))"
    asked = len(hub.asked)

    done = subprocess.run([sys.executable, "-c", code], env=shell.env, capture_output=True, text=True, timeout=100)

    assert done.stdout.strip() == str(folder / "model.safetensors"), done.stderr
    assert len(hub.asked) == asked


def test_what_other_programs_pulled_is_not_fetched_again(hub, shell, model):
    """The other way round."""
    code = "import huggingface_hub as h; h.hf_hub_download('user/llama', 'model.safetensors')"
    subprocess.run([sys.executable, "-c", code], env=shell.env, check=True, capture_output=True, timeout=100)
    assert len(hub.seen("^GET /object")) == 1

    done = shell("pull", "user/llama")

    assert done.code == 0, done.err
    assert len(hub.seen("^GET /object")) == 1


SAYS = {  # a fault of the listing -> exit code and words
    "401": (
        {"status": 401, "headers": {"X-Error-Message": "Invalid credentials in Authorization header"}},
        "rejected (401)",
    ),
    "403": ({"status": 403}, "may not do that (403)"),
    "404": (
        {"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}},
        "not found, or this token cannot see it (404)",
    ),
    "429 for long": ({"status": 429, "headers": {"Retry-After": "3600"}}, "too many requests (429), wait 3600 s"),
    "500 all the time": ({"status": 500, "times": 99}, "fails (500)"),
    "garbage": ({"garbage": True}, "an answer that is not the Hub's"),
}


@pytest.mark.parametrize("case", SAYS)
def test_a_refusal_is_one_sentence(hub, shell, model, case):
    """What the Hub says, in words, with exit code 7."""
    fault, words = SAYS[case]
    hub.fail("^GET /api/models/user/llama", **fault)

    done = shell("pull", "user/llama")

    assert done.code == 7, done.err
    assert words in done.err
    assert done.err.startswith("error: hub: user/llama: ")
    assert len(done.err.splitlines()) == 1


def test_a_gated_model_says_where_to_accept(hub, shell, model):
    """With and without a token."""
    hub.state.repo("user/llama").gated = True

    done = shell("pull", "user/llama")
    nobody = shell("pull", "user/llama", HF_TOKEN=None)

    assert (done.code, nobody.code) == (7, 7)
    assert f"is gated; accept its conditions at {hub.url}/user/llama with the account of your token" in done.err
    assert "hf auth login" in nobody.err


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("user/LLama", "did you mean user/llama?"),
        ("user/lama", "did you mean user/llama?"),
        ("user/words", "there is a dataset"),
    ],
)
def test_a_name_that_is_not_there_suggests_another(hub, shell, model, asked, hint):
    """Another capitalisation, a letter missing, a dataset."""
    hub.state.repo("user/words", "dataset")

    done = shell("pull", asked)

    assert done.code == 7
    assert hint in done.err


def test_a_revision_that_is_not_there(hub, shell, model):
    """The error lists those that are."""
    hub.state.repo("user/llama").tags["v1"] = model

    done = shell("pull", "user/llama@v2")

    assert done.code == 7
    assert "has no revision 'v2'; it has main, v1" in done.err


def test_private_repositories_need_a_token(hub, shell):
    """Signed in it is there; else it says what to do."""
    hub.state.put("user/secret", tree(ADAPTER), private=True)

    assert shell("pull", "user/secret", HF_TOKEN=READ).code == 0
    done = shell("pull", "user/secret", HF_TOKEN=None)
    assert done.code == 7
    assert "hf auth login" in done.err


def test_offline_uses_the_cache_and_asks_nobody(hub, shell, adapter):
    """HF_HUB_OFFLINE: what is cached works, what is not says so."""
    assert shell("pull", "user/lora").code == 0
    hub.asked.clear()

    there = shell("inspect", "user/lora", HF_HUB_OFFLINE="1")
    not_there = shell("inspect", "user/other", HF_HUB_OFFLINE="1")

    assert there.code == 0, there.err
    assert not_there.code == 7
    assert "is not in the cache, and HF_HUB_OFFLINE is set" in not_there.err
    assert not hub.asked


@pytest.mark.slow
def test_a_hub_that_is_down_is_not_hidden_by_an_old_copy(hub, shell, adapter):
    """Without --offline an old commit is not passed off as the newest."""
    assert shell("pull", "user/lora").code == 0

    done = shell("inspect", "user/lora", HF_ENDPOINT="http://127.0.0.1:9")

    assert done.code == 7
    assert "cannot be reached" in done.err
    assert "HF_HUB_OFFLINE=1 uses what is cached" in done.err


def test_names_that_leave_the_folder_are_refused(hub, shell, adapter):
    """A listing is not trusted."""
    hub.state.put("user/evil", {**tree(ADAPTER), "../../evil.json": b"{}"})

    done = shell("pull", "user/evil", "-o", "here")

    assert done.code == 5
    assert "unsafe path" in done.err
    assert not (shell.home.parent / "evil.json").exists()


def test_odd_names_that_nobody_needs_are_no_obstacle(hub, shell):
    """A file that not every file system can hold, beside a sound adapter."""
    hub.state.put("user/odd", {**tree(ADAPTER), "plots/a:b?.txt": b"x", "con\x07.json": b"{}"})

    done = shell("pull", "user/odd", "-o", "here")

    assert done.code == 0, done.err
    assert set(tree(shell.home / "here")) >= {"adapter_config.json", "adapter_model.safetensors"}


def test_a_pointer_in_place_of_weights_is_called_so(hub, shell):
    """Where only headers are looked at as where all is fetched."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    hub.state.put("user/pointer", {**tree(MODEL), "model.safetensors": pointer})

    for command in (("inspect", "user/pointer"), ("merge", "user/pointer", str(ADAPTER), "-o", "out")):
        done = shell(*command)
        assert done.code == 3
        assert "user/pointer/model.safetensors: this is a git-lfs pointer" in done.err


def test_a_model_is_no_adapter_and_is_not_fetched_to_find_out(hub, shell, model):
    """The listing says it before the weights move."""
    done = shell("merge", "user/llama", "user/llama", "-o", "out")

    assert done.code == 4
    assert "this is a model, not an adapter" in done.err
    assert not hub.seen("^GET /object")


@pytest.mark.slow
def test_ctrl_c_is_answered_while_the_server_is_silent(hub, shell, model):
    """One line, exit code 130; the same command goes on."""
    hub.fail("GET /object", wait=8)
    process = shell.start("pull", "user/llama", "-o", "here")
    while not hub.seen("GET /object"):
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert re.fullmatch(r"interrupted.*; run the same command again to go on\n", err)
    assert hub.seen("GET /object")[0].status == 0  # the server is silent still
    assert not (shell.home / "here").exists()
    assert shell("pull", "user/llama", "-o", "here").code == 0


def test_a_token_is_not_sent_in_the_clear(shell):
    """An endpoint over http on another machine."""
    done = shell("pull", "user/llama", HF_ENDPOINT="http://hub.example")

    assert done.code == 5
    assert "http://hub.example would get your token unencrypted" in done.err


@pytest.mark.slow
def test_code_written_for_peft_takes_ids(hub, shell, adapter):
    """revision and subfolder as PEFT has them, through the same cache."""
    hub.state.put("user/many", {f"style/{n}": d for n, d in tree(ADAPTER).items()})
    code = (
        "from adaptkit.peft import PeftConfig;"
        "print(PeftConfig.from_pretrained('user/lora').r);"
        "print(PeftConfig.from_pretrained('user/many', subfolder='style', revision='main').r)"
    )

    done = subprocess.run([sys.executable, "-c", code], env=shell.env, capture_output=True, text=True, timeout=100)

    assert done.stdout == "8\n8\n", done.stderr


@pytest.mark.parametrize("whole", [False, True], ids=["ranges", "ranges ignored"])
def test_long_headers_are_read_by_ranges(hub, shell, whole):
    """A header of 200 kB, of a server that knows ranges and of one that sends everything."""
    tensors = {f"model.layers.{k}.{'long' * 20}.weight": np.ones((2, 2), np.float32) for k in range(1500)}
    hub.state.put("user/wide", {"config.json": b"{}", "model.safetensors": save(tensors, {"format": "pt"})})
    hub.fail("GET /object", times=9 * whole, whole=whole)

    done = shell("inspect", "user/wide", "--json")

    assert done.code == 0, done.err
    assert json.loads(done.out)["tensors"] == 1500


def test_several_processes_fetch_a_file_once(hub, shell, model):
    """They wait for each other."""
    hub.fail("GET /object", wait=0.5)
    processes = [shell.start("pull", "user/llama") for _ in range(3)]

    folders = {p.communicate(timeout=60)[0] for p in processes}

    assert [p.returncode for p in processes] == [0, 0, 0]
    assert len(folders) == 1
    assert len(hub.seen("^GET /object")) == 1


@pytest.mark.parametrize(
    "index",
    [
        b"[]",
        b"{",
        b'{"weight_map": {"a": "model-00009-of-00009.safetensors"}}',
        b'{"weight_map": {"a": "../a.safetensors"}}',
    ],
)
def test_an_index_that_promises_what_is_not_there(hub, shell, index):
    """Refused from the listing, before weights move."""
    hub.state.put("user/broken", {"config.json": b"{}", "model.safetensors.index.json": index, "a.safetensors": b"x"})

    done = shell("pull", "user/broken", "-o", "here")

    assert done.code == 3, done.err
    assert done.err.startswith("error: model.safetensors.index.json: ")
    assert not hub.seen("^GET /object")


def test_a_traceback_shows_no_token(hub, shell, model):
    """--debug included."""
    hub.fail("^GET /api/models/user/llama", status=403, headers={"X-Error-Message": f"token {WRITE} is not enough"})

    done = shell("--debug", "pull", "user/llama")

    assert done.code == 7
    assert "Traceback" in done.err
    assert WRITE not in done.err
