"""``--nproc-per-node N``: the ranks of a run on this machine; ``wan_model.system.launcher`` starts and supervises them.

A rank that hangs in a collective is detected by its peers after ``dist.distributed_timeout_minutes`` (10).
"""

from wan_model.system import launcher


def launch(argument: str, ranks: int) -> int:
    """Run ``wan_train.launch.worker`` with an argument in ``ranks`` processes; returns the exit status.

    It is 0; or that of the process that failed first: 2 for an error in the input, 128 + N if signal N killed it; or
    128 + N if signal N interrupted this process.
    """
    return launcher.launch("wan_train.launch.worker", [argument], ranks).code
