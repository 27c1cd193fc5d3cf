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

os.environ.setdefault("OMP_NUM_THREADS", "1")
jaxtyping.install_import_hook(["wan_model", "wan_train.mock_data", "wan_train.dataset"], "beartype.beartype")

STEPS = 6
RUN_OPTIONS = (
    "--recipe", "tiny", "--mock", f"train.train_iters={STEPS}", "train.global_batch_size=2",
    "scheduler.lr_warmup_iters=1", "optimizer.lr=0.01", "optimizer.min_lr=0.001",
)  # fmt: skip


def wan_train(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The real command line, in processes of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from wan_train.cli import main; main()", "pretrain", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def train(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """A tiny run that must succeed; returns its log."""
    done = wan_train(*RUN_OPTIONS, f"checkpoint.save={folder}", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_log(folder)


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


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
def one_process_run(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The run that every parallel layout must equal."""
    return once("one-process-run", lambda folder: train(folder, "checkpoint.save_interval=3"))
