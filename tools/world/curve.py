"""One run with checkpoints that are all kept, and the adherence of each: what is learnt when."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from common.commands import run_command
from common.failure import require
from common.json_file import write_json
from common.training_log import counted, read_log, seconds_until, validation_at
from small_world import commands
from small_world.adherence import requests
from small_world.scenes import World
from world.curve_report import draw_curve, markdown
from world.place import Data, Place, claim
from world.sampling import adherence

FOLDER = "curve"
PACKS = 2  # a step


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of the run.

    Attributes:
        world: of the clips.
        steps: of training.
        points: checkpoints, each after as many steps.
        requests: videos sampled from each checkpoint.
        processes: of training.
        overrides: settings of wan-train, over ``small_world.commands.TRAINING``.
    """

    world: World
    steps: int
    points: int
    requests: int
    processes: int
    overrides: Mapping[str, str]

    @property
    def interval(self) -> int:
        """Steps between two checkpoints."""
        return self.steps // self.points

    def training(self, sizes: Mapping[str, str]) -> dict[str, str]:
        """All settings of wan-train."""
        return {
            **sizes,
            **commands.TRAINING,
            "dataset.capacity": str(commands.CAPACITY),
            "train.global_batch_size": str(PACKS),
            **self.overrides,
            "train.train_iters": str(self.steps),
            "checkpoint.save_interval": str(self.interval),
            "validation.interval": str(self.interval),
        }


def is_trained(place: Place, steps: int, *names: str) -> bool:
    """Whether a folder of checkpoints has that of the last step."""
    tracker = place.path(*names, "latest_checkpointed_iteration.txt")
    return tracker.is_file() and tracker.read_text(encoding="utf-8").strip() == str(steps)


def point(step: int, entries: list[dict[str, Any]], found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A point of the curve, from the counted entries of the log and the adherence by group."""
    validation = validation_at(entries, step)
    return {
        "step": step,
        "seconds": round(seconds_until(entries, step), 1),
        "loss": validation["loss"],
        "caption_gap": validation.get("caption_gap"),
        "adherence": found,
    }


def run(place: Place, data: Data, settings: Settings) -> dict[str, Any]:
    """Train, or go on with training; sample the checkpoints that were not sampled; write the curve after each.

    Returns:
        The content of ``curve.json``.

    Raises:
        ToolFailure: a command failed, or the folder holds a run of other settings.
    """
    world = settings.world
    require(
        settings.steps % settings.points == 0,
        f"--steps is {settings.steps} and --points {settings.points}; expected a number of steps that they divide",
    )
    training = settings.training(data.sizes)
    others = {"world": world.name, "requests": settings.requests, "processes": settings.processes, "data": data.digest}
    claim(place.path(FOLDER), {**training, **{name: str(value) for name, value in others.items()}})
    checkpoints = place.argument(FOLDER, "checkpoints")
    line = commands.pretrain(data.dataset, checkpoints, training, processes=settings.processes)
    if not is_trained(place, settings.steps, FOLDER, "checkpoints"):
        run_command(*line, folder=place.root)
    asked = requests(world, settings.requests)
    commands.write_requests(world, asked, place.path(FOLDER, "requests.jsonl"))
    entries = counted(read_log(place.path(FOLDER, "checkpoints")))
    result: dict[str, Any] = {"world": world.name, "train": line, "points": []}
    for step in range(settings.interval, settings.steps + 1, settings.interval):
        name = f"step-{step:07}"
        sample = commands.sample(
            checkpoints,
            data.model,
            place.argument(FOLDER, "requests.jsonl"),
            place.argument(FOLDER, name, "videos"),
            step=step,
        )
        found = adherence(world, asked, sample, place.path(FOLDER, name), root=place.root)
        print(f"step {step}: {found['all']['all']:.0%} of the videos show everything", flush=True)
        result["points"].append({**point(step, entries, found), "sample": sample})
        write_json(place.path("curve.json"), result)
        place.path("curve.md").write_text(markdown(result), encoding="utf-8")
        draw_curve(result, place.path("curve.png"))
    return result
