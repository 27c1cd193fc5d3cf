"""One thread a test process, shapes checked, and runs that several tests look at made once."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for training_runs
os.environ.setdefault("OMP_NUM_THREADS", "1")
jaxtyping.install_import_hook(["wan_model", "wan_train.data.mock_data", "wan_train.data.dataset"], "beartype.beartype")

from training_runs import train, train_for_equality, write_start  # noqa: E402  after the hook


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Make a folder once for all test processes."""
    # Under xdist each worker has its own base below a common one.
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, build: Callable[[Path], object]) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                build(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def start_weights(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A model folder to start from, whose every gradient is alive."""
    return once("start-weights", write_start)


@pytest.fixture(scope="session")
def one_process_run(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The run that every parallel layout must equal."""
    return once("one-process-run", lambda folder: train(folder, "checkpoint.save_interval=3"))


@pytest.fixture(scope="session")
def equality_reference(once: Callable[[str, Callable[[Path], object]], Path], start_weights: Path) -> Path:
    """One process, six steps, a checkpoint after each: what every parallel layout is compared with."""
    return once("equality-reference", lambda folder: train_for_equality(folder, start_weights))


@pytest.fixture(scope="session")
def engine_answers(once: Callable[[str, Callable[[Path], object]], Path]) -> dict[str, Any]:
    """What ``engine_probe.py`` found in a process of its own."""

    def probe(path: Path) -> None:
        command = [sys.executable, str(Path(__file__).parent / "engine_probe.py")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        path.write_text(next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))[8:])

    found: dict[str, Any] = json.loads(once("engine-probe", probe).read_text())
    return found
