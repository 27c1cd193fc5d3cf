"""``python -m wan_infer``."""

from wan_infer.cli import main

if __name__ == "__main__":
    main()
