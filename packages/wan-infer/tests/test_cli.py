import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from infer_command import QUICK, refused, run
from PIL import Image
from safetensors.torch import save_file

from wan_infer.cli import main
from wan_infer.output.video_file import read_video
from wan_model.sampling.settings import NEGATIVE_PROMPT
from wan_model.testing.lora_files import tiny_lora

HOSTILE = ["../../evil\n; rm -rf /", "/etc/passwd", "$(touch marker)", "兔子 \U0001f430"]


def test_help_imports_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "wan_infer", "--help"], capture_output=True, text=True, check=True
    )
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not imported & {"torch", "numpy", "av", "PIL", "diffusers", "transformers"}
    for spelling in ("--checkpoint-dir", "--checkpoint_dir", "--sample_guide_scale", "--frame_nums"):
        assert spelling in done.stdout


def test_an_interruption_is_a_sentence(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wan_infer.cli._run", interrupted)
    result = run("--model", model_folder, "--prompts", "a", "--save_file", tmp_path / "a.mp4", *QUICK)
    assert (result.exit_code, result.stderr, result.stdout) == (130, "Ended by SIGINT.\n", "")


def test_one_video_with_all_that_made_it(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    arguments = ("--model", model_folder, "--prompts", "a rabbit", "--base_seed", 42, "--fps", 8, "--save_file", path)
    result = run(*arguments, *QUICK)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0] == str(path)
    assert re.match(r"1 video in \d+\.\d s \(load", result.stdout.splitlines()[-1])
    assert "video 1/1  step 2/2" in result.stderr
    frames, fps, metadata = read_video(path)
    assert (frames.shape, fps) == ((5, 48, 32, 3), 8)
    expected = {"prompt": "a rabbit", "seed": 42, "width": 32, "height": 48, "frames": 5, "steps": 2, "solver": "unipc"}
    assert metadata.items() >= expected.items()
    assert metadata["negative_prompt"] == NEGATIVE_PROMPT
    assert set(metadata["versions"]) == {"wan-infer", "wan-model", "torch", "tokenizers", "python"}
    assert str(tmp_path) not in json.dumps(metadata)

    # By a process of its own, whose sets and dictionaries have another order.
    path.rename(first := tmp_path / "first.mp4")
    command = [sys.executable, "-P", "-m", "wan_infer", *map(str, arguments), *QUICK]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=True)
    assert path.read_bytes() == first.read_bytes()

    again = run(*arguments, *QUICK, "--no-metadata")
    assert again.exit_code == 0
    bare = read_video(path)
    assert np.array_equal(bare[0], frames), "the same seed gave another video"
    assert bare[2] == {}
    assert b"a rabbit" not in path.read_bytes()


def test_the_command_of_the_readme_for_the_tiny_model(model_folder: Path, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^\$ wan-infer (--model tiny-wan .*)$", readme, re.M)
    assert "$ python -m wan_model.tiny tiny-wan\n" in readme
    paths = {"tiny-wan": str(model_folder), "noise.mp4": str(tmp_path / "noise.mp4")}
    arguments = [paths.get(word, word) for word in shlex.split(line)]
    result = run(*arguments, "--sample_steps", "2", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert read_video(tmp_path / "noise.mp4")[0].shape == (17, 80, 128, 3)


@pytest.mark.parametrize("full", [True, False], ids=["full disk", "nobody reads"])
def test_a_video_is_whole_although_nothing_can_be_printed(
    full: bool, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ["--model", str(model_folder), "--prompts", "a", *QUICK, "--save-file", str(tmp_path / "a.mp4")]
    with os.fdopen(writer, "w") as pipe, open("/dev/full", "w") as device, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", device if full else pipe)
        if not full:
            patch.setattr("sys.stderr", pipe)
        with pytest.raises(SystemExit) as ended:
            main(arguments)
    assert ended.value.code == 1
    said = ["Error: cannot read or write standard output: No space left on device"]
    assert capfd.readouterr().err.splitlines()[-1:] == (said if full else [])
    assert read_video(tmp_path / "a.mp4")[0].shape == (5, 48, 32, 3)


def test_training_checkpoint_in_both_spellings(
    model_folder: Path, write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "run", 10, seed=1)
    (write_checkpoint(tmp_path / "run", 20, seed=2) / "run_config.yaml").unlink()
    shared = ("--model", model_folder, "--prompts", "a", "--json", *QUICK)
    snake = run("--checkpoint_dir", tmp_path / "run", "--save_file", tmp_path / "a.mp4", *shared)
    kebab = run(
        *("--checkpoint-dir", tmp_path / "run", "--checkpoint-step", 10, "--save-file", tmp_path / "b.mp4"),
        *("--vae_checkpoint_dir", model_folder, "--t5-checkpoint-dir", model_folder, *shared[2:]),
    )
    reports = [json.loads(result.stdout) for result in (snake, kebab)]
    # The newest one is partial, so that of step 10 is taken.
    assert [report["videos"][0]["checkpoint_step"] for report in reports] == [10, 10]
    assert [report["videos"][0]["transformer"] for report in reports] == ["run", "run"]
    assert np.array_equal(read_video(tmp_path / "a.mp4")[0], read_video(tmp_path / "b.mp4")[0])
    assert "run_config.yaml is missing" in refused(
        *("--checkpoint_dir", tmp_path / "run", "--checkpoint_step", 20, "--save_file", tmp_path / "c.mp4", *shared)
    )
    assert not (tmp_path / "c.mp4").exists()


def test_several_videos_and_a_contact_sheet(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary_that_nobody_may_see")
    folder, sheet = tmp_path / "videos", tmp_path / "sheet.png"
    result = run(
        *("--model", model_folder, "--prompts", *HOSTILE, "--sizes", "32*48", "32*48", "64*32", "32*32"),
        *("--frame_nums", 5, 1, 5, 5, "--base_seed", 3, "--sample_steps", 1, "--sample_guide_scale", 1),
        *("--output_folder", folder, "--contact_sheet", sheet, "--json", "--device", "cpu"),
    )
    assert result.exit_code == 0, result.stderr
    videos = json.loads(result.stdout)["videos"]
    assert [video["prompt"] for video in videos] == HOSTILE
    names = sorted(file.name for file in folder.iterdir())
    assert names == [Path(video["file"]).name for video in videos]
    assert all(re.fullmatch(rf"{i:04d}-[0-9a-f]{{12}}\.(mp4|png)", name) for i, name in enumerate(names))
    assert [name[-3:] for name in names] == ["mp4", "png", "mp4", "mp4"]
    assert read_video(folder / names[2])[0].shape == (5, 32, 64, 3)
    assert read_video(folder / names[0])[2]["prompt"] == HOSTILE[0]
    with Image.open(sheet) as picture:
        assert picture.size[0] == 4 + 4 * (64 + 4)
    assert f"contact sheet: {sheet}" in result.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"videos", "sheet.png"}
    assert "hf_canary" not in result.stdout + result.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_canary" in path.read_bytes()]


def test_a_file_of_prompts_with_settings_of_their_own(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "seed": 5}\n{"prompt": "b", "size": "32*32", "frames": 1, "steps": 1}\n')
    result = run("--model", model_folder, "--prompts-file", file, *QUICK, "--json", "--output-folder", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    first, second = json.loads(result.stdout)["videos"]
    assert (first["prompt"], first["seed"], first["steps"], first["height"]) == ("a", 5, 2, 48)
    assert (second["prompt"], second["seed"], second["steps"], second["height"]) == ("b", 0, 1, 32)
    assert (Path(first["file"]).suffix, Path(second["file"]).suffix) == (".mp4", ".png")
    alone = run(
        *("--model", model_folder, "--prompts", "a", "--base_seed", 5, *QUICK, "--save_file", tmp_path / "a.mp4"),
        *("--vae-tiles", 2),
    )
    assert alone.exit_code == 0, alone.stderr
    assert np.array_equal(read_video(first["file"])[0], read_video(tmp_path / "a.mp4")[0])
    assert "not both" in refused("--model", model_folder, "--prompts", "a", "--prompts-file", file)
    assert "no prompt is given; give --prompts" in refused("--model", model_folder)
    assert "give one size, frame count and seed" in refused(
        "--model", model_folder, "--prompts-file", file, "--base_seed", 1, 2
    )


def test_texts_that_are_cut_are_named_once(model_folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer" / "tokenizer.json"))
    tokenizer.no_truncation()
    long, negative = "a rabbit and a butterfly in a meadow " * 60, "grey, " * 300
    counts = {text: len(tokenizer.encode(text.strip()).ids) for text in (long, negative, "short")}
    assert min(counts[long], counts[negative]) > 512
    result = run(
        *("--model", model_folder, "--prompts", long, "short", long, "--negative-prompt", negative, "--device", "cpu"),
        *("--sizes", "32*32", "--frame_nums", 1, "--sample_steps", 1, "--output-folder", tmp_path / "out", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if "tokens" in line] == [
        f"Warning: the prompt of videos 1, 3 has {counts[long]} tokens; the model takes 512, the rest is cut",
        f"Warning: the negative prompt of videos 1, 2, 3 has {counts[negative]} tokens; the model takes 512, "
        "the rest is cut",
    ]
    report = json.loads(result.stdout)
    assert report["text_length"] == 512
    assert [video["prompt_tokens"] for video in report["videos"]] == [counts[long], counts["short"], counts[long]]
    assert [video["negative_prompt_tokens"] for video in report["videos"]] == [counts[negative]] * 3


def test_an_average_of_weights_is_sampled_on_request(
    model_folder: Path, write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "run", 10, seed=1, average=2)
    write_checkpoint(tmp_path / "other", 10, seed=2)
    shared = ("--model", model_folder, "--prompts", "a", "--json", *QUICK)
    videos = []
    for name, given in (("run", ["--ema"]), ("run", []), ("other", [])):
        path = tmp_path / f"{len(videos)}.mp4"
        result = run("--checkpoint_dir", tmp_path / name, *given, "--save_file", path, *shared)
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["videos"][0]["ema"] == bool(given)
        videos.append(read_video(path)[0])
    assert np.array_equal(videos[0], videos[2])
    assert not np.array_equal(videos[0], videos[1])
    assert "holds no EMA of the weights" in refused("--checkpoint_dir", tmp_path / "other", "--ema", *shared)
    assert "--ema needs --checkpoint-dir" in refused("--ema", *shared)


def test_several_loras_in_one_call(model_folder: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in ("style", "motion")]
    for seed, file in enumerate(files):
        save_file(tiny_lora(seed=seed), file)
    shared = ("--model", model_folder, "--prompts", "a", "--json", *QUICK)

    def sampled(*arguments: object) -> tuple[np.ndarray, str]:
        done = run(*shared, "--output-folder", tmp_path / "videos", *arguments)
        assert done.exit_code == 0, done.stderr
        (video,) = json.loads(done.stdout)["videos"]
        assert f"loaded tiny with {video['lora']} on cpu" in done.stderr
        return read_video(video["file"])[0], video["lora"]

    together, record = sampled("--lora", *files, "--lora-scale", 0.1, -0.05)
    assert record == "style.safetensors x 0.1, motion.safetensors x -0.05"
    one_by_one = sampled("--lora", files[0], "--lora_scale", 0.1, "--lora", files[1], "--lora_scale", -0.05)
    assert np.array_equal(one_by_one[0], together)
    first = sampled("--lora", files[0], "--lora-scale", 0.1)
    assert first[1] == "style.safetensors x 0.1"
    assert not np.array_equal(first[0], together)
    assert sampled("--lora", *files, "--lora-scale", 0)[1] == "style.safetensors x 0, motion.safetensors x 0"
    assert sampled("--lora", *files)[1] == "style.safetensors x 1, motion.safetensors x 1"


def test_a_video_does_not_depend_on_its_place_in_the_call(model_folder: Path, tmp_path: Path) -> None:
    common = ("--model", model_folder, *QUICK, "--json", "--output-folder")
    both = json.loads(run(*common, tmp_path / "both", "--prompts", "a", "b").stdout)
    alone = json.loads(run(*common, tmp_path / "alone", "--prompts", "b").stdout)
    files = [report["videos"][-1]["file"] for report in (both, alone)]
    assert np.array_equal(read_video(files[0])[0], read_video(files[1])[0])
    assert [Path(file).name[:4] for file in files] == ["0001", "0000"]
    assert Path(files[0]).name[4:] == Path(files[1]).name[4:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frame_nums", "8"], r"the number of frames is 8; .* 4n\+1 frames: the nearest are 5 and 9"),
        (["--sizes", "30*48"], r"the nearest is 32\*48"),
        (["--sizes", "big"], r"expected width\*height"),
        (["--task", "t2v-1.3B", "--sizes", "1280*720"], r"not one of t2v-1.3B's: 480\*832, 832\*480, 416\*240"),
        (["--task", "t2v-1.3B", "--sizes", "832*480"], r"tiny is not t2v-1.3B: num_heads 4 where t2v-1.3B has 12"),
        (["--checkpoint_step", "3"], r"needs --checkpoint-dir"),
        (["--checkpoint_dir", "{tmp}/none"], r"no checkpoint folder at .*none"),
        (["--model", "{tmp}/none"], r"no model at .*none"),
        (["--model", "{tmp}"], r"has no transformer folder"),
        (["--save_file", "{tmp}/out.avi"], r"the name must end in \.mp4"),
        (["--frame_nums", "1"], r"the name must end in \.png"),
        (["--save_file", "{tmp}/file/out.mp4"], r"file is not a folder"),
        (["--contact-sheet", "{tmp}/sheet.jpg"], r"must end in \.png"),
        (["--prompts", "a", "b"], r"--save-file takes one video and 2 were asked for"),
        (["--device", "cuda:77"], r"the device cuda:77 was asked for"),
        (["--sample_steps", "0"], r"0 sampling steps"),
        (["--cfg-parallel"], r"divides the processes into two halves and there are 1; start an even number"),
        (["--cfg-parallel", "--nproc-per-node", "2", "--sample_guide_scale", "1"], r"so there is no second branch"),
        (["--shard-weights"], r"--shard-weights needs several processes and there is one; add --nproc-per-node N"),
        (["--lora", "{tmp}/none"], r"no LoRA at .*none"),
        (["--lora", "{tmp}/none", "--lora-scale", "nan"], r"the scale of the LoRA .*none is nan"),
        (["--lora", "a", "b", "--lora-scale", "1", "2", "3"], r"got 2 --lora and 3 --lora-scale; give one scale"),
        (["--lora-scale", "0.5"], r"--lora-scale needs --lora, which it scales"),
        (
            ["--save_file", "s3://bucket/out.mp4"],
            r"--save-file is s3://bucket/out.mp4, and only datasets may lie in an",
        ),
        (["--contact-sheet", "gs://bucket/a.png"], r"--contact-sheet is gs://bucket/a.png, and only datasets"),
        (["--output-folder", "msc://bucket/a"], r"--output-folder is msc://bucket/a, and only datasets"),
        (["--prompts-file", "s3://bucket/a.txt"], r"--prompts-file is s3://bucket/a.txt, and only datasets"),
        (["--lora", "s3://bucket/a.safetensors"], r"--lora is s3://bucket/a.safetensors, and only datasets"),
        (["--checkpoint-dir", "s3://bucket/a"], r"--checkpoint-dir is s3://bucket/a, and only datasets"),
        (["--model", "s3://bucket/a"], r"the model is s3://bucket/a, and only datasets"),
        (["--vae-tiles", "97"], r"cannot be cut into 1\*97 tiles"),
    ],
)
def test_invalid_arguments_are_one_sentence(
    model_folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("")
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    base = ["--model", str(model_folder), "--prompts", "a", "--save_file", str(tmp_path / "out.mp4"), *QUICK]
    # A flag that is given replaces the base's; prompts would add up.
    for flag in (word for word in given if word.startswith("--") and word in base):
        index = base.index(flag)
        del base[index : index + 2]
    assert re.search(message, refused(*base, *given))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_foreign_latent_space_is_named(
    model_folder: Path, write_checkpoint: Callable[..., Path], sampler: object, tmp_path: Path
) -> None:
    spec = {**sampler.spec.to_dict(), "model_id": "vae-other"}  # type: ignore[attr-defined]
    write_checkpoint(tmp_path / "run", 10, spec=spec)
    said = refused(
        *("--model", model_folder, "--checkpoint_dir", tmp_path / "run", "--prompts", "a", *QUICK),
        *("--output_folder", tmp_path / "videos"),
    )
    assert "are of different latent spaces: model_id (vae-other against" in said
    assert not (tmp_path / "videos").exists()


def test_a_checkpoint_alone_is_not_enough(write_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", 10)
    assert "holds the transformer only: give --model" in refused("--checkpoint_dir", tmp_path / "run", "--prompts", "a")
    assert "there is no transformer to sample" in refused("--prompts", "a")


def test_an_exported_transformer_is_completed_by_two_flags(model_folder: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    shutil.copytree(model_folder / "transformer", exported / "transformer")
    base = ("--model", exported, "--prompts", "a", "--save_file", tmp_path / "out.mp4", *QUICK)
    vae, text = ("--vae-checkpoint-dir", model_folder), ("--t5-checkpoint-dir", model_folder)
    advice = "take it from another model with"
    assert f"{exported} has no vae folder; {advice} --vae-checkpoint-dir and --t5-checkpoint-dir" in refused(*base)
    assert f"{exported} has no text_encoder folder; {advice} --t5-checkpoint-dir" in refused(*base, *vae)
    assert f"{exported} has no vae folder; {advice} --vae-checkpoint-dir" in refused(*base, *text)
    # The model that a flag names is itself the wrong one.
    assert f"{exported} has no vae folder; expected a model" in refused(*base, *text, "--vae-checkpoint-dir", exported)
    assert run(*base, *vae, *text).exit_code == 0
