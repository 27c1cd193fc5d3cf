"""Models by hub id, with the hub's own client and a cache as it leaves one; nothing is fetched."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from infer_command import refused, run

from wan_infer.output.video_file import read_video
from wan_model.testing.processes import PATIENCE
from wan_model.tiny import write_tiny_wan

TOKEN = "hf_canary_that_nobody_may_see"


def cached(cache: Path, name: str, revisions: dict[str, Path]) -> None:
    """What downloads of a model's revisions leave."""
    model = cache / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    for number, (revision, folder) in enumerate(revisions.items()):
        commit = f"{number:040x}"
        (model / "refs" / revision).write_text(commit)
        shutil.copytree(folder, model / "snapshots" / commit)


@pytest.fixture(scope="module")
def cache(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    other = write_tiny_wan(folder / "other", seed=5)
    cached(folder / "cache", "Wan-AI/tiny", {"main": model_folder, "v2": other})
    return folder / "cache"


@pytest.fixture
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment variables of ``variables`` make of the client when it is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def variables(cache: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_TOKEN": TOKEN}


def arguments_of(file: Path, *arguments: str) -> list[str]:
    settings = ("--sizes", "32*48", "--frame_nums", "1", "--sample_steps", "2", "--device", "cpu")
    return [*arguments, "--prompts", "a", "--save_file", str(file), *settings]


@pytest.mark.usefixtures("offline")
def test_a_hub_id_is_a_model_and_a_revision_another(cache: Path, model_folder: Path, tmp_path: Path) -> None:
    pictures = {}
    for name, arguments in {
        "folder": ("--model", str(model_folder)),
        "main": ("--model", "Wan-AI/tiny"),
        "v2": ("--model", "Wan-AI/tiny", "--revision", "v2"),
    }.items():
        done = run(*arguments_of(tmp_path / f"{name}.png", *arguments))
        assert done.exit_code == 0, done.stderr
        assert TOKEN not in done.output
        pictures[name] = read_video(tmp_path / f"{name}.png")[0]
    # By the environment's variables, in a process that can import neither diffusers nor transformers.
    script = (
        "import sys; sys.modules.update(dict.fromkeys(['diffusers', 'transformers', 'accelerate', 'scipy']))\n"
        "from wan_infer.cli import main; main()"
    )
    command = [sys.executable, "-c", script, *arguments_of(tmp_path / "process.png", "--model", "Wan-AI/tiny")]
    process = subprocess.run(
        command, env=variables(cache), capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert process.returncode == 0, process.stderr
    assert TOKEN not in process.stdout + process.stderr
    pictures["process"] = read_video(tmp_path / "process.png")[0]
    assert np.array_equal(pictures["main"], pictures["folder"])
    assert np.array_equal(pictures["process"], pictures["folder"])
    assert not np.array_equal(pictures["v2"], pictures["folder"])
    for file in tmp_path.iterdir():
        assert TOKEN.encode() not in file.read_bytes()


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "Wan-AI/absent"], "Wan-AI/absent is no folder here, and the hub did not give it"),
        (["--model", "Wan-AI/tiny", "--revision", "v3"], "Wan-AI/tiny is no folder here, and the hub did not give it"),
        (["--model", "a/b/c"], "no model at a/b/c: expected a folder in diffusers' layout or a hub id"),
    ],
)
def test_a_model_that_the_hub_does_not_have_is_one_sentence(arguments: list[str], said: str, tmp_path: Path) -> None:
    assert said in refused(*arguments_of(tmp_path / "a.png", *arguments))
    assert not (tmp_path / "a.png").exists()
