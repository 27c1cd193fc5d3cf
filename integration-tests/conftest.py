"""The real command lines from clips to a video, run once: every test looks at what a stage left behind.

Nothing of the packages but their support for tests is imported here: they are used as installed programs.
"""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from wan_model.testing.devices import hide_gpus
from wan_model.testing.once import Once, once_in, order_by_shared_fixtures, session_folder
from wan_model.testing.shapes import check_shapes

check_shapes("small_world")

TRAIN_STEPS, SAVED_STEP = 6, 3
Run = Callable[..., subprocess.CompletedProcess[str]]


def pytest_configure(config: pytest.Config) -> None:
    hide_gpus(config.option.markexpr)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order_by_shared_fixtures(items, Path(__file__).parent, "whole_run", "stopped_run", "videos")


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Make a stage once for all test processes."""
    return once_in(session_folder(tmp_path_factory, "integration"))


@pytest.fixture(scope="session")
def run() -> Run:
    def run_program(*arguments: str | Path, fails: bool = False) -> subprocess.CompletedProcess[str]:
        program, *rest = map(str, arguments)
        path = sys.executable if program == "python" else str(Path(sysconfig.get_path("scripts"), program))
        done = subprocess.run(
            [path, *rest],
            capture_output=True,
            text=True,
            timeout=240,
            stdin=subprocess.DEVNULL,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        said = f"{' '.join([program, *rest])}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
        assert (done.returncode != 0) == fails, f"status {done.returncode} of {said}"
        return done

    return run_program


def _write_clip(path: Path, frames: int, height: int, width: int) -> None:
    rows, columns = np.mgrid[0:height, 0:width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(16))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            # A pattern that moves, differently along each axis.
            channels = [rows * 3 + index * 9, columns * 2 + index * 5, rows + columns + index * 7]
            picture = np.stack([channel % 256 for channel in channels], axis=-1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def clips(once: Once) -> Path:
    """Three clips of three shapes, with captions of both kinds."""
    return once("clips", _write_clips)


def _write_clips(folder: Path) -> None:
    folder.mkdir()
    for name, suffix, frames, height, width in [
        ("wide", ".json", 36, 64, 128),
        ("tall", ".jsonl", 27, 128, 64),
        ("square", ".json", 18, 96, 96),
    ]:
        _write_clip(folder / f"{name}.mp4", frames, height, width)
        caption = {"caption": f"A {name} pattern that moves."}
        (folder / f"{name}{suffix}").write_text(json.dumps(caption) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_model(run: Run, once: Once) -> Path:
    return once("model", lambda folder: run("python", "-m", "wan_model.tiny", folder))


@pytest.fixture(scope="session")
def dataset(run: Run, clips: Path, tiny_model: Path, once: Once) -> Path:
    def prepare(folder: Path) -> None:
        run(
            "wan-data", "prepare", "--video-folder", clips, "--output-folder", folder, "--model", tiny_model,
            "--windows", "consecutive", "--frames", "9", "--area", str(64 * 64), "--samples-per-shard", "2",
            "--validation-fraction", "0",
        )  # fmt: skip

    return once("dataset", prepare)


@pytest.fixture(scope="session")
def train(run: Run) -> Callable[..., None]:
    def train(dataset: Path, checkpoints: Path, *overrides: str) -> None:
        run(
            "wan-train", "pretrain", "--recipe", "tiny", "--nproc-per-node", "2", f"dataset.path={dataset}",
            f"checkpoint.save={checkpoints}", f"checkpoint.save_interval={SAVED_STEP}",
            "model.tensor_model_parallel_size=2", "model.sequence_parallel=true",
            f"train.train_iters={TRAIN_STEPS}", *overrides,
        )  # fmt: skip

    return train


@pytest.fixture(scope="session")
def stopped_run(train: Callable[..., None], dataset: Path, tiny_model: Path, once: Once) -> Path:
    """The checkpoints of a run that was stopped at its first save and resumed by the same command.

    It samples while it trains, and the run without a stop does not.
    """

    def stop_and_resume(folder: Path) -> None:
        prompts = folder.with_suffix(".txt")
        prompts.write_text("A wide pattern that moves.\n", encoding="utf-8")
        samples = (
            f"dataset.encoded_by={tiny_model}", f"samples.interval={SAVED_STEP}", f"samples.prompts={prompts}",
            "samples.width=96", "samples.height=64", "samples.frames=9", "samples.steps=4", "samples.seed=42",
        )  # fmt: skip
        for _ in range(2):
            train(dataset, folder, f"train.exit_interval={SAVED_STEP}", *samples)

    return once("stopped", stop_and_resume)


@pytest.fixture(scope="session")
def whole_run(train: Callable[..., None], dataset: Path, once: Once) -> Path:
    """The checkpoints of a run of as many steps without a stop."""
    return once("whole", lambda folder: train(dataset, folder))
