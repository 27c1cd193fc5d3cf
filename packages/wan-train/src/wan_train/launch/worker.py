"""The main module of a training process.

Import-light and guarded: Megatron's checkpoint writer starts processes that import it again.
"""

import sys

from wan_model.system.child_process import Supervisor, end_process
from wan_model.system.standard_streams import checked_streams
from wan_train.launch.stopped_children import watch_children


def main() -> int:
    """Run with the options in the first argument; returns 0 when training ended, 2 for an error in the input."""
    supervisor = Supervisor.find()
    supervisor.follow()
    watch_children(supervisor)
    with checked_streams(run=True):
        try:
            from wan_train.config.options import RunOptions
            from wan_train.loop.run import pretrain

            pretrain(RunOptions.from_json(sys.argv[1]))
        except Exception as error:
            return supervisor.record(error)
    return 0


if __name__ == "__main__":
    end_process(main())
