"""The quickstart's result as report.json and as a table."""

import json
from pathlib import Path
from typing import Any


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the report as JSON."""
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _run_rows(name: str, run: dict[str, Any]) -> list[tuple[str, str]]:
    resumed = run["resumed_from_step"]
    how = f", resumed from step {resumed}" if resumed is not None else ""
    packs = f"{run['packs_per_step']} pack{'s' * (run['packs_per_step'] > 1)}"
    packing = run["packing"]
    samples, fill, needed = packing["samples_a_pack"], 100 * packing["fill"], 100 * packing["efficiency"]
    return [
        (name, f"{run['steps']} steps of {packs}{how}; loss {run['first_loss']:.4f} -> {run['last_loss']:.4f}"),
        ("  packing", f"{samples} samples per pack; packs {fill:.0f} % full; {needed:.1f} % of computed tokens needed"),
    ]


def table(report: dict[str, Any]) -> str:
    """The report as a table of two columns."""
    data, video = report["dataset"], report["video"]
    shapes = ", ".join(f"{count} of {shape}" for shape, count in data["shapes"].items())
    rows = [
        ("dataset", f"{data['samples']} samples in {data['shards']} shards"),
        ("  latents", f"{shapes} (frames x rows x columns)"),
    ]
    for name, run in report["training"].items():
        rows += _run_rows(name, run)
    rows.append(("video", f"{video['frames']} frames of {video['width']} x {video['height']} pixels"))
    stages = dict(report["seconds"])
    rows.append(("time", f"{stages.pop('total'):7.1f} s, of which"))
    rows += [(f"  {stage}", f"{seconds:7.1f} s") for stage, seconds in stages.items()]
    rows += [(name.replace("_", " "), path) for name, path in report["files"].items()]
    width = max(len(name) for name, _ in rows)
    rule = "-" * (width + 62)
    return "\n".join([rule, *(f"{name:<{width}}  {value}" for name, value in rows), rule])
