"""Tiny runs through the real command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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
