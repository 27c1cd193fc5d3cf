"""With other sources of Megatron-Bridge and Core (``nox -s engine``): runs continue when their engine is replaced."""

import os
from pathlib import Path

import pytest
from training_runs import RUN_OPTIONS, STEPS, read_log, same_weights, train, trajectory, wan_train

# The path that the engine's sources were put before.
INSTALLED = os.environ.get("WAN_INSTALLED_PATH")


@pytest.mark.skipif(INSTALLED is None, reason="there is only one engine here; nox -s engine has two")
def test_a_run_of_the_installed_engine_is_continued_to_the_bit(one_process_run: Path, tmp_path: Path) -> None:
    options = ("train.exit_interval=2", f"checkpoint.save={tmp_path}")
    done = wan_train(*RUN_OPTIONS, *options, environment={"PYTHONPATH": str(INSTALLED)})
    assert done.returncode == 0, done.stderr
    log = train(tmp_path)
    assert [entry for entry in log if "event" in entry] == [{"event": "resumed", "step": 2}]
    assert len(read_log(tmp_path)) == STEPS + 1
    assert trajectory(tmp_path) == trajectory(one_process_run)
    assert same_weights(tmp_path, one_process_run, STEPS)
