"""Which tests see a GPU, and that no process forks after it has used one.

A session computes on the CPU also where there is a GPU, because its tests compare numbers of one device and fork ranks,
and CUDA does not survive a fork. ``pytest -m gpu`` is a session of the tests that need a GPU; each of them uses it in
the test process or in a command of its own.
"""

import os
import sys

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def hide_gpus(mark_expression: str) -> bool:
    """Hide all GPUs from this process and its children, unless the session is one of tests marked ``gpu``.

    Call it in ``pytest_configure`` with ``config.option.markexpr``, before CUDA is used.

    Returns:
        Whether they are hidden.
    """
    words = mark_expression.replace("(", " ").replace(")", " ").split()
    wanted = "gpu" in words and "not" not in words
    if not wanted:
        os.environ[_VISIBLE] = ""
    return not wanted


def check_fork() -> None:
    """Refuse a fork that would leave the child without CUDA.

    Raises:
        RuntimeError: CUDA is initialised in this process.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RuntimeError(
            "CUDA is initialised in this process, and a forked one could not use it: "
            f"start the process anew, or set {_VISIBLE} to an empty value before torch uses CUDA"
        )
