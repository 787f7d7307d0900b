"""The door for plugins: everything in plugins/ works through it, and no plugin spoils anyone else's work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from places import FIXTURES, ROOT
from plugin_door import FOLDERS, declared, door, opened, run
from safetensors.numpy import load_file, save_file

import adaptkit
from adaptkit import Adapter, AdaptKitError, Format, Site, Tuner, registry
from adaptkit.testing import check_format, check_tuner, zoo
from adaptkit.tuners.dora import DoRA
from adaptkit.tuners.ia3 import IA3
from adaptkit.tuners.lora import LoRA


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The import path on which every folder of plugins/ is as good as installed."""
    return door(tmp_path_factory.mktemp("site"), FOLDERS)


@pytest.fixture
def plugins(path: list[str]):
    """This process sees the plugins."""
    with opened(path):
        yield


# what lies in plugins/


def test_every_plugin_is_listed_with_its_package(plugins):
    """The packages of plugins/ appear beside the built-in names."""
    found = {(p.kind, p.name): (p.package, p.broken) for p in adaptkit.plugins()}

    assert found["tuner", "echo"] == found["format", "echo"] == ("adaptkit-echo", False)
    assert found["format", "npz"] == ("adaptkit-npz", False)
    assert found["tuner", "hra"] == ("adaptkit-hra", False)
    assert found["format", "gguf"] == found["format", "onnx_adapter"] == ("adaptkit", False)  # shipped with it
    assert found["tuner", "lora"] == ("adaptkit", False)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_a_plugin_is_one_module_one_pyproject_and_one_test(folder: Path):
    """What a stranger copies is small, and looks into the shop window only."""
    files = sorted(p.name for p in folder.iterdir() if p.name != "__pycache__")
    (module,) = folder.glob("adaptkit_*")
    text = (module / "__init__.py" if module.is_dir() else module).read_text()

    assert files == sorted([module.name, "pyproject.toml", *(t.name for t in folder.glob("test_*.py"))])
    assert len(files) == 3
    assert "adaptkit." not in text.replace("adaptkit.testing", "")


@pytest.mark.slow
def test_the_plugins_own_tests_pass(path: list[str]):
    """Each is run as its author would run it."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT)])}
    pytest_alone = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        f"--rootdir={ROOT}",
    ]
    done = subprocess.run([*pytest_alone, *map(str, FOLDERS)], env=env, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def _base(folder: Path) -> tuple[Path, np.ndarray]:
    """A model of two layers in one file."""
    W = np.random.default_rng(0).standard_normal((2, 6, 4)).astype("f4")
    save_file({"layers.0.lin.weight": W[0], "layers.1.lin.weight": W[1]}, folder / "model.safetensors")
    return folder / "model.safetensors", W


def _reflected(W: np.ndarray, U: np.ndarray) -> np.ndarray:
    """HRA by its formula, with whole matrices: W H_1 ... H_r."""
    for u in U.T.astype("f8"):
        W = W @ (np.eye(len(u)) - 2 * np.outer(u, u) / (u @ u))
    return W


def test_a_strangers_tuner_in_a_strangers_format_merges_by_its_formula(plugins, path: list[str], tmp_path: Path):
    """HRA in an .npz, merged by the command: what changes is W H_1 ... H_r, and nothing else changes."""
    base, W = _base(tmp_path)
    U = np.random.default_rng(1).standard_normal((4, 2)).astype("f4")
    adapter = Adapter({"layers.1.lin": Site(registry.load("tuners", "hra")(r=2), {"U": U})})
    registry.load("formats", "npz")().write(adapter, tmp_path / "x.npz")

    run(path, "merge", base, tmp_path / "x.npz", "-o", tmp_path / "out", "--quiet")

    merged = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_allclose(merged["layers.1.lin.weight"], _reflected(W[1].astype("f8"), U), rtol=1e-6, atol=1e-7)
    assert np.array_equal(merged["layers.0.lin.weight"], W[0])


def test_a_strangers_tuner_can_be_taken_out_again(plugins, tmp_path: Path):
    """unmerge follows the tuner's own inverse."""
    base, W = _base(tmp_path)
    U = np.random.default_rng(1).standard_normal((4, 2)).astype("f4")
    adapter = Adapter({"layers.1.lin": Site(registry.load("tuners", "hra")(r=2), {"U": U})})

    adaptkit.merge(base, adapter, tmp_path / "merged")
    adaptkit.unmerge(tmp_path / "merged" / "model.safetensors", adapter, tmp_path / "back")

    back = load_file(tmp_path / "back" / "model.safetensors")
    np.testing.assert_allclose(back["layers.1.lin.weight"], W[1], rtol=1e-6, atol=1e-6)


def test_echo_merges_to_the_base(plugins, path: list[str], tmp_path: Path):
    """A tuner that changes nothing changes no byte, and the format has said what it was given."""
    base, _ = _base(tmp_path)
    (tmp_path / "x.echo").write_text("layers.0.lin")

    done = run(path, "merge", base, tmp_path / "x.echo", "-o", tmp_path / "out", "--json")

    assert "echo: read x.echo: 1 modules" in done.stderr
    assert json.loads(done.stdout)["changed"] == ["layers.0.lin.weight"]
    before, after = load_file(base), load_file(tmp_path / "out" / "model.safetensors")
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}


def test_a_peft_adapter_goes_through_a_strangers_format(plugins, tmp_path: Path):
    """What was read lazily from another format can be written, and reads back bit for bit."""
    adapter = adaptkit.read(FIXTURES / "adapters" / "gpt2" / "lora")

    assert check_format(registry.load("formats", "npz")(), adapter, tmp_path / "x.npz")


def test_the_plugin_of_the_tutorial_works(tmp_path: Path):
    """The code in docs/plugins.md, copied out as a reader would: it is listed, and keeps the promises of a tuner."""
    text = (ROOT / "docs" / "plugins.md").read_text()
    code, toml = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1] for kind in ("python", "toml"))
    (tmp_path / "adaptkit_gain.py").write_text(code)
    (tmp_path / "pyproject.toml").write_text(toml)

    with opened(door(tmp_path / "site", [tmp_path])):
        assert ("gain", "adaptkit-gain", False) in {(p.name, p.package, p.broken) for p in adaptkit.plugins()}
        check_tuner(registry.load("tuners", "gain")())


# J01 to J07: what a stranger's package may do wrong

SOUND = "from adaptkit import Tuner\n\nclass Good(Tuner):\n    name = 'good'\n"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages, with one sound tuner in it."""
    return _package(tmp_path / "site", "sound", SOUND, "[adaptkit.tuners]\ngood = sound:Good\n")


def _package(site: Path, name: str, source: str, entry_points: str) -> Path:
    declared(site, f"adaptkit-{name}", entry_points)
    (site / f"{name}.py").write_text(source)
    return site


def _listed(site: Path, **env: str) -> dict[str, dict]:
    """`adaptkit plugins --json`, by name; every built-in and the sound stranger must be fine."""
    found = {p["name"]: p for p in json.loads(run([str(site)], "plugins", "--json", **env).stdout)}
    assert not found["lora"]["broken"]
    assert not found["peft"]["broken"]
    assert not found["good"]["broken"]
    return found


def _inspects(site: Path) -> subprocess.CompletedProcess:
    done = run([str(site)], "inspect", FIXTURES / "adapters" / "llama" / "lora", "--json")
    assert json.loads(done.stdout)["kind"] == "lora"
    return done


# case -> source, entry point, what is said; NAME is the module and the tuner
BROKEN = {
    "J01 raises": ("1 / 0", "NAME:Bad", "cannot be loaded (ZeroDivisionError: division by zero)"),
    "J01 lacks a module": ("import no_such_module", "NAME:Bad", "needs no_such_module; pip install no_such_module"),
    "J01 lacks itself": ("", "gone:Bad", "cannot be loaded (ModuleNotFoundError: No module named 'gone')"),
    "J01 has an error in it": ("def", "NAME:Bad", "cannot be loaded (SyntaxError"),
    "J02 exits": ("import sys; sys.exit(3)", "NAME:Bad", "cannot be loaded (SystemExit: 3)"),
    "J06 is a function": ("def Bad(): pass", "NAME:Bad", "not a Tuner"),
    "J06 is another class": ("class Bad:\n    name = 'NAME'", "NAME:Bad", "not a Tuner"),
    "J06 has another name": (SOUND.replace("Good", "Bad"), "NAME:Bad", "calls itself 'good'; set name = 'NAME'"),
    "J06 is not there": ("", "NAME:Bad", "has no attribute 'Bad'"),
    "J07 names no class": ("", "NAME", 'not a Tuner; write it as "module:Class"'),
    "J07 is no name at all": ("", "!!", "has the entry point '!!'; write it as \"module:Class\""),
}
NAMES = {case: f"bad{i}" for i, case in enumerate(BROKEN)}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages, one sound and all others broken."""
    site = _package(tmp_path_factory.mktemp("site"), "sound", SOUND, "[adaptkit.tuners]\ngood = sound:Good\n")
    for case, (source, entry, _) in BROKEN.items():
        name = NAMES[case]
        text = f"[adaptkit.tuners]\n{name} = {entry.replace('NAME', name)}\n"
        _package(site, name, source.replace("NAME", name), text)
    return site


@pytest.fixture(scope="module")
def listing(broken: Path) -> dict[str, dict]:
    """What `adaptkit plugins` says of them; the built-in and the sound ones are fine."""
    return _listed(broken)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_listed_with_the_reason(case: str, listing: dict[str, dict]):
    """The listing says whose it is and why it cannot be used; exit code 0."""
    name, why = NAMES[case], BROKEN[case][2]

    assert (listing[name]["broken"], listing[name]["package"]) == (True, f"adaptkit-{name}")
    assert why.replace("NAME", name) in listing[name]["about"]


def test_broken_plugins_stop_nothing_else(broken: Path):
    """With eleven broken packages installed, an adapter is inspected without a word about them."""
    assert _inspects(broken).stderr == ""


def test_a_format_that_cannot_read_is_listed_as_broken(site: Path):
    """J06: a class that lacks what every format must have."""
    source = (
        "from adaptkit import Format\n\nclass Bad(Format):\n    name = 'bad'\n    def sniff(self, path): return False\n"
    )
    _package(site, "bad", source, "[adaptkit.formats]\nbad = bad:Bad\n")

    assert "does not define read" in _listed(site)["bad"]["about"]


@pytest.mark.parametrize("text", ["[adaptkit.tuners]\nbad\n", "[adaptkit.tuners\nbad = bad:Bad\n", "bad = bad:Bad\n"])
def test_a_list_of_entry_points_that_cannot_be_read_spoils_no_other(text: str, site: Path):
    """J07: a line without "=", a group without its bracket, a line before any group."""
    _package(site, "bad", "", text)

    assert "bad" not in _listed(site)
    _inspects(site)


def test_entry_points_that_are_not_text_spoil_no_other(site: Path):
    """J07: bytes that are not UTF-8."""
    _package(site, "bad", "", "")
    (site / "adaptkit_bad-0.dist-info" / "entry_points.txt").write_bytes(b"[adaptkit.tuners]\n\xff = bad:Bad\n")

    _listed(site)


def test_what_a_plugin_prints_on_import_stays_out_of_the_output(site: Path):
    """J03: stdout stays parseable, and the text is on stderr."""
    _package(site, "loud", f"print('hello')\n{SOUND.replace('good', 'loud')}", "[adaptkit.tuners]\nloud = loud:Good\n")

    done = run([str(site)], "plugins", "--json")

    assert {p["name"]: p["broken"] for p in json.loads(done.stdout)}["loud"] is False
    assert "hello" in done.stderr


def test_a_loud_format_does_not_spoil_the_json_of_other_commands(site: Path):
    """J03: a format is imported when a path is to be recognised; what it prints then is not the result."""
    _package(site, "loud", LOUD_FORMAT, "[adaptkit.formats]\nloud = loud:Loud\n")

    _inspects(site)


LOUD_FORMAT = """
print('imported loud')
from adaptkit import Format

class Loud(Format):
    name = 'loud'
    def sniff(self, path): return False
    def read(self, path): ...
"""


def test_a_built_in_name_cannot_be_taken(site: Path):
    """J04: the stranger's claim is ignored and said; its code is not imported."""
    source = "print('imported thief')\n" + SOUND.replace("good", "lora")
    _package(site, "thief", source, "[adaptkit.tuners]\nlora = thief:Good\n")

    done = _inspects(site)

    assert "warning: tuner 'lora' of adaptkit-thief is ignored: the name is built in" in done.stderr
    assert "imported" not in done.stderr
    assert _listed(site)["lora"]["package"] == "adaptkit"


def test_two_strangers_with_one_name_are_both_refused(site: Path):
    """Nobody can say which one is meant."""
    for name in ("one", "two"):
        _package(site, name, SOUND.replace("good", "same"), f"[adaptkit.tuners]\nsame = {name}:Good\n")

    found = _listed(site)["same"]

    assert (found["broken"], found["package"]) == (True, "adaptkit-one, adaptkit-two")
    assert "uninstall all but one" in found["about"]


@pytest.mark.parametrize("args", [["--help"], ["merge", "--help"], ["--version"]])
def test_help_imports_no_plugin(args: list[str], site: Path):
    """J05: asking for help runs nobody's code."""
    _eager(site)

    assert "imported" not in run([str(site)], *args).stderr


def test_merge_imports_no_plugin_that_it_does_not_use(site: Path, tmp_path: Path):
    """J05: a PEFT adapter is recognised by the built-in format; strangers are not asked."""
    _eager(site)
    out = tmp_path / "out"

    done = run(
        [str(site)],
        "merge",
        FIXTURES / "models" / "gpt2",
        FIXTURES / "adapters" / "gpt2" / "lora",
        "-o",
        out,
        "--quiet",
    )

    assert (out / "model.safetensors").exists()
    assert "imported" not in done.stderr


def _eager(site: Path) -> None:
    """A tuner and a format that tell when they are imported."""
    source = f"import sys\nprint('imported eager', file=sys.stderr)\n{SOUND}"
    _package(site, "eager", source, "[adaptkit.tuners]\neager = eager:Good\n")
    _package(site, "loud", LOUD_FORMAT, "[adaptkit.formats]\nloud = loud:Loud\n")


def test_a_format_that_fails_while_it_is_asked_does_not_stop_the_others(site: Path, tmp_path: Path):
    """A bug in a stranger's sniff is not a bug of ours, nor of the format that would fit."""
    source = LOUD_FORMAT.replace("return False", "raise KeyError(path)")
    _package(site, "loud", source, "[adaptkit.formats]\nloud = loud:Loud\n")
    (tmp_path / "x.echo").write_text("")

    done = run([str(site)], "inspect", tmp_path / "x.echo", code=4)

    assert "recognises it" in done.stderr
    assert "bug of ours" not in done.stderr


FAILING_TUNER = """
from dataclasses import dataclass
from adaptkit import Adapter, Format, Site, Tuner

@dataclass(frozen=True)
class Fails(Tuner):
    name = 'fails'
    arrays = 'any'
    def weight(self, W, p): return W[p['nothing']]

class Fail(Format):
    name = 'fail'
    def sniff(self, path): return path.suffix == '.fail'
    def read(self, path): return Adapter({'layers.0.lin': Site(Fails(), {})}) if path.stem == 'x' else 1 / 0
"""


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (
            "x.fail",
            "layers.0.lin.weight: tuner 'fails' of adaptkit-fails failed (KeyError: 'nothing'); tell its author",
        ),
        ("y.fail", "format 'fail' of adaptkit-fails failed (ZeroDivisionError: division by zero); tell its author"),
    ],
)
def test_a_bug_of_a_plugin_is_not_called_ours(file: str, said: str, site: Path, tmp_path: Path):
    """The line says whose code failed, and nothing is left behind."""
    entry_points = "[adaptkit.tuners]\nfails = fails:Fails\n[adaptkit.formats]\nfail = fails:Fail\n"
    _package(site, "fails", FAILING_TUNER, entry_points)
    base, _ = _base(tmp_path)
    (tmp_path / file).write_text("")

    done = run([str(site)], "merge", base, tmp_path / file, "-o", tmp_path / "out", code=4)

    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_no_plugins_means_none(site: Path):
    """ADAPTKIT_NO_PLUGINS=1 leaves what is built in."""
    _eager(site)

    done = run([str(site)], "plugins", "--json", ADAPTKIT_NO_PLUGINS="1")

    assert {p["package"] for p in json.loads(done.stdout)} == {"adaptkit"}
    assert "imported" not in done.stderr


def test_a_missing_extra_of_a_plugin_is_not_called_an_extra_of_ours(site: Path):
    """Only our own packages are asked for by adaptkit[...]."""
    _package(site, "needy", "import no_such_module", "[adaptkit.formats]\nneedy = needy:Needy\n")

    assert (
        _listed(site)["needy"]["about"]
        == "format 'needy' of adaptkit-needy needs no_such_module; pip install no_such_module"
    )


def test_an_unknown_name_is_answered_with_the_nearest(plugins):
    """A typing error is met with what was probably meant."""
    with pytest.raises(AdaptKitError, match="Did you mean 'hra'"):
        registry.load("tuners", "hraa")


# the contracts that plugin authors run


def _factors(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {"A": rng.standard_normal((2, shape[1])).astype("f4"), "B": rng.standard_normal((shape[0], 2)).astype("f4")}


BUILT_IN = {
    "lora": ({"r": 2}, None),
    "rslora": ({"r": 2, "rslora": True}, None),
    "lora with a bias": ({"r": 2}, lambda shape: {**_factors(shape), "c": np.ones(shape[0], "f4")}),
    "dora": ({"r": 2}, None),
    "experts": ({"r": 2}, None),
    "bdlora": ({"r": 2}, None),
    "bdlora of two blocks": ({"r": 2, "blocks": 2}, None),
    "bdlora of two blocks in B": ({"r": 2, "blocks": 2, "side": "B"}, None),
    "ia3": ({}, None),
    "ia3 on the in side": ({"feedforward": True}, None),
    "tokens": ({}, lambda shape: {"index": np.array([4, 1]), "rows": np.ones((2, shape[1]), "f4") / 3}),
    "prompt": ({}, None),
    "ptuning": ({}, None),
    "prefix": ({}, None),
    "pissa": ({"r": 2}, lambda shape: _factors(shape)),
    "olora": ({"r": 2}, lambda shape: _factors(shape)),
    "kasa": ({"r": 2}, lambda shape: {**_factors(shape), "d": np.array([1 / 3, -2], "f4")}),
}


@pytest.mark.parametrize("case", BUILT_IN)
@pytest.mark.filterwarnings("ignore::adaptkit.AdaptKitWarning")
def test_every_built_in_tuner_keeps_the_promises(case: str):
    """What strangers must pass, ours pass."""
    settings, params_for = BUILT_IN[case]
    name = "lora" if case == "rslora" else case.split()[0]

    check_tuner(registry.load("tuners", name)(**settings), params_for)


def test_every_built_in_tuner_is_checked():
    """A new one cannot be forgotten."""
    ours = {n for n in registry.names("tuners") if registry.built_in("tuners", n)}

    assert ours == {case.split()[0] for case in BUILT_IN} - {"rslora"}


class WrongFactors(LoRA):
    def factors(self, p):
        L, R, s = super().factors(p)
        return L, R, -s

    def weight(self, W, p):
        L, R, s = super().factors(p)
        return W + s * (L @ R)


class WrongRows(DoRA):
    def rows(self, p, start, stop):
        return {**super().rows(p, start, stop), "m": p["m"].reshape(-1)[: stop - start]}


class WrongInverse(IA3):
    def inverse(self, p):
        return self, {"l": -p["l"]}


class WrongStart(LoRA):
    def init(self, base):
        started = super().init(base)
        return {**started, "B": started["B"] + 1}


class SilentBias(IA3):
    def bias(self, b, p):
        return b * p["l"]

    def changes_bias(self, p):
        return False


class Deaf(LoRA):
    def weight(self, W, p):
        return super().weight(W, {**p, "B": p["B"].detach() if hasattr(p["B"], "detach") else p["B"]})


class OnlyNumPy(IA3):
    def weight(self, W, p):
        return W * (p["l"].reshape(-1, 1) if isinstance(W, np.ndarray) else p["l"].sum())


class Transposes(LoRA):
    def weight(self, W, p):
        return super().weight(W, p).T


@dataclass
class Melts(Tuner):
    """Not frozen: two sites could not share it."""

    name = "melts"


WRONG = {
    WrongFactors: "factors: W \\+ s L R differs from weight",
    WrongRows: "rows: weight on rows 2:6 differs",
    WrongInverse: "inverse does not undo weight",
    WrongStart: "init is no no-op",
    SilentBias: "changes_bias says no",
    Deaf: "no gradient to 'B'",
    OnlyNumPy: "differs",
    Transposes: "shape",
    Melts: "not a frozen dataclass",
}


@pytest.mark.parametrize("broken", WRONG, ids=lambda c: c.__name__)
def test_a_broken_promise_of_a_tuner_is_found_and_named(broken: type[Tuner]):
    """Each contract fails for a tuner that breaks it, and says which one it was."""
    with pytest.raises(AssertionError, match=WRONG[broken]):
        check_tuner(broken(**({"r": 2} if issubclass(broken, LoRA) else {})))


def test_running_must_equal_merging():
    """A tuner whose torch side differs from what the file engine merges is found out, even when both agree on a step."""
    from adaptkit import testing

    layer = testing._layer((6, 4))
    params = {k: v.astype("f8") for k, v in _factors((6, 4)).items()}
    with pytest.raises(AssertionError, match="merging differs from running"):
        testing._running_equals_merging(WrongFactors(r=2), layer, params)


class Forgetful(Format):
    """Remembers an adapter as its author describes, in memory."""

    name = "forgetful"
    kept: Adapter

    def sniff(self, path):
        return path.suffix == ".forget"

    def read(self, path):
        return self.spoil(self.kept)

    def write(self, adapter, path):
        path.write_text("")
        type(self).kept = adapter


def _spoilt(adapter: Adapter, change) -> Adapter:
    sites = {k: Site(s.tuner, {n: change(v) for n, v in s.params.items()}) for k, s in adapter.sites.items()}
    return replace(adapter, sites=sites)


LOSSES = {
    "sites": (lambda a: replace(a, sites={}), "holds sites"),
    "meta": (lambda a: replace(a, meta={}), "loses meta"),
    "whole": (lambda a: replace(a, whole={}), "whole holds"),
    "precision": (lambda a: _spoilt(a, lambda v: v.astype("f2")), "is float16"),
    "a bit": (lambda a: _spoilt(a, lambda v: np.nextafter(v, 9, dtype="f4")), "other numbers"),
    "a setting": (
        lambda a: replace(a, sites={k: Site(replace(s.tuner, alpha=9.0), s.params) for k, s in a.sites.items()}), "instead of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_a_format_that_loses_something_is_found_and_named(loss: str, tmp_path: Path):
    """Bit for bit means every bit."""
    spoil, message = LOSSES[loss]
    format = type("Spoils", (Forgetful,), {"spoil": staticmethod(spoil)})()
    adapter = replace(zoo()["whole"], meta={"a": "b"})

    with pytest.raises(AssertionError, match=message):
        check_format(format, adapter, tmp_path / "a.forget")


def test_a_format_that_keeps_everything_passes(tmp_path: Path):
    """The contract can be kept, for every animal of the zoo."""
    format = type("Keeps", (Forgetful,), {"spoil": staticmethod(lambda a: a)})()

    assert all(check_format(format, adapter, tmp_path / f"{kind}.forget") for kind, adapter in zoo().items())


def test_a_refusal_must_be_allowed_and_leave_nothing(tmp_path: Path):
    """A format that refuses fails its test, unless the test expects it; and half a file is never left."""

    class Refuses(Forgetful):
        def write(self, adapter, path):
            raise AdaptKitError("no")

    class Leaves(Forgetful):
        def write(self, adapter, path):
            path.write_text("half")
            raise AdaptKitError("no")

    with pytest.raises(AdaptKitError):
        check_format(Refuses(), zoo()["lora"], tmp_path / "a.forget")
    assert check_format(Refuses(), zoo()["lora"], tmp_path / "a.forget", may_refuse=True) is False
    with pytest.raises(AssertionError, match="has written"):
        check_format(Leaves(), zoo()["lora"], tmp_path / "a.forget", may_refuse=True)


def test_a_format_that_claims_everything_is_found(tmp_path: Path):
    """Every format is asked about every path."""

    class Greedy(Forgetful):
        def sniff(self, path):
            return True

    with pytest.raises(AssertionError, match="recognises an empty folder"):
        check_format(Greedy(), zoo()["lora"], tmp_path / "a.forget")
