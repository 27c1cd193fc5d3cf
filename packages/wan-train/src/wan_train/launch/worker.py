"""The main module of a training process.

Import-light and guarded: Megatron's checkpoint writer starts processes that import it again.
"""

import sys
import warnings

from wan_model.system.child_process import Supervisor, end_process


def main() -> int:
    """Run with the options in the first argument; returns 0 when training ended, 2 for an error in the input."""
    supervisor = Supervisor.find()
    supervisor.follow()
    # A warning of torch about a package that nvidia-resiliency-ext requires; a user cannot act on it.
    warnings.filterwarnings("ignore", message="The pynvml package is deprecated", category=FutureWarning)
    try:
        from wan_train.config.options import RunOptions
        from wan_train.loop.run import pretrain

        pretrain(RunOptions.from_json(sys.argv[1]))
    except Exception as error:
        return supervisor.record(error)
    return 0


if __name__ == "__main__":
    end_process(main())
