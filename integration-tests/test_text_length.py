"""One length of texts from ``wan-data prepare --text-length`` to the video."""

import json
from pathlib import Path

import pytest

from wan_model.testing.once import Once

LENGTH = 16


@pytest.fixture(scope="module")
def short_dataset(run, clips, tiny_model, once: Once) -> Path:
    def prepare(folder: Path) -> None:
        run(
            "wan-data", "prepare", "--video-folder", clips, "--output-folder", folder, "--model", tiny_model,
            "--windows", "first", "--frames", "9", "--area", str(32 * 32), "--validation-fraction", "0",
            "--fps", "12", "--text-length", str(LENGTH),
        )  # fmt: skip

    return once("short-texts", prepare)


def test_a_model_is_sampled_with_the_texts_that_it_was_trained_with(run, short_dataset, tiny_model, tmp_path):
    checkpoints = tmp_path / "run"
    run(
        "wan-train", "pretrain", "--recipe", "tiny", f"dataset.path={short_dataset}", f"checkpoint.save={checkpoints}",
        "train.train_iters=2", "optimizer.lr=0.01",
    )  # fmt: skip
    run("wan-train", "export", checkpoints, tmp_path / "exported")
    exported = tmp_path / "exported/transformer/config.json"
    assert json.loads(exported.read_text())["text_len"] == LENGTH

    def sample(name: str, *model: str | Path) -> bytes:
        done = run(
            "wan-infer", *model, "--prompts", "A wide pattern that moves.", "--sizes", "32*32", "--frame_nums", "5",
            "--sample_steps", "2", "--base_seed", "42", "--no-metadata", "--json", "--save_file", tmp_path / name,
        )  # fmt: skip
        report = json.loads(done.stdout)
        assert (report["text_length"], report["videos"][0]["fps"]) == (LENGTH, 12)
        return (tmp_path / name).read_bytes()

    parts = ("--vae-checkpoint-dir", tiny_model, "--t5-checkpoint-dir", tiny_model)
    of_run = sample("run.mp4", "--checkpoint_dir", checkpoints, *parts)
    assert sample("exported.mp4", "--model", tmp_path / "exported", *parts) == of_run
    # What the sampler is told matters: with texts padded to 512 the same weights give another video.
    config = json.loads(exported.read_text())
    exported.write_text(json.dumps({**config, "text_len": 512}))
    assert sample("padded.mp4", "--model", tmp_path / "exported", *parts) != of_run


def test_weights_of_another_text_length_need_a_choice(run, short_dataset, tiny_model, tmp_path):
    done = run(
        "wan-train", "pretrain", "--recipe", "tiny", "--dry-run", "--init-from", tiny_model,
        f"dataset.path={short_dataset}", fails=True,
    )  # fmt: skip
    assert f"the captions of {short_dataset} were cut to {LENGTH} tokens and the model {tiny_model} was" in done.stderr
    assert "set model.transformer.text_len to 512 or 16" in done.stderr
    assert "Traceback" not in done.stderr
