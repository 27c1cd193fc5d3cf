"""``python tools/gpu_check.py --out FOLDER [--minutes 8]``: what a GPU says of this repository.

It needs no installed package of ours. ``gpu_check.json`` and ``gpu_check.md`` in FOLDER have a row for each check:
passed, failed or not run, and why. The last line of the output counts them; the exit status is 0 if none failed. On a
machine without a GPU every stage runs at a tiny size on the CPU.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root / "tools"), *map(str, sorted(root.glob("packages/*/src")))]
    from gpu.check import main

    sys.exit(main())
