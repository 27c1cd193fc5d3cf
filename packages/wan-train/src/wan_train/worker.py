"""The main module of a training process.

Import-light and guarded: Megatron's checkpoint writer starts processes that import it again.
"""

import os
import sys


def main() -> int:
    """Run with the options in the first argument; 0 when training ended, 2 when a user must put something right."""
    from wan_train.options import RunOptions
    from wan_train.run import pretrain

    try:
        pretrain(RunOptions.from_json(sys.argv[1]))
    except ValueError as error:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" (rank {rank})"
        print(f"Error{where}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
