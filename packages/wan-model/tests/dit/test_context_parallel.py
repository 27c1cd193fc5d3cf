"""Context parallelism on gloo: two and four processes give what one gives, forward and every gradient."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from context_parallel_cases import build, cases, on_each_rank, outcome, refusals, run_distributed, traffic


@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_one_process(ranks: int, near: Any) -> None:
    parts = run_distributed(on_each_rank, ranks)
    for number, (head_name, heads, layout_name, layout, recompute) in enumerate(cases()):
        wanted = outcome(build(heads), layout, recompute)
        for name, value in wanted.items():
            label = f"{head_name}, {layout_name}, recompute {recompute}: {name}"
            mine = [part[number][name] for part in parts]
            if name == "output":
                for out in mine:
                    near(out, value, 1e-12, label)
            else:
                near(torch.stack(mine).sum(0), value, 1e-11, label, floor=1e-3)
        table = "blocks.0.scale_shift_table"
        shares = [part[number][table].norm() / wanted[table].norm() for part in parts]
        assert layout.padding > 3 or min(shares) > 1e-3, "every rank does a part of the work"


def test_tokens_that_cannot_be_shared_are_refused_by_every_rank() -> None:
    for message in run_distributed(refusals, 2):
        assert message.startswith("7 tokens cannot be shared evenly by 2 ranks; pad the pack to a multiple")


def test_text_is_not_sharded_and_queries_are_never_gathered() -> None:
    rows, layers = 12, 2
    by_heads, by_keys = rows * 4 * 12, rows * 3 * 12
    wanted = layers * [("all_to_all_single", 3 * by_heads), ("all_to_all_single", by_heads)]
    wanted += [("all_gather_into_tensor", rows * 64)]
    wanted += layers * [("all_gather_into_tensor", 2 * by_keys)] + [("all_gather_into_tensor", rows * 64)]
    for sent in run_distributed(traffic, 2):
        assert [tuple(item) for item in sent] == wanted
