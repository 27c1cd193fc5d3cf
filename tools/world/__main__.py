"""Command line of the longer session: ``python -m world --folder world [--compare | --lora]``."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from common.failure import ToolFailure
from small_world.adherence import COUNT
from small_world.commands import CLIPS
from small_world.scenes import OBJECTS, PATTERNS, WORLDS
from world import comparison, curve, lora
from world.place import Place, prepare
from world.variants import VARIANTS

STEPS_OF_CURVE, STEPS_OF_COMPARISON = 6000, 400
LEAST_REQUESTS = 3  # a third of them is held out


def _override(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is no setting of wan-train; expected KEY.PATH=VALUE")
    return key, value


def _count(least: int = 1) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number, at least {least}")
        return int(text)

    return count


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="nox -s world --", description=__doc__)
    options.add_argument("--folder", type=Path, default=Path("world"), help="folder for all results")
    options.add_argument("--world", choices=sorted(WORLDS), help="objects; patterns with --compare and --lora")
    options.add_argument(
        "--steps", type=_count(),
        help=f"of training: {STEPS_OF_CURVE}; {STEPS_OF_COMPARISON} with --compare, {lora.STEPS} with --lora",
    )  # fmt: skip
    options.add_argument("--points", type=_count(), default=12, help="checkpoints that are sampled (default: 12)")
    options.add_argument("--clips", type=_count(), default=CLIPS, help=f"to train on (default: {CLIPS})")
    options.add_argument(
        "--requests", type=_count(LEAST_REQUESTS),
        help=f"videos that are sampled, a third of them held out: {COUNT}; {lora.REQUESTS} of each group with --lora",
    )  # fmt: skip
    options.add_argument("--processes", type=_count(), help="of each training: 2; 1 with --compare")
    options.add_argument(
        "--set", type=_override, nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="settings of wan-train over the small world's",
    )  # fmt: skip
    kinds = options.add_mutually_exclusive_group()
    kinds.add_argument("--compare", action="store_true", help="compare settings over short runs")
    kinds.add_argument("--lora", action="store_true", help="train a LoRA for clips that the world of patterns has not")
    options.add_argument(
        "--base", metavar="CHECKPOINTS", help="with --lora: of a training on patterns, such as the quickstart's"
    )
    options.add_argument(
        "--only", choices=VARIANTS, nargs="+", metavar="NAME", help=f"with --compare: some of {', '.join(VARIANTS)}"
    )
    options.add_argument("--seeds", type=_count(0), nargs="+", default=[0], help="with --compare: of each (default: 0)")
    options.add_argument("--jobs", type=_count(), default=1, help="with --compare: runs side by side (default: 1)")
    return options


def options_of(chosen: argparse.Namespace) -> list[str]:
    """The options of a comparison but ``--only`` and ``--jobs``, those left out that have their defaults."""
    words = []
    for name in ("folder", "world", "steps", "clips", "requests", "processes", "seeds"):
        if (value := getattr(chosen, name)) != parser().get_default(name):
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    if chosen.set:
        words += ["--set", *(f"{key}={value}" for key, value in chosen.set)]
    return words


def run(chosen: argparse.Namespace) -> list[str]:
    """Make the curve, the comparison or the LoRA.

    Returns:
        Names of the files that were written, first that with the table.

    Raises:
        ToolFailure: a command failed, the folder holds results of other settings, or the LoRA has not learnt.
    """
    place = Place(Path.cwd(), chosen.folder)
    if chosen.lora:
        settings = lora.Settings(
            chosen.steps or lora.STEPS,
            chosen.requests or lora.REQUESTS,
            chosen.processes or 2,
            chosen.clips,
            dict(chosen.set),
            chosen.base,
        )
        lora.check(lora.Session(place, settings).run(), place.argument("lora.md"))
        return ["lora.md", "lora.json"]
    requests = chosen.requests or COUNT
    world = WORLDS[chosen.world or (PATTERNS if chosen.compare else OBJECTS).name]
    data = prepare(place, [(world, chosen.clips)])
    if chosen.compare:
        compared = comparison.Settings(
            world,
            chosen.steps or STEPS_OF_COMPARISON,
            requests,
            chosen.seeds,
            chosen.processes or 1,
            chosen.jobs,
            dict(chosen.set),
            options_of(chosen),
        )
        comparison.Comparison(place, data, compared).run(chosen.only or list(VARIANTS))
        return ["compare.md", "compare.json"]
    steps, processes = chosen.steps or STEPS_OF_CURVE, chosen.processes or 2
    curve.run(place, data, curve.Settings(world, steps, chosen.points, requests, processes, dict(chosen.set)))
    return ["curve.md", "curve.json", "curve.png"]


def main() -> None:
    """Make the results, and print the table and where it is."""
    chosen = parser().parse_args()
    try:
        written = run(chosen)
    except ToolFailure as error:
        sys.exit(f"\nworld: {error}")
    except KeyboardInterrupt:
        sys.exit("\nworld: stopped; the same command goes on from here")
    print(f"\n{(chosen.folder / written[0]).read_text(encoding='utf-8')}")
    print(f"wrote {', '.join(str(chosen.folder / name) for name in written)}")


if __name__ == "__main__":
    main()
