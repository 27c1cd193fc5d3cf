"""Command line of the longer session: ``python -m world --folder world [--compare]``."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from common.failure import ToolFailure
from small_world.adherence import COUNT
from small_world.commands import CLIPS
from small_world.scenes import WORLDS
from world import comparison, curve
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
    options.add_argument("--world", choices=sorted(WORLDS), help="objects; patterns with --compare")
    options.add_argument(
        "--steps", type=_count(), help=f"of training: {STEPS_OF_CURVE}; {STEPS_OF_COMPARISON} with --compare"
    )
    options.add_argument("--points", type=_count(), default=12, help="checkpoints that are sampled (default: 12)")
    options.add_argument("--clips", type=_count(), default=CLIPS, help=f"to train on (default: {CLIPS})")
    options.add_argument(
        "--requests", type=_count(LEAST_REQUESTS), default=COUNT,
        help=f"videos that are sampled, a third of them held out (default: {COUNT})",
    )  # fmt: skip
    options.add_argument("--processes", type=_count(), help="of each training: 2; 1 with --compare")
    options.add_argument(
        "--set", type=_override, nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="settings of wan-train over the small world's",
    )  # fmt: skip
    options.add_argument("--compare", action="store_true", help="compare settings over short runs")
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
    """Make the curve or the comparison.

    Returns:
        Names of the files that were written, first that with the table.

    Raises:
        ToolFailure: a command failed, or the folder holds results of other settings.
    """
    place = Place(Path.cwd(), chosen.folder)
    world = WORLDS[chosen.world or ("patterns" if chosen.compare else "objects")]
    data = prepare(place, world, chosen.clips)
    if chosen.compare:
        settings = comparison.Settings(
            world,
            chosen.steps or STEPS_OF_COMPARISON,
            chosen.requests,
            chosen.seeds,
            chosen.processes or 1,
            chosen.jobs,
            dict(chosen.set),
            options_of(chosen),
        )
        comparison.Comparison(place, data, settings).run(chosen.only or list(VARIANTS))
        return ["compare.md", "compare.json"]
    steps, processes = chosen.steps or STEPS_OF_CURVE, chosen.processes or 2
    curve.run(place, data, curve.Settings(world, steps, chosen.points, chosen.requests, processes, dict(chosen.set)))
    return ["curve.md", "curve.json", "curve.png"]


def main() -> None:
    """Make the curve or the comparison, and print the table and where it is."""
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
