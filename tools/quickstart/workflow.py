"""What the quickstart does on any clips: the stages of training, and the parts of the report that all share."""

import abc
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from common.commands import require_programs
from common.failure import require
from quickstart.results_folder import claimed
from quickstart.stages import Stages
from quickstart.training_log import TrainingLog, check_checkpoint, check_learning, check_steps, read_log

PROGRAMS = ("wan-data", "wan-train", "wan-infer")
TENSOR_PARALLEL, DATA_PARALLEL = "training-tensor-parallel", "training-data-parallel"

# Files and folders that each run replaces; the download is kept, so that a second run needs no network.
MADE = ["clips", "model", "dataset", TENSOR_PARALLEL, "trained-halfway", DATA_PARALLEL, "requests.jsonl", "samples",
        "samples.json", "video.mp4", "contact-sheet.png", "sampled-clips.png", "loss-curve.png", "adherence.png",
        "report.json"]  # fmt: skip


class Workflow(abc.ABC):
    """The stages of the quickstart on some clips.

    Args:
        root: where the commands run.
        folder: where everything is written, relative to ``root``.
    """

    stage_count: ClassVar[int]
    pack_capacity: ClassVar[int]  # tokens

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        self.stages = Stages(self.stage_count, root)

    @abc.abstractmethod
    def run(self) -> dict[str, Any]:
        """Run all stages, where ``prepared``.

        Returns:
            The report.

        Raises:
            ToolFailure: a command failed, or a check of its result did.
        """

    def check(self, report: dict[str, Any]) -> None:  # noqa: B027  not every workflow has a goal
        """Check what the model has learnt, after the report is written.

        Raises:
            ToolFailure: it is too little.
        """

    def path(self, name: str) -> Path:
        """Where a result is."""
        return self.root / self.folder / name

    def argument(self, name: str) -> str:
        """The same as an argument of a command."""
        return str(self.folder / name)

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """For the whole run: all programs are there, and the folder is this run's own and without results.

        Raises:
            ToolFailure: a program is missing, or the folder is not the quickstart's or another run writes to it.
        """
        require_programs(*PROGRAMS)
        with claimed(self.path(""), MADE) as lock:
            # A command that outlives a killed run keeps the folder locked.
            self.stages.kept_open = [lock]
            yield

    def pretrain(self, name: str, steps: int, *arguments: str) -> None:
        """Train on two processes."""
        self.stages.command(
            "wan-train", "pretrain", "--recipe", "tiny", "--nproc-per-node", "2",
            f"dataset.path={self.argument('dataset')}", f"checkpoint.save={self.argument(name)}",
            f"dataset.capacity={self.pack_capacity}", f"train.train_iters={steps}",
            *arguments,
        )  # fmt: skip

    def train_tensor_parallel(self, steps: int, *arguments: str) -> TrainingLog:
        """Train with tensor parallelism on two processes; stop halfway and resume with the same command."""
        halfway = steps // 2
        settings = ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true",
                    f"checkpoint.save_interval={halfway}", f"train.exit_interval={halfway}", *arguments]  # fmt: skip
        folder = self.path(TENSOR_PARALLEL)
        with self.stages.stage("train", "two processes (TP=2, sequence parallel); stopped halfway"):
            self.pretrain(TENSOR_PARALLEL, steps, *settings)
            log = read_log(folder)
            check_steps(log, halfway)
            check_checkpoint(folder, halfway)
        with self.stages.stage("resume", "the same command resumes from the checkpoint"):
            self.pretrain(TENSOR_PARALLEL, steps, *settings)
            log = read_log(folder)
            check_steps(log, steps)
            check_checkpoint(folder, steps)
            step = log.resumed_from()
            require(step == halfway, f"the second run resumed from step {step}; expected {halfway}")
            check_learning(log)
        return log

    def train_data_parallel(self, what: str, steps: int, *arguments: str) -> TrainingLog:
        """Train with data parallelism on two processes."""
        folder = self.path(DATA_PARALLEL)
        with self.stages.stage("train-dp", what):
            self.pretrain(
                DATA_PARALLEL, steps, "train.global_batch_size=2", f"checkpoint.save_interval={steps}", *arguments
            )
            log = read_log(folder)
            check_steps(log, steps)
            check_checkpoint(folder, steps)
            require(log.resumed_from() is None, "the data-parallel run resumed from a checkpoint; expected a new run")
            check_learning(log)
        return log

    def summary(self, log: TrainingLog, packs_a_step: int) -> dict[str, Any]:
        """A training run in the report."""
        return {
            "steps": len(log.steps),
            "packs_per_step": packs_a_step,
            "first_loss": log.losses[0],
            "last_loss": log.losses[-1],
            "resumed_from_step": log.resumed_from(),
            "packing": log.packing(packs_a_step, self.pack_capacity),
            "validation": [
                {name: entry[name] for name in ("step", "loss", "caption_gap") if name in entry}
                for entry in log.validations
            ],
        }

    def report(self, runs: dict[str, TrainingLog], files: dict[str, str], **parts: Any) -> dict[str, Any]:
        """The report: parts of its own, then what every workflow has.

        Args:
            runs: first that of tensor parallelism, a pack a step, then that of data parallelism, two packs.
            files: names of results, by what they are.
            parts: by their keys.
        """
        return {
            **parts,
            "training": {
                name: self.summary(log, packs) for (name, log), packs in zip(runs.items(), (1, 2), strict=True)
            },
            "seconds": {**self.stages.seconds, "total": round(sum(self.stages.seconds.values()), 1)},
            "files": {what: self.argument(name) for what, name in files.items()},
        }
