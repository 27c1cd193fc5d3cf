"""The command line chooses among clips by scenes, measures and near-duplicates, and computes nothing twice."""

import contextlib
import json
import shutil
import sys

import cv2
import numpy as np
import pytest
from data_command import run
from dataset_sources import records_of
from made_scenes import Scene, joined_scenes, write_frames

from wan_data.curation import libraries
from wan_data.curation.measures import Measures
from wan_data.prepare.probing.cache import Found, ProbeCache
from wan_data.prepare.settings import PrepareSettings
from wan_data.shards.reader import samples_of
from wan_data.video.decode import ClipInfo
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
    for more in ((), ("--measures",)):  # which --where asks for already
        again = prepare("--where", "motion > 0.05", *more)
        assert (again.exit_code, again.stdout) == (0, done.stdout), again.stderr
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


# -- scenes ------------------------------------------------------------------------------------------------------------


def windows_of(folder):
    """The windows of each source, as the samples have them."""
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        for sample in samples_of(shard):
            window = sample.info["frame_start"], sample.info["frame_stop"]
            found.setdefault(sample.info["video_path"], []).append(window)
    return {name: sorted(windows) for name, windows in found.items()}


@pytest.mark.parametrize("detector", ["content", "adaptive"])
def test_no_window_crosses_a_cut(prepare, tmp_path, detector):
    assert prepare(output=tmp_path / "uncut").exit_code == 0
    assert prepare("--scenes", detector).exit_code == 0
    frames = joined_scenes([11, 13], speed=2.0)
    # A frame belongs to the scene whose mean picture it is nearer.
    means = [np.mean(frames[:11], axis=0), np.mean(frames[11:], axis=0)]
    of = [int(np.argmin([np.abs(frame - mean).mean() for mean in means])) for frame in frames]
    assert of == [0] * 11 + [1] * 13

    def scenes(folder):
        return [{*of[start:stop]} for start, stop in windows_of(folder)["cut.mkv"]]

    assert {0, 1} in scenes(tmp_path / "uncut")
    assert scenes(tmp_path / "out") == [{0}, {1}]
    assert windows_of(tmp_path / "out")["cut.mkv"] == [(0, 9), (11, 20)]


# -- near-duplicates ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def copied_clips(once):
    """A clip with a mirrored, a recompressed and a smaller copy and its bytes again, and another clip."""

    def build(folder):
        frames = Scene(1, 128, 224).frames(20, speed=2.0)
        original = write(folder, "original", frames, crf=18)
        write(folder, "a mirrored", [np.ascontiguousarray(frame[:, ::-1]) for frame in frames], crf=23)
        write(folder, "b recompressed", frames, crf=35)
        write(folder, "c smaller", [cv2.resize(frame, (112, 64), interpolation=cv2.INTER_AREA) for frame in frames])
        (folder / "d bytes.mkv").write_bytes(original.read_bytes())
        (folder / "d bytes.txt").write_text("Its bytes.")
        write(folder, "other", Scene(2, 128, 224).frames(20, speed=2.0), crf=18)

    return once("copied-clips", build)


COPIES = ("a mirrored.mkv", "b recompressed.mkv", "c smaller.mkv", "d bytes.mkv")


def test_of_near_duplicates_the_best_stays(prepare, copied_clips, tmp_path, no_decoding):
    done = prepare("--duplicates", "drop", clips=copied_clips)
    assert done.exit_code == 0, done.output
    assert (
        "Files left out by --duplicates drop (4):\n  a mirrored.mkv: it is a near-duplicate of the mirror"
        in done.stdout
    )
    found = {record.path: record for record in records_of(tmp_path / "out")}
    # Of equal sizes, the file of most bytes; of equal bytes, the first by name.
    (best,) = {record.duplicate_of for record in found.values() if record.duplicate_of}
    assert best == "d bytes.mkv"
    wanted = dict.fromkeys((*COPIES[:3], "original.mkv"), "duplicate")
    assert verdicts(tmp_path / "out") == {**wanted, best: "accepted", "other.mkv": "accepted"}
    assert {*windows_of(tmp_path / "out")} == {best, "other.mkv"}
    before = [(path.name, path.read_bytes()) for path in sorted((tmp_path / "out").glob("[sw]*"))]
    no_decoding()
    again = prepare("--duplicates", "drop", clips=copied_clips)
    assert (again.exit_code, again.stdout) == (0, done.stdout)
    assert [(path.name, path.read_bytes()) for path in sorted((tmp_path / "out").glob("[sw]*"))] == before
    # All of them again, in another dataset in its place.
    assert "6 of 6 files" in prepare("--duplicates", "name", "--overwrite", clips=copied_clips).stdout


def test_a_copy_of_what_the_dataset_has_is_left_out_however_good(prepare, copied_clips, tmp_path):
    clips = shutil.copytree(copied_clips, tmp_path / "clips")
    for name in ("original", "d bytes"):
        for path in clips.glob(f"{name}.*"):
            path.rename(tmp_path / path.name)
    (clips / "a mirrored.mkv").unlink()
    (clips / "b recompressed.mkv").unlink()
    assert prepare("--duplicates", "drop", clips=clips).exit_code == 0
    assert verdicts(tmp_path / "out")["c smaller.mkv"] == "accepted"
    shards = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")}
    shutil.copy(tmp_path / "original.mkv", clips)
    shutil.copy(tmp_path / "original.txt", clips)
    done = prepare("--duplicates", "drop", clips=clips)
    assert done.exit_code == 0, done.output
    assert "original.mkv: it is a near-duplicate of c smaller.mkv" in done.stdout
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")} == shards
    # When that one goes, the other comes in its place.
    (clips / "c smaller.mkv").unlink()
    assert prepare("--duplicates", "drop", "--remove-missing", clips=clips).exit_code == 0
    assert verdicts(tmp_path / "out") == {"original.mkv": "accepted", "other.mkv": "accepted"}
    assert run("verify", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("seed", range(4))
def test_named_near_duplicates_are_in_one_split(prepare, copied_clips, tmp_path, seed):
    done = prepare("--duplicates", "name", "--validation-fraction", 0.5, "--seed", seed, clips=copied_clips)
    assert done.exit_code == 0, done.output
    assert (
        "Near-duplicates, encoded in the split of the file that they are like (4):\n  a mirrored.mkv: of d"
        in done.stdout
    )
    found = {record.path: record for record in records_of(tmp_path / "out")}
    assert {record.verdict for record in found.values()} == {"accepted"}
    assert len({record.split for name, record in found.items() if name != "other.mkv"}) == 1
    # The two contents that are left are one in each split.
    assert {record.split for record in found.values()} == {"train", "val"}


def test_the_choice_does_not_depend_on_the_number_of_processes(prepare, copied_clips, tmp_path):
    for count in (1, 2):
        done = prepare(
            "--duplicates", "drop", "--num-decoders", count, clips=copied_clips, output=tmp_path / f"{count}"
        )
        assert done.exit_code == 0
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / f"{count}").glob("*") if path.suffix in (".tar", ".json")}
        for count in (1, 2)
    )
    assert one == two


def test_a_run_that_ends_between_probing_and_planning_goes_on(
    prepare, copied_clips, tmp_path, monkeypatch, no_decoding
):
    with monkeypatch.context() as patch:
        patch.setattr("wan_data.prepare.planning.plan_shard_batch", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare("--duplicates", "drop", clips=copied_clips)
    no_decoding()
    assert "2 of 6 files" in prepare("--duplicates", "drop", clips=copied_clips).stdout


def test_a_plan_says_what_would_be_left_out(copied_clips, tmp_path):
    arguments = ("plan", "--video-folder", copied_clips, "--area", 1536, "--frames", 9, "--num-decoders", 1)
    arguments += ("--duplicates", "drop", "--where", "width > 150", "--output-folder", tmp_path / "out")
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert (
        "1 left out by --where:\n  c smaller.mkv: it does not fulfil --where 'width > 150': width is 112\n"
        in done.stdout
    )
    assert "3 left out by --duplicates drop:\n  a mirrored.mkv: it is a near-duplicate" in done.stdout
    found = json.loads(run(*arguments, "--json").stdout)
    assert [found["accepted"], len(found["duplicates"]), len(found["unselected"])] == [2, 3, 1]


def test_a_copy_of_a_validation_clip_is_for_validation_too(prepare, copied_clips, tmp_path):
    clips = shutil.copytree(copied_clips, tmp_path / "clips")
    later = [path for path in clips.glob("*.*") if path.stem in ("a mirrored", "b recompressed")]
    for path in (*later, *clips.glob("c *"), *clips.glob("d *")):
        path.rename(tmp_path / path.name)
    for seed in range(20):
        output = tmp_path / f"{seed}"
        arguments = ("--duplicates", "name", "--validation-fraction", 0.01, "--seed", seed)
        assert prepare(*arguments, clips=clips, output=output).exit_code == 0
        if {record.path: record.split for record in records_of(output)}["original.mkv"] == "val":
            break
    for path in later:
        shutil.copy(tmp_path / path.name, clips)
    assert prepare(*arguments, clips=clips, output=output).exit_code == 0
    splits = {record.path: record.split for record in records_of(output)}
    assert splits == dict.fromkeys(["a mirrored.mkv", "b recompressed.mkv", "original.mkv"], "val") | {
        "other.mkv": "train"
    }


def test_a_changed_clip_that_would_be_left_out_keeps_its_samples_and_is_named(prepare, chosen_clips, tmp_path):
    clips = shutil.copytree(chosen_clips, tmp_path / "clips")
    options = ("--where", "motion > 0.05", "--duplicates", "drop")
    assert prepare(*options, clips=clips).exit_code == 0
    before = windows_of(tmp_path / "out")
    shutil.copy(clips / "still.mkv", clips / "fast.mkv")
    shutil.copy(clips / "cut.mkv", clips / "slow.mkv")
    done = prepare(*options, "--update", clips=clips)
    assert done.exit_code == 1
    assert "fast.mkv: it does not fulfil --where 'motion > 0.05': motion is 0" in done.stdout
    assert "slow.mkv: it is a near-duplicate of cut.mkv (0 of 256 bits differ)" in done.stdout
    assert windows_of(tmp_path / "out") == before
    assert run("verify", tmp_path / "out").exit_code == 0


# -- what is refused, and what counts as known -------------------------------------------------------------------------


def test_an_expression_is_read_before_anything_is_probed(prepare, tmp_path):
    done = prepare("--where", "speed > 1")
    assert done.exit_code == 1
    assert "at character 1 of 'speed > 1' 'speed' is no column; expected an expression such as" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", [("--scenes", "content"), ("--duplicates", "name"), ("--where", "motion > 1"), ("--measures",)]
)
def test_measuring_without_its_libraries_is_one_sentence(prepare, tmp_path, monkeypatch, option):
    libraries._imported.cache_clear()
    monkeypatch.setitem(sys.modules, "cv2", None)
    try:
        done = prepare(*option)
    finally:
        libraries._imported.cache_clear()
    assert done.exit_code == 1
    assert done.output.endswith("OpenCV is not installed, and curation needs it: pip install 'wan-data[curation]'\n")
    assert not (tmp_path / "out").exists()


def test_an_expression_of_what_is_known_anyway_measures_nothing(prepare, chosen_clips, tmp_path, monkeypatch):
    libraries._imported.cache_clear()
    monkeypatch.setitem(sys.modules, "cv2", None)
    try:
        done = prepare("--where", "frames > 21")
    finally:
        libraries._imported.cache_clear()
    assert done.exit_code == 0, done.output
    assert [name for name, verdict in verdicts(tmp_path / "out").items() if verdict == "accepted"] == ["cut.mkv"]


def test_if_all_is_left_out_another_expression_decodes_nothing_again(prepare, tmp_path, no_decoding):
    done = prepare("--where", "motion > 99")
    assert done.exit_code == 1
    assert (
        "none of the 4 files can be used: cut.mkv: it does not fulfil --where 'motion > 99': motion is" in done.output
    )
    no_decoding()
    assert "4 of 4 files" in prepare("--where", "motion < 99").stdout


def test_an_interrupted_replacement_does_not_forget_the_dataset_that_it_replaces(
    prepare, tmp_path, monkeypatch, no_decoding
):
    assert prepare("--measures").exit_code == 0
    no_decoding()
    for place in ("wan_data.prepare.planning.probe", "wan_data.prepare.planning.plan_shard_batch"):
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                prepare("--where", "motion < 0.05", "--overwrite")
    done = prepare("--where", "motion < 0.05", "--overwrite")
    assert "from 1 of 4 files" in done.stdout, done.output
    assert run("verify", tmp_path / "out").exit_code == 0


def test_what_is_known_counts_only_where_the_same_was_measured(tmp_path):
    info = ClipInfo(5, 5, 16.0, 32.0, 48.0, 1)
    measures = Measures(0.1, 0.0, 3.0, 0.0, (3,), ("",) * 8)
    plain, measured = Found(1, 2, "0" * 64, info), Found(1, 2, "0" * 64, info, measures)
    content = PrepareSettings(scenes="content")

    def finds(settings):
        with contextlib.closing(ProbeCache(tmp_path / "known.sqlite", settings)) as cache:
            return cache.find(["a"]).get("a")

    for settings, found in ((PrepareSettings(), plain), (content, measured)):
        with contextlib.closing(ProbeCache(tmp_path / "known.sqlite", settings)) as cache:
            cache.add("a", found)
        assert finds(PrepareSettings()) == plain, "what more is known is not recorded where nothing was to be measured"
        assert finds(content) == (measured if settings is content else None)
        assert finds(PrepareSettings(scenes="content", where="motion > 1")) == finds(content)
        for other in (PrepareSettings(scenes="adaptive"), PrepareSettings(measures=True),
                      PrepareSettings(scenes="content", background="#000000")):  # fmt: skip
            assert finds(other) is None


# -- looking at what was measured --------------------------------------------------------------------------------------


def test_a_plan_shows_the_measures_from_which_thresholds_are_chosen(prepare, chosen_clips, tmp_path, no_decoding):
    arguments = ("plan", "--video-folder", chosen_clips, "--area", 1536, "--frames", 9, "--measures")
    arguments += ("--output-folder", tmp_path / "out", "--json")
    found = json.loads(run(*arguments, "--num-decoders", 1).stdout)["measures"]
    motions = sorted([*found["motion"]["lowest"]])
    assert [name for _, name in motions] == ["still.mkv", "slow.mkv", *(name for _, name in motions[2:])]
    assert found["motion"]["clips"] == 4
    no_decoding()
    between = (motions[0][0] + motions[1][0]) / 2
    assert prepare("--where", f"motion > {between}").exit_code == 0
    assert [name for name, verdict in verdicts(tmp_path / "out").items() if verdict == "unselected"] == ["still.mkv"]
