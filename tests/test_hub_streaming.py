"""Merging from the Hub to the Hub: a few shards on the disk, one commit, and the bytes of the local merge."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from faults import namespaces
from hub import made
from hub.running import Shell
from places import FIXTURES

SHARDS, CHANGED = 20, range(3, 14)  # layers that the adapter changes, one in each shard
STREAM = ("merge", "user/base", "user/lora", "--push", "user/merged", "--streaming")
OWN = {"adaptkit.json", "README.md"}  # the receipt and the card, which a local merge has not got in that form


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """base, lora and what the local merge makes of them."""
    from adaptkit import merge

    top = tmp_path_factory.mktemp("made")
    base, lora = made.model(top / "base", SHARDS), made.adapter(top / "lora", CHANGED)
    merge(base, lora, top / "merged")
    return top


@pytest.fixture
def there(hub, files):
    """user/base and user/lora at the Hub."""
    hub.state.put("user/base", files / "base")
    hub.state.put("user/base", {"README.md": b"---\nlicense: mit\nlanguage: [de, en]\n---\n# Base\n"})
    hub.state.put("user/lora", files / "lora")
    return hub


def local(files: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (files / "merged").iterdir() if p.name not in OWN}


def pushed(hub) -> dict[str, bytes]:
    if ("model", "user/merged") not in hub.state.repos:
        return {}
    return {n: b for n, b in hub.state.repo("user/merged").bytes().items() if n not in OWN}


def files_below(folder: Path) -> list[str]:
    """Files of a folder that others change meanwhile."""
    return [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names]


def taken(path: str) -> int:
    """Bytes on the disk, which for a hole are none."""
    try:
        return os.lstat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


class Disk:
    """The most bytes that a folder took on the disk while something ran."""

    def __init__(self, folder: Path):
        self.folder, self.most, self.looks, self.over = folder, 0, 0, threading.Event()

    def _look(self) -> None:
        while not self.over.is_set():
            self.most = max(self.most, sum(map(taken, files_below(self.folder))))
            self.looks += 1
            time.sleep(0.002)

    def __enter__(self) -> Disk:
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


def test_the_result_is_the_local_merge_and_the_disk_holds_a_few_shards(there, shell: Shell, files):
    """Twenty shards, a disk of four; every file has the bytes of the local merge."""
    shard = max(p.stat().st_size for p in (files / "base").glob("*.safetensors"))

    with Disk(shell.home) as disk:
        done = shell(*STREAM)

    assert done.code == 0, done.err
    assert pushed(there) == local(files)
    assert disk.looks > SHARDS
    assert shard < disk.most < 4 * shard
    assert not list(shell.home.glob("hf/adaptkit/streaming/*"))


@pytest.mark.skipif(not namespaces.permitted(), reason="mounting in a namespace of our own is not permitted here")
@pytest.mark.parametrize(("shards", "code"), [(4, 0), (2, 6)])
def test_a_disk_of_four_shards_is_enough_and_one_of_two_is_refused(there, shell, files, shards, code):
    """A file system that cannot hold more; too little of it is said before anything is fetched or made."""
    size = shards * max(p.stat().st_size for p in (files / "base").glob("*.safetensors"))
    (shell.home / "hf").mkdir()

    with namespaces.mounted(shell.home / "hf", f'mount -t tmpfs -o size={size // 1024}k none "$0"') as mounted:
        shell.prefix = ["nsenter", f"--target={mounted.pid}", "--mount"]
        done = shell(*STREAM)

    assert done.code == code, done.err
    assert pushed(there) == (local(files) if code == 0 else {})
    assert code == 0 or "for three shards" in done.err
    assert code == 0 or ("model", "user/merged") not in there.state.repos


@pytest.mark.slow
@pytest.mark.skipif(not namespaces.permitted(), reason="mounting in a namespace of our own is not permitted here")
def test_what_a_killed_run_left_does_not_count_as_missing_room(there, shell, files):
    """On a disk of four shards the same command goes on."""
    size = 4 * max(p.stat().st_size for p in (files / "base").glob("*.safetensors"))
    (shell.home / "hf").mkdir()
    there.fail("PUT", times=10_000, wait=0.05)

    with namespaces.mounted(shell.home / "hf", f'mount -t tmpfs -o size={size // 1024}k none "$0"') as mounted:
        shell.prefix = ["nsenter", f"--target={mounted.pid}", "--mount"]
        shell.killed(*STREAM, when=lambda: len(there.seen("PUT")) == 8)
        there.faults.clear()
        done = shell(*STREAM)

    assert done.code == 0, done.err
    assert pushed(there) == local(files)


@pytest.mark.parametrize("secret", ["user/base", "user/lora"])
def test_what_is_made_of_something_private_is_private(there, shell, secret):
    """A new repository would otherwise tell everybody."""
    there.state.repo(secret).private = True

    done = shell(*STREAM)

    assert done.code == 0, done.err
    assert there.state.repo("user/merged").private
    assert f"{secret} is private, so the new user/merged is, too" in done.err


def test_nobody_sees_half_a_model(there, shell, files):
    """One commit, and nothing before it."""
    done = shell(*STREAM)

    repo = there.state.repo("user/merged")
    assert done.code == 0, done.err
    assert len(repo.commits) == 2  # the empty one that every repository begins with, and ours
    assert len(there.seen("POST .*/commit/")) == 1


def test_shards_that_do_not_change_are_not_downloaded(there, shell):
    """The Hub copies them; the others are downloaded once."""
    done = shell(*STREAM)

    assert done.code == 0, done.err
    objects = {f.oid: n for n, f in there.state.repo("user/base").files().items()}
    whole = [objects[a.path[-64:]] for a in there.seen("GET /object") if a.path[-64:] in objects and a.sent > 1 << 17]
    assert sorted(whole) == [f"model-{k + 1:05}-of-{SHARDS:05}.safetensors" for k in CHANGED]
    assert len(there.seen("PUT /upload")) <= 3 * len(CHANGED)  # in parts


def test_a_hub_that_does_not_copy_gets_them_from_here(there, shell, files):
    """Another storage region: the shards go by this machine, with a warning."""
    there.state.can_copy = False

    done = shell(*STREAM)

    assert done.code == 0, done.err
    assert "does not copy shards from user/base to user/merged" in done.err
    assert pushed(there) == local(files)


def test_within_one_repository_unchanged_shards_stay_where_they_are(there, shell, files):
    """A branch of the base's own repository: nothing unchanged is moved at all."""
    done = shell("merge", "user/base", "user/lora", "--push", "user/base@merged", "--streaming")

    repo = there.state.repo("user/base")
    assert done.code == 0, done.err
    assert {n: b for n, b in repo.bytes("merged").items() if n not in OWN} == local(files)
    assert not there.seen("duplicate")
    assert repo.branches["main"] != repo.branches["merged"]


WHEN = {  # moments to be killed at
    "in a download": lambda hub: len([a for a in hub.seen("GET /object") if a.sent > 1 << 17]) == 4,
    "before an upload": lambda hub: len(hub.seen("objects/batch")) == 3,
    "in an upload": lambda hub: len(hub.seen("PUT /upload")) == 8,
    "after an upload": lambda hub: len(hub.seen("lfs/complete")) == 5,
    "before the commit": lambda hub: len(hub.seen("validate-yaml")) == 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", WHEN)
def test_a_killed_run_goes_on(there, shell, files, moment):
    """Killed on either side of a transfer: nothing was to be seen, and what was uploaded is not sent again."""
    there.fail(".", times=10_000, wait=0.01)  # leaves time to be killed in
    shell.killed(*STREAM, when=lambda: WHEN[moment](there))
    there.faults.clear()
    assert not pushed(there)
    before = set(there.state.repo("user/merged").objects)
    there.asked.clear()

    done = shell(*STREAM)

    assert done.code == 0, done.err
    assert pushed(there) == local(files)
    again = {m[1] for a in there.seen("PUT /upload") if (m := re.search(r"user/merged/(\w{64})", a.path))}
    assert not again & before
    assert len(again) <= len(CHANGED)
    assert not list(shell.home.glob("hf/adaptkit/streaming/*"))


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "terminated"])
def test_an_interrupted_run_says_so_and_goes_on(there, shell, files, sign, code):
    """One line; what was uploaded is not sent again."""
    there.fail(".", times=10_000, wait=0.01)
    process = shell.start(*STREAM)
    while len(there.seen("lfs/complete")) < 4:
        time.sleep(0.01)
    process.send_signal(sign)
    _, err = process.communicate(timeout=60)
    there.faults.clear()
    there.asked.clear()

    done = shell(*STREAM)

    assert process.returncode == code
    assert re.fullmatch(r"(interrupted|terminated) after \d+%; run the same command again to go on\n", err)
    assert done.code == 0, done.err
    assert len(there.seen("lfs/complete")) <= len(CHANGED) - 3
    assert pushed(there) == local(files)


@pytest.mark.slow
def test_uploads_that_the_hub_swept_away_are_made_again(there, shell, files):
    """What no commit names may be deleted between two runs."""
    there.fail("POST .*/commit/", times=1, status=403)
    first = shell(*STREAM)
    objects = there.state.repo("user/merged").objects
    for oid in sorted(objects)[:3]:
        del objects[oid]

    done = shell(*STREAM)

    assert (first.code, done.code) == (7, 0), done.err
    assert "may not do that (403)" in first.err
    assert pushed(there) == local(files)


IN_MEMORY = """
import sys
import adaptkit
from adaptkit.adapter import Adapter, Site
from adaptkit.store.arrays import load

lora = adaptkit.read(sys.argv[1])
for factor in (1, 2):  # the first run is refused its commit
    sites = {p: Site(s.tuner, {k: load(v) * (factor if k == "B" else 1) for k, v in s.params.items()}) for p, s in lora.sites.items()}
    try:
        adaptkit.merge("user/base", Adapter(sites, about=lora.about), push="user/merged", streaming=True)
    except adaptkit.AdaptKitError as e:
        print(e)
"""


@pytest.mark.slow
def test_numbers_in_memory_tell_one_merge_from_another(there, shell, files):
    """An adapter that is in no file, and then another: the second run does not go on with the first one's shards."""
    from adaptkit import merge

    there.fail("POST .*/commit/", status=403)
    command = [sys.executable, "-c", IN_MEMORY, str(files / "lora")]
    done = subprocess.run(command, env=shell.env, capture_output=True, text=True, timeout=100)

    merge(files / "base", files / "lora", shell.home / "out", weights=[2])
    assert done.stdout.count("may not do that (403)") == 1, done.stderr
    assert pushed(there) == {p.name: p.read_bytes() for p in (shell.home / "out").iterdir() if p.name not in OWN}


@pytest.mark.parametrize("fault", ["lost", "garbage"])
def test_a_commit_whose_answer_is_lost_is_not_sent_twice(there, shell, files, fault):
    """The head has moved and holds our files: done, with a word about it."""
    there.fail("POST .*/commit/", **{fault: True})

    done = shell(*STREAM)

    assert done.code == 0, done.err
    assert "no answer to the commit, but it is at" in done.err
    assert len(there.seen("POST .*/commit/")) == 1
    assert pushed(there) == local(files)


def test_a_commit_that_is_refused_for_now_is_sent_again(there, shell, files):
    """429 and 503 at the very end do not throw hours away."""
    there.fail("POST .*/commit/", status=503)
    there.fail("POST .*/commit/", status=429, headers={"Retry-After": "0"})

    done = shell(*STREAM)

    assert done.code == 0, done.err
    assert len(there.state.repo("user/merged").commits) == 2


def test_somebody_else_commits_meanwhile(there, shell):
    """412: nothing is overwritten, and the message says so."""
    there.state.put("user/merged", {"notes.txt": b"mine"})
    there.fail("validate-yaml", then=lambda: there.state.put("user/merged", {"notes.txt": b"changed"}))

    done = shell(*STREAM)

    assert done.code == 7
    assert "was changed by somebody else meanwhile (412)" in done.err
    assert there.state.repo("user/merged").bytes() == {"notes.txt": b"changed"}
    assert shell(*STREAM).code == 0


@pytest.mark.slow
def test_faults_on_the_way(there, shell, files):
    """Resets, short bodies, 429 and 503 in downloads and uploads: the same bytes in the end."""
    for match in ("GET /object", "PUT /upload", "objects/batch", "preupload"):
        there.fail(match, status=503)
    there.fail("GET /object", reset=250_000)
    there.fail("GET /object", cut=500_000)

    done = shell(*STREAM)

    assert done.code == 0, done.err
    assert pushed(there) == local(files)


def test_old_weights_of_the_repository_go_with_the_same_commit(there, shell, files):
    """A stale model.safetensors beside a new index would be loaded, or refused; a card that is there stays."""
    there.state.put("user/merged", {"model.safetensors": b"old", "README.md": b"mine", "notes.txt": b"kept"})

    done = shell(*STREAM)

    held = there.state.repo("user/merged").bytes()
    assert done.code == 0, done.err
    assert "model.safetensors" not in held
    assert held["README.md"] == b"mine"
    assert held["notes.txt"] == b"kept"


def test_verify_reads_the_receipt_at_the_hub(there, shell):
    """The weights of the merge stand there; an adapter of other bytes is named."""
    assert shell(*STREAM, "--weights", "0.5").code == 0
    config = there.state.repo("user/lora").bytes()["adapter_config.json"]
    there.state.put("user/lora", {"adapter_config.json": config + b"\n"})

    done = shell("verify", "user/merged", "--base", "user/base", "--adapter", "user/lora")

    assert done.code == 0, done.err
    assert "compared with weights 0.5, as adaptkit.json says" in done.err
    assert "user/lora/adapter_config.json: other bytes than adaptkit.json names" in done.out


def test_receipt_and_card_name_the_commits(there, shell):
    """What was made of what, by ids and commits; licence and languages are the base's."""
    done = shell(*STREAM)

    held = there.state.repo("user/merged").bytes()
    said, card = json.loads(held["adaptkit.json"]), held["README.md"].decode()
    base, lora = (there.state.repo(f"user/{n}").branches["main"] for n in ("base", "lora"))
    assert done.code == 0, done.err
    assert said["hub"] == [{"id": "user/base", "revision": base}, {"id": "user/lora", "revision": lora}]
    assert (said["base"], said["adapters"]) == ("user/base", ["user/lora"])
    assert {r["name"] for r in said["files"]} == set(held) - OWN
    for words in ("base_model: user/base", "license: mit", "- de", "library_name: transformers", base, lora):
        assert words in card
    assert str(shell.home) not in card + held["adaptkit.json"].decode()


def test_a_base_in_a_folder_streams_too(there, shell, files):
    """Nothing to download, the same commit."""
    done = shell("merge", files / "base", files / "lora", *STREAM[3:])

    assert done.code == 0, done.err
    assert pushed(there) == local(files)


def test_other_shards_than_the_base_has(there, shell, files):
    """--max-shard-size: an output file may need two inputs, an input two output files."""
    done = shell(*STREAM, "--max-shard-size", "1MB")

    from adaptkit import merge

    merge(files / "base", files / "lora", shell.home / "out", max_shard_size="1MB")
    assert done.code == 0, done.err
    assert pushed(there) == {p.name: p.read_bytes() for p in (shell.home / "out").iterdir() if p.name not in OWN}


def test_two_runs_of_the_same_merge(there, shell):
    """The second says that the first is at it."""
    over = threading.Event()
    there.fail("POST .*/commit/", then=lambda: over.wait(60))
    first = shell.start(*STREAM)
    while not there.seen("POST .*/commit/"):
        time.sleep(0.01)

    done = shell(*STREAM)
    over.set()
    first.communicate(timeout=60)

    assert first.returncode == 0
    assert done.code == 6
    assert "another run does the same merge" in done.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("-o", "out", "--streaming"), "give --push user/name and no -o OUT"),
        (("--streaming",), "give --push user/name"),
        (("--push", "user/merged"), "give -o OUT, or --streaming"),
        (("--push", "a/b/c", "--streaming"), "is not a Hub id"),
        (("-o", "out", "--private"), "give --push user/name"),
        (("--streaming", "--dry-run"), "give --push user/name"),
        (("-o", "out", "--push", "user/merged", "--streaming", "--dry-run"), "give --push user/name and no -o OUT"),
    ],
)
def test_options_that_do_not_go_together(there, shell, args, words):
    """Said before anything is asked of the Hub."""
    done = shell("merge", "user/base", "user/lora", *args)

    assert done.code == 2
    assert words in done.err
    assert not there.asked


def test_without_a_token_nothing_is_begun(there, shell):
    """Said before a byte is fetched."""
    done = shell(*STREAM, HF_TOKEN=None)

    assert done.code == 7
    assert "nobody is logged in" in done.err
    assert not there.asked


def test_a_pickled_base_cannot_stream(there, shell):
    """Its header cannot be read alone; the message says what to do."""
    there.state.put("user/old", {"config.json": b"{}", "pytorch_model.bin": b"PK" * 200_000})

    done = shell("merge", "user/old", *STREAM[2:])

    assert done.code == 4
    assert "pull the model first" in done.err
    assert not there.state.repos.get(("model", "user/merged"))


KINDS = (
    "llama/grown",
    "llama/tied-weights",
    "llama/dora",
    "llama/modules-to-save",
    "llama-untied-tiny/layer-replication",
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_an_adapter_does_to_a_model(hub, shell, kind):
    """New tokens with their tokenizer, tied ends, magnitudes, replaced tensors, more layers: as the local merge."""
    from adaptkit import AdaptKitWarning, merge

    model, lora = FIXTURES / "models" / kind.split("/")[0], FIXTURES / "adapters" / kind
    hub.state.put("user/base", model)
    hub.state.put("user/lora", lora)

    done = shell(*STREAM)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdaptKitWarning)
        merge(model, lora, shell.home / "out")
    assert done.code == 0, done.err
    assert pushed(hub) == {p.name: p.read_bytes() for p in (shell.home / "out").iterdir() if p.name not in OWN}


def test_a_local_merge_keeps_files_in_which_nothing_changes(files):
    """Header and all, though a merge would have written the header in another way."""
    same = {
        p.name
        for p in (files / "base").glob("*.safetensors")
        if p.read_bytes() == (files / "merged" / p.name).read_bytes()
    }

    assert len(same) == SHARDS - len(CHANGED)
