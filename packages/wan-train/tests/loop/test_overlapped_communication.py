"""Communication beside computations: what goes on at the same time, and that nothing else is computed."""

import json
from pathlib import Path

import pytest
import torch
from training_runs import (
    NO_RECOMPUTE,
    OVERLAP,
    PIPELINE,
    RUN_OPTIONS,
    SEQUENCE,
    TENSOR,
    read_tensors,
    run,
    steps_of,
    train,
)
from warm_ranks import Call

from wan_model.weights.training_checkpoint import find_checkpoint


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


LORA = ("lora.rank=4", "lora.targets=['attn1.*','ffn.*']")


@pytest.mark.parametrize(
    ("layout", "adapters"),
    [((TENSOR, SEQUENCE), ()), ((PIPELINE,), ()), ((TENSOR, SEQUENCE), LORA)],
    ids=["data x tensor", "data x pipeline", "data x tensor, LoRA"],
)
def test_overlapped_communication_changes_nothing(
    layout: tuple[str, ...], adapters: tuple[str, ...], start_weights: Path, tmp_path: Path
) -> None:
    """To the bit: sums of two ranks have no order.

    The weights of a step are gathered while the next one has begun: an EMA, which waits for them, and recomputation,
    which calls a module twice, would hide a module that reads its weights too early. So would a bucket that holds
    weights of a module before it. Without clipping, because the norm is a sum in another order.
    """
    settings = (*layout, NO_RECOMPUTE, "mixed_precision=bf16_mixed", "optimizer.clip_grad=0")
    start = ("--nproc-per-node", "4", "--init-from", str(start_weights), *adapters)
    plain = steps_of(train(tmp_path / "plain", *start, *settings))
    overlapped = steps_of(train(tmp_path / "overlapped", *start, *settings, *OVERLAP, "ddp.bucket_size=1"))
    assert [entry["loss"] for entry in overlapped] == [entry["loss"] for entry in plain]
    saved, wanted = (read_tensors(find_checkpoint(tmp_path / run), ("",)) for run in ("overlapped", "plain"))
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted), "weights or optimizer states differ"
