"""Command line of the quickstart: ``python -m quickstart --folder quickstart``."""

import argparse
import sys
from pathlib import Path

from quickstart.failure import QuickstartError
from quickstart.report import table, write_report
from quickstart.run import QuickstartRun


def main() -> None:
    """Run all stages, write the report and print the table."""
    parser = argparse.ArgumentParser(prog="quickstart", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("quickstart"), help="folder for all results")
    folder = parser.parse_args().folder
    run = QuickstartRun(Path.cwd(), folder)
    try:
        report = run.run()
    except QuickstartError as error:
        sys.exit(f"\nquickstart: {error}")
    write_report(report, run.root / folder / "report.json")
    print(f"\n{table(report)}", flush=True)


if __name__ == "__main__":
    main()
