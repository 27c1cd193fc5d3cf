"""Context parallelism on gloo: two and four processes give what one gives, forward and every gradient."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from context_parallel_cases import build, cases, on_each_rank, outcome, run_distributed

from wan_model.testing import assert_all_within, rounding_scale, seeds
from wan_model.testing.once import Once

SEEDS = seeds(9)


@pytest.fixture(scope="session")
def processes(once: Once) -> list[dict[str, Any]]:
    """What each of four processes found, all seeds and cases in one start of them."""
    path = once("context-parallel.pt", lambda path: torch.save(run_distributed(on_each_rank, 4, SEEDS), path))
    found: list[dict[str, Any]] = torch.load(path, weights_only=True)
    return found


def whole(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Outputs are equal on all ranks, gradients are summed over them."""
    assert all(torch.equal(part["output"], parts[0]["output"]) for part in parts)
    names = [name for name in parts[0] if name != "output"]
    return {
        "output": parts[0]["output"],
        **{name: torch.stack([part[name] for part in parts]).sum(0) for name in names},
    }


@pytest.mark.rounding
@pytest.mark.parametrize("seed", SEEDS)
def test_equals_one_process(seed: int, processes: list[dict[str, Any]]) -> None:
    groups = {"of 2": [processes[:2], processes[2:]], "of 4": [processes]}
    for number, (_, heads, _, layout, recompute) in enumerate(cases()):
        model = build(heads, seed=seed)
        wanted = outcome(model, layout, recompute, seed)
        # In fp64, where even a thousand roundings hide nothing.
        scale = rounding_scale(
            lambda model=model, layout=layout: outcome(model, layout, "none", seed), torch.float64, 1
        )
        for key, members in groups.items():
            for group in members:
                parts = [process[key][SEEDS.index(seed) * len(cases()) + number] for process in group]
                assert_all_within(whole(parts), wanted, scale, factor=1000)
                table = "blocks.0.scale_shift_table"
                shares = [part[table].norm() / wanted[table].norm() for part in parts]
                assert layout.padding > 3 or min(shares) > 1e-3, "every rank does a part of the work"


def test_tokens_that_cannot_be_shared_are_refused_by_every_rank(processes: list[dict[str, Any]]) -> None:
    for process in processes:
        expected = "7 tokens cannot be shared evenly by 2 ranks; pad the pack to a multiple"
        assert process["refusal"].startswith(expected)


def test_text_is_not_sharded_and_queries_are_never_gathered(processes: list[dict[str, Any]]) -> None:
    rows, layers = 12, 2
    by_heads, by_keys = rows * 4 * 12, rows * 3 * 12
    wanted = layers * [("all_to_all_single", 3 * by_heads), ("all_to_all_single", by_heads)]
    wanted += [("all_gather_single", rows * 64)]
    wanted += layers * [("all_gather_single", 2 * by_keys)] + [("all_gather_single", rows * 64)]
    for process in processes:
        assert [tuple(item) for item in process["traffic"]] == wanted
