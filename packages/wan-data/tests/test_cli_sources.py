"""What the commands say of sources that are left out, changed, missing, or read by options; with their exit codes."""

import json
import os
import shutil

import av
import numpy as np
import pytest
from changed_sources import change_a_byte
from data_command import run
from dataset_sources import records_of
from PIL import Image

from wan_data.shards.reader import samples_of

# The options that the dataset of the tests was prepared with.
SAME = ("--area", 1536, "--frames", 9, "--min-frames", 5, "--samples-per-shard", 3, "--validation-fraction", 1e-4)


@pytest.fixture
def copies(dataset, clips, tmp_path):
    return shutil.copytree(dataset, tmp_path / "out"), shutil.copytree(clips, tmp_path / "in")


def prepare_options(out, folder, model):
    return ("prepare", "--video-folder", folder, "--output-folder", out, "--model", model, "--device", "cpu", *SAME)


def test_what_is_left_out_is_named_and_decides_no_exit_code(copies, tiny_model, monkeypatch):
    out, folder = copies
    walk, listed = os.walk, []
    monkeypatch.setattr(os, "walk", lambda top, **more: listed.append(top) or walk(top, **more))
    for name in (".hidden.mp4", ".git/a.mp4", "paper.pdf", "still.png", "orphan.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "gone.jsonl").write_text('{"caption": "x"}\n')
    named = [
        "2 left out, hidden: .git, .hidden.mp4",
        "1 left out, of a kind that is not read: paper.pdf",
        "1 left out, images, which --mode frames reads: still.png",
        "2 left out, texts without a clip of their name: gone.jsonl, orphan.txt",
    ]
    done = run(*prepare_options(out, folder, tiny_model))
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-len(named) :] == named
    plan = ("plan", "--video-folder", folder, *SAME, "--num-decoders", 1)
    done = run(*plan)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-len(named) :] == named
    done = run(*plan, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["left_out"] == named
    assert listed.count(folder) == 3, "each command lists the folder once"


def test_missing_files_alone_are_no_failure_and_kept_ones_are(copies, tiny_model):
    out, folder = copies
    (folder / "wide.mkv").rename(folder / "away")
    done = run(*prepare_options(out, folder, tiny_model))
    assert done.exit_code == 0, done.output
    assert "1; --remove-missing removes them):\n  wide.mkv\n" in done.stdout
    (folder / "deep" / "tall.jsonl").unlink()
    for again in ("--update", "--update"):
        done = run(*prepare_options(out, folder, tiny_model), again)
        assert done.exit_code == 1
        assert (
            "cannot be used as they are now, and keep their samples (1):\n  deep/tall.mkv: it has no c" in done.stdout
        )
    assert run(*prepare_options(out, folder, tiny_model), "--update", "--allow-rejects").exit_code == 0
    assert {record.path: record.samples for record in records_of(out)}["deep/tall.mkv"] > 0


def test_verify_compares_sources_and_listings(dataset, copies, tmp_path):
    _, folder = copies
    change_a_byte(folder / "wide.mkv")
    (folder / "deep" / "tall.jsonl").write_text('{"caption": "Another."}\n')
    done = run("verify", dataset, "--sources", folder)
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        "deep/tall.mkv has another caption than its samples were encoded with",
        "wide.mkv has changed since it was encoded",
        "5 shards, 14 samples, 6 sources checked: problems: 2",
    ]
    captions = {"wide.mkv": "A wide clip.", "deep/tall.mkv": "Ein hoher Clip, größer."}
    captions |= {f"many/clip {index}.v1.mkv": "A square." for index in range(4)}
    for changed, code in (({}, 0), ({"wide.mkv": "Another."}, 1)):
        rows = [json.dumps({"video": name, "caption": text}) for name, text in {**captions, **changed}.items()]
        (tmp_path / "list.jsonl").write_text("\n".join(rows))
        done = run("verify", dataset, "--sources", folder, "--listing", tmp_path / "list.jsonl")
        assert done.exit_code == 1
        found = [line for line in done.stdout.splitlines() if "caption" in line]
        assert found == ["wide.mkv has another caption than its samples were encoded with"] * code
    (folder / "wide.mkv").unlink()
    os.mkfifo(folder / "wide.mkv")
    done = run("verify", dataset, "--sources", folder)
    assert "wide.mkv is a named pipe; expected a file" in done.stdout


def test_options_of_how_sources_are_read(clip, tiny_model, tmp_path):
    folder, long = tmp_path / "in", "long " + "n" * 220
    clip(folder / "slow.mkv", range(5), times=[0, 62, 125, 3000, 3062])
    Image.new("RGBA", (48, 32), (200, 0, 0, 0)).save(folder / f"{long}.png")
    Image.new("RGB", (48, 32), (16, 32, 48)).save(folder / "opaque.bmp")
    Image.new("RGB", (48, 32), (200, 0, 0)).save(folder / "red.png")
    for name, text in (("slow", "x"), (long, "many words " * 40), ("opaque", "x"), ("red", "x")):
        (folder / f"{name}.txt").write_text(text)
    options = ("prepare", "--video-folder", folder, "--output-folder", tmp_path / "out", "--model", tiny_model)
    options += ("--mode", "frames", "--height", 32, "--width", 48, "--background", "#102030", "--text-length", 4)
    options += ("--device", "cpu", "--num-decoders", 1, "--validation-fraction", 0)
    done = run(*options, "--max-source-still", 2)
    assert done.exit_code == 1, done.output
    assert "slow.mkv: " in done.stdout
    assert "more than 2 s indicates damaged presentation times (--max-source-still)" in done.stdout
    assert f"Captions cut to 4 tokens (1):\n  {long}.png: " in done.stdout
    latents = {
        sample.info["video_path"]: sample.latent
        for shard in (tmp_path / "out").glob("*.tar")
        for sample in samples_of(shard)
    }
    assert latents[f"{long}.png"].equal(latents["opaque.bmp"]), "the background shows through"
    assert not latents[f"{long}.png"].equal(latents["red.png"])
    # A caption that is cut is no failure.
    (folder / "slow.mkv").unlink()
    done = run(*options, "--max-source-still", 2)
    assert done.exit_code == 0, done.output
    assert "Captions cut to 4 tokens (1):" in done.stdout
    assert "background '#000000' instead of '#102030'" in run(*options, "--background", "#000000").output
    done = run("preview", tmp_path / "out", "--model", tiny_model, "--output", tmp_path / "a.png", "--device", "cpu")
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "a.png") as sheet:
        assert max(sheet.size) < 4000


def test_hdr_is_rejected_or_mapped(tmp_path):
    (tmp_path / "pq.txt").write_text("x")
    with av.open(str(tmp_path / "pq.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p10le"
        stream.codec_context.color_trc, stream.codec_context.colorspace = 16, 9
        stream.codec_context.color_primaries, stream.codec_context.color_range = 9, 1
        for _ in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((48, 48), 512, np.uint16), format="yuv420p10le")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    options = ("plan", "--video-folder", tmp_path, "--area", 1536, "--frames", 5, "--min-frames", 5)
    done = run(*options, "--num-decoders", 1)
    assert done.exit_code == 1
    assert "--hdr tone-map" in " ".join(done.output.split())
    done = run(*options, "--num-decoders", 1, "--hdr", "tone-map")
    assert done.exit_code == 0, done.output
    assert "1 samples of 1 of 1 files" in done.output
    assert run(*options, "--hdr", "ignore").exit_code == 2
