"""Every command line that the documents show is one that the programs understand."""

import dataclasses
import itertools
import json
import re
import shlex
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

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
for command, recipe, mode, file, overrides, world in json.loads(sys.argv[1]):
    given = dict(training_mode=mode, config_file=file, overrides=tuple(overrides), mock=True, command=command)
    options = RunOptions(recipe, **given)
    found.append(describe(options, world))
with open(sys.argv[2], "w") as results:
    json.dump(found, results)
"""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line of a document.

    Attributes:
        before: the words before our program: variables, torchrun and its options.
        words: our program and its arguments.
    """

    before: tuple[str, ...]
    words: tuple[str, ...]

    def parsed(self) -> tuple[str, dict[str, Any]]:
        """The subcommand, and what the program makes of the arguments without running; its paths need not exist."""
        program, *rest = self.words
        (entry,) = entry_points(group="console_scripts", name=program)
        command, names = entry.load(), []
        while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
            names.append(rest.pop(0))
            command = command.commands[names[-1]]
        if {"--help", "--version"} & set(rest):
            return " ".join(names), {}
        return " ".join(names), command.make_context(program, rest).params

    def processes(self, params: dict[str, Any]) -> int:
        """Of a training run: its own, torchrun's, or those of the cluster that its configuration file is named for."""
        if "torchrun" not in self.before:
            return params["world_size"] or params["nproc_per_node"]
        nodes, processes = (_option(self.before, name) or "1" for name in ("--nnodes", "--nproc-per-node"))
        if nodes.startswith("$"):
            return int(re.search(r"(\d+)gpu", params["config_file"])[1])
        return int(nodes) * int(processes)


def _option(words: Sequence[str], name: str) -> str | None:
    return next((words[at + 1] for at, word in enumerate(words) if word == name), None)


def commands_of(text: str) -> list[Command]:
    """The commands of a document's blocks: all lines that call one of our programs, whatever stands before it."""
    commands = []
    for block in re.findall(r"^ *```(?:bash|console|sh)\n(.*?)^ *```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s(?:\||\|\||&&|;)\s", line.strip().removeprefix("$ ")):
                words = shlex.split(part, comments=True)
                # A sign in quotes is no redirection.
                words = list(itertools.takewhile(lambda word: not re.match(r"2?>|<", word), words))
                if at := [at for at, word in enumerate(words) if word in PROGRAMS]:
                    commands.append(Command(tuple(words[: at[0]]), tuple(words[at[0] :])))
    return commands


COMMANDS = [command for document in DOCUMENTS for command in commands_of(document.read_text(encoding="utf-8"))]


def test_the_documents_show_every_program():
    assert {command.words[0] for command in COMMANDS} == set(PROGRAMS)
    # Blocks in a numbered list are indented.
    assert any("--training-mode" in command.words for command in COMMANDS)
    assert {command.words[0] for command in COMMANDS if "torchrun" in command.before} >= {"wan-train", "wan-data"}
    assert any("srun" in command.before for command in COMMANDS)


def test_commands_are_found_whatever_stands_around_them():
    text = """
  ```sh
  $ A=1 torchrun --nproc-per-node 2 \\
      --no-python wan-train pretrain --recipe=tiny a.b=1   # comment
  cd x && wan-data sources d --where "motion > 1" | head > out 2> err
  wan-data inspect d > out
  echo no
  ```
"""
    assert [command.before for command in commands_of(text)] == [
        ("A=1", "torchrun", "--nproc-per-node", "2", "--no-python"), (), (),
    ]  # fmt: skip
    train, sources, inspect = commands_of(text)
    assert sources.words == ("wan-data", "sources", "d", "--where", "motion > 1")
    assert inspect.words == ("wan-data", "inspect", "d")
    name, params = train.parsed()
    assert (name, params["recipe"], params["overrides"]) == ("pretrain", "tiny", ("a.b=1",))
    assert train.processes(params) == 2


@pytest.mark.parametrize(
    "line",
    [
        "wan-data prepare --no-such-flag", "wan-train pretrain --recipe=unknown", "wan-infer -z",
        "wan-train plan --gpus many", "wan-data nothing", "wan-train plan bare",
    ],
)  # fmt: skip
def test_a_mistaken_command_is_noticed(line):
    with pytest.raises((click.UsageError, KeyError)):
        Command((), tuple(line.split())).parsed()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.words))
def test_every_argument_is_understood(command):
    command.parsed()


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


def _full_pack(overrides: Sequence[str]) -> list[str]:
    """One video that fills a pack, in place of the documents' data."""
    capacity = next((int(word.partition("=")[2]) for word in overrides if word.startswith("dataset.capacity=")), 43008)
    assert capacity >= 1024, "the grid below has 1,024 tokens a frame"
    shape = f"dataset.mock_settings.shapes=[[{capacity // 1024},64,64]]"
    return [shape, "dataset.mock_settings.number_packed_samples=1"]


def test_every_training_command_has_known_settings_and_fits_80_gb(run, tmp_path):
    runs, of = [], []
    for command in COMMANDS:
        name, params = command.parsed()
        if command.words[0] == "wan-train" and name in ("pretrain", "finetune"):
            recipe, file = params["recipe"], params["config_file"]
            # Of the files that they name; a rank of 0 is that of a LoRA file.
            absent = ("dataset.path=", "lora.init_from=", "lora.rank=0")
            overrides = [word for word in params["overrides"] if not word.startswith(absent)]
            full = [] if "tiny" in (recipe, file) else _full_pack(overrides)
            runs.append((name, recipe, params["training_mode"], file, [*overrides, *full], command.processes(params)))
            of.append(" ".join(command.words))
    assert {name for name, *_ in runs} == {"pretrain", "finetune"}
    assert any(overrides for *_, overrides, _ in runs)
    assert any(world > 64 for *_, world in runs)
    run("python", "-c", DESCRIBE, json.dumps(runs), str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert any(one["tokens"] / one["packs"] == 43008 for one in found)
    for line, one in zip(of, found, strict=True):
        assert one["total_bytes"] < 0.9 * 80e9, f"{line} needs {one['total_bytes'] / 1e9:.1f} GB"
