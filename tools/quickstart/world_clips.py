"""The quickstart on the small world, in which a tiny model learns to show what captions say.

A third of the clips that are sampled at the end are of combinations that training never saw; plain image analysis
reads what they show, and the run fails if too few are right.
"""

import dataclasses
from typing import Any

import numpy as np

from common.failure import require
from quickstart.adherence_pictures import draw_adherence, draw_samples
from quickstart.dataset_facts import DatasetFacts, read_dataset
from quickstart.pictures import check_picture, draw_losses
from quickstart.training_log import TrainingLog
from quickstart.workflow import DATA_PARALLEL, TENSOR_PARALLEL, Workflow
from small_world import commands
from small_world.adherence import COUNT, Adherence, Request, requests, table
from small_world.clips import read_video
from small_world.recognition import recognise
from small_world.scenes import FRAMES, PATTERNS

WORLD = PATTERNS
SHAPES = {f"{(FRAMES - 1) // 4 + 1} x {height // 8} x {width // 8}" for height, width in WORLD.sizes}

# The first run is stopped halfway.
STEPS_TENSOR_PARALLEL = 200
STEPS_DATA_PARALLEL = 1500
VALIDATIONS = 4  # of the data-parallel run

# Of the sampled clips, those that are right in all attributes at once. Of the 16 of combinations that training never
# saw two may be wrong; alone, the first bound would let a third of them be.
LEAST_ADHERENCE = 0.9
LEAST_HELD_OUT = 0.85


class WorldClips(Workflow):
    """The stages on clips of the small world."""

    stage_count = 9
    pack_capacity = commands.CAPACITY

    def clips(self) -> None:
        """Draw clips of the scenes that are not held out."""
        with self.stages.stage("clips", f"{commands.CLIPS} drawn clips of three sizes, with captions"):
            self.stages.command(*commands.draw_clips(WORLD, self.argument("clips")))

    def model(self) -> None:
        """Write the model folder: a trained autoencoder, and transformer and text encoder with random weights."""
        with self.stages.stage("model", "a tiny Wan 2.1: trained autoencoder, random text encoder"):
            self.stages.command(*commands.write_model(self.argument("model")))

    def prepare(self) -> DatasetFacts:
        """Encode the clips to shards, each clip in its own size."""
        with self.stages.stage("prepare", "videos and captions -> latents and text embeddings in shards"):
            self.stages.command(
                *commands.prepare(WORLD, self.argument("clips"), self.argument("dataset"), self.argument("model"))
            )
            facts = read_dataset(self.path("dataset"))
            require(
                facts.samples == commands.CLIPS, f"the clips gave {facts.samples} samples; expected {commands.CLIPS}"
            )
            require(
                set(facts.shapes) == SHAPES, f"the samples have the shapes {facts.shapes}; expected {sorted(SHAPES)}"
            )
            trained = {WORLD.caption(scene) for scene in WORLD.trained()}
            require(
                facts.captions == trained,
                f"{len(facts.captions ^ trained)} captions are in the shards and of no scene for training, or the "
                "other way round; expected none",
            )
        return facts

    def settings(self) -> list[str]:
        """Overrides of both runs."""
        settings = {**commands.sizes_of_model(self.path("model")), **commands.TRAINING}
        return [f"{key}={value}" for key, value in settings.items()]

    def train(self) -> dict[str, TrainingLog]:
        """Train with tensor parallelism, then from the EMA of its weights with data parallelism, which is faster."""
        settings = self.settings()
        first = self.train_tensor_parallel(
            STEPS_TENSOR_PARALLEL, *settings, f"validation.interval={STEPS_TENSOR_PARALLEL // 2}"
        )
        with self.stages.stage("export", "the EMA of the weights as a model folder, for the next run"):
            self.stages.command(
                "wan-train", "export", self.argument(TENSOR_PARALLEL), self.argument("trained-halfway"), "--ema"
            )
        second = self.train_data_parallel(
            "from these weights, two processes with a pack each (DP=2)",
            STEPS_DATA_PARALLEL,
            "--init-from",
            self.argument("trained-halfway"),
            *settings,
            f"validation.interval={STEPS_DATA_PARALLEL // VALIDATIONS}",
        )
        return {"TP=2 + sequence parallel": first, "DP=2": second}

    def sample(self) -> tuple[list[Request], list[np.ndarray]]:
        """Sample clips from the EMA of the last checkpoint.

        Returns:
            What was asked for, and the frames [T, H, W, 3] of each.
        """
        asked = requests(WORLD)
        with self.stages.stage("sample", f"{COUNT} clips of three sizes, a third of combinations never trained on"):
            commands.write_requests(WORLD, asked, self.path("requests.jsonl"))
            sample = commands.sample(
                self.argument(DATA_PARALLEL),
                self.argument("model"),
                self.argument("requests.jsonl"),
                self.argument("samples"),
            )
            self.stages.command(
                *sample, "--contact-sheet", self.argument("contact-sheet.png"), output=self.path("samples.json")
            )
            check_picture(self.path("contact-sheet.png"))
            videos = [read_video(path) for path in commands.sampled_files(self.path("samples.json"), self.root)]
            shapes = [video.shape for video in videos]
            wanted = [(FRAMES, *request.size, 3) for request in asked]
            require(shapes == wanted, f"the sampled clips have the shapes {shapes}; asked for were {wanted}")
        return asked, videos

    def pictures(
        self, runs: dict[str, TrainingLog], asked: list[Request], videos: list[np.ndarray], found: dict[str, Adherence]
    ) -> None:
        """Draw the pictures of the report."""
        with self.stages.stage("report", "adherence, the sampled clips and the loss curve as pictures"):
            draw_losses(runs, self.path("loss-curve.png"), one_after_another=True)
            draw_adherence(found, LEAST_ADHERENCE, self.path("adherence.png"))
            seen = [recognise(WORLD, video) for video in videos]
            draw_samples(WORLD, asked, videos, seen, self.path("sampled-clips.png"))
            for name in ("loss-curve.png", "adherence.png", "sampled-clips.png"):
                check_picture(self.path(name))

    def run(self) -> dict[str, Any]:
        """See ``Workflow.run``."""
        self.clips()
        self.model()
        facts = self.prepare()
        runs = self.train()
        asked, videos = self.sample()
        found = table(WORLD, asked, videos)
        self.pictures(runs, asked, videos, found)
        files = {
            "adherence": "adherence.png",
            "sampled_clips": "sampled-clips.png",
            "contact_sheet": "contact-sheet.png",
            "loss_curve": "loss-curve.png",
            "report": "report.json",
            "videos": "samples",
            "dataset": "dataset",
            "checkpoints": DATA_PARALLEL,
        }
        adherence = {name: dataclasses.asdict(one) for name, one in found.items()}
        return self.report(runs, files, dataset=facts.summary(), adherence=adherence)

    def check(self, report: dict[str, Any]) -> None:
        """See ``Workflow.check``."""
        goals = {
            "all": ("the sampled clips", LEAST_ADHERENCE),
            "held-out": ("those of combinations never trained on", LEAST_HELD_OUT),
        }
        right = {group: report["adherence"][group]["all"] for group in goals}
        missed = [
            f"{right[group]:.1%} of {what} show all that their captions say; expected at least {least:.0%}"
            for group, (what, least) in goals.items()
            if right[group] < least
        ]
        require(not missed, f"{', and '.join(missed)}; see {self.argument('sampled-clips.png')}")
