"""``--nproc-per-node N``: start this command in N processes, as torchrun does. Importing it imports no torch.

The processes are started and supervised by ``wan_model.system.launcher``: the first that fails ends the others, and
only its error is printed; a stopped process is detected; when this process ends, its ranks end too.
"""

from collections.abc import Sequence

from wan_model.system import launcher


def launch(arguments: Sequence[str], count: int) -> int:
    """Run ``wan-infer ARGUMENTS`` in ``count`` processes; only the first one's output is printed.

    Returns:
        The exit status: 0; 1 if a process failed, after its error; 128 + N if signal N interrupted this process.
    """
    outcome = launcher.launch("wan_infer", arguments, count, first_rank_output=True)
    return outcome.code if outcome.interrupted else min(outcome.code, 1)
