"""Videos while a run trains: files, records and curves, what fails, and that training does not notice.

That each layout samples what one process does, and one process what plain torch does, is for the tests in ../loop; that
the files are those of the sampler, for the integration tests.
"""

import json
import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import (
    BASE_OPTIONS,
    FULLY_SHARDED,
    RUN_OPTIONS,
    SHAPES,
    data_options,
    read_log,
    refused,
    run,
    same_weights,
    steps_of,
    train_on,
    trajectory,
    wan_train,
)
from warm_ranks import Call

from wan_model.codec import LatentCodec
from wan_model.codec.video_encoding import encode_mp4_beside, to_frames
from wan_model.pack import PackLayout, latent_grid, pad_text, patchify, unpatchify
from wan_model.sampling.denoising import draw_noise
from wan_model.sampling.solvers import Solver
from wan_model.tiny import TINY_CONFIG
from wan_model.weights.training_checkpoint import find_checkpoint, read_training_checkpoint
from wan_train.config.samples import SamplesConfig
from wan_train.report.videos import RunVideos

CHOSEN = ("samples.steps=3", "samples.guidance=3", "samples.seed=7")


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [entry for entry in read_log(folder) if entry.get("event") == "samples"]


def sampled_from(checkpoint: Path, ema: bool, text: torch.Tensor, negative: torch.Tensor, shape: Any, seed: int) -> Any:
    """What three steps with guidance 3 make of a checkpoint, read without Megatron."""
    from wan_model import WanDiT

    model = WanDiT(TINY_CONFIG)
    read_training_checkpoint(checkpoint, into=dict(model.named_parameters()), ema=ema)
    noise = draw_noise((TINY_CONFIG.in_channels, *shape), seed)
    layout, tokens = PackLayout((latent_grid(noise, TINY_CONFIG.patch_size),)), patchify(noise)
    solver = Solver("unipc", 3, 5.0)
    with torch.no_grad():
        for index, timestep in enumerate(solver.timesteps):
            own, other = (
                model(tokens, torch.tensor([timestep]), pad_text([one], 512), layout) for one in (text, negative)
            )
            tokens = solver.step(index, other + 3 * (own - other), tokens)
    return unpatchify(tokens, layout.grids[0])


def read_frames(path: Path) -> np.ndarray:
    if path.suffix == ".png":
        with Image.open(path) as picture:
            return np.asarray(picture)[None]
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_captions_of_the_validation_split_become_files_records_and_curves(dataset: Path, tmp_path: Path) -> None:
    folder, latents, board, bias = (tmp_path / name for name in ("run", "latents", "board", "bias"))
    options = (
        *BASE_OPTIONS, *data_options(dataset), *CHOSEN, "samples.interval=2", "samples.count=3", "train.train_iters=3",
        "ema.decay=0.5", "samples.ema=true", f"logger.tensorboard_dir={board}", "logger.wandb_project=wan",
        "logger.wandb_exp_name=trial", f"logger.wandb_save_dir={tmp_path}", "checkpoint.save_interval=1",
    )  # fmt: skip
    calls = [Call("rank_calls:note_wandb", [str(bias)]), Call("rank_calls:keep_latents", [str(latents)])]
    ended = run(options, folder, calls=calls)
    assert ended.codes == [0], ended.errors
    records = [json.loads(line) for line in (folder / "samples" / "samples.jsonl").read_text().splitlines()]
    # The validation samples of ``write_dataset``, whose number 41 is a single frame.
    assert [[one[name] for name in ("step", "name", "caption", "seed", "weights", "file")] for one in records] == [
        [step, f"{n:02d}", f"sample {40 + n}", 7 + n, "ema", f"samples/step-{step:07d}/{n:02d}.{kind}"]
        for step in (2, 3)
        for n, kind in enumerate(("mp4", "png", "mp4"))
    ]
    shown, left_out = RunVideos(folder).find(0)  # by the page of the run
    assert [video.path for video in shown] == [folder / one["file"] for one in records]
    assert left_out == []
    events = events_of(folder)
    assert [(entry["step"], entry["videos"], entry["weights"]) for entry in events] == [(2, 3, "ema"), (3, 3, "ema")]
    assert all(entry["seconds"] > 0 for entry in events)
    assert "step 2  3 videos of the ema in " in ended.output[0]

    from wan_data.shards.reader import samples_of

    codec = LatentCodec.from_pretrained(dataset / "model", load_vae=False, load_decoder=True)
    (negative,) = codec.encode_text([""])  # this dataset has no embedding of it
    (shard,) = [path for path in sorted((dataset / "data").glob("*.tar")) if next(samples_of(path)).key == "000040"]
    stored = list(samples_of(shard))[:3]
    for record, sample in zip(records, [*stored, *stored], strict=True):
        latent = torch.load(latents / f"{record['step']}-{record['name']}.pt", weights_only=True)
        checkpoint, shape = find_checkpoint(folder, record["step"]), sample.latent.shape[1:]
        wanted = sampled_from(checkpoint, True, sample.text, negative, shape, record["seed"])
        torch.testing.assert_close(latent, wanted, rtol=1e-4, atol=1e-4)
        decoded = to_frames(codec.decode_video(latent[None])[0])
        if record["file"].endswith(".mp4"):  # what is lost in encoding is not of interest here
            with (tmp_path / "same.mp4").open("wb") as file:
                encode_mp4_beside(file, [decoded], 16)
            decoded = read_frames(tmp_path / "same.mp4")
        assert abs(read_frames(folder / record["file"]).astype(int) - decoded).mean() < 0.01

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drawn = EventAccumulator(str(board))
    drawn.Reload()
    assert [event.step for event in drawn.Images("samples/00")] == [2, 3]
    curves = [json.loads(line) for line in bias.read_text().splitlines()]
    assert [entry["step"] for entry in curves if entry.get("curves") == ["samples/01"]] == [2, 3]


def test_prompts_of_a_file_are_embedded_by_the_model_of_the_data(dataset: Path, tmp_path: Path) -> None:
    folder, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("A rabbit wakes in a meadow.\n\n兔子\n", encoding="utf-8")
    options = (
        *BASE_OPTIONS, *data_options(dataset), *CHOSEN, "samples.interval=1", f"samples.prompts={prompts}",
        "samples.width=48", "samples.frames=5", "train.train_iters=1",
    )  # fmt: skip
    train_on(options, folder)
    records = [json.loads(line) for line in (folder / "samples" / "samples.jsonl").read_text().splitlines()]
    assert [(one["caption"], one["seed"]) for one in records] == [("A rabbit wakes in a meadow.", 7), ("兔子", 8)]
    codec = LatentCodec.from_pretrained(dataset / "model", load_vae=False)
    texts = codec.encode_text(["A rabbit wakes in a meadow.", "兔子", ""])
    rows = SHAPES[40 % len(SHAPES)][1]  # the height is that of the first validation sample
    for number, text in enumerate(texts[:2]):
        found = torch.load(folder / "latents" / f"1-{number:02d}.pt", weights_only=True)
        wanted = sampled_from(find_checkpoint(folder, 1), False, text, texts[2], (2, rows, 6), 7 + number)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ema", [False, True])
def test_training_is_the_same_to_the_bit(
    ema: bool, dataset: Path, one_process_run: Path, run_on_data: Any, tmp_path: Path
) -> None:
    folder, states = tmp_path / "run", tmp_path / "states"
    if ema:
        other, last = run_on_data(0), max(step for step in trajectory(run_on_data(0)))
        options = (
            *BASE_OPTIONS, *data_options(dataset), "ema.decay=0.9", "samples.ema=true", f"train.train_iters={last}",
        )  # fmt: skip
    else:
        other, last = one_process_run, max(trajectory(one_process_run))
        options = (*RUN_OPTIONS, f"dataset.encoded_by={dataset / 'model'}")
    options = (*options, "checkpoint.save_interval=2", "samples.interval=3", "samples.count=2", *CHOSEN)
    ended = run(options, folder, calls=[Call("rank_calls:compare_states", [str(states)])])
    assert ended.codes == [0], ended.errors
    assert [entry["step"] for entry in events_of(folder)] == [*range(3, last, 3), last]
    assert not [entry for entry in events_of(folder) if "failure" in entry]
    assert trajectory(folder) == trajectory(other)
    assert same_weights(folder, other, last)
    found = [json.loads(line) for line in states.read_text().splitlines()]
    assert found
    assert all(value for entry in found for value in entry.values()), found


def test_seconds_of_sampling_are_in_no_step_of_any_rank(dataset: Path, tmp_path: Path) -> None:
    """With one video for two ranks that share the weights, of which one decodes."""
    options = (
        *RUN_OPTIONS, f"dataset.encoded_by={dataset / 'model'}", "train.train_iters=2", "samples.interval=1",
        "samples.steps=1", "samples.count=1", "--nproc-per-node", "2", FULLY_SHARDED,
    )  # fmt: skip
    ended = run(options, tmp_path, calls=[Call("rank_calls:slow_decoder", [15.0])])
    assert ended.codes == [0, 0], ended.errors
    assert [entry["videos"] for entry in events_of(tmp_path)] == [1, 1]
    assert all(entry["seconds"] > 15 for entry in events_of(tmp_path))
    assert all(entry["seconds"] < 15 for entry in steps_of(read_log(tmp_path)))


def test_a_failure_is_said_once_and_training_goes_on(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "samples").write_text("a file where the folder should be")
    two = ("--nproc-per-node", "2", "model.pipeline_model_parallel_size=2")
    options = (*RUN_OPTIONS, *two, f"dataset.encoded_by={dataset / 'model'}", "samples.interval=2", "samples.count=1")
    ended = run((*options, "samples.steps=1", "train.train_iters=4"), tmp_path)
    assert ended.codes == [0, 0], ended.errors
    assert [(entry["step"], entry["videos"]) for entry in events_of(tmp_path)] == [(2, 0), (4, 0)]
    assert all("samples" in entry["failure"] for entry in events_of(tmp_path))
    assert "".join(ended.output).count("no videos") == 1
    assert "training goes on" in "".join(ended.output)
    assert [entry["step"] for entry in steps_of(read_log(tmp_path))] == [1, 2, 3, 4]


def test_a_prompt_that_is_too_long_is_cut_and_named(dataset: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A rabbit.\n" + "A meadow, and " * 30 + "a rabbit.\n")
    sampled = ("samples.interval=1", f"samples.prompts={prompts}", "samples.negative_prompt=" + "nothing " * 20)
    texts = ("model.transformer.text_len=16", "dataset.mock_settings.context_length=16")
    options = (*RUN_OPTIONS, *sampled, *texts, f"dataset.encoded_by={dataset / 'model'}", "samples.steps=1")
    ended = run((*options, "train.train_iters=1"), tmp_path / "run")
    assert ended.codes == [0], ended.errors
    log = read_log(tmp_path / "run")
    said = [entry["reason"] for entry in log if entry.get("event") == "prompt_cut"]
    assert [sentence.partition(" has ")[0] for sentence in said] == [
        f"the negative prompt {'nothing ' * 7 + 'noth...'!r}",
        f"the prompt {'A meadow, and ' * 4 + 'A me...'!r}",
    ]
    assert all(sentence.endswith("tokens; the model takes 16, the rest is cut") for sentence in said)
    assert [line for line in ended.output[0].splitlines() if "is cut" in line] == [f"samples: {one}" for one in said]
    assert [entry["videos"] for entry in events_of(tmp_path / "run")] == [2]


def test_a_partly_failed_sampling_says_how_many_videos_stand(dataset: Path, tmp_path: Path) -> None:
    """And a log and records that a killed process has left torn lose nothing of what follows."""
    for name in ("01.mp4", "01.png"):
        (tmp_path / "samples/step-0000001" / name).mkdir(parents=True)  # where the second file should be
    torn = '{"step": 1, "lo'
    (tmp_path / "log.jsonl").write_text(torn)
    (tmp_path / "samples/samples.jsonl").write_text(torn)
    options = (*RUN_OPTIONS, f"dataset.encoded_by={dataset / 'model'}", "samples.interval=1", "samples.count=3")
    ended = run((*options, "samples.steps=1", "train.train_iters=1"), tmp_path)
    assert ended.codes == [0], ended.errors
    left, *lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert left == torn
    step, sampled = map(json.loads, lines)
    assert (step["step"], sampled["event"], sampled["videos"]) == (1, "samples", 1)
    assert "step-0000001/01." in sampled["failure"]
    assert "step 1  1 of 3 videos: IsADirectoryError: " in ended.output[0]
    left, *records = (tmp_path / "samples/samples.jsonl").read_text().splitlines()
    assert (left, [json.loads(record)["name"] for record in records]) == (torn, ["00"])
    assert [path.stem for path in (tmp_path / "samples/step-0000001").iterdir() if path.is_file()] == ["00"]


def test_a_failure_that_the_terminal_cannot_show_ends_no_run(tmp_path: Path) -> None:
    done = wan_train(
        *RUN_OPTIONS, "samples.interval=1", f"samples.prompts={tmp_path}/é.txt", "train.train_iters=2",
        f"checkpoint.save={tmp_path}", environment={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"the prompts file {tmp_path}/\\xe9.txt cannot be read" in done.stdout
    assert len(steps_of(read_log(tmp_path))) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([], "there is no model to decode with; set dataset.encoded_by"),
        (["dataset.encoded_by=/absent"], "no model at /absent"),
        (["samples.prompts=/absent.txt"], "the prompts file /absent.txt cannot be read"),
    ],
)
def test_what_cannot_be_sampled_is_said_at_the_start(changes: list[str], said: str, tmp_path: Path) -> None:
    ended = run((*RUN_OPTIONS, *changes, "samples.interval=1", "train.train_iters=2"), tmp_path)
    assert ended.codes == [0], ended.errors
    (entry,) = events_of(tmp_path)
    assert entry["step"] == 0
    assert said in entry["failure"]
    assert ended.output[0].count("no videos will be sampled") == 1
    assert len(steps_of(read_log(tmp_path))) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"interval": -1}, "samples.interval is -1"),
        ({"count": 0}, "samples.count is 0"),
        ({"fps": 0}, "samples.fps is 0"),
        ({"frames": 4}, "samples.frames is 4; the autoencoder takes 4n+1 frames: the nearest are 1 and 5"),
        ({"frames": 0}, "samples.frames is 0; the autoencoder takes 4n+1 frames: the nearest is 1"),
        ({"width": 40}, "samples.width is 40 pixels; it must be a multiple of 16: the nearest are 32 and 48"),
        ({"height": 8}, "samples.height is 8 pixels; it must be a multiple of 16: the nearest is 16"),
        ({"seed": -1}, "samples.seed is -1; expected a number from 0 to 2^62 - 1"),
        ({"seed": 2**62}, "expected a number from 0 to 2^62 - 1"),
        ({"guidance": 0.5}, "samples: the guidance scale is 0.5"),
        ({"steps": 0}, "samples: 0 sampling steps"),
        ({"interval": 1, "ema": True}, "samples.ema is true and ema.decay is 0"),
        ({"interval": 1, "saved": False}, "checkpoint.save is not set"),
    ],
)
def test_invalid_settings_are_refused_by_name(change: dict[str, Any], said: str) -> None:
    saved = change.pop("saved", True)
    with pytest.raises(ValueError, match=re.escape(said)):
        SamplesConfig(**change).check(ema_decay=0.0, saved=saved)


def test_the_section_is_checked_before_a_run(tmp_path: Path) -> None:
    assert "samples.count is 0" in refused(tmp_path, "samples.count=0")
    assert "unknown configuration key samples.intervall" in refused(tmp_path, "samples.intervall=2")
