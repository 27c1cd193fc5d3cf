"""``--nproc-per-node N``: the ranks of a run on this machine; ``wan_model.system.launcher`` starts and supervises them.

A rank that hangs in a collective is found by its peers when ``dist.distributed_timeout_minutes`` (10) have passed.
"""

from wan_model.system import launcher


def launch(argument: str, ranks: int) -> int:
    """Run ``wan_train.launch.worker`` with that argument as that many processes; returns the exit status.

    0; the one of the process that failed first, 2 where a user must put something right, 128 + N if signal N killed it;
    128 + N if signal N interrupted this process.
    """
    return launcher.launch("wan_train.launch.worker", [argument], ranks).code
