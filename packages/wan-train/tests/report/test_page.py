"""One file with everything in it: what it holds, that input stays text, and what the command says."""

import base64
import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from report_runs import MARKUP, entry, validation, write_run, write_sample

import wan_train.report.page
from wan_train.checkpoint.sample_videos import is_sample_name, read_samples, records_path
from wan_train.cli import main
from wan_train.report.page import content_of, open_runs, write_page
from wan_train.report.videos import MOST_VIDEOS, RunVideos, choose, halving


class Elements(html.parser.HTMLParser):
    """The elements of a page as a browser finds them, and the text of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.scripts: list[str] = []
        self.title = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs), attrs
        assert not any((value or "").startswith("http") for _, value in attrs), attrs
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.names[-1:] == ["script"]:
            self.scripts[-1] += data
        if self.names[-1:] == ["title"]:
            self.title += data


def content_in(page: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Elements(page.read_text(encoding="utf-8")).scripts[0])
    return found


def report(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["report", *map(str, arguments)])
    return result.exit_code, result.output.strip()


def test_the_page_holds_the_points_of_the_log(tmp_path: Path) -> None:
    losses = {step: 5.0 / step for step in range(1, 61)}
    log = [*(entry(step, loss) for step, loss in losses.items()), validation(60, {"500": 2.5})]
    write_run(tmp_path, log, {"train": {"train_iters": 80}}, saved=60)
    assert report(tmp_path) == (0, str(tmp_path / "report.html"))
    content = content_in(tmp_path / "report.html")
    (run,) = content["runs"]
    assert run["curves"]["loss"] == {"step": list(losses), "value": list(losses.values())}
    assert run["curves"]["validation.timesteps.500"] == {"step": [60], "value": [2.5]}
    assert list(run["smoothed"]) == ["2", "5", "10", "20"]
    assert (run["step"], run["steps"], run["validation"], run["tokens"], run["time"]) == (
        60,
        80,
        2.5,
        6000,
        "2 min 00 s",
    )
    assert (tmp_path / "report.html").stat().st_size < 6_000_000


def test_input_stays_text(tmp_path: Path) -> None:
    folder = tmp_path / "run <img src=x onerror=alert(1)>"
    log = [entry(1, **{MARKUP: 2.0}), validation(1, {MARKUP: 1.0}), {"event": MARKUP, "step": 1, MARKUP: "\ud800"}]
    write_run(folder, log, {"dataset": {"path": MARKUP, MARKUP: [MARKUP]}}, saved=1)
    write_sample(folder, 1, "fox", MARKUP)
    assert report(folder, "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    plain = write_page([write_run(tmp_path / "plain", [entry(1)])]).read_text(encoding="utf-8")
    assert 'onerror="document' not in page
    got, expected = Elements(page), Elements(plain)
    assert got.names == expected.names, "the input has added an element"
    assert got.scripts[1:] == expected.scripts[1:], "the input has changed a script"
    assert got.title.strip() == folder.name
    content = json.loads(got.scripts[0])
    assert content["videos"]["rows"][0]["caption"] == MARKUP
    assert {row["key"]: row["values"] for row in content["settings"]}["dataset.path"] == [MARKUP]
    assert MARKUP in content["runs"][0]["curves"]


def test_the_page_asks_no_other_machine_for_anything(tmp_path: Path) -> None:
    page = write_page([write_run(tmp_path, [entry(1)])]).read_text(encoding="utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in rules["script-src"]
    assert rules["connect-src"] == "'self'"
    # No element but the page's own markup loads anything, and that has nothing to load.
    assert {"link", "script", "style"} >= {"img", "iframe", "link", "object", "script", "style"} & set(
        Elements(page).names
    )


def test_compared_runs_show_where_their_configurations_differ(tmp_path: Path) -> None:
    ours = {"optimizer": {"lr": 0.1, "_target_": "x"}, "checkpoint": {"save": "a"}, "train": {"train_iters": 5}}
    theirs = {
        "optimizer": {"lr": 0.2},
        "checkpoint": {"save": "b"},
        "train": {"train_iters": 5},
        "ema": {"decay": None},
    }
    one = write_run(tmp_path / "one", [entry(1)], ours)
    two = write_run(tmp_path / "two", [entry(1), entry(2)], theirs)
    none = write_run(tmp_path / "none", [entry(1)])
    content = content_of(open_runs([one, two]))
    assert [(row["key"], row["values"]) for row in content["settings"] if row["differs"]] == [
        ("ema.decay", [None, "null"]),
        ("optimizer.lr", ["0.1", "0.2"]),
    ]
    assert [row["key"] for row in content["settings"]] == [
        "checkpoint.save", "ema.decay", "optimizer.lr", "train.train_iters"
    ]  # fmt: skip
    third = content_of(open_runs([one, none]))
    assert not any(row["differs"] for row in third["settings"])
    assert [run["settings_from"] for run in third["runs"]] == ["iter_0000000", None]
    assert [run["name"] for run in content["runs"]] == ["one", "two"]
    same = write_run(tmp_path / "below" / "one", [entry(1)])
    assert [run.name for run in open_runs([one, same])] == [str(one), str(same)]


def test_a_configuration_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    write_run(tmp_path, [entry(1)], {"train": {}}, saved=1)
    (tmp_path / "iter_0000001" / "run_config.yaml").write_text("a: [")
    (run,) = content_of(open_runs([tmp_path]))["runs"]
    assert any("run_config.yaml is not YAML" in note for note in run["notes"])


def test_videos_stand_by_step_and_are_in_the_page(tmp_path: Path) -> None:
    write_run(tmp_path, [entry(1)])
    for step in (100, 200):
        for name in ("fox", "owl"):
            write_sample(tmp_path, step, name, f"a {name}")
    write_sample(tmp_path, 200, "owl", "an owl")  # sampled again after a resume
    content = content_of(open_runs([tmp_path]))
    assert content["notes"] == []
    videos = content["videos"]
    assert videos["steps"] == [100, 200]
    assert [(row["name"], row["caption"], row["seed"]) for row in videos["rows"]] == [
        ("fox", "a fox", 7),
        ("owl", "an owl", 7),
    ]
    for row in videos["rows"]:
        for step, source in zip(videos["steps"], row["sources"], strict=True):
            assert bytes_in(source, "video/mp4") == file_of(tmp_path, step, f"{row['name']}.mp4")


def file_of(folder: Path, step: int, name: str) -> bytes:
    return (folder / "samples" / f"step-{step:07d}" / name).read_bytes()


def bytes_in(source: list[str], media_type: str) -> bytes:
    """Of a video in the page."""
    head, data = source[1].split(",")
    assert [source[0], head] == [media_type, f"data:{media_type};base64"]
    return base64.b64decode(data)


def test_single_frames_are_pictures_in_the_page(tmp_path: Path) -> None:
    write_run(tmp_path, [entry(1)])
    write_sample(tmp_path, 100, "fox", frames=1)
    write_sample(tmp_path, 200, "fox")  # resumed with another samples.frames
    with records_path(tmp_path).open("a") as records:  # of a version that did not record the file
        records.write(json.dumps({"step": 300, "name": "fox"}) + "\n")
    (tmp_path / "samples/step-0000300").mkdir()
    (tmp_path / "samples/step-0000300/fox.mp4").write_bytes(file_of(tmp_path, 200, "fox.mp4"))
    content = content_of(open_runs([tmp_path]))
    assert content["notes"] == []
    (row,) = content["videos"]["rows"]
    picture, video, earlier = row["sources"]
    assert bytes_in(picture, "image/png") == file_of(tmp_path, 100, "fox.png")
    assert bytes_in(video, "video/mp4") == bytes_in(earlier, "video/mp4") == file_of(tmp_path, 200, "fox.mp4")


def test_a_picture_that_is_none_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, [entry(1)])
    path = write_sample(tmp_path, 1, "fox", frames=1).path(tmp_path)
    path.write_text("<svg onload=alert(1)>")
    assert RunVideos(tmp_path).find(0) == ([], [f"A video is left out: {path} is not a PNG file."])


def test_videos_beyond_the_bound_are_left_out_by_whole_steps(tmp_path: Path) -> None:
    write_run(tmp_path, [entry(1)])
    for step in (10, 20, 30, 40):
        write_sample(tmp_path, step, "fox")
    found, notes = RunVideos(tmp_path).find(0)
    assert notes == []
    sizes = {video.sample.step: video.size for video in found}
    chosen, said = choose(found, sizes[40] + sizes[10])
    assert [video.sample.step for video in chosen] == [40, 10]
    assert said[0].startswith("Videos of 2 of 4 steps are shown")
    assert "raise --max-video-mb" in said[0]
    assert choose(found, sum(sizes.values())) == ([*chosen, *choose(found, sum(sizes.values()))[0][2:]], [])
    page = tmp_path / "page.html"
    assert report(tmp_path, "--out", page, "--max-video-mb", 0)[0] == 0
    content = content_in(page)
    assert content["videos"]["rows"] == []
    assert "Videos of 0 of 4 steps" in content["notes"][0]


def test_steps_are_taken_from_both_ends_and_then_between() -> None:
    assert halving([]) == []
    assert halving([5]) == [5]
    assert halving([5, 9]) == [9, 5]
    assert halving(range(0, 90, 10)) == [80, 0, 40, 20, 60, 10, 30, 50, 70]


def test_only_videos_of_the_run_are_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [entry(1)])
    (tmp_path / "secret.mp4").write_bytes(write_sample(folder, 1, "good").path(folder).read_bytes())
    (folder / "samples" / "step-0000001" / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (folder / "samples" / "step-0000001" / "text.mp4").write_text("no video at all")
    names = ["link", "text", "absent", "../../../secret", "/etc/passwd", ".good", "", 3, "a\x00", "good\n"]
    with records_path(folder).open("a") as records:
        for name in names:
            records.write(json.dumps({"step": 1, "name": name}) + "\n")
        records.write(json.dumps({"step": 1, "name": "good", "caption": "x" * (1 << 16)}) + "\n")
        records.write('not JSON\n{"step": -1, "name": "good"}\n[]\n{"step": 2, "name": "cut')
    assert [sample.name for sample in read_samples(folder)[0]] == ["good", "link", "text", "absent"]
    assert [is_sample_name(name) for name in names] == [True] * 3 + [False] * 7
    found, notes = RunVideos(folder).find(0)
    assert [video.sample.name for video in found] == ["good"]
    assert len(notes) == 2
    # Names that are no file's, a line that is too long, three that are no record, and a torn one.
    assert notes[0] == f"Lines of {records_path(folder)} that are no records are left out: line 5 and 11 more."
    assert "link.mp4 is a link, which may lead elsewhere; expected a file or folder there" in notes[1]
    assert "(and 2 more)" in notes[1]


@pytest.mark.parametrize("place", ["samples", "samples/step-0000001", "samples/samples.jsonl"])
def test_no_link_leads_to_videos_or_records_elsewhere(place: str, tmp_path: Path) -> None:
    folder, other = write_run(tmp_path / "run", [entry(1)]), write_run(tmp_path / "other", [entry(1)])
    for run in (folder, other):
        write_sample(run, 1, "fox", f"of {run.name}")
    (folder / place).rename(tmp_path / "moved")
    (folder / place).symlink_to(other / place)
    found, (note,) = RunVideos(folder).find(0)
    assert found == []
    assert f"{folder / place} is a link, which may lead elsewhere" in note
    # The run's folder itself may be reached by one.
    (tmp_path / "link").symlink_to(other)
    assert [video.sample.caption for video in RunVideos(tmp_path / "link").find(0)[0]] == ["of other"]


def test_the_newest_steps_of_very_many_videos_are_looked_at(tmp_path: Path) -> None:
    write_run(tmp_path, [entry(1)])
    video = write_sample(tmp_path, 1, "a").path(tmp_path)
    with records_path(tmp_path).open("a") as records:
        for step in range(2, 2000):
            folder = tmp_path / f"samples/step-{step:07d}"
            folder.mkdir()
            for name in "abc":
                (folder / f"{name}.mp4").hardlink_to(video)
                records.write(json.dumps({"step": step, "name": name}) + "\n")
    found, notes = RunVideos(tmp_path).find(0)
    assert {video.sample.step for video in found} == set(range(2000 - MOST_VIDEOS // 3, 2000))
    assert notes == ["Sampled videos of the newest 666 of 1999 steps are looked at: at most 2,000 of a run."]


def test_the_command_refuses_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", [entry(1)])
    assert report(tmp_path) == (
        2,
        f"Error: {tmp_path} has no log.jsonl; expected a folder that a run has as checkpoint.save",
    )
    assert report(run, "--compare", run / ".." / "run")[1].endswith("is compared with itself; give every run once")
    assert "leave --out or --follow out" in report(run, "--follow", "--out", tmp_path / "x")[1]
    assert "add --follow or leave --port out" in report(run, "--port", 5)[1]
    for out in (tmp_path / "absent" / "page.html", run):
        assert report(run, "--out", out) == (
            2,
            f"Error: --out is {out}; expected the name of a file in a folder that exists",
        )
    for absent in ("jinja2", "plotly.offline"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, absent, None)
            assert report(run) == (
                2,
                f"Error: the package {absent} is absent; run pip install 'wan-train[report]'",
            )


def test_a_page_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write_page([write_run(tmp_path, [entry(1)])])
    before = page.read_bytes()

    def fail(*_: object) -> str:
        raise ValueError("no")

    monkeypatch.setattr(wan_train.report.page, "render", fail)
    with pytest.raises(ValueError, match="no"):
        write_page([tmp_path])
    assert page.read_bytes() == before


def test_it_needs_neither_torch_nor_megatron(tmp_path: Path) -> None:
    write_run(tmp_path, [entry(1)], {"train": {}}, saved=1)
    code = (
        "import sys; sys.modules.update(torch=None, megatron=None, numpy=None)\n"
        "from wan_train.cli import main; main(['report', sys.argv[1]])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(tmp_path / "report.html")
