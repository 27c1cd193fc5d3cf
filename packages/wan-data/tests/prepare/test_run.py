import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import uuid
from pathlib import Path

import pytest
import torch
from dataset_sources import records_of
from folder_digests import digests, without_index
from tokenizers import Tokenizer

from wan_data.index.manifest import MANIFEST_NAME, read_manifest
from wan_data.inspect.verify import verify
from wan_data.prepare.encoding import encoder_pool
from wan_data.prepare.output_folder import WORK_FOLDER
from wan_data.prepare.results import PrepareResult, summary_lines
from wan_data.prepare.settings import PrepareSettings
from wan_data.reading.empty_caption import EMPTY_CAPTION_NAME, read_empty_caption
from wan_data.shards.energon_metadata import DATASET_YAML
from wan_data.shards.lock import writer_lock
from wan_model.codec.latent_codec import LatentCodec
from wan_model.system.files import sha256_of
from wan_model.testing import assert_rounds_to


def members(folder):
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                yield shard.name, member, tar.extractfile(member).read()


def test_clips_have_the_same_bytes_in_every_run(clip, tmp_path):
    # Which of them are for validation, and so how many shards there are, follows from their content.
    first, second = (clip(tmp_path / name, range(5)) for name in ("a.mkv", "b.mkv"))
    assert first.read_bytes() == second.read_bytes()


def test_shards_are_those_of_the_recipe(dataset, tiny_model):
    found = list(members(dataset))
    kinds = [member.name.rpartition(".")[2] for _, member, _ in found]
    assert kinds == ["json", "pickle", "pth"] * 14
    assert {shard for shard, _, _ in found} == {f"shard-rank00-{number:06d}.tar" for number in range(5)}
    assert {member.mtime for _, member, _ in found} == {0}
    assert {(member.uid, member.gid, member.uname, member.gname) for _, member, _ in found} == {(0, 0, "", "")}
    codec = LatentCodec.from_pretrained(tiny_model)
    for index in range(0, len(found), 3):
        info, text, latent = (data for _, _, data in found[index : index + 3])
        info = json.loads(info)
        latent = torch.load(io.BytesIO(latent), weights_only=True)
        frames, height, width = (info[f"processed_{name}"] for name in ("frames", "height", "width"))
        assert tuple(latent.shape) == codec.spec.latent_shape(frames, height, width)
        assert latent.dtype == torch.float32
        # As NVIDIA's recipe reads it: by plain pickle. The text has its true length.
        assert torch.equal(pickle.loads(text), codec.encode_text([info["caption"]])[0])
        assert info["fps"] == 16
        assert info["model_version"] == "wan2.1"
        assert info["resize_settings"]["target_size"] == [height, width]
        assert info["frame_stop"] - info["frame_start"] == frames
        assert info["latent_fingerprint"] == codec.spec.fingerprint


def exact_latent(model, info):
    """The latent of a window of ``write_clip`` in float64, as a function for ``wan_model.testing``."""
    codec = LatentCodec.from_pretrained(model, load_text=False)
    vae, spec = codec.vae.double(), codec.spec
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None, None] for values in (spec.mean, spec.std))
    first = {"wide.mkv": 0, "deep/tall.mkv": 40, **{f"many/clip {i}.v1.mkv": 80 + 10 * i for i in range(4)}}
    start, stop = (first[info["video_path"]] + info[f"frame_{end}"] for end in ("start", "stop"))
    shades = torch.arange(start, stop).double() / 127.5 - 1
    size = (info["processed_height"], info["processed_width"])
    video = shades[None, None, :, None, None].expand(1, 3, -1, *size)
    return lambda: {"latent": (vae.encode(video).latent_dist.mode()[0] - mean) / std}


def read_samples(folder):
    """The side information, text and latent of each sample, in order."""
    found = [data for _, _, data in members(folder)]
    return [
        (json.loads(info), text, torch.load(io.BytesIO(latent), weights_only=True))
        for info, text, latent in zip(found[::3], found[1::3], found[2::3], strict=True)
    ]


@pytest.mark.rounding
def test_latents_are_those_of_the_codec(dataset, tiny_model):
    chosen = [one for one in read_samples(dataset) if one[0]["video_path"] == "wide.mkv"]
    assert len(chosen) == 3
    for info, _, latent in chosen[-2:]:
        assert_rounds_to({"latent": latent}, exact_latent(tiny_model, info))


def test_the_manifest_tells_what_is_there(dataset):
    manifest = read_manifest(dataset)
    assert manifest.complete
    assert sum(manifest.samples.values()) == 14
    assert len({shape.latent for shape in manifest.shapes}) >= 3
    assert sum(shape.samples for shape in manifest.shapes) == 14
    for shard in manifest.shards:
        path = dataset / shard.name
        assert (path.stat().st_size, sha256_of(path)) == (shard.bytes, shard.sha256)
    assert {source.verdict for source in records_of(dataset)} == {"accepted"}


def test_validation_shares_no_source_with_training(dataset):
    manifest = read_manifest(dataset)
    split_of = {shard.name: shard.split for shard in manifest.shards}
    sources = {"train": set(), "val": set()}
    for shard, member, data in members(dataset):
        if member.name.endswith(".json"):
            sources[split_of[shard]].add(json.loads(data)["video_path"])
    assert sources["train"]
    assert sources["val"]
    assert not sources["train"] & sources["val"]


def test_the_energon_metadata_is_written_without_questions(dataset):
    meta = dataset / ".nv-meta"
    assert (meta / "dataset.yaml").read_bytes() == DATASET_YAML
    assert sum(json.loads((meta / ".info.json").read_text())["shard_counts"].values()) == 14
    assert uuid.UUID((meta / "index.uuid").read_text())


def test_bad_files_are_rejected_by_name_and_the_others_go_on(prepared, clip, tiny_model, small, silent, tmp_path):
    folder = tmp_path / "in"
    for name, size, frames in (("good", (48, 64), 9), ("short", (48, 64), 3), ("little", (16, 24), 9)):
        clip(folder / f"{name}.mkv", range(frames), size=size)
        (folder / f"{name}.json").write_text('{"caption": "x"}')
    clip(folder / "mute.mkv", range(9))
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "broken.json").write_text('{"caption": "x"}')
    settings = PrepareSettings(**small)
    manifest = prepared(folder, tmp_path / "out", tiny_model, settings, report=silent)
    reasons = {source.path: source.reason for source in records_of(tmp_path / "out")}
    assert reasons.pop("good.mkv") is None
    assert set(reasons) == {"short.mkv", "little.mkv", "mute.mkv", "broken.mp4"}
    assert "3 frames at the target rate; the shortest window is 5" in reasons["short.mkv"]
    assert "enlarged 2.00 times" in reasons["little.mkv"]
    assert "no caption: expected mute.json" in reasons["mute.mkv"]
    assert "cannot be decoded" in reasons["broken.mp4"]
    assert manifest.samples == {"train": 1}
    assert any("too few for a validation split" in line for line in silent.lines)


def test_equal_captions_are_encoded_once(prepared, clips, tiny_model, small, silent, tmp_path, monkeypatch):
    asked = []
    encode = LatentCodec.encode_prompt
    monkeypatch.setattr(LatentCodec, "encode_prompt", lambda self, prompt: asked.append(prompt) or encode(self, prompt))
    prepared(clips, tmp_path / "out", tiny_model, PrepareSettings(**small), report=silent)
    assert sorted(asked) == sorted(set(asked))
    assert len(asked) == 4, "three captions, and the empty one"


def test_the_empty_caption_stands_beside_the_shards(prepared, dataset, clips, tiny_model, small, silent, tmp_path):
    codec = LatentCodec.from_pretrained(tiny_model, load_vae=False)
    assert torch.equal(read_empty_caption(dataset), codec.encode_text([""])[0])
    # A dataset of before, or of a run that was killed right before it: the same command adds it.
    copy = shutil.copytree(dataset, tmp_path / "copy")
    manifest = json.loads((copy / MANIFEST_NAME).read_text())
    (copy / MANIFEST_NAME).write_text(json.dumps({**manifest, "empty_caption": None}))
    (copy / EMPTY_CAPTION_NAME).unlink()
    with pytest.raises(ValueError, match="holds no embedding of the empty caption"):
        read_empty_caption(copy)
    prepared(clips, copy, tiny_model, PrepareSettings(**small), report=silent)
    assert digests(copy) == digests(dataset)
    data = (copy / EMPTY_CAPTION_NAME).read_bytes()
    (copy / EMPTY_CAPTION_NAME).write_bytes(data[:-1] + b"x")
    with pytest.raises(ValueError, match="it is damaged"):
        read_empty_caption(copy)
    assert [problem for problem in verify(copy)[1] if "empty-caption" in problem]


def test_frames_mode_makes_images(prepared, clip, tiny_model, small, silent, tmp_path):
    folder = tmp_path / "in"
    clip(folder / "a.mkv", range(4))
    (folder / "a.json").write_text('{"caption": "x"}')
    settings = PrepareSettings(mode="frames", **small)
    manifest = prepared(folder, tmp_path / "out", tiny_model, settings, report=silent)
    assert [(shape.latent[1], shape.samples) for shape in manifest.shapes] == [(1, 4)]
    infos = [json.loads(data) for _, member, data in members(tmp_path / "out") if member.name.endswith("json")]
    assert [(info["frame_index"], info["total_frames_in_video"]) for info in infos] == [(i, 4) for i in range(4)]


def test_folders_of_others_are_left_alone(prepared, clips, tiny_model, small, silent, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="did not write"):
        prepared(clips, tmp_path, tiny_model, PrepareSettings(**small), report=silent, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_dataset_takes_no_samples_of_another_latent_space(prepared, clips, dataset, tiny_model, small, tmp_path):
    folder = shutil.copytree(dataset, tmp_path / "dataset")
    model = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("transformer"))

    def refused(file, change, **settings):
        content = json.loads((model / file).read_text())
        change(changed := json.loads(json.dumps(content)))
        (model / file).write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=rf"{folder}|{model}") as error:
            prepared(clips, folder, model, PrepareSettings(**{**small, **settings}))
        (model / file).write_text(json.dumps(content))
        return str(error.value)

    for name, file, change in (
        ("mean", "vae/config.json", lambda content: content.update(latents_mean=[0.25] * 16)),
        ("std", "vae/config.json", lambda content: content.update(latents_std=[0.25] * 16)),
        ("tokenizer", "tokenizer/tokenizer.json", lambda content: content["model"]["merges"].pop()),
    ):
        said = refused(file, change)
        assert f"the dataset in {folder} (fingerprint" in said
        assert f"the model {model} (fingerprint" in said
        assert f"of different latent spaces: {name} (" in said
    for name, value in {"text_length": 16, "fps": 24}.items():
        assert f"a dataset of other settings ({name} " in refused(
            "vae/config.json", lambda content: None, **{name: value}
        )
    # A stride that clips are not cut for.
    said = refused("vae/config.json", lambda content: content.update(temperal_downsample=[True] * 3))
    assert (
        f"the autoencoder of {model} has strides of 8 frames and 8 pixels where clips are cut for 4 and 8; name" in said
    )
    assert without_index(folder) == without_index(dataset)


def test_a_run_killed_in_its_first_manifest_is_taken_up(prepared, clips, dataset, tiny_model, small, silent, tmp_path):
    (tmp_path / "wan-data.json.partial").write_text('{"complete": fal')
    (tmp_path / WORK_FOLDER).mkdir()
    prepared(clips, tmp_path, tiny_model, PrepareSettings(**small), report=silent)
    assert without_index(tmp_path) == without_index(dataset)


def test_captions_beyond_the_text_encoder_are_counted_and_named(prepared, clip, tiny_model, small, tmp_path):
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer" / "tokenizer.json"))
    captions = {"long": "a rabbit " * 400, "fits": "a rabbit"}
    # With its end token it has 512 exactly.
    captions["full"] = "?" * (512 - len(tokenizer.encode("").ids) - len(tokenizer.encode("?").ids) + 2)
    while (size := len(tokenizer.encode(captions["full"]).ids)) != 512:
        captions["full"] = captions["full"][:-1] if size > 512 else captions["full"] + "?"
    for name, caption in captions.items():
        clip(tmp_path / "clips" / f"{name}.mkv", range(9), size=(48, 64))
        (tmp_path / "clips" / f"{name}.txt").write_text(caption)
    manifest = prepared(tmp_path / "clips", tmp_path / "out", tiny_model, PrepareSettings(**small))
    whole = len(tokenizer.encode(captions["long"].strip()).ids)
    assert whole > 512
    assert {one.path: one.caption_tokens for one in records_of(tmp_path / "out")} == {
        "long.mkv": whole, "fits.mkv": None, "full.mkv": None,
    }  # fmt: skip
    assert read_manifest(tmp_path / "out") == manifest
    assert summary_lines(PrepareResult(manifest), tmp_path / "out")[-2:] == [
        "Captions cut to 512 tokens (1):", f"  long.mkv: {whole} tokens",
    ]  # fmt: skip


def test_a_failing_run_leaves_whole_shards_only_and_is_taken_up(
    prepared, clips, clip, dataset, tiny_model, small, silent, tmp_path, monkeypatch
):
    out, encode, calls = tmp_path / "out", LatentCodec.encode_video, []

    def fail_late(self, video):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("out of memory")
        return encode(self, video)

    more = shutil.copytree(clips, tmp_path / "more")
    with monkeypatch.context() as patch:
        patch.setattr(LatentCodec, "encode_video", fail_late)
        with pytest.raises(RuntimeError, match="out of memory"):
            prepared(more, out, tiny_model, PrepareSettings(**small))
    assert [path.name for path in out.glob("shard*")] == ["shard-rank00-000000.tar"]
    with pytest.raises(ValueError, match="incomplete"):
        read_manifest(out)
    written = (out / "shard-rank00-000000.tar").stat().st_mtime_ns
    # What is added in between comes after what had been begun.
    clip(more / "a new one.mkv", range(100, 118), size=(48, 64))
    (more / "a new one.txt").write_text("New.")
    manifest = prepared(more, out, tiny_model, PrepareSettings(**small), report=silent)
    assert (out / "shard-rank00-000000.tar").stat().st_mtime_ns == written
    assert "encoding 11" in silent.lines
    undisturbed = read_manifest(dataset)
    assert manifest.shards[: len(undisturbed.shards)] == undisturbed.shards
    assert not (out / WORK_FOLDER).exists()
    # And the whole is what two undisturbed runs give.
    twice = shutil.copytree(dataset, tmp_path / "twice")
    prepared(more, twice, tiny_model, PrepareSettings(**small))
    assert without_index(out) == without_index(twice)


def test_a_process_that_dies_is_named_and_the_run_is_taken_up(
    prepared, dataset, clips, tiny_model, small, silent, tmp_path, monkeypatch
):
    get, taken = encoder_pool._TaskQueue.get, []
    # A loader that another test has left to the garbage collector may still have its workers.
    others = {child.pid for child in multiprocessing.active_children()}

    def encoders():
        return [child.pid for child in multiprocessing.active_children() if child.pid not in others]

    def killed_at_the_fourth(self, *, wait):
        taken.append(wait)
        if len(taken) == 4:
            while len(encoders()) < 2:
                time.sleep(0.05)
            for pid in encoders():
                os.kill(pid, signal.SIGKILL)
        return get(self, wait=wait)

    with monkeypatch.context() as patch:
        patch.setattr(encoder_pool._TaskQueue, "get", killed_at_the_fourth)
        with pytest.raises(ChildProcessError, match="an encoding process died"):
            prepared(clips, tmp_path / "out", tiny_model, PrepareSettings(**small), report=silent, processes=2)
    assert len(list((tmp_path / "out").glob("*.tar"))) < 3, "most shards are written by the second run"
    prepared(clips, tmp_path / "out", tiny_model, PrepareSettings(**small), report=silent, processes=2)
    # The bytes do not depend on the number of processes either: the dataset was encoded by one.
    assert without_index(tmp_path / "out") == without_index(dataset)


def descendants(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        # The encoding processes are started by another thread than the first.
        for task in list(Path(f"/proc/{pid}/task").iterdir()):
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from descendants(int(child))


def is_decoder(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return b"wan_data.video.decoder_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def test_a_killed_run_leaves_no_process_behind(clips, tiny_model, tmp_path):
    command = [sys.executable, "-c", "from wan_data.cli import main; main()", "prepare", "--num-processes", "2"]
    command += ["--video-folder", clips, "--output-folder", tmp_path / "out", "--model", tiny_model]
    # Every frame is a sample, so that the run lasts.
    command += ["--area", "1536", "--mode", "frames", "--device", "cpu"]
    run = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in run.stdout:
        if line.startswith(b"encoding"):
            break
    # The decoders of the probing have ended, so these two are children of the two encoding processes.
    while sum(map(is_decoder, started := list(descendants(run.pid)))) < 2:
        assert run.poll() is None, "it ended before both encoding processes had started"
        time.sleep(0.01)
    run.kill()
    run.wait()
    run.stdout.close()
    assert len(started) >= 5, "two encoding processes with a decoder each, and the process that they are forked from"
    deadline = time.monotonic() + 300
    while survivors := [pid for pid in started if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, survivors
        time.sleep(0.1)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_window_that_cannot_be_encoded_is_dropped_and_named(
    prepared, clips, tiny_model, small, silent, tmp_path, monkeypatch, batch_size
):
    encode = LatentCodec.encode_video

    def overflow(self, video):
        latents = encode(self, video)
        bright = video.mean(dim=(1, 2, 3, 4)) > 110 / 127.5 - 1
        return torch.where(bright[:, None, None, None, None], torch.inf, latents)

    monkeypatch.setattr(LatentCodec, "encode_video", overflow)
    settings = PrepareSettings(**small, batch_size=batch_size)
    manifest = prepared(clips, tmp_path / "out", tiny_model, settings, report=silent)
    assert sum(manifest.samples.values()) == sum(shard.samples for shard in manifest.shards) == 11
    records = {record.path: record for record in records_of(tmp_path / "out")}
    half, none = records["many/clip 2.v1.mkv"], records["many/clip 3.v1.mkv"]
    assert (half.verdict, half.samples, [number for number, _ in half.dropped]) == ("accepted", 1, [1])
    assert (none.verdict, none.samples, none.shards) == ("rejected", 0, ())
    assert "values that are not finite; try --dtype float32" in none.reason
    assert sum("REJECTED" in line for line in silent.lines) == 3


@pytest.mark.rounding
def test_batches_give_the_same_samples(prepared, dataset, clips, tiny_model, small, tmp_path):
    prepared(clips, tmp_path / "out", tiny_model, PrepareSettings(**small, batch_size=2))
    ours, single = read_samples(tmp_path / "out"), read_samples(dataset)
    assert [(info, text) for info, text, _ in ours] == [(info, text) for info, text, _ in single]
    checked = set()
    for index, (info, _, latent) in enumerate(ours):
        same_shape = [i for i, (*_, other) in enumerate(single) if other.shape == latent.shape]
        assert min(same_shape, key=lambda i: (single[i][2] - latent).norm()) == index, "no window in another's place"
        if latent.shape not in checked:
            checked.add(latent.shape)
            assert_rounds_to({"latent": latent}, exact_latent(tiny_model, info))
    assert len(checked) >= 3


def test_one_writer_a_folder(prepared, clips, tiny_model, small, silent, tmp_path):
    with (
        writer_lock(tmp_path),
        pytest.raises(ValueError, match="being written by process"),
    ):
        prepared(clips, tmp_path, tiny_model, PrepareSettings(**small), report=silent)


def test_sample_keys_are_safe_whatever_the_name():
    from wan_data.shards.writer import sample_key

    key = sample_key("a/__b__/clip.v1 ü.mp4", 34)
    assert key == f"{hashlib.sha256('a/__b__/clip.v1 ü.mp4'.encode()).hexdigest()[:16]}_000034"
