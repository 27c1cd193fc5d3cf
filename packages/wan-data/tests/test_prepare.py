import hashlib
import io
import json
import pickle
import tarfile
import uuid

import pytest
import torch

from wan_data.energon_metadata import DATASET_YAML
from wan_data.files import sha256_of, sole_writer
from wan_data.manifest import read_manifest
from wan_data.prepare import prepare
from wan_data.settings import PrepareSettings
from wan_model.codec import LatentCodec


def members(folder):
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                yield shard.name, member, tar.extractfile(member).read()


def digests(folder):
    return {
        path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


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


def test_latents_are_those_of_the_codec(dataset, tiny_model):
    codec = LatentCodec.from_pretrained(tiny_model, load_text=False)
    for index, (_, member, data) in enumerate(found := list(members(dataset))):
        if member.name.endswith(".json") and json.loads(data)["video_path"] == "wide.mkv":
            info, latent = json.loads(data), torch.load(io.BytesIO(found[index + 2][2]))
            shades = torch.arange(info["frame_start"], info["frame_stop"]).float() / 127.5 - 1
            size = (info["processed_height"], info["processed_width"])
            video = shades[None, None, :, None, None].expand(1, 3, -1, *size)
            torch.testing.assert_close(latent, codec.encode_video(video)[0], rtol=0, atol=1e-5)
            return
    pytest.fail("no sample of wide.mkv")


def test_the_manifest_tells_what_is_there(dataset):
    manifest = read_manifest(dataset)
    assert manifest.complete
    assert sum(manifest.samples.values()) == 14
    assert len({shape.latent for shape in manifest.shapes}) >= 3
    assert sum(shape.samples for shape in manifest.shapes) == 14
    for shard in manifest.shards:
        path = dataset / shard.name
        assert (path.stat().st_size, sha256_of(path)) == (shard.bytes, shard.sha256)
    assert [source.path for source in manifest.sources] == sorted(source.path for source in manifest.sources)
    assert {source.verdict for source in manifest.sources} == {"accepted"}


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


def test_a_second_run_has_the_same_bytes_with_other_processes(clips, tiny_model, dataset, small, silent, tmp_path):
    prepare(clips, tmp_path / "a", str(tiny_model), PrepareSettings(**small), report=silent, device="cpu", processes=2)
    # index.sqlite: Energon's own index, written by whatever library there is.
    first, second = (
        {name: digest for name, digest in digests(folder).items() if not name.endswith(".sqlite")}
        for folder in (dataset, tmp_path / "a")
    )
    assert first == second


def test_bad_files_are_rejected_by_name_and_the_others_go_on(clip, tiny_model, small, silent, tmp_path):
    folder = tmp_path / "in"
    for name, size, frames in (("good", (48, 64), 9), ("short", (48, 64), 3), ("little", (16, 24), 9)):
        clip(folder / f"{name}.mkv", range(frames), size=size)
        (folder / f"{name}.json").write_text('{"caption": "x"}')
    clip(folder / "mute.mkv", range(9))
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "broken.json").write_text('{"caption": "x"}')
    settings = PrepareSettings(**small)
    manifest = prepare(folder, tmp_path / "out", str(tiny_model), settings, report=silent, device="cpu")
    reasons = {source.path: source.reason for source in manifest.sources}
    assert reasons.pop("good.mkv") is None
    assert set(reasons) == {"short.mkv", "little.mkv", "mute.mkv", "broken.mp4"}
    assert "3 frames at the target rate; the shortest window is 5" in reasons["short.mkv"]
    assert "enlarged 2.00 times" in reasons["little.mkv"]
    assert "no caption: expected mute.json" in reasons["mute.mkv"]
    assert "cannot be decoded" in reasons["broken.mp4"]
    assert manifest.samples == {"train": 1}
    assert any("too few for a validation split" in line for line in silent.lines)


def test_equal_captions_are_encoded_once(clips, tiny_model, small, silent, tmp_path, monkeypatch):
    asked = []
    encode = LatentCodec.encode_text
    monkeypatch.setattr(
        LatentCodec, "encode_text", lambda self, prompts: asked.extend(prompts) or encode(self, prompts)
    )
    prepare(clips, tmp_path / "out", str(tiny_model), PrepareSettings(**small), report=silent, device="cpu")
    assert sorted(asked) == sorted(set(asked))
    assert len(asked) == 3


def test_frames_mode_makes_images(clip, tiny_model, small, silent, tmp_path):
    folder = tmp_path / "in"
    clip(folder / "a.mkv", range(4))
    (folder / "a.json").write_text('{"caption": "x"}')
    settings = PrepareSettings(mode="frames", **small)
    manifest = prepare(folder, tmp_path / "out", str(tiny_model), settings, report=silent, device="cpu")
    assert [(shape.latent[1], shape.samples) for shape in manifest.shapes] == [(1, 4)]
    infos = [json.loads(data) for _, member, data in members(tmp_path / "out") if member.name.endswith("json")]
    assert [(info["frame_index"], info["total_frames_in_video"]) for info in infos] == [(i, 4) for i in range(4)]


def test_folders_of_others_are_left_alone(clips, tiny_model, small, silent, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="did not write"):
        prepare(clips, tmp_path, str(tiny_model), PrepareSettings(**small), report=silent, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_dataset_is_replaced_only_when_asked(dataset, clips, clip, tiny_model, small, silent, tmp_path):
    import shutil

    out = tmp_path / "out"
    shutil.copytree(dataset, out)
    (tmp_path / "in").mkdir()
    clip(tmp_path / "in" / "a.mkv", range(9))
    (tmp_path / "in" / "a.json").write_text('{"caption": "x"}')
    settings = PrepareSettings(**small)
    with pytest.raises(ValueError, match="holds a dataset already; pass --overwrite"):
        prepare(tmp_path / "in", out, str(tiny_model), settings, report=silent, device="cpu")
    assert digests(out) == digests(dataset)
    prepare(tmp_path / "in", out, str(tiny_model), settings, report=silent, device="cpu", overwrite=True)
    assert [path.name for path in sorted(out.glob("*.tar"))] == ["shard-rank00-000000.tar"]


def test_a_failing_run_leaves_whole_shards_only_and_is_taken_up(
    clips, dataset, tiny_model, small, silent, tmp_path, monkeypatch
):
    out, encode, calls = tmp_path / "out", LatentCodec.encode_video, []

    def fail_late(self, video):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("out of memory")
        return encode(self, video)

    with monkeypatch.context() as patch:
        patch.setattr(LatentCodec, "encode_video", fail_late)
        with pytest.raises(RuntimeError, match="out of memory"):
            prepare(clips, out, str(tiny_model), PrepareSettings(**small), report=silent, device="cpu")
    assert [path.name for path in out.glob("shard*")] == ["shard-rank00-000000.tar"]
    assert sha256_of(out / "shard-rank00-000000.tar") == sha256_of(dataset / "shard-rank00-000000.tar")
    with pytest.raises(ValueError, match="incomplete"):
        read_manifest(out)
    prepare(clips, out, str(tiny_model), PrepareSettings(**small), report=silent, device="cpu")
    assert {n: d for n, d in digests(out).items() if "sqlite" not in n} == {
        n: d for n, d in digests(dataset).items() if "sqlite" not in n
    }


def test_one_writer_a_folder(clips, tiny_model, small, silent, tmp_path):
    with (
        sole_writer(tmp_path),
        pytest.raises(ValueError, match="being written by process"),
    ):
        prepare(clips, tmp_path, str(tiny_model), PrepareSettings(**small), report=silent)


def test_sample_keys_are_safe_whatever_the_name():
    from wan_data.shards import sample_key

    key = sample_key("a/__b__/clip.v1 ü.mp4", 34)
    assert key == f"{hashlib.sha256('a/__b__/clip.v1 ü.mp4'.encode()).hexdigest()[:16]}_000034"
