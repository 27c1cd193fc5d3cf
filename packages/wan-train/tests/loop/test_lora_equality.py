"""Adapters trained by two and four processes in every layout, by one, and by plain torch: losses, gradients, weights.

As ``test_parallel_equality``, with a LoRA of some linears, dropout and a factor that is not 1, whose B is not zero at
first. The plain loop is float64 on wan-model's adapters, which are equal to peft's (its tests).
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from plain_training import Reference, engine_results, kept_by
from training_runs import (
    CONTEXT,
    ELEMENTWISE,
    EQUALITY_SEED,
    FULL,
    FULLY_SHARDED,
    OVERLAP,
    PIPELINE,
    SELECTIVE,
    SEQUENCE,
    SMALL_BUCKETS,
    TENSOR,
    call,
    equality_options,
    train,
)
from warm_ranks import Call

from wan_model.dit.lora import LoraSettings, adapter_shapes
from wan_model.testing import assert_all_within
from wan_model.testing.once import Once
from wan_model.tiny import TINY_CONFIG

pytestmark = pytest.mark.rounding

TARGETS = ["attn1.*", "attn2.to_q", "attn2.to_v", "attn2.to_out.0", "ffn.*"]
SETTINGS = LoraSettings(rank=4, alpha=6.0, dropout=0.1, targets=tuple(TARGETS))
LORA = ("lora.rank=4", "lora.alpha=6", "lora.dropout=0.1", f"lora.targets=[{','.join(repr(one) for one in TARGETS)}]")
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "data, communication overlapped": (2, [*OVERLAP, SMALL_BUCKETS]),
    "tensor, recomputing": (2, [TENSOR, ELEMENTWISE]),
    "tensor and sequence x pipeline": (4, [TENSOR, SEQUENCE, PIPELINE]),
    "tensor and sequence x context, recomputing": (4, [TENSOR, SEQUENCE, CONTEXT, SELECTIVE]),
    "context x pipeline": (4, [CONTEXT, PIPELINE, FULL]),
    "fully sharded x context": (4, [FULLY_SHARDED, CONTEXT]),
    # Nothing is sharded, and Megatron-FSDP asks frozen weights for gradients.
    "fully sharded, alone": (1, [FULLY_SHARDED]),
    "fully sharded, alone x tensor": (2, [FULLY_SHARDED, TENSOR, SEQUENCE]),
    "fully sharded x tensor, recomputing": (4, [FULLY_SHARDED, TENSOR, SEQUENCE, SELECTIVE]),
}


ALIVE = Call("rank_calls:alive_adapters", [])


@pytest.fixture(scope="session")
def lora_reference(once: Once, start_weights: Path) -> Reference:
    """One process of the engine, and the plain loop."""
    options = (*equality_options(start_weights, EQUALITY_SEED), *LORA)
    run = once("lora-equality", lambda folder: train(folder, *options, calls=[ALIVE]))
    write, settings = "plain_training:write_plain_results", dataclasses.asdict(SETTINGS)
    plain = once("lora-plain", lambda path: call(write, str(path), str(start_weights), EQUALITY_SEED, settings))
    exact, scale = torch.load(plain, weights_only=True)
    return Reference(start_weights, run, exact, scale)


def test_one_process_of_the_engine_is_plain_torch(lora_reference: Reference) -> None:
    wanted, scale = kept_by([], lora_reference.exact), kept_by([], lora_reference.scale)
    gradients = [value for name, value in wanted.items() if name.startswith("gradient/")]
    assert len(gradients) == len(adapter_shapes(TINY_CONFIG, SETTINGS))
    assert all(gradient.norm() > 0 for gradient in gradients), "a gradient that is zero shows nothing"
    assert_all_within(engine_results(lora_reference.run), wanted, scale)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_process(layout: str, lora_reference: Reference, once: Once) -> None:
    processes, settings = LAYOUTS[layout]
    ranks = ("--nproc-per-node", str(processes))
    options = (*equality_options(lora_reference.start, EQUALITY_SEED, *ranks, *settings), *LORA)
    folder = once(f"lora-equality-{layout}", lambda folder: train(folder, *options, calls=[ALIVE]))
    sampled = {name: value for name, value in lora_reference.exact.items() if name.startswith("latent-weights/")}
    found, wanted = engine_results(folder), kept_by(settings, {**sampled, **engine_results(lora_reference.run)})
    shapes = {name.removeprefix("weight/"): tuple(v.shape) for name, v in found.items() if name[:7] == "weight/"}
    assert shapes == adapter_shapes(TINY_CONFIG, SETTINGS)
    assert_all_within(found, wanted, kept_by(settings, lora_reference.scale))
