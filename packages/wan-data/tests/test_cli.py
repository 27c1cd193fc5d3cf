import json
import os
import shutil

import pytest
import torch
from data_command import run
from dataset_sources import records_of

from wan_data.cli import main
from wan_data.index.manifest import read_manifest
from wan_data.prepare import ranks
from wan_data.prepare import run as run_module
from wan_data.prepare.ranks import Ranks
from wan_model.codec.latent_codec import LatentCodec


@pytest.fixture
def two_clips(clip, tmp_path):
    folder = tmp_path / "in"
    clip(folder / "a.mkv", range(9))
    (folder / "a.json").write_text('{"caption": "x"}')
    clip(folder / "mute.mkv", range(9))
    return folder


SMALL = ("--area", 1536, "--frames", 9, "--device", "cpu")


def test_rejects_are_named_and_decide_the_exit_code(two_clips, tiny_model, tmp_path):
    arguments = ("prepare", "--video-folder", two_clips, "--output-folder", tmp_path / "a", *SMALL)
    arguments += ("--model", tiny_model)
    done = run(*arguments)
    assert done.exit_code == 1, done.output
    assert "1 samples (1 train) of 1 shapes in 1 shards from 1 of 2 files" in done.output
    assert "mute.mkv: it has no caption: expected mute.json" in done.output
    assert "REJECTED mute.mkv" in done.stderr
    # A run that finds the dataset finished says so again.
    again = run(*arguments)
    assert again.exit_code == 1
    assert "Rejected files (1):\n  mute.mkv: it has no caption" in again.stdout
    assert run(*arguments, "--allow-rejects").exit_code == 0


@pytest.mark.parametrize(("rank", "code"), [(0, 1), (1, 0)])
def test_the_first_rank_alone_says_that_files_were_rejected(two_clips, tiny_model, tmp_path, monkeypatch, rank, code):
    """If another failed, torchrun would end the first before it has said which files."""

    class Rank(Ranks):
        world_size = 2

    Rank.rank = rank
    monkeypatch.setattr(ranks, "ranks_from_environment", Rank)
    all_work = run_module.prepare
    monkeypatch.setattr(run_module, "prepare", lambda *given, **more: all_work(*given, **{**more, "ranks": Ranks()}))
    done = run(
        *("prepare", "--video-folder", two_clips, "--output-folder", tmp_path / "a", "--model", tiny_model, *SMALL)
    )
    assert done.exit_code == code
    assert ("Rejected files (1)" in done.stdout) == (rank == 0)


def test_dropped_windows_of_an_accepted_clip_decide_the_exit_code(clip, tiny_model, tmp_path, monkeypatch):
    clip(tmp_path / "in" / "a.mkv", [20] * 9 + [200] * 9)
    (tmp_path / "in" / "a.txt").write_text("It becomes bright.")
    encode = LatentCodec.encode_video

    def overflow(self, video):
        return encode(self, video) * (torch.inf if video.mean() > 0 else 1)

    monkeypatch.setattr(LatentCodec, "encode_video", overflow)
    arguments = ("prepare", "--video-folder", tmp_path / "in", "--output-folder", tmp_path / "out", *SMALL)
    arguments += ("--model", tiny_model)
    for _ in ("the run that drops it", "a run on the finished dataset"):
        done = run(*arguments)
        assert done.exit_code == 1, done.output
        assert "1 samples (1 train)" in done.stdout
        assert "Windows of accepted files that could not be encoded (1):\n  a.mkv window 2: the autoenc" in done.stdout
        assert "Rejected files" not in done.stdout
    (record,) = records_of(tmp_path / "out")
    assert (record.verdict, record.samples, len(record.dropped)) == ("accepted", 1, 1)
    assert run(*arguments, "--allow-rejects").exit_code == 0


def test_the_tutorials_spellings(two_clips, tiny_model, tmp_path):
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
def test_errors_are_sentences(two_clips, tiny_model, tmp_path, arguments, message):
    done = run(
        "prepare", "--video-folder", two_clips, "--output-folder", tmp_path / "a", "--model", tiny_model, *arguments
    )
    assert done.exit_code != 0
    assert message in done.output
    assert "Traceback" not in done.output


def test_nothing_usable_is_an_error_and_leaves_nothing(tiny_model, clip, tmp_path):
    clip(tmp_path / "in" / "mute.mkv", range(9))
    done = run(
        "prepare", "--video-folder", tmp_path / "in", "--output-folder", tmp_path / "a", "--model", tiny_model, *SMALL
    )
    assert done.exit_code == 1
    assert "none of the 1 files can be used: mute.mkv: it has no caption" in done.output
    assert [path.name for path in (tmp_path / "a").iterdir()] in ([], [".wan-data.lock"])
    done = run("prepare", "--video-folder", tmp_path / "a", "--output-folder", tmp_path / "b", "--model", tiny_model)
    assert "holds no files ending in" in done.output


def test_plan_says_what_prepare_then_does(clips, tiny_model, tmp_path):
    shutil.copytree(clips, tmp_path / "in")
    (tmp_path / "in" / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "in" / "broken.txt").write_text("x")
    options = ("--video-folder", tmp_path / "in", "--output-folder", tmp_path / "out", *SMALL, "--min-frames", 5)
    done = run("plan", *options, "--json", "--model", tiny_model)
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    assert (found["sources"], found["accepted"], found["samples"]) == (7, 6, 14)
    assert [kind["sources"] for kind in found["rejected"]] == [[source] for source in found["rejected"][0]["sources"]]
    assert found["rejected"][0]["sources"][0].startswith("broken.mp4: it cannot be decoded")
    assert found["seconds_about"] > 0
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != ".wan-data.lock"] == [".wan-data"]

    done = run("prepare", *options, "--model", tiny_model, "--allow-rejects")
    assert done.exit_code == 0, done.output
    manifest = read_manifest(tmp_path / "out")
    rows = {(row["split"], row["frames"], row["height"], row["width"]): row for row in found["buckets"]}
    shapes = {(shape.split, shape.frames, shape.height, shape.width): shape for shape in manifest.shapes}
    assert {place: row["samples"] for place, row in rows.items()} == {
        place: shape.samples for place, shape in shapes.items()
    }
    assert {row["tokens"] for row in found["buckets"]} == {shape.tokens for shape in manifest.shapes}
    assert found["shards"] == len(manifest.shards)

    same = run("plan", *options, "--json", "--allow-rejects")
    assert "refuse" not in same.stderr
    other = run("plan", *options, "--json", "--allow-rejects", "--measures")
    assert other.exit_code == 0
    assert f"prepare would refuse these settings: {tmp_path / 'out'} holds a dataset of other settings" in other.stderr
    assert "(measures on instead of off)" in other.stderr
    other = run("plan", *options, "--json", "--allow-rejects", "--where", "seconds > 0")
    assert "(where 'seconds > 0' instead of not given)" in other.stderr

    tables = run("plan", *options[:2], *SMALL, "--min-frames", 5, "--allow-rejects")
    assert tables.exit_code == 0
    assert "14 samples of 6 of 7 files" in tables.output
    assert (
        "\n1 rejected: it cannot be decoded: Invalid data found when processing input\n  broken.mp4\n" in tables.output
    )


def test_a_listing_instead_of_a_folder(clips, tiny_model, tmp_path):
    (tmp_path / "list.csv").write_text("path,text\nwide.mkv,Wide.\nabsent.mkv,Nothing.\n")
    options = ("--listing", tmp_path / "list.csv", "--video-folder", clips, "--caption-key", "text")
    done = run("prepare", *options, "--output-folder", tmp_path / "out", "--model", tiny_model, *SMALL)
    assert done.exit_code == 1
    assert "absent.mkv: it cannot be read: No such file or directory" in done.output
    (wide,) = (record for record in records_of(tmp_path / "out") if record.verdict == "accepted")
    assert (wide.path, wide.samples) == ("wide.mkv", 3)
    nothing = run("prepare", "--output-folder", tmp_path / "x", "--model", tiny_model)
    assert nothing.exit_code == 1
    assert "pass --video-folder, or --listing" in nothing.output


def test_verify(dataset, clips, tmp_path):
    done = run("verify", dataset, "--sources", clips)
    assert done.exit_code == 0, done.output
    assert done.stdout == "5 shards, 14 samples, 6 sources checked: no problems\n"
    copy = shutil.copytree(dataset, tmp_path / "copy")
    shard = min(copy.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1])
    done = run("verify", copy)
    assert done.exit_code == 1
    assert f"shard {shard.name} has" in done.stdout
    assert "problems" in done.stdout.splitlines()[-1]
    assert "no .nv-meta folder" in run("verify", tmp_path).output


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_preview_shows_the_latents(dataset, tiny_model, tmp_path):
    options = ("preview", dataset, "--model", tiny_model, "--output", tmp_path / "sheet.png", "--device", "cpu")
    done = run(*options, "--samples", 3)
    assert done.exit_code == 0, done.output
    assert done.output == f"3 samples of {dataset}: {tmp_path / 'sheet.png'}\n"
    width, height = png_size(tmp_path / "sheet.png")
    run(*options, "--samples", 1)
    assert png_size(tmp_path / "sheet.png") == (width, pytest.approx(height / 3, abs=2))
    assert "no split 'test'; it has train, val" in run(*options, "--split", "test").output
    assert "must be at least 1" in run(*options, "--samples", 0).output


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("s3://bucket/a.png", "s3://bucket/a.png is in a store; name a file of this machine"),
        ("{}/nowhere/a.png", "/nowhere is no folder; make it first"),
        ("{}", "is a folder; name a file in it"),
    ],
)
def test_where_a_picture_cannot_be_written_is_said_before_anything_is_read(tmp_path, place, said):
    for command, option in (("inspect", "--png"), ("inspect", "--measures-png"), ("preview", "--output")):
        done = run(command, tmp_path / "no dataset", option, place.format(tmp_path))
        assert done.exit_code == 2
        assert option in done.output
        assert said in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        ("vae/config.json", "latents_std", ["1"] * 16, "latents_std has '1' in it; expected 16 positive numbers"),
        ("vae/config.json", "z_dim", None, "z_dim is None; expected a whole number"),
        ("text_encoder/config.json", "d_model", "32", "d_model is '32'; expected a whole number"),
        (
            "vae/diffusion_pytorch_model.safetensors.index.json",
            "weight_map",
            [],
            "weight_map is []; expected an object",
        ),
    ],
)
def test_a_damaged_model_is_a_sentence(dataset, clips, tiny_model, tmp_path, file, key, value, said):
    damaged = shutil.copytree(tiny_model, tmp_path / "model")
    content = json.loads((damaged / file).read_text()) if (damaged / file).exists() else {}
    (damaged / file).write_text(json.dumps({**content, key: value}))
    prepare = ("prepare", "--video-folder", clips, "--output-folder", tmp_path / "out", *SMALL)
    for command in (prepare, ("preview", dataset, "--output", tmp_path / "sheet.png", "--device", "cpu")):
        done = run(*command, "--model", damaged)
        assert done.exit_code == 1
        assert done.output.splitlines()[-1].startswith(f"Error: {damaged / file}: {said}")
    assert not (tmp_path / "out").exists()


def test_inspect_draws(dataset, tmp_path):
    done = run("inspect", dataset, "--png", tmp_path / "sizes.png")
    assert done.exit_code == 0, done.output
    assert min(png_size(tmp_path / "sizes.png")) > 300


def test_inspect(dataset):
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
    printed = " ".join(tables.output.split())
    assert "% of their capacity filled, " in printed
    assert "% of computed tokens valid (packing efficiency)" in printed
    assert "Error: " in run("inspect", dataset / "absent").output


def test_changed_files_decide_the_exit_code_until_they_are_updated(clip, tiny_model, tmp_path):
    for name in ("a", "b", "c"):
        clip(tmp_path / "in" / f"{name}.mkv", range(9))
        (tmp_path / "in" / f"{name}.txt").write_text(f"Clip {name}.")
    arguments = ("prepare", "--video-folder", tmp_path / "in", "--output-folder", tmp_path / "out", *SMALL)
    arguments += ("--model", tiny_model)
    assert run(*arguments).exit_code == 0
    (tmp_path / "in" / "a.txt").write_text("Another caption.")
    (tmp_path / "in" / "b.mkv").unlink()
    done = run(*arguments)
    assert done.exit_code == 1
    assert "1; --update encodes them again):\n  a.mkv has another caption\n" in done.stdout
    assert "1; --remove-missing removes them):\n  b.mkv\n" in done.stdout
    done = run(*arguments, "--update", "--remove-missing")
    assert done.exit_code == 0, done.output
    assert "Changed files, encoded again in place of the samples that they had (1):\n  a.mkv\n" in done.stdout
    assert "Files that are no longer there, whose samples are removed (1):\n  b.mkv" in done.stdout
    assert "REJECTED" not in done.output
    assert run("verify", tmp_path / "out", "--sources", tmp_path / "in").exit_code == 0
    done = run(*arguments, "--update", "--overwrite")
    assert done.exit_code == 1
    assert "--overwrite replaces the whole dataset" in done.output


def test_a_result_that_cannot_be_written_is_a_sentence(dataset, monkeypatch, capsys):
    for command in (["verify", str(dataset)], ["inspect", str(dataset)], ["plan", "--help"]):
        with open("/dev/full", "w") as full, monkeypatch.context() as patch:
            patch.setattr("sys.stdout", full)
            with pytest.raises(SystemExit) as ended:
                main(command)
        assert ended.value.code == 1
        said = "Error: cannot read or write standard output: No space left on device"
        assert capsys.readouterr().err.splitlines()[-1] == said


def test_progress_that_nobody_reads_does_not_end_a_command(dataset, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", pipe)
        with pytest.raises(SystemExit) as ended:
            main(["verify", str(dataset)])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "5 shards, 14 samples checked: no problems\n"
