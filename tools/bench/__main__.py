"""``python -m bench [--folder FOLDER] [--of model|data|train|infer] [--quick]``: tables of speed and memory."""

import argparse
import itertools
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.report import Table, to_markdown


def conditions() -> dict[str, str]:
    """Versions and hardware that the figures depend on."""
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
    """Run the benchmarks, print the tables and write them to files."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("bench"), help="folder for the tables")
    parser.add_argument("--quick", action="store_true", help="few rounds of small sizes, only to check that it runs")
    parser.add_argument(
        "--of", choices=["all", "model", "data", "train", "infer"], default="all", help="package to benchmark"
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the CPU, and a GPU if there is one"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("--device is cuda and there is no CUDA device here; leave it out", file=sys.stderr)
        return 2
    arguments.folder.mkdir(parents=True, exist_ok=True)

    surroundings = conditions()
    print(", ".join(f"{key} {value}" for key, value in surroundings.items()))
    for name, runs in _chosen(arguments).items():
        tables: list[Table] = []
        for table in itertools.chain.from_iterable(runs):
            tables.append(table)
            print("\n" + to_markdown(table), flush=True)
            # Written after each table, so that an interrupted run keeps its finished tables.
            _write(arguments.folder / name, surroundings, tables)
        if tables:
            print(f"\nwritten: {arguments.folder / name}.md and .json", flush=True)
    return 0


def _chosen(arguments: argparse.Namespace) -> dict[str, list[Iterator[Table]]]:
    # Only now: they import everything that is timed.
    from bench import data, data_duplicates, data_in_store, data_scale, infer, infer_cuda, model_cpu, model_cuda, train

    cpu, quick = arguments.device in ("auto", "cpu"), arguments.quick
    cuda = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    runs: dict[str, list[Iterator[Table]]] = {}
    if arguments.of in ("all", "model"):
        runs["model"] = [model_cpu.tables(quick=quick)] if cpu else []
        if cuda:
            runs["model"].append(model_cuda.tables(torch.device("cuda"), quick=quick))
    if arguments.of in ("all", "data") and cpu:
        parts = data, data_in_store, data_duplicates, data_scale
        runs["data"] = [part.tables(quick=quick) for part in parts]
    if arguments.of in ("all", "train") and cpu:
        runs["train"] = [train.tables(quick=quick)]
    if arguments.of in ("all", "infer"):
        runs["infer"] = [infer.tables(quick=quick)] if cpu else []
        if cuda:
            runs["infer"].append(infer_cuda.tables(quick=quick))
    return runs


def _write(stem: Path, surroundings: dict[str, str], tables: list[Table]) -> None:
    report = {"conditions": surroundings, "tables": [vars(one) for one in tables]}
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    text = "\n".join([", ".join(f"{k} {v}" for k, v in surroundings.items()), *(to_markdown(t) for t in tables)])
    stem.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
