import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from wan_data.cli import main


@pytest.fixture
def run():
    def invoke(*arguments):
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def two_clips(clip, tmp_path):
    folder = tmp_path / "in"
    clip(folder / "a.mkv", range(9))
    (folder / "a.json").write_text('{"caption": "x"}')
    clip(folder / "mute.mkv", range(9))
    return folder


SMALL = ("--area", 1536, "--frames", 9, "--device", "cpu")


def test_rejects_are_named_and_decide_the_exit_code(run, two_clips, tiny_model, tmp_path):
    arguments = ("prepare", "--video-folder", two_clips, "--model", tiny_model, *SMALL)
    done = run(*arguments, "--output-folder", tmp_path / "a")
    assert done.exit_code == 1, done.output
    assert "1 samples (1 train) of 1 shapes in 1 shards from 1 of 2 files" in done.output
    assert "mute.mkv: it has no caption: expected mute.json" in done.output
    assert "REJECTED mute.mkv" in done.stderr
    assert run(*arguments, "--output-folder", tmp_path / "b", "--allow-rejects").exit_code == 0


def test_the_tutorials_spellings(run, two_clips, tiny_model, tmp_path):
    (two_clips / "mute.mkv").unlink()
    done = run(
        *("prepare", "--video_folder", two_clips, "--output_dir", tmp_path / "a", "--output_format", "energon"),
        *("--model", tiny_model, "--mode", "video", "--height", 32, "--width", 48, "--resize_mode", "bilinear"),
        *("--center-crop", "--min_frames", 5, "--frames", 9, "--device", "cpu"),
    )
    assert done.exit_code == 0, done.output
    assert "9x32x48" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--frames", 10), "frames is 10; the autoencoder takes 4n+1 frames: the nearest are 9 and 13"),
        (("--height", 480), "height and width go together"),
        (("--fps", "fast"), "'fast' is no number such as 16 or 24000/1001"),
        (("--num-processes", 0), "0 processes cannot encode"),
    ],
)
def test_errors_are_sentences(run, two_clips, tiny_model, tmp_path, arguments, message):
    done = run(
        "prepare", "--video-folder", two_clips, "--output-folder", tmp_path / "a", "--model", tiny_model, *arguments
    )
    assert done.exit_code != 0
    assert message in done.output
    assert "Traceback" not in done.output


def test_nothing_usable_is_an_error_and_leaves_nothing(run, tiny_model, clip, tmp_path):
    clip(tmp_path / "in" / "mute.mkv", range(9))
    done = run(
        "prepare", "--video-folder", tmp_path / "in", "--output-folder", tmp_path / "a", "--model", tiny_model, *SMALL
    )
    assert done.exit_code == 1
    assert "none of the 1 files can be used: mute.mkv: it has no caption" in done.output
    assert list((tmp_path / "a").iterdir()) == []
    done = run("prepare", "--video-folder", tmp_path / "a", "--output-folder", tmp_path / "b", "--model", tiny_model)
    assert "holds no files ending in" in done.output


def test_inspect(run, dataset):
    done = run("inspect", dataset, "--capacity", 60, "--json")
    found = json.loads(done.stdout)
    assert sum(split["samples"] for split in found["splits"].values()) == 14
    train = found["splits"]["train"]
    assert sum(shape["samples"] * shape["tokens"] for shape in train["shapes"]) == train["tokens"]
    packing = train["packing"]
    assert packing["valid_of_capacity"] == pytest.approx(train["tokens"] / 60 / packing["packs"])
    assert train["text_tokens"]["least"] >= 2
    tables = run("inspect", dataset)
    assert tables.exit_code == 0
    assert "16x3x" in tables.output
    assert "Error: " in run("inspect", dataset / "absent").output


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from wan_data.cli import main; main(['prepare', '--help'], standalone_mode=False);"
        "sys.exit(','.join({'torch', 'av', 'megatron.energon', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
    assert "--video-folder" in done.stdout
