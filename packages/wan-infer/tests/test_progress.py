"""Progress of the sampler on a terminal and in a log."""

import re
from pathlib import Path
from typing import TextIO

import pytest

from wan_infer.progress import Progress
from wan_model.testing.terminals import shown_on_a_terminal


def sample(stream: TextIO, steps: int) -> None:
    progress = Progress(stream)
    progress.line("loading")
    for video in ("video 1/2", "video 2/2"):
        progress.start(video)
        for done in range(1, steps + 1):
            progress.step(done, steps)
    progress.line("done")


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_a_log_has_at_most_ten_lines_a_video_and_the_last_step(steps: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as stream:
        sample(stream, steps)
    first, *lines, last = log.read_text().splitlines()
    assert (first, last) == ("loading", "done")
    assert len(lines) == 2 * min(steps, 10)
    assert all(re.fullmatch(rf"video [12]/2  step \d+/{steps}  \d\.\d\d s/step  \d+ s left", line) for line in lines)
    assert f"step {steps}/{steps} " in lines[-1]


def test_a_terminal_keeps_one_line_a_video() -> None:
    shown = shown_on_a_terminal(lambda stream: sample(stream, 12))
    lines = [re.sub(r".*(\r|\x1b\[2K)", "", line) for line in shown.split("\n")]
    assert [re.sub(r"  \d.*", "", line) for line in lines] == [
        "loading", "video 1/2  step 12/12", "video 2/2  step 12/12", "done", "",
    ]  # fmt: skip
    assert shown.count("step 11/12") == 2


def test_a_message_does_not_replace_an_unfinished_line() -> None:
    def write(stream: TextIO) -> None:
        progress = Progress(stream)
        progress.start("video 1/1")
        progress.step(1, 50)
        progress.line("Warning: odd")

    assert re.fullmatch(r"\r?video 1/1  step 1/50  .* left *\nWarning: odd\n", shown_on_a_terminal(write))
