"""One thing under three faces: a command, its verb in Python and the README use the same words."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys

import click
import pytest
from places import FIXTURES, ROOT

import adaptkit
from adaptkit.cli.app import COMMANDS, cli

COMMAND_ONLY = {  # what a command has and its verb has not
    "json": "how the result is printed",
    "quiet": "how the result is printed",
    "dry_run": "is the verb `plan`",
}
VERB_ONLY = {  # what a verb has and its command has not
    "progress": "the command draws the bar",
    "dry_run": "the option of convert and export-onnx; that of merge is the verb `plan`",
}
OTHER_WORD = {"adapter": "adapters", "from": "from_", "for": "for_"}  # given once for each; words that Python keeps
PYTHON_ONLY = {"plan"}  # verbs without a command: `merge --dry-run`
CONTRACT = {  # the options that people were promised
    "merge": "output weights dtype device max-shard-size engine workers overwrite dry-run json quiet push streaming",
    "unmerge": "output",
    "combine": "output method weights rank clamp density majority-sign seed",
    "resize": "output rank energy max-rank",
    "extract": "output rank energy target-modules layers",
    "convert": "output to from base dtype max-shard-size",
    "export-onnx": "output swappable dtype quantize task no-verify",
    "inspect": "json base plot",
    "targets": "target-modules layers layers-pattern exclude-modules",
    "verify": "base adapter sample",
    "pull": "output",
    "push": "private revision create-pr message",
    "plugins": "",
}
NOT_YET: dict[str, set[str]] = {}  # promised, and not there: to be emptied
LIGHT = {
    "--help": ["--help"],
    "merge --help": ["merge", "--help"],
    "pull --help": ["pull", "--help"],
    "push --help": ["push", "--help"],
    "inspect": ["inspect", str(FIXTURES / "adapters" / "llama" / "lora")],
    "targets": ["targets", str(FIXTURES / "models" / "llama")],
    "plugins": ["plugins"],
}


def command(name: str) -> click.Command:
    return cli.get_command(click.Context(cli), name)


def verb(name: str):
    return getattr(adaptkit, name.replace("-", "_"))


def words(c: click.Command) -> list[str]:
    """The parameters of a command, as its verb spells them."""
    return [_word(p) for p in c.params if _word(p) not in COMMAND_ONLY]


def _word(p: click.Parameter) -> str:
    if isinstance(p, click.Argument):
        return p.name
    name = max(p.opts, key=len).lstrip("-").replace("-", "_")
    return OTHER_WORD.get(name, name)


def first_sentence(text: str) -> str:
    """first_sentence("List them.\\n\\nMore.") -> "List them." """
    return re.split(r"(?<=\.)\s", inspect.cleandoc(text))[0].replace("\n", " ")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_takes_what_its_verb_takes(name: str):
    """Same parameters, same names; what differs stands in the tables above."""
    taken = [p for p in inspect.signature(verb(name)).parameters if p not in VERB_ONLY]

    assert sorted(words(command(name))) == sorted(taken)


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_verb_needs_its_command_needs(name: str):
    """A parameter without a default is a required argument or option, and the other way round."""
    needed = {p.name for p in inspect.signature(verb(name)).parameters.values() if p.default is p.empty}

    assert {_word(p) for p in command(name).params if p.required} == needed


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_its_verb_says(name: str):
    """The first sentence of the help is that of the docstring, and that of `adaptkit --help`."""
    sentence = first_sentence(verb(name).__doc__)

    assert first_sentence(command(name).help) == sentence
    assert COMMANDS[name] == sentence


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_shows_an_example_and_explains_its_options(name: str):
    """Help has a line that can be copied, and a word on every option."""
    help_text = command(name).get_help(click.Context(command(name), info_name=f"adaptkit {name}"))

    assert re.search(rf"^ +Examples?:\n +adaptkit {name}\b", help_text, re.MULTILINE)
    assert not [p.name for p in command(name).params if isinstance(p, click.Option) and not p.help]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_readme_shows_every_command(name: str):
    """A command that the README does not show is not found."""
    assert f"adaptkit {name}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_options_that_were_promised(name: str):
    """The contract on words is kept by every command there is."""
    have = {o.lstrip("-") for p in command(name).params if isinstance(p, click.Option) for o in p.opts}
    missing = set(CONTRACT[name].split()) - have

    assert missing == NOT_YET.get(name, set())


def test_every_verb_has_a_command():
    """A verb that only Python has is said to be one."""
    verbs = {name for name, home in adaptkit.HOMES.items() if home.startswith("verbs.")}

    assert verbs - PYTHON_ONLY == {name.replace("-", "_") for name in COMMANDS}


@pytest.mark.parametrize("name", LIGHT)
def test_a_quick_command_imports_nothing_slow(name: str):
    """torch takes more than a second to import; who asks for help or looks into an adapter does not wait for it."""
    code = (
        "import json, sys; from adaptkit.cli.app import run; code = run(json.loads(sys.argv[1]));"
        "print(code, sorted({'torch', 'transformers', 'peft', 'huggingface_hub'} & sys.modules.keys()), file=sys.stderr)"
    )
    env = {**os.environ, "ADAPTKIT_NO_PLUGINS": "1"}
    command = [sys.executable, "-c", code, json.dumps(LIGHT[name])]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)

    assert done.stderr.splitlines()[-1] == "0 []", done.stderr


@pytest.mark.parametrize(
    ("typed", "answers"),
    [
        ("adaptkit conv", ["plain,convert"]),
        ("adaptkit convert --over", ["plain,--overwrite"]),
        ("adaptkit convert x --to m", ["plain,mlx"]),
        ("adaptkit merge llama/ my", ["file,my"]),
    ],
)
def test_a_shell_completes_commands_options_formats_and_paths(typed: str, answers: list[str]):
    """bash is told what fits; where folders and ids may stand it completes paths."""
    asked = {"_ADAPTKIT_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    command = [sys.executable, "-m", "adaptkit"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | asked, timeout=60)

    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, answers, "")
