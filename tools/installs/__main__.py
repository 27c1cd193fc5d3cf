"""``python -m installs [NAME ...]``: check the documented ways to install; a NAME selects those that begin with it."""

import argparse
import subprocess
import time
from pathlib import Path

from installs.check import RouteError, check, interpreter
from installs.routes import routes

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Check every route and print a line for each."""
    parser = argparse.ArgumentParser(prog="installs", description=__doc__)
    parser.add_argument("names", nargs="*", help="for example nemo-26.02")
    parser.add_argument("--python", help="interpreter of the machine; by default python3.12 where there is one")
    options = parser.parse_args()
    every = routes(ROOT)
    chosen = [route for route in every if not options.names or route.name.startswith(tuple(options.names))]
    if not chosen:
        raise SystemExit(
            f"No route begins with {' or '.join(options.names)}; there are {', '.join(r.name for r in every)}."
        )
    python = options.python or interpreter()
    version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    print(f"pip resolves for {version} and installs nothing.", flush=True)
    failed = 0
    for route in chosen:
        started = time.monotonic()
        try:
            found = check(route, ROOT, python)
        except RouteError as error:
            failed += 1
            print(f"{route.name}: failed: {error}", flush=True)
        else:
            kept = ", ".join(f"{name} {version}" for name, version in route.present.items())
            seconds = time.monotonic() - started
            print(f"{route.name}: kept {kept}; {len(found)} packages would be added ({seconds:.0f} s)", flush=True)
    if failed:
        raise SystemExit(f"{failed} of {len(chosen)} routes failed.")


if __name__ == "__main__":
    main()
