"""A LoRA teaches a trained model what its clips never showed, and what the model knew before stays.

The base is trained on the world of patterns; the LoRA on clips of the world ``vanishing``, whose patterns do what none
of the base's clips shows, and on some of the base's. Both worlds are sampled from the base alone and with the LoRA, the
same requests with the same seeds.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from common.commands import run_command
from common.failure import require
from common.json_file import write_json
from common.training_log import counted, read_log, seconds_until, validation_at
from small_world import commands
from small_world.adherence import requests
from small_world.scenes import PATTERNS, VANISHING
from world.curve import PACKS, is_trained
from world.lora_report import markdown
from world.place import Data, Place, claim, prepare
from world.sampling import Adherences, adherence

FOLDER = "lora"
NEW, OLD = "new", "old"  # the groups of requests
WORLDS = {NEW: VANISHING, OLD: PATTERNS}
BASE, WITH_LORA = "base", "with the LoRA"

STEPS_OF_BASE, STEPS = 2000, 600
NEW_CLIPS, OLD_CLIPS = 150, 150
REQUESTS = 96  # of each group: of 48, one that is wrong would be more than may be lost
TRAINING: Mapping[str, str] = {
    **commands.TRAINING,
    "lora.rank": "16",
    "optimizer.lr": "6e-3",
    "scheduler.lr_warmup_iters": "10",
}

LEAST_NEW = 0.9  # of the videos that show what the LoRA was trained for, in all attributes at once
LARGEST_FALL = 0.02  # of the share of the others


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of the session.

    Attributes:
        steps: of the LoRA's training.
        requests: videos sampled of each group.
        processes: of each training.
        clips: that the base is trained on.
        overrides: settings of the LoRA's training, over ``TRAINING``.
        base: checkpoints of a trained base; None to train it.
    """

    steps: int
    requests: int
    processes: int
    clips: int
    overrides: Mapping[str, str]
    base: str | None = None


def _training(settings: Mapping[str, str], steps: int) -> dict[str, str]:
    return {
        **settings,
        "dataset.capacity": str(commands.CAPACITY),
        "train.global_batch_size": str(PACKS),
        "train.train_iters": str(steps),
        "checkpoint.save_interval": str(steps),
        "validation.interval": str(steps),
    }


class Session:
    """The runs of a folder; what stands is not made again.

    Args:
        place: of the session.
        settings: of all that it makes.

    Raises:
        ToolFailure: the folder holds results of other settings.
    """

    def __init__(self, place: Place, settings: Settings) -> None:
        self.place, self.settings = place, settings
        self.commands: dict[str, list[str]] = {}

    def _run(self, name: str, line: list[str], *made: str) -> None:
        """Run a command, unless what it makes is there."""
        self.commands[name] = line
        if not self.place.path(FOLDER, *made).exists():
            run_command(*line, folder=self.place.root)

    def _train(self, name: str, line: list[str], steps: int, folder: str) -> dict[str, Any]:
        """Train, or go on with training; returns what the log says of it."""
        self.commands[name] = line
        if not is_trained(self.place, steps, FOLDER, folder):
            run_command(*line, folder=self.place.root)
        entries = counted(read_log(self.place.path(FOLDER, folder)))
        loss = validation_at(entries, steps)["loss"]
        return {"steps": steps, "seconds": round(seconds_until(entries, steps), 1), "loss": loss}

    def train_base(self) -> tuple[str, dict[str, Any] | None]:
        """The base's checkpoints, and what the log says of its training if it is the session's own."""
        if self.settings.base is not None:
            return self.settings.base, None
        data = prepare(self.place, [(PATTERNS, self.settings.clips)])
        training = _training({**data.sizes, **commands.TRAINING}, STEPS_OF_BASE)
        checkpoints = self.place.argument(FOLDER, "base")
        claim(self.place.path(FOLDER, "base"), {**training, "data": data.digest})
        line = commands.pretrain(data.dataset, checkpoints, training, processes=self.settings.processes)
        return checkpoints, self._train("train the base", line, STEPS_OF_BASE, "base")

    def sample(self, data: Data, base: str, group: str, lora: str | None) -> Adherences:
        """Adherence of a group of videos, from the base alone or with the LoRA."""
        weights = BASE if lora is None else WITH_LORA
        folder = f"{group}-{'base' if lora is None else 'lora'}"
        asked = requests(WORLDS[group], self.settings.requests)
        commands.write_requests(WORLDS[group], asked, self.place.path(FOLDER, f"{group}.jsonl"))
        line = commands.sample(
            base,
            data.model,
            self.place.argument(FOLDER, f"{group}.jsonl"),
            self.place.argument(FOLDER, folder, "videos"),
            lora=lora,
        )
        self.commands[f"sample {group} videos, {weights}"] = line
        found = adherence(WORLDS[group], asked, line, self.place.path(FOLDER, folder), root=self.place.root)
        print(f"{group} videos, {weights}: {found['all']['all']:.0%} show everything", flush=True)
        return found

    def run(self) -> dict[str, Any]:
        """Make all of it, and write the tables.

        Returns:
            The content of ``lora.json``.

        Raises:
            ToolFailure: a command failed.
        """
        settings = self.settings
        data = prepare(self.place, [(VANISHING, NEW_CLIPS), (PATTERNS, OLD_CLIPS)])
        training = _training({**TRAINING, **settings.overrides}, settings.steps)
        chosen = settings.base or "trained here"
        facts = {"base": chosen, "requests": settings.requests, "processes": settings.processes, "data": data.digest}
        claim(self.place.path(FOLDER), {**training, **{name: str(value) for name, value in facts.items()}})
        base, of_base = self.train_base()
        model = self.place.argument(FOLDER, "base-model")
        self._run("export the base", commands.export(base, model), "base-model")
        line = commands.finetune(
            data.dataset,
            self.place.argument(FOLDER, "checkpoints"),
            training,
            base=model,
            processes=settings.processes,
        )
        of_lora = self._train("train the LoRA", line, settings.steps, "checkpoints")
        file = self.place.argument(FOLDER, "lora.safetensors")
        line = commands.export_lora(self.place.argument(FOLDER, "checkpoints"), file)
        self._run("export the LoRA", line, "lora.safetensors")
        found = {
            group: {BASE: self.sample(data, base, group, None), WITH_LORA: self.sample(data, base, group, file)}
            for group in WORLDS
        }
        result = {
            "training": {"base": of_base, "LoRA": of_lora},
            "lora_bytes": os.path.getsize(self.place.path(FOLDER, "lora.safetensors")),
            "adherence": found,
            "commands": self.commands,
        }
        write_json(self.place.path("lora.json"), result)
        self.place.path("lora.md").write_text(markdown(result), encoding="utf-8")
        return result


def check(result: Mapping[str, Any], table: str) -> None:
    """Check that the LoRA has learnt and the base forgotten nothing.

    Args:
        result: see ``Session.run``.
        table: where its tables are, for messages.

    Raises:
        ToolFailure: one of both is not so.
    """
    shares = {
        group: {weights: found["all"]["all"] for weights, found in of_group.items()}
        for group, of_group in result["adherence"].items()
    }
    new, fall = shares[NEW][WITH_LORA], shares[OLD][BASE] - shares[OLD][WITH_LORA]
    require(
        new >= LEAST_NEW,
        f"{new:.1%} of the new videos show all that their captions say; expected at least {LEAST_NEW:.0%}; see {table}",
    )
    require(
        fall <= LARGEST_FALL,
        f"{shares[OLD][WITH_LORA]:.1%} of the old videos show all that their captions say with the LoRA, and "
        f"{shares[OLD][BASE]:.1%} without; expected a fall of at most {LARGEST_FALL:.0%}; see {table}",
    )
