"""The main module of a training process.

Import-light and guarded: Megatron's checkpoint writer starts processes that import it again.
"""

import os
import sys

from wan_model.system.child_process import Supervisor, end_process


def sentence_of_system_error(error: OSError) -> Exception:
    """The error for a file that the system does not let this process use; others keep their traceback."""
    if error.filename is None or error.strerror is None:
        return error
    return ValueError(f"cannot read or write {os.fsdecode(error.filename)}: {error.strerror}")


def main() -> int:
    """Run with the options in the first argument; returns 0 when training ended, 2 for an error in the input."""
    supervisor = Supervisor.find()
    supervisor.follow()
    try:
        from wan_train.config.options import RunOptions
        from wan_train.loop.run import pretrain

        pretrain(RunOptions.from_json(sys.argv[1]))
    except OSError as error:
        return supervisor.record(sentence_of_system_error(error))
    except Exception as error:
        return supervisor.record(error)
    return 0


if __name__ == "__main__":
    end_process(main())
