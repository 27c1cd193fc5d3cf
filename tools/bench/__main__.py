"""``python -m bench [--folder FOLDER] [--quick]``: runs what this machine can run and writes the tables."""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import torch

from bench import model_cpu, model_cuda
from bench.report import Table, to_markdown


def conditions() -> dict[str, str]:
    """What the figures depend on besides the code."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "cpu": next(
            (
                line.split(":", 1)[1].strip()
                for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
                if line.startswith("model name")
            ),
            platform.processor(),
        )
        + f", {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("bench"), help="where the tables go")
    parser.add_argument("--quick", action="store_true", help="few rounds of small sizes: to see that it runs")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: all there are")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("--device is cuda and there is no CUDA device here; leave it out", file=sys.stderr)
        return 2
    arguments.folder.mkdir(parents=True, exist_ok=True)

    tables: list[Table] = []
    surroundings = conditions()
    print(", ".join(f"{key} {value}" for key, value in surroundings.items()))
    runs = []
    if arguments.device in ("auto", "cpu"):
        runs.append(model_cpu.tables(quick=arguments.quick))
    if arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available()):
        runs.append(model_cuda.tables(torch.device("cuda"), quick=arguments.quick))
    for run in runs:
        for table in run:
            tables.append(table)
            print("\n" + to_markdown(table), flush=True)
            # Written after each table, so that a run that is cut short leaves what it had.
            report = {"conditions": surroundings, "tables": [vars(one) for one in tables]}
            (arguments.folder / "model.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            (arguments.folder / "model.md").write_text(
                "\n".join([", ".join(f"{k} {v}" for k, v in surroundings.items()), *(to_markdown(t) for t in tables)]),
                encoding="utf-8",
            )
    print(f"\nwritten: {arguments.folder / 'model.md'}, {arguments.folder / 'model.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
