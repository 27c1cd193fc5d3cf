"""The command line chooses among clips by scenes, measures and near-duplicates, and computes nothing twice."""

import pytest
from data_command import run
from dataset_sources import records_of
from made_scenes import Scene, joined_scenes, write_frames

from wan_data.video.decoder_process import Decoder

SMALL = ("--area", 1536, "--frames", 9, "--min-frames", 5, "--device", "cpu", "--num-decoders", 1)


def write(folder, name, frames, **more):
    path = write_frames(folder / f"{name}.mkv", frames, **more)
    path.with_suffix(".txt").write_text(f"A clip, {name}.")
    return path


def scene(seed, count=20, speed=2.0):
    return Scene(seed).frames(count, speed=speed)


@pytest.fixture(scope="session")
def chosen_clips(once):
    """Two clips that move, one that stands still, and one of two scenes."""

    def build(folder):
        write(folder, "fast", scene(1, speed=3.0))
        write(folder, "slow", scene(2, speed=1.0))
        write(folder, "still", scene(3, 1) * 20)
        write(folder, "cut", joined_scenes([11, 13], speed=2.0))

    return once("chosen-clips", build)


@pytest.fixture
def prepare(chosen_clips, tiny_model, tmp_path):
    def command(*more, clips=chosen_clips, output=tmp_path / "out"):
        return run("prepare", "--video-folder", clips, "--output-folder", output, "--model", tiny_model, *SMALL, *more)

    return command


@pytest.fixture
def no_decoding(monkeypatch):
    """From its call on, no source is decoded to be probed."""

    def refuse(self, job):
        assert job.windows is not None, f"{job.path} is decoded again"
        submit(self, job)

    submit = Decoder.submit
    return lambda: monkeypatch.setattr(Decoder, "submit", refuse)


def verdicts(folder):
    return {record.path: record.verdict for record in records_of(folder)}


def test_an_expression_selects_and_a_second_run_decodes_nothing(prepare, no_decoding, tmp_path):
    done = prepare("--where", "motion > 0.05")
    assert done.exit_code == 0, done.output
    assert "from 3 of 4 files" in done.stdout
    assert "Files left out by --where (1):\n  still.mkv: it does not fulfil --where 'motion > 0.05': motion is 0\n" in (
        done.stdout
    )
    wanted = {"cut.mkv": "accepted", "fast.mkv": "accepted", "slow.mkv": "accepted", "still.mkv": "unselected"}
    assert verdicts(tmp_path / "out") == wanted
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("[sw]*")}
    no_decoding()
    again = prepare("--where", "motion > 0.05")
    assert (again.exit_code, again.stdout) == (0, done.stdout)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("[sw]*")} == before
    # Another choice among what is known, and one that finds its own measures in the index of the dataset it replaces.
    assert "other settings (where 'motion > 9'" in prepare("--where", "motion > 9").output
    other = prepare("--where", "motion < 0.05", "--overwrite")
    assert other.exit_code == 0, other.output
    assert [name for name, verdict in verdicts(tmp_path / "out").items() if verdict == "accepted"] == ["still.mkv"]
    shown = run("inspect", tmp_path / "out")
    assert "files left out by --where: 3" in shown.output


def test_the_index_holds_what_was_measured(prepare, tmp_path):
    assert prepare("--measures", "--scenes", "content").exit_code == 0
    found = {record.path: record for record in records_of(tmp_path / "out")}
    assert found["cut.mkv"].cuts == (11,)
    assert found["still.mkv"].stillness == 1
    assert found["still.mkv"].motion == 0 < found["slow.mkv"].motion < found["fast.mkv"].motion
    assert all(record.sharpness > 0 and record.black_borders == 0 for record in found.values())
    assert len({record.fingerprint for record in found.values()}) == 4
    assert run("verify", tmp_path / "out").exit_code == 0
