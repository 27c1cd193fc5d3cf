"""The exchanges of tensor parallelism's backward pass go on while gradients of weights are computed."""

import json
from pathlib import Path

from training_runs import RUN_OPTIONS, SEQUENCE, TENSOR, run
from warm_ranks import Call


def test_weights_gradients_are_computed_while_the_gradients_of_rows_are_exchanged(tmp_path: Path) -> None:
    """Of a block: queries, keys and values of tokens; keys and values of texts; queries of tokens; the feed-forward."""
    found = tmp_path / "found.json"
    settings = ("--nproc-per-node", "2", TENSOR, SEQUENCE, "train.train_iters=1", "model.recompute_granularity=null")
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
