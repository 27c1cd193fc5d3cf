"""``python tools/gpu_wheels.py --out FOLDER [--python 3.12]``: wheels for ``gpu_check.py --wheels FOLDER``.

For a GPU machine without a network. It needs pip and a package index; nothing is installed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from gpu.wheels import main

    sys.exit(main())
