"""``--nproc-per-node N``: this command again, N times, as torchrun would start it. Imports no torch to be imported.

The processes are started and supervised by ``wan_model.system.launcher``: the first that fails ends the others, and its
error is the one that is shown; a stopped process is found; when this process ends, its ranks end too.
"""

import os
from collections.abc import Sequence

from wan_model.system import launcher


def processes() -> int:
    """How many processes this one was started as one of, by torchrun's variables."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launch(arguments: Sequence[str], count: int) -> int:
    """Run ``wan-infer ARGUMENTS`` in so many processes, of which the first prints.

    Returns:
        The exit status: 0; 1 where a process failed, after its error; 128 + N if signal N interrupted this one.
    """
    outcome = launcher.launch("wan_infer", arguments, count, first_rank_output=True)
    return outcome.code if outcome.interrupted else min(outcome.code, 1)
