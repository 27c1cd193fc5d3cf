"""``python -m bench.data_cost``: what preparing ten million clips takes, computed from measured rates.

The table of packages/wan-data/PLANNING.md is printed; options put other rates in the place of those that were measured.
"""

import argparse
import dataclasses
import math

from bench.report import Table, to_markdown
from wan_data.video.windows import Lengths, plan_windows
from wan_model.video_shape import TEMPORAL_STRIDE


@dataclasses.dataclass(frozen=True)
class Clips:
    """The clips of the plan.

    Attributes:
        count: how many.
        seconds, rate: length and frames a second of each.
        megabytes: size of each.
        text_tokens: of each caption.
    """

    count: int = 10_000_000
    seconds: float = 10.0
    rate: float = 24.0
    megabytes: float = 5.0
    text_tokens: int = 100


@dataclasses.dataclass(frozen=True)
class Rates:
    """Measured rates; PLANNING.md says where each is from.

    Attributes:
        probing: CPU milliseconds of a core to decode a frame of the source.
        decoding: CPU milliseconds of a core to decode and resize a frame of a window.
        encoding: seconds of a GPU for 81 frames of 480 x 832.
        planning: seconds of a core to plan ten million clips.
    """

    probing: float = 1.93
    decoding: float = 26.1
    encoding: float = 1.13
    planning: float = 147.0


RATE, LONGEST, HEIGHT, WIDTH, CHANNELS, TEXT_WIDTH = 16, 81, 480, 832, 16, 4096
SAMPLES_PER_SHARD = 1_000
LISTED = 1_000  # objects of a page of S3


def cost(gpus: int, cores_per_gpu: int, clips: Clips, rates: Rates) -> list[list[str]]:
    """Rows of stage, what bounds it, and hours."""
    windows = plan_windows(int(clips.seconds * RATE), "consecutive", Lengths(17, LONGEST))
    frames = sum(window.length for window in windows)
    cores = gpus * cores_per_gpu
    probing = clips.count * clips.seconds * clips.rate * rates.probing / 1e3 / cores / 3600
    decoding = clips.count * frames * rates.decoding / 1e3 / cores / 3600
    encoding = clips.count * frames * rates.encoding / LONGEST / gpus / 3600
    planning = clips.count / 1e7 * rates.planning / 3600
    return [
        ["probing", f"{cores} cores", f"{probing:.1f}"],
        ["planning", "one core", f"{planning:.2f}"],
        ["decoding, beside encoding", f"{cores} cores", f"{decoding:.1f}"],
        ["encoding", f"{gpus} GPUs", f"{encoding:.1f}"],
        [
            "in all",
            "the slower of the last two, and the first two",
            f"{probing + planning + max(decoding, encoding):.1f}",
        ],
    ]


def traffic(clips: Clips) -> list[list[str]]:
    """Rows of what travels, number of requests and terabytes."""
    windows = plan_windows(int(clips.seconds * RATE), "consecutive", Lengths(17, LONGEST))
    latents = sum((window.length - 1) // TEMPORAL_STRIDE + 1 for window in windows)
    samples = clips.count * len(windows)
    output = clips.count * latents * CHANNELS * (HEIGHT // 8) * (WIDTH // 8) * 4
    output += samples * clips.text_tokens * TEXT_WIDTH * 4
    shards = math.ceil(samples / SAMPLES_PER_SHARD)
    source = clips.count * clips.megabytes * 1e6
    return [
        ["the list of clips and captions", f"{2 * clips.count // LISTED:,} LIST", ""],
        ["captions, one file a clip", f"{clips.count:,} GET", ""],
        ["clips, probing", f"{clips.count:,} GET", f"{source / 1e12:.0f}"],
        ["clips, encoding", f"{clips.count:,} GET", f"{source / 1e12:.0f}"],
        [f"{shards:,} shards of {SAMPLES_PER_SHARD:,} samples", f"{2 * shards:,} PUT", f"{output / 1e12:.0f}"],
    ]


def tables(clips: Clips, rates: Rates, machines: list[tuple[int, int]]) -> list[Table]:
    """The tables of the plan."""
    found = []
    for gpus, cores in machines:
        found.append(Table(f"{gpus} GPUs with {cores} cores each", ["stage", "bound by", "hours"]))
        found[-1].rows += cost(gpus, cores, clips, rates)
    found.append(Table("What travels between the store and the machines", ["what", "requests", "TB"]))
    found[-1].rows += traffic(clips)
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="bench.data_cost", description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=[64, 8])
    parser.add_argument("--cores", type=int, default=24, help="CPU cores for each GPU")
    for kind in (Clips, Rates):
        for field in dataclasses.fields(kind):
            value = getattr(kind, field.name)
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args()
    clips = Clips(given.count, given.seconds, given.rate, given.megabytes, given.text_tokens)
    rates = Rates(given.probing, given.decoding, given.encoding, given.planning)
    for table in tables(clips, rates, [(gpus, given.cores) for gpus in given.gpus]):
        print(to_markdown(table))


if __name__ == "__main__":
    main()
