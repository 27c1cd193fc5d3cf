"""Communication beside computations: what goes on at the same time, and that nothing else is computed."""

import json
from pathlib import Path

import pytest
from training_runs import (
    NO_RECOMPUTE,
    OVERLAP,
    PIPELINE,
    RUN_OPTIONS,
    SEQUENCE,
    STEPS,
    TENSOR,
    run,
    same_weights,
    steps_of,
    train,
)
from warm_ranks import Call


def test_weights_gradients_are_computed_while_the_gradients_of_rows_are_exchanged(tmp_path: Path) -> None:
    """Of a block: queries, keys and values of tokens; keys and values of texts; queries of tokens; the feed-forward."""
    found = tmp_path / "found.json"
    settings = ("--nproc-per-node", "2", TENSOR, SEQUENCE, "train.train_iters=1", NO_RECOMPUTE)
    ended = run(
        (*RUN_OPTIONS, *settings), tmp_path / "run", calls=[Call("exchange_order:note_exchanges", (str(found),))]
    )
    assert ended.codes == [0, 0], ended.errors

    def expected(linears: int, exchange: str) -> list[str]:
        return [*["product"] * linears, exchange, *["product"] * linears, "wait"]

    tokens, texts = "reduce_scatter_base", "allreduce"
    of_block = [expected(1, tokens), expected(2, texts), expected(1, tokens), expected(3, tokens)]
    calls = json.loads(found.read_text())
    blocks = [calls[first : first + len(of_block)] for first in range(0, len(calls), len(of_block))]
    assert len(blocks) > 1
    assert all(sorted(block) == sorted(of_block) for block in blocks), blocks


@pytest.mark.parametrize("layout", [[TENSOR, SEQUENCE], [PIPELINE]], ids=["data x tensor", "data x pipeline"])
def test_overlapped_communication_changes_nothing(layout: list[str], tmp_path: Path) -> None:
    """To the bit: sums of two ranks have no order.

    The weights of a step are gathered while the next one has begun: an EMA, which waits for them, and recomputation,
    which calls a module twice, would hide a module that reads its weights too early. So would a bucket that holds
    weights of a module before it. Without clipping, because the norm is a sum in another order.
    """
    settings = ("--nproc-per-node", "4", *layout, NO_RECOMPUTE, "mixed_precision=bf16_mixed", "optimizer.clip_grad=0")
    plain = steps_of(train(tmp_path / "plain", *settings))
    overlapped = steps_of(train(tmp_path / "overlapped", *settings, *OVERLAP, "ddp.bucket_size=1"))
    assert [entry["loss"] for entry in overlapped] == [entry["loss"] for entry in plain]
    assert same_weights(tmp_path / "overlapped", tmp_path / "plain", STEPS)
