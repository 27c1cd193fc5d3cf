"""The quickstart's result as a table."""

from typing import Any


def _run_rows(name: str, run: dict[str, Any]) -> list[tuple[str, str]]:
    resumed = run["resumed_from_step"]
    how = f", resumed from step {resumed}" if resumed is not None else ""
    packs = f"{run['packs_per_step']} pack{'s' * (run['packs_per_step'] > 1)}"
    packing = run["packing"]
    samples, fill, needed = packing["samples_a_pack"], 100 * packing["fill"], 100 * packing["efficiency"]
    rows = [
        (name, f"{run['steps']} steps of {packs}{how}; loss {run['first_loss']:.4f} -> {run['last_loss']:.4f}"),
        ("  packing", f"{samples} samples per pack; packs {fill:.0f} % full; {needed:.1f} % of computed tokens needed"),
    ]
    if gaps := [f"{one['caption_gap']:.2f} (step {one['step']})" for one in run["validation"] if "caption_gap" in one]:
        rows.append(("  caption gap", ", ".join(gaps)))
    return rows


def _adherence_rows(adherence: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("adherence", "sampled clips that show what their captions say")]
    for group, found in adherence.items():
        by_attribute = ", ".join(f"{name} {share:.0%}" for name, share in found["by_attribute"].items())
        rows.append((f"  {group}", f"{found['all']:.1%} of {found['count']} in everything; {by_attribute}"))
    return rows


def table(report: dict[str, Any]) -> str:
    """The report as a table of two columns."""
    data = report["dataset"]
    shapes = ", ".join(f"{count} of {shape}" for shape, count in data["shapes"].items())
    rows = [
        ("dataset", f"{data['samples']} samples in {data['shards']} shards"),
        ("  latents", f"{shapes} (frames x rows x columns)"),
    ]
    for name, run in report["training"].items():
        rows += _run_rows(name, run)
    if "adherence" in report:
        rows += _adherence_rows(report["adherence"])
    if "video" in report:
        video = report["video"]
        rows.append(("video", f"{video['frames']} frames of {video['width']} x {video['height']} pixels"))
    stages = dict(report["seconds"])
    rows.append(("time", f"{stages.pop('total'):7.1f} s, of which"))
    rows += [(f"  {stage}", f"{seconds:7.1f} s") for stage, seconds in stages.items()]
    rows += [(name.replace("_", " "), path) for name, path in report["files"].items()]
    width = max(len(name) for name, _ in rows)
    rule = "-" * (width + 62)
    return "\n".join([rule, *(f"{name:<{width}}  {value}" for name, value in rows), rule])
