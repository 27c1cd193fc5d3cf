"""What a LoRA adds and what it costs, as tables in Markdown."""

import shlex
from collections.abc import Mapping
from typing import Any

from common.markdown_table import markdown_table
from small_world.scenes import PATTERNS, VANISHING
from world.curve_report import percent, uncertainty

_GROUPS = {
    "new": f"new: {', '.join(VANISHING.attributes['event'])}",
    "old": f"old: {', '.join(PATTERNS.attributes['event'])}",
}


def markdown(result: Mapping[str, Any]) -> str:
    """The tables and the commands that made them.

    Args:
        result: see ``world.lora.Session.run``.
    """
    adherence = result["adherence"]
    some = next(iter(adherence["new"].values()))
    attributes = list(some["all"]["by_attribute"])
    rows = [
        [
            _GROUPS[group], weights,
            *(percent(found["all"]["by_attribute"][name]) for name in attributes),
            percent(found["all"]["all"]), percent(found["held-out"]["all"]),
        ]
        for group, of_group in adherence.items()
        for weights, found in of_group.items()
    ]  # fmt: skip
    count, held_out = some["all"]["count"], some["held-out"]["count"]
    trained = [
        [name, f"{one['steps']:,}", f"{one['seconds']:,.0f}", f"{one['loss']:.4f}"]
        for name, one in result["training"].items()
        if one is not None
    ]
    lines = [f"{shlex.join(line)}  # {name}" for name, line in result["commands"].items()]
    return (
        "# A LoRA on the small world: what it adds, and what the base keeps\n\n"
        f"Shares of {count} sampled videos of each group that show what their captions say, by attribute and in all of "
        f"them at once. {held_out} are of combinations that neither training saw. {uncertainty(count)} Base and LoRA "
        "have the same requests and seeds.\n\n"
        f"{markdown_table(['videos', 'weights', *attributes, 'all', 'held-out, all'], rows, aligned=True)}\n\n"
        f"{markdown_table(['training', 'steps', 'seconds', 'validation loss'], trained, aligned=True)}\n\n"
        "The validation losses are each of its own clips: those of the LoRA are new and old ones. "
        f"The LoRA's file has {result['lora_bytes'] / 2**10:,.0f} KiB.\n\n"
        "```sh\n" + "\n".join(lines) + "\n```\n"
    )
