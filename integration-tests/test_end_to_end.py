"""Clips -> shards -> training, stopped and resumed -> a video."""

import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from common.training_log import read_log


def _samples(dataset: Path) -> dict[str, dict[str, Any]]:
    """Every sample's latent and side-information, by key."""
    samples: dict[str, dict[str, Any]] = {}
    for shard in sorted(dataset.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, part = member.name.partition(".")
                content = archive.extractfile(member).read()  # type: ignore[union-attr]
                sample = samples.setdefault(key, {})
                if part == "pth":
                    sample["latent"] = torch.load(io.BytesIO(content), weights_only=True)
                elif part == "json":
                    sample["json"] = json.loads(content)
    return samples


def test_captions_are_dropped_in_training(train, dataset, whole_run, tmp_path):
    train(dataset, tmp_path, "model.flow.caption_dropout=1.0", "train.exit_interval=3")
    dropped, kept = read_log(tmp_path), read_log(whole_run)
    # The head begins at zero: the first answer does not depend on the text, later ones do.
    assert dropped[0]["loss"] == kept[0]["loss"]
    assert dropped[2]["loss"] != kept[2]["loss"]
    assert math.isclose(dropped[2]["loss"], kept[2]["loss"], rel_tol=0.5)


def test_every_window_of_every_clip_becomes_a_sample(dataset):
    samples = _samples(dataset)
    # 36, 27 and 18 frames in windows of 9, at 64 x 64 pixels' area: latents of 3 frames.
    assert len(samples) == 4 + 3 + 2
    shapes = {tuple(sample["latent"].shape[-3:]) for sample in samples.values()}
    assert len(shapes) == 3
    assert {shape[0] for shape in shapes} == {3}
    assert all(torch.isfinite(sample["latent"]).all() for sample in samples.values())


def test_captions_of_both_kinds_reach_the_shards(dataset):
    text = json.dumps([sample["json"] for sample in _samples(dataset).values()])
    for name in ("wide", "tall", "square"):
        assert f"A {name} pattern that moves." in text


def test_a_resumed_run_equals_one_without_a_stop(stopped_run, whole_run):
    stopped, whole = read_log(stopped_run), read_log(whole_run)
    assert [entry["step"] for entry in stopped if entry.get("event") == "resumed"] == [3]
    assert not [entry for entry in whole if "event" in entry]

    def facts(log: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        names = ("step", "samples", "tokens", "loss", "grad_norm", "learning_rate")
        return [tuple(entry[name] for name in names) for entry in log if "loss" in entry]

    assert [fact[0] for fact in facts(whole)] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(value) for fact in facts(whole) for value in fact)
    assert facts(stopped) == facts(whole)


def test_packs_hold_samples_of_several_shapes(whole_run):
    samples = [entry["samples"] for entry in read_log(whole_run)]
    assert max(samples) > 1


@pytest.fixture(scope="module")
def videos(run, stopped_run, tiny_model, once):
    """A video from each saved step, with one seed."""

    def sample(folder: Path) -> None:
        for step in (3, 6):
            run(
                "wan-infer", "--checkpoint_dir", stopped_run, "--checkpoint_step", str(step), "--model", tiny_model,
                "--prompts", "A wide pattern that moves.", "--sizes", "96*64", "--frame_nums", "9",
                "--sample_steps", "4", "--base_seed", "42", "--negative_prompt", "",
                "--save_file", folder / f"{step}.mp4",
            )  # fmt: skip

    folder = once("videos", sample)
    return {step: _decode(folder / f"{step}.mp4") for step in (3, 6)}


def _decode(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames)


def test_training_samples_what_the_sampler_makes_of_its_checkpoint(videos, stopped_run):
    """In the mean to a fifth of a level of 255; a pixel that is rounded otherwise changes how its block is encoded."""
    records = [
        json.loads(line)
        for line in (stopped_run / "samples" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [(record["step"], record["file"], record["seed"], record["weights"]) for record in records] == [
        (step, f"samples/step-{step:07d}/00.mp4", 42, "weights") for step in (3, 6)
    ]
    for record in records:
        sampled, made = _decode(stopped_run / record["file"]).float(), videos[record["step"]].float()
        assert (sampled - made).abs().mean() < 0.2
        assert record["caption"] == "A wide pattern that moves."


def test_a_checkpoint_becomes_a_video(videos):
    for video in videos.values():
        assert video.shape == (9, 64, 96, 3)
        assert video.float().std() > 1


def test_training_changes_the_video(videos):
    difference = (videos[3].float() - videos[6].float()).abs().mean()
    assert difference > 2
