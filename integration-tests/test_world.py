"""The longer session on the small world: its settings are accepted, and what was made is not made again."""

import itertools
import json
import random
import re
import shlex
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import world.__main__ as command_line
from quickstart.pictures import check_picture
from world import comparison, curve, lora, place, sampling
from world.variants import BASE, VARIANTS, shared_runs

from common.failure import ToolFailure
from common.training_log import counted, seconds_until
from small_world import commands
from small_world.adherence import requests
from small_world.clips import write_video
from small_world.scenes import OBJECTS, PATTERNS, VANISHING, WORLDS, World

SIZES = {"model.transformer.num_layers": "3", "model.transformer.text_dim": "64"}
# Of each: the settings of the objective and of the optimizer, as a run has them.
BUILD = """
import dataclasses, json, sys
from wan_train.config.options import RunOptions
from wan_train.planning.dry_run import describe
from wan_train.loop.run import build_config
found = []
for overrides in json.loads(sys.argv[1]):
    options = RunOptions("tiny", overrides=tuple(overrides), mock=True)
    packs = describe(options, 1)["packs"]
    config = build_config(options)
    found.append({
        "packs": packs, "lr": config.optimizer.lr, "ema": config.ema.decay, "steps": config.train.train_iters,
        "seeds": [config.rng.seed, config.dataset.seed], **dataclasses.asdict(config.model.flow),
    })
with open(sys.argv[2], "w") as results:
    json.dump(found, results)
"""


def _words(line: list[str]) -> dict[str, Any]:
    """What a program makes of its arguments, without running."""
    (entry,) = entry_points(group="console_scripts", name=line[0])
    command, rest = entry.load(), line[1:]
    if hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    return command.make_context(line[0], list(rest)).params


# -- settings ---------------------------------------------------------------------------------------------------------


def test_every_variant_is_accepted_and_changes_what_its_name_says(run, tmp_path):
    settings = {
        name: {**SIZES, **variant.settings(400, 1 if name == "no-ema" else 0, {})} for name, variant in VARIANTS.items()
    }
    # The recipe's mock data fill a pack of any capacity.
    lines = [[f"{key}={value}" for key, value in one.items()] for one in settings.values()]
    run("python", "-c", BUILD, json.dumps(lines), tmp_path / "found.json")
    found = dict(zip(VARIANTS, json.loads((tmp_path / "found.json").read_text()), strict=True))
    base = found[BASE]
    seeds = base["seeds"], found["no-ema"].pop("seeds")
    assert seeds == ([1234, 1234], [1235, 1235])
    changed = {name: {key: one[key] for key in one if one[key] != base[key]} for name, one in found.items()}
    assert changed == {
        BASE: {},
        "logit_normal": {"density": "logit_normal", "shift": 2.5},
        "mode": {"density": "mode", "uniform_mix": 0},
        "lognorm": {"density": "lognorm", "uniform_mix": 0},
        "shift-1.0": {"shift": 1.0},
        "shift-5.0": {"shift": 5.0},
        "weighting-none": {"weighting": "none"},
        "dropout-0": {"caption_dropout": 0},
        "dropout-0.3": {"caption_dropout": 0.3},
        "no-guidance": {},
        "dropout-0-no-guidance": {"caption_dropout": 0},
        "ema-0.9": {"ema": 0.9},
        "ema-0.999": {"ema": 0.999},
        "no-ema": {},
        "lr-1e-3": {"lr": 1e-3},
        "lr-6e-3": {"lr": 6e-3},
        "half-batch": {"packs": 1, "ema": 0.995, "steps": 800},
    }
    assert (base["packs"], base["lr"], base["density"], base["shift"]) == (2, 3e-3, "uniform", 3.0)


def test_variants_of_sampling_share_the_run_of_their_training():
    groups = shared_runs(list(VARIANTS), lambda variant: variant.settings(400, 0, {}))
    shared = [[variant.name for variant in group] for group in groups if len(group) > 1]
    assert shared == [[BASE, "no-guidance", "no-ema"], ["dropout-0", "dropout-0-no-guidance"]]


@pytest.mark.parametrize("name", VARIANTS)
def test_sampling_is_what_the_variant_says(name):
    variant = VARIANTS[name]
    params = _words(commands.sample("c", "m", "r", "v", ema=variant.ema, settings=variant.options()))
    assert params["ema"] == (name != "no-ema")
    scale = params["sample_guide_scale"]
    assert float(scale[0] if isinstance(scale, tuple | list) else scale) == (1 if "no-guidance" in name else 1.5)


@pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)
def test_the_commands_of_the_data_are_understood(world):
    params = _words(commands.prepare(world, "c", "d", "m"))
    assert params["area"] == (max(height * width for height, width in world.sizes),)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "optimizer.lr"], "'optimizer.lr' is no setting of wan-train; expected KEY.PATH=VALUE"),
        (["--requests", "2"], "'2'; expected a whole number, at least 3"),
        (["--compare", "--only", "unknown"], "invalid choice: 'unknown'"),
        (["--compare", "--lora"], "argument --lora: not allowed with argument --compare"),
    ],
)
def test_a_wrong_option_ends_the_session_before_it_begins(words, message, capsys):
    with pytest.raises(SystemExit):
        command_line.parser().parse_args(words)
    assert message in capsys.readouterr().err


def test_the_command_of_a_row_repeats_the_options_of_its_session():
    words = ["--compare", "--steps", "20", "--seeds", "0", "1", "--jobs", "2", "--set", "optimizer.lr=1e-3"]
    options = command_line.options_of(command_line.parser().parse_args(words))
    assert options == ["--steps", "20", "--seeds", "0", "1", "--set", "optimizer.lr=1e-3"]


# -- logs -------------------------------------------------------------------------------------------------------------


def _step(number: int) -> dict[str, Any]:
    return {"step": number, "seconds": float(number), "loss": 1.0}


def test_steps_that_were_trained_again_count_once():
    first = [_step(1), _step(2), {"event": "validation", "step": 2, "loss": 9.0}, _step(3)]
    resumed = [*first, {"event": "resumed", "step": 2}, _step(3), _step(4)]
    assert [(one["step"], one.get("event")) for one in counted(resumed)] == [
        (1, None), (2, None), (2, "validation"), (2, "resumed"), (3, None), (4, None),
    ]  # fmt: skip
    assert seconds_until(counted(resumed), 3) == 6.0
    # Stopped before its first checkpoint, a run begins again.
    assert counted([*first, _step(1)]) == [_step(1)]


# -- sessions ---------------------------------------------------------------------------------------------------------


class Programs:
    """In place of the programs: training writes a log, sampling draws what was asked for.

    Attributes:
        ran: programs, in order.
        stops: training ends with an error after so many steps of its interval.
        fails: a setting of a training that ends with an error.
        forgets: with a LoRA the videos of this world show another colour.
    """

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.stops: int | None = None
        self.fails = "nothing"
        self.forgets: World | None = None

    def __call__(self, *arguments: str, folder: Path, output: Path | None = None, **_: Any) -> None:
        self.ran.append(arguments[0])
        match arguments[0]:
            case "wan-train" if arguments[1] == "export":
                (folder / arguments[arguments.index("--lora") + 1 if "--lora" in arguments else 3]).touch()
            case "wan-train":
                values = dict(word.split("=", 1) for word in arguments if "=" in word)
                if self.fails in arguments:
                    raise ToolFailure(f"{self.fails} failed")
                self._train(folder / values["checkpoint.save"], values)
            case "wan-infer":
                assert output is not None
                options = dict(itertools.pairwise(arguments))
                output.write_text(json.dumps({"videos": self._sample(folder, options)}))
            case _ if arguments[2] == "small_world.model":
                config = folder / arguments[3] / "transformer" / "config.json"
                config.parent.mkdir(parents=True)
                config.write_text(json.dumps(dict.fromkeys(commands.SIZES_OF_MODEL, 1)))

    def _train(self, checkpoints: Path, values: Mapping[str, str]) -> None:
        checkpoints.mkdir(parents=True, exist_ok=True)
        tracker = checkpoints / "latest_checkpointed_iteration.txt"
        interval, steps = int(values["checkpoint.save_interval"]), int(values["train.train_iters"])
        begun = int(tracker.read_text()) if tracker.is_file() else 0
        with (checkpoints / "log.jsonl").open("a") as log:

            def write(entry: dict[str, Any]) -> None:
                log.write(json.dumps(entry) + "\n")

            if begun:
                write({"event": "resumed", "step": begun})
            for number in range(begun + 1, steps + 1):
                write({"step": number, "seconds": 2.0, "loss": 1.0})
                if number % interval == 0:
                    write({"event": "validation", "step": number, "loss": 3 / number, "caption_gap": 1.5})
                    tracker.write_text(str(number))
                if number == self.stops:
                    raise ToolFailure("stopped")

    def _sample(self, root: Path, options: Mapping[str, str]) -> list[dict[str, str]]:
        scenes = {world.caption(scene): (world, scene) for world in WORLDS.values() for scene in world.scenes}
        videos = root / options["--output-folder"]
        videos.mkdir()
        found = []
        for number, line in enumerate((root / options["--prompts-file"]).read_text().splitlines()):
            world, scene = scenes[json.loads(line)["prompt"]]
            request = next(one for one in requests(world, 4) if one.scene == scene)
            path = videos / f"{number}.mp4"
            shown = world.values(scene)
            if world is self.forgets if "--lora" in options else world is VANISHING:  # the base never saw these
                shown["colour"] = "red" if shown["colour"] != "red" else "blue"
            write_video(world.frames(tuple(shown.values()), request.size, random.Random(number)), path)
            found.append({"file": str(path.relative_to(root))})
        return found


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    programs = Programs()
    for module in (place, sampling, curve, comparison, lora):
        monkeypatch.setattr(module, "run_command", programs)
    return programs


@pytest.fixture
def session(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs a session with some options and returns the programs that it ran."""
    monkeypatch.chdir(tmp_path)

    def session(*options: str) -> list[str]:
        before = len(programs.ran)
        try:
            command_line.run(command_line.parser().parse_args(["--requests", "4", *options]))
        finally:
            ran = programs.ran[before:]
        return ran

    return session


def test_a_stopped_curve_goes_on_where_it_was(programs, session, tmp_path):
    options = ["--steps", "20", "--points", "2"]
    programs.stops = 15
    with pytest.raises(ToolFailure, match=r"^stopped$"):
        session(*options)
    assert programs.ran == ["python", "python", "wan-data", "wan-train"]
    programs.stops = None
    assert session(*options) == ["wan-train", "wan-infer", "wan-infer"]
    result = json.loads((tmp_path / "world" / "curve.json").read_text())
    assert [(one["step"], one["seconds"], one["caption_gap"]) for one in result["points"]] == [
        (10, 20.0, 1.5), (20, 40.0, 1.5),
    ]  # fmt: skip
    assert [one["adherence"]["all"]["all"] for one in result["points"]] == [1.0, 1.0]
    check_picture(tmp_path / "world" / "curve.png")
    text = (tmp_path / "world" / "curve.md").read_text()
    header, _, *rows = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert header == [
        "step", "seconds of training", "validation loss", "caption gap", *OBJECTS.attributes, "all", "held-out, all",
    ]  # fmt: skip
    assert rows == [
        ["10", "20", "0.3000", "1.50", *["100 %"] * 6],
        ["20", "40", "0.1500", "1.50", *["100 %"] * 6],
    ]
    # One that is lost is sampled again, the others are not.
    (tmp_path / "world" / "curve" / "step-0000010" / "adherence.json").unlink()
    for path in (tmp_path / "world" / "curve" / "step-0000010" / "videos").iterdir():
        path.unlink()
    (tmp_path / "world" / "curve" / "step-0000010" / "videos").rmdir()
    assert session(*options) == ["wan-infer"]
    assert session(*options) == []


def test_a_curve_of_other_settings_is_refused(session, tmp_path):
    session("--steps", "20", "--points", "2")
    with pytest.raises(ToolFailure, match=r"was made with optimizer\.lr of 3e-3, and now it is 1e-3; "):
        session("--steps", "20", "--points", "2", "--set", "optimizer.lr=1e-3")
    with pytest.raises(ToolFailure, match="--steps is 20 and --points 3; expected"):
        session("--steps", "20", "--points", "3")


def test_rows_stand_and_the_data_are_made_once(programs, session, tmp_path):
    options = ["--compare", "--steps", "20", "--jobs", "2", "--only"]
    assert session(*options, BASE, "no-ema") == [
        "python", "python", "wan-data", "wan-train", "wan-infer", "wan-infer",
    ]  # fmt: skip
    assert session(*options, BASE, "half-batch") == ["wan-train", "wan-infer"]
    assert session(*options, BASE, "half-batch", "no-ema") == []
    assert sorted(session(*options, BASE, "--seeds", "0", "1")) == ["wan-infer", "wan-train"]
    result = json.loads((tmp_path / "world" / "compare.json").read_text())
    assert [(one["variant"], one["seed"], one["loss"]) for one in result["rows"]] == [
        (BASE, 0, 0.15), (BASE, 1, 0.15), ("no-ema", 0, 0.15), ("half-batch", 0, 0.075),
    ]  # fmt: skip
    text = (tmp_path / "world" / "compare.md").read_text()
    _, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows] == [f"`{BASE}`", "`no-ema`", "`half-batch`"]
    assert rows[0][2:] == [
        "0, 1", "0.1500", "1.50", *["100 %"] * len(PATTERNS.attributes), *["100 % (100 to 100)"] * 2, "40",
        "`nox -s world -- --compare --only base --steps 20 --requests 4 --seeds 0 1`",
    ]  # fmt: skip
    for row in rows:  # what stands in the table is a command that the session takes
        words = shlex.split(row[-1].strip("`"))
        assert command_line.parser().parse_args(words[words.index("--") + 1 :]).only == [row[0].strip("`")]
    with pytest.raises(ToolFailure, match="was made with steps of 20, and now it is 40; "):
        session("--compare", "--steps", "40")


def test_a_failed_run_does_not_end_the_others(programs, session, tmp_path):
    programs.fails = "optimizer.lr=6e-3"
    options = ["--compare", "--steps", "20", "--only", "lr-6e-3", BASE]
    with pytest.raises(ToolFailure, match=r"^1 of 2 runs failed: optimizer\.lr=6e-3 failed$"):
        session(*options)
    rows = json.loads((tmp_path / "world" / "compare.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == [BASE]


def test_a_row_of_a_variant_that_was_changed_since_is_made_again(session, tmp_path, monkeypatch):
    options = ["--compare", "--steps", "20", "--only"]
    session(*options, BASE, "lr-1e-3")
    changed = type(VARIANTS["lr-1e-3"])("lr-1e-3", "changed", {"optimizer.lr": "2e-3"})
    monkeypatch.setitem(VARIANTS, "lr-1e-3", changed)  # type: ignore[arg-type]
    assert session(*options, BASE) == []
    rows = json.loads((tmp_path / "world" / "compare.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == [BASE]
    assert session(*options, "lr-1e-3") == ["wan-train", "wan-infer"]


# -- LoRA -------------------------------------------------------------------------------------------------------------

PREPARED = ["python", "python", "python", "wan-data"]  # two kinds of clips, and the model


def test_a_lora_is_trained_on_a_base_of_the_session_and_what_stands_is_kept(programs, session, tmp_path):
    """The base is trained on clips of its own, then all videos are sampled twice."""
    options = ["--lora", "--steps", "20"]
    programs.stops = 15
    with pytest.raises(ToolFailure, match=r"^stopped$"):
        session(*options)
    assert programs.ran == [*PREPARED, "python", "python", "wan-data", "wan-train"]
    programs.stops = None
    assert session(*options) == ["wan-train"] * 4 + ["wan-infer"] * 4  # base, its export, LoRA, its export
    assert session(*options) == []
    result = json.loads((tmp_path / "world" / "lora.json").read_text())
    assert result["training"]["LoRA"] == {"steps": 20, "seconds": 40.0, "loss": 0.15}
    assert result["training"]["base"]["steps"] == lora.STEPS_OF_BASE
    shares = {
        (group, weights): found["all"]["all"]
        for group, of_group in result["adherence"].items()
        for weights, found in of_group.items()
    }
    assert shares == {
        ("new", "base"): 0.0, ("new", "with the LoRA"): 1.0, ("old", "base"): 1.0, ("old", "with the LoRA"): 1.0,
    }  # fmt: skip
    text = (tmp_path / "world" / "lora.md").read_text()
    rows = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("| new")]
    assert rows == [
        ["new: vanish", "base", "0 %", "100 %", "100 %", "100 %", "0 %", "0 %"],
        ["new: vanish", "with the LoRA", *["100 %"] * 6],
    ]
    # What stands in the report are commands that the programs take.
    lines = [shlex.split(line, comments=True) for line in text.split("```sh\n")[1].split("```")[0].splitlines()]
    assert [line[1] for line in lines if line[0] == "wan-train"] == ["pretrain", "export", "finetune", "export"]
    exported, trained = lines[1][3], dict(itertools.pairwise(lines[2]))
    assert trained["--init-from"] == exported == "world/lora/base-model"
    for line in lines:
        _words(line)
    with pytest.raises(ToolFailure, match=r"was made with lora\.rank of 16, and now it is 4; "):
        session(*options, "--set", "lora.rank=4")


def test_a_lora_is_trained_on_a_base_that_is_given(session):
    assert session("--lora", "--steps", "20", "--base", "run") == [*PREPARED, *["wan-train"] * 3, *["wan-infer"] * 4]
    with pytest.raises(ToolFailure, match=r"was made with base of run, and now it is other; "):
        session("--lora", "--steps", "20", "--base", "other")


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (VANISHING, r"^0\.0% of the new videos show all .*; expected at least 90%; see world/lora\.md$"),
        (PATTERNS, r"^0\.0% of the old videos show .*, and 100\.0% without; expected a fall of at most 2%; see \S+$"),
    ],
    ids=["nothing learnt", "all forgotten"],
)
def test_a_lora_that_learns_nothing_or_forgets_fails_with_its_table_written(
    world, message, programs, session, tmp_path
):
    programs.forgets = world
    with pytest.raises(ToolFailure, match=message):
        session("--lora", "--steps", "20", "--base", "run")
    assert "| 0 %" in (tmp_path / "world" / "lora.md").read_text()
