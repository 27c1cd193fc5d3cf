"""Every command line that the documents show is one that the programs understand."""

import json
import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("packages/*/*.md")), ROOT / "docker" / "README.md"]
PROGRAMS = ("wan-data", "wan-train", "wan-infer")

# Builds the configuration of a run and nothing more: an unknown key or a value of the wrong kind ends it.
BUILD = """
import json, sys
from wan_train import engine
engine.start()
from wan_train.config.options import RunOptions
from wan_train.loop.run import build_config
for recipe, file, overrides in json.loads(sys.argv[1]):
    build_config(RunOptions(recipe, config_file=file, overrides=tuple(overrides)))
"""


def _commands() -> list[list[str]]:
    commands = []
    for document in DOCUMENTS:
        for block in re.findall(
            r"^```(?:bash|console|sh)\n(.*?)^```", document.read_text(encoding="utf-8"), re.M | re.S
        ):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words and words[0] in PROGRAMS:
                    commands.append(words)
    return commands


COMMANDS = _commands()


def test_the_documents_show_every_program():
    assert {command[0] for command in COMMANDS} == set(PROGRAMS)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_flag_is_known(words):
    program, *rest = words
    (entry,) = entry_points(group="console_scripts", name=program)
    command = entry.load()
    if isinstance(command, click.Group):
        name, *rest = rest
        assert name in command.commands
        command = command.commands[name]
    known = {spelling for option in command.params for spelling in (*option.opts, *option.secondary_opts)}
    known |= {"--help", "--version"}
    used = {word.partition("=")[0] for word in rest if word.startswith("--")}
    assert used <= known, f"unknown: {sorted(used - known)}"


def test_the_places_to_add_something_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^## Where to add\n(.*?)^## ", text, re.M | re.S)
    places = re.findall(r"`(wan_\w+/[\w./]+)`", table)
    assert places
    for place in places:
        assert list(ROOT.glob(f"packages/*/src/{place}")), place
    for name, place in re.findall(r"`(\w+)` of `(wan_\w+/[\w./]+)`", table):
        (file,) = ROOT.glob(f"packages/*/src/{place}")
        assert re.search(rf"^{name}\b", file.read_text(encoding="utf-8"), re.M), name


def test_every_override_is_a_known_setting(run):
    runs = []
    for words in COMMANDS:
        if words[:2] == ["wan-train", "pretrain"]:
            recipe, file = (words[words.index(o) + 1] if o in words else None for o in ("--recipe", "--config-file"))
            runs.append((recipe, file, [word for word in words[2:] if re.match(r"[a-z_]+\.[a-z_.0-9]+=", word)]))
    assert any(overrides for _, _, overrides in runs)
    run("python", "-c", BUILD, json.dumps(runs))
