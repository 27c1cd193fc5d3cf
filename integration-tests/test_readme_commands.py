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

# A dry run of each: an unknown key or a value of the wrong kind ends it.
DESCRIBE = """
import json, sys
from wan_train.config.options import RunOptions
from wan_train.planning.dry_run import describe
found = []
for recipe, file, overrides, world in json.loads(sys.argv[1]):
    found.append(describe(RunOptions(recipe, config_file=file, overrides=tuple(overrides), mock=True), world))
with open(sys.argv[2], "w") as results:
    json.dump(found, results)
"""
# One video that fills a pack, in place of the documents' data.
FULL_PACK = ["dataset.mock_settings.shapes=[[42,64,64]]", "dataset.mock_settings.number_packed_samples=1"]


def _commands() -> list[list[str]]:
    commands = []
    for document in DOCUMENTS:
        for block in re.findall(
            r"^ *```(?:bash|console|sh)\n(.*?)^ *```", document.read_text(encoding="utf-8"), re.M | re.S
        ):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words and words[0] in PROGRAMS:
                    commands.append(words)
    return commands


COMMANDS = _commands()


def test_the_documents_show_every_program():
    assert {command[0] for command in COMMANDS} == set(PROGRAMS)
    # Blocks in a numbered list are indented.
    assert any("--training-mode" in command for command in COMMANDS)


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


def _option(words: list[str], *names: str) -> str | None:
    return next((words[words.index(name) + 1] for name in names if name in words), None)


def test_every_training_command_has_known_settings_and_fits_80_gb(run, tmp_path):
    runs = []
    for words in COMMANDS:
        if words[:2] == ["wan-train", "pretrain"]:
            recipe, file = _option(words, "--recipe"), _option(words, "--config-file")
            overrides = [word for word in words[2:] if re.match(r"[a-z_]+\.[a-z_.0-9]+=", word)]
            overrides = [word for word in overrides if not word.startswith("dataset.path=")]
            full = [] if "tiny" in (recipe, file) else FULL_PACK
            world = int(_option(words, "--nproc-per-node", "--world-size") or 1)
            runs.append((recipe, file, [*overrides, *full], world))
    assert any(overrides for _, _, overrides, _ in runs)
    run("python", "-c", DESCRIBE, json.dumps(runs), str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert any(one["tokens"] / one["packs"] == 43008 for one in found)
    for words, one in zip(runs, found, strict=True):
        needed = one["total_bytes"]
        assert needed < 0.9 * 80e9, f"{words} needs {needed / 1e9:.1f} GB"
