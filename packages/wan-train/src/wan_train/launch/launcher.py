"""``--nproc-per-node N``: the ranks of a run on this machine; ``wan_model.system.launcher`` starts and supervises them.

A rank that hangs in a collective is detected by its peers after ``dist.distributed_timeout_minutes`` (10).
"""

import contextlib
import sys
from pathlib import Path

from wan_model.system import launcher
from wan_train.config.options import RunOptions


def launch(options: RunOptions, ranks: int) -> int:
    """Run ``wan_train.launch.worker`` with options in ``ranks`` processes; returns the exit status.

    It is 0; or that of the process that failed first: 2 for an error in the input, 128 + N if signal N killed it; or
    128 + N if signal N interrupted this process, after a sentence that says from where the same command goes on.
    """
    outcome = launcher.launch("wan_train.launch.worker", [options.to_json()], ranks)
    if outcome.interrupted:
        # What is wrong with the folder is said at the next start.
        with contextlib.suppress(OSError, ValueError, KeyboardInterrupt):
            print(resume_message(options), file=sys.stderr, flush=True)
    return outcome.code


def resume_message(options: RunOptions) -> str:
    """From where the same command goes on, in one sentence.

    Raises:
        ValueError: the newest complete checkpoint is damaged, or a file or setting is invalid.
    """
    from wan_train.checkpoint.folder import find_resume_point

    save = save_folder(options)
    if save is None:
        return "checkpoint.save is not set, so nothing was saved, and the same command starts anew."
    if (point := find_resume_point(save)) is None:
        return f"{save} has no complete checkpoint, so the same command starts anew."
    return f"The same command goes on after step {point.step}, from {point.step_folder}."


def save_folder(options: RunOptions) -> Path | None:
    """What ``checkpoint.save`` is by the configuration file and the settings of the command line.

    Raises:
        ValueError: these cannot be read.
    """
    from wan_train.config.overrides import parse_overrides, read_file
    from wan_train.config.shipped_configs import find

    checkpoint = read_file(find(options.config_file)).get("checkpoint") if options.config_file else None
    save = checkpoint.get("save") if isinstance(checkpoint, dict) else None
    for key, value in parse_overrides(options.overrides):
        save = value if key == "checkpoint.save" else save
    return None if save is None else Path(str(save))
