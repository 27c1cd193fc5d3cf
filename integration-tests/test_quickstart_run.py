"""The quickstart on the small world with stand-ins for the programs: each check must notice a wrong result."""

import dataclasses
import io
import itertools
import json
import random
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from quickstart import __main__ as command_line
from quickstart import stages, world_clips
from quickstart.dataset_facts import read_dataset
from quickstart.training_log import TrainingLog
from quickstart.workflow import DATA_PARALLEL, TENSOR_PARALLEL
from quickstart.world_clips import WORLD, WorldClips

from common.failure import ToolFailure
from small_world.adherence import requests
from small_world.clips import write_video
from small_world.commands import CLIPS, SIZES_OF_MODEL

PARTS = ("json", "pickle", "pth")
SCENES = {WORLD.caption(scene): scene for scene in WORLD.scenes}


def _write_shard(path: Path, samples: list[tuple[str, tuple[int, ...]]], without: Mapping[int, str]) -> None:
    with tarfile.open(path, "w") as shard:
        for number, (caption, shape) in enumerate(samples):
            latent = io.BytesIO()
            torch.save(torch.zeros(16, *shape), latent)
            contents = {"json": json.dumps({"caption": caption}).encode(), "pickle": b"", "pth": latent.getvalue()}
            for part in PARTS:
                if without.get(number) != part:
                    member = tarfile.TarInfo(f"sample{number}.{part}")
                    member.size = len(contents[part])
                    shard.addfile(member, io.BytesIO(contents[part]))


@dataclasses.dataclass
class Programs:
    """In place of ``run_command``: writes what the programs write, with the mistakes that are asked for.

    Attributes:
        ran: the lines, in order.
        samples: in the shards.
        captions: in the shards.
        size: pixels of every clip in the shards; None for all sizes of the world.
        resumes_at: the step that a second training goes on from, instead of the last.
        rises: whether the loss does.
        saves: whether a training leaves a checkpoint.
        wrong: sampled clips that show another colour, the first of each kind.
        shape: frames, height and width of every sampled clip; None for what was asked for.
    """

    ran: list[list[str]] = dataclasses.field(default_factory=list)
    samples: int = CLIPS
    captions: list[str] = dataclasses.field(default_factory=lambda: [WORLD.caption(one) for one in WORLD.trained()])
    size: tuple[int, int] | None = None
    resumes_at: int | None = None
    rises: bool = False
    saves: bool = True
    wrong: int = 0
    shape: tuple[int, int, int] | None = None

    def __call__(self, *arguments: str, folder: Path, output: Path | None = None, **_: Any) -> None:
        self.ran.append(list(arguments))
        options = dict(itertools.pairwise(arguments))
        match arguments[:2]:
            case ("wan-data", _):
                self._prepare(folder / options["--output-folder"])
            case ("wan-train", "pretrain"):
                values = dict(word.split("=", 1) for word in arguments if "=" in word)
                self._train(folder / values["checkpoint.save"], values)
            case ("wan-infer", _):
                assert output is not None
                output.write_text(json.dumps({"videos": self._sample(folder, options)}))
                noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(noise).save(folder / options["--contact-sheet"])
            case _ if "small_world.model" in arguments:
                config = folder / arguments[3] / "transformer" / "config.json"
                config.parent.mkdir(parents=True)
                config.write_text(json.dumps(dict.fromkeys(SIZES_OF_MODEL, 1)))

    def _prepare(self, dataset: Path) -> None:
        (dataset / ".nv-meta").mkdir(parents=True)
        (dataset / ".nv-meta" / "dataset.yaml").touch()
        sizes = [self.size] if self.size else list(WORLD.sizes)
        rows = zip(itertools.cycle(self.captions), itertools.cycle(sizes))
        samples = [
            (caption, (3, height // 8, width // 8)) for caption, (height, width) in itertools.islice(rows, self.samples)
        ]
        _write_shard(dataset / "shard.tar", samples, {})

    def _train(self, checkpoints: Path, values: Mapping[str, str]) -> None:
        steps, tracker = int(values["train.train_iters"]), checkpoints / "latest_checkpointed_iteration.txt"
        begun = int(tracker.read_text()) if tracker.is_file() else 0
        last = min(steps, begun + int(values.get("train.exit_interval", steps)))
        entries: list[dict[str, Any]] = [{"event": "resumed", "step": begun}] if begun else []
        if self.resumes_at is not None and begun:
            entries, begun = [{"event": "resumed", "step": self.resumes_at}], self.resumes_at
        for step in range(begun + 1, last + 1):
            loss = step / steps if self.rises else 1 / step
            entries.append(
                {"step": step, "loss": loss, "grad_norm": 1.0, "tokens": 9, "tokens_padded": 9, "samples": 2}
            )
        checkpoints.mkdir(exist_ok=True)
        with (checkpoints / "log.jsonl").open("a") as log:
            log.writelines(json.dumps(entry) + "\n" for entry in entries)
        tracker.write_text(str(last))
        if self.saves:
            (checkpoints / f"iter_{last:07}").mkdir()
            (checkpoints / f"iter_{last:07}" / ".metadata").touch()

    def _sample(self, root: Path, options: Mapping[str, str]) -> list[dict[str, str]]:
        (root / options["--output-folder"]).mkdir()
        found, left = [], {True: self.wrong, False: self.wrong}
        held_out = set(WORLD.held_out())
        for number, line in enumerate((root / options["--prompts-file"]).read_text().splitlines()):
            asked = json.loads(line)
            scene = SCENES[asked["prompt"]]
            kind = scene in held_out
            shown = ("red" if scene[0] == "blue" else "blue", *scene[1:]) if left[kind] > 0 else scene
            left[kind] -= 1
            width, height = map(int, asked["size"].split("*"))
            frames, *size = self.shape or (asked["frames"], height, width)
            video = WORLD.frames(shown, (size[0], size[1]), random.Random(number))[:frames]
            path = root / options["--output-folder"] / f"{number}.mp4"
            write_video(video, path)
            found.append({"file": str(path.relative_to(root))})
        return found


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    programs = Programs()
    monkeypatch.setattr(stages, "run_command", programs)
    monkeypatch.chdir(tmp_path)
    return programs


@pytest.fixture
def workflow(programs: Programs, tmp_path: Path) -> WorldClips:
    """With an empty folder."""
    (tmp_path / "q").mkdir()
    return WorldClips(tmp_path, Path("q"))


# -- the whole run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "shares"), [(0, (1.0, 1.0)), (3, (42 / 48, 13 / 16))])
def test_a_run_reports_what_the_sampled_clips_show_and_ends_by_it(
    wrong, shares, programs, tmp_path, monkeypatch, capsys
):
    for name in ("TENSOR", "DATA"):
        monkeypatch.setattr(world_clips, f"STEPS_{name}_PARALLEL", 16)
    monkeypatch.setattr(sys, "argv", ["quickstart", "--folder", "q"])
    programs.wrong = wrong
    if wrong:
        with pytest.raises(SystemExit, match=r"87\.5% of the sampled clips .*, and 81\.2% of those of combinations"):
            command_line.main()
    else:
        command_line.main()
    adherence = json.loads((tmp_path / "q" / "report.json").read_text())["adherence"]
    assert (adherence["all"]["all"], adherence["held-out"]["all"]) == shares
    assert f"{shares[0]:.1%} of 48" in capsys.readouterr().out
    programs_run = [line[0] if line[0] != "python" else line[2] for line in programs.ran]
    assert programs_run == [
        "small_world.clips", "small_world.model", "wan-data", "wan-train", "wan-train", "wan-train", "wan-train",
        "wan-infer",
    ]  # fmt: skip
    assert programs.ran[3] == programs.ran[4]  # the same command resumes
    # From the EMA of the first run, with which the second begins.
    assert programs.ran[5][1:] == ["export", f"q/{TENSOR_PARALLEL}", "q/trained-halfway", "--ema"]
    assert ("--init-from", "q/trained-halfway") in itertools.pairwise(programs.ran[6])


# -- stages -----------------------------------------------------------------------------------------------------------


def test_another_number_of_samples_is_named(programs, workflow):
    programs.samples = CLIPS - 1
    with pytest.raises(ToolFailure, match=r"^the clips gave 479 samples; expected 480$"):
        workflow.prepare()


def test_samples_of_other_shapes_are_named(programs, workflow):
    programs.size = WORLD.sizes[0]
    with pytest.raises(
        ToolFailure, match=r"^the samples have the shapes \{'3 x 4 x 4': 480\}; expected \['3 x 4 x 4',"
    ):
        workflow.prepare()


@pytest.mark.parametrize("change", ["one is missing", "one is held out"])
def test_other_captions_than_those_of_training_are_named(change, programs, workflow):
    if change == "one is missing":
        programs.captions.pop()
    else:
        programs.captions.append(WORLD.caption(WORLD.held_out()[0]))
    with pytest.raises(ToolFailure, match=r"^1 captions are in the shards and of no scene for training, or the other"):
        workflow.prepare()


def test_the_facts_of_a_dataset_are_those_of_its_shards(workflow):
    facts = workflow.prepare()
    assert facts.shapes == {"3 x 4 x 4": 160, "3 x 4 x 6": 160, "3 x 6 x 4": 160}
    assert (facts.shards, facts.samples, len(facts.captions)) == (1, CLIPS, 92)


@pytest.mark.parametrize("part", PARTS)
def test_a_sample_without_one_of_its_files_is_named(part, tmp_path):
    (tmp_path / ".nv-meta").mkdir()
    (tmp_path / ".nv-meta" / "dataset.yaml").touch()
    _write_shard(tmp_path / "a.tar", [("a", (3, 4, 4)), ("b", (3, 4, 4))], {})
    assert read_dataset(tmp_path).samples == 2
    _write_shard(tmp_path / "b.tar", [("a", (3, 4, 4)), ("b", (3, 4, 4))], {1: part})
    with pytest.raises(ToolFailure, match=r"b\.tar: the samples \['sample1'\] do not have exactly the files \['json',"):
        read_dataset(tmp_path)


def test_a_dataset_without_shards_or_metadata_is_named(tmp_path):
    with pytest.raises(ToolFailure, match=r"holds no shards \(\*\.tar\)$"):
        read_dataset(tmp_path)
    _write_shard(tmp_path / "a.tar", [("a", (3, 4, 4))], {})
    with pytest.raises(ToolFailure, match=r"holds no Energon metadata"):
        read_dataset(tmp_path)


def test_a_sound_training_is_accepted(workflow):
    log = workflow.train_tensor_parallel(16)
    assert (len(log.steps), log.resumed_from()) == (16, 8)
    assert len(workflow.train_data_parallel("DP", 16).steps) == 16


def test_a_resume_from_another_step_than_halfway_is_named(programs, workflow):
    programs.resumes_at = 7
    with pytest.raises(ToolFailure, match=r"^the log has the steps \[1, 2, 3, 4, 5, 6, 7, 8, 8, 9, .*; expected each"):
        workflow.train_tensor_parallel(16)


def test_a_training_that_begins_again_instead_of_resuming_is_named(workflow, monkeypatch):
    monkeypatch.setattr(TrainingLog, "resumed_from", lambda self: None)
    with pytest.raises(ToolFailure, match=r"^the second run resumed from step None; expected 8$"):
        workflow.train_tensor_parallel(16)


def test_a_new_training_that_resumed_is_named(workflow, monkeypatch):
    monkeypatch.setattr(TrainingLog, "resumed_from", lambda self: 4)
    with pytest.raises(ToolFailure, match=r"^the data-parallel run resumed from a checkpoint; expected a new run$"):
        workflow.train_data_parallel("DP", 16)


@pytest.mark.parametrize(
    ("mistake", "message"), [("rises", "the mean loss of the last"), ("saves", "no checkpoint of")]
)
@pytest.mark.parametrize("name", [TENSOR_PARALLEL, DATA_PARALLEL])
def test_a_training_that_learns_or_saves_nothing_is_named(mistake, message, name, programs, workflow):
    def train() -> TrainingLog:
        if name == TENSOR_PARALLEL:
            return workflow.train_tensor_parallel(16)
        return workflow.train_data_parallel("DP", 16)

    setattr(programs, mistake, not getattr(programs, mistake))
    with pytest.raises(ToolFailure, match=rf"^{message}"):
        train()


def test_sampling_is_of_the_ema_in_twenty_steps(programs, workflow):
    asked, videos = workflow.sample()
    assert asked == requests(WORLD)
    assert [video.shape[1:3] for video in videos] == [request.size for request in asked]
    (line,) = programs.ran
    assert line[:5] == ["wan-infer", "--checkpoint-dir", f"q/{DATA_PARALLEL}", "--model", "q/model"]
    assert "--ema" in line
    assert "--checkpoint-step" not in line  # the newest
    options = dict(itertools.pairwise(line))
    assert options["--sample-steps"] == "20"
    assert options["--sample-guide-scale"] == "1.5"
    assert options["--prompts-file"] == "q/requests.jsonl"


@pytest.mark.parametrize("shape", [(9, 32, 32), (8, 32, 32)])
def test_sampled_clips_of_other_shapes_than_asked_for_are_named(shape, programs, workflow):
    programs.shape = shape
    with pytest.raises(
        ToolFailure, match=r"^the sampled clips have the shapes \[\([89], 32, 32, 3\), .*; asked for were"
    ):
        workflow.sample()
