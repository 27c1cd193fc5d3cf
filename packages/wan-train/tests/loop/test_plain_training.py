"""The engine against training written down plainly: torch's operations and optimizer, one loop, no Megatron.

What every parallel layout is compared with is itself one process of the engine; here that process is compared with the
mathematics. So Megatron's linears, schedules, scaling of gradients, clipping, learning rate and weight decay are all in
what is proven equal, and the noise, sigma and dropped captions of each pack are those of its number in the run.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_runs import CAPTION_DROPOUT, STEPS, WEIGHT_DECAY, read_log, steps_of

from wan_model import LatentPack
from wan_model.flow import FlowMatching, loss_sum
from wan_model.tiny import TINY_CONFIG
from wan_model.weights.training_checkpoint import find_checkpoint, read_training_checkpoint
from wan_model.weights.transformer import load_transformer
from wan_train.data.mock_data import MockConfig, MockLoader
from wan_train.data.seeds import generator_for

# What the tiny recipe and the options of the tests' runs say.
SEED = 1234
PACKS = MockConfig(shapes=[[3, 8, 8], [1, 6, 10], [2, 4, 10]], context_length=16, number_packed_samples=3)
PACKS_A_STEP = 2
FLOW = dataclasses.replace(FlowMatching.pretrain(), caption_dropout=CAPTION_DROPOUT)
EMPTY_CAPTION = torch.zeros(1, TINY_CONFIG.text_dim)


def learning_rate(step: int) -> float:
    """One step of warm-up from 0, then a cosine from 0.01 to 0.001 over the run's steps."""
    if step == 0:
        return 0.0
    return 0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * (step - 1) / (STEPS - 1)))


@dataclasses.dataclass
class Plain:
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def train_plainly(start: Path, number_of: Callable[[int], int] = lambda pack: pack) -> Plain:
    """Train; ``number_of`` says by which number a pack's noise is drawn."""
    model = load_transformer(start / "transformer").train()
    kinds = {True: [], False: []}  # type: dict[bool, list[torch.nn.Parameter]]
    for parameter in model.parameters():
        kinds[parameter.ndim > 1].append(parameter)  # biases and norms do not decay
    optimizer = torch.optim.AdamW(
        [{"params": kinds[True], "weight_decay": WEIGHT_DECAY}, {"params": kinds[False], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    packs: Iterator[LatentPack] = iter(MockLoader(PACKS, TINY_CONFIG, rank=0, ranks=1, multiple=1, seed=SEED))
    done = Plain([], [], {})
    for step in range(STEPS):
        optimizer.zero_grad()
        summed, counted = 0.0, 0
        for pack_number in range(PACKS_A_STEP * step, PACKS_A_STEP * (step + 1)):
            pack = next(packs)
            noisy = FLOW.corrupt(pack, generator_for("noise", SEED, number_of(pack_number)), EMPTY_CAPTION)
            total, tokens = loss_sum(
                model(noisy.tokens_SC, noisy.timesteps_B, noisy.text_BTD, pack.layout), noisy, pack.layout
            )
            total.backward()
            summed, counted = summed + total.item(), counted + tokens
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= counted
        done.losses.append(summed / counted)
        done.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
    done.weights = {key: value.detach() for key, value in model.named_parameters()}
    return done


@pytest.fixture(scope="module")
def plain(start_weights: Path) -> Plain:
    return train_plainly(start_weights)


def test_one_process_of_the_engine_is_plain_torch(plain: Plain, equality_reference: Path, start_weights: Path) -> None:
    log = steps_of(read_log(equality_reference))
    assert [entry["learning_rate"] for entry in log] == pytest.approx([learning_rate(step) for step in range(STEPS)])
    assert [entry["loss"] for entry in log] == pytest.approx(plain.losses, rel=1e-5)
    assert [entry["grad_norm"] for entry in log] == pytest.approx(plain.norms, rel=1e-4)
    trained = read_training_checkpoint(find_checkpoint(equality_reference, STEPS), dtype=torch.float32)[2]
    start = load_transformer(start_weights / "transformer").state_dict()
    assert set(trained) == set(plain.weights)
    off = {
        key: float((trained[key] - weight).norm() / (weight - start[key]).norm())
        for key, weight in plain.weights.items()
    }
    print(f"weights off by {max(off.values()):.1e} of how far they moved")
    assert max(off.values()) < 1e-3, off


def test_a_generator_shared_by_the_packs_of_a_step_would_show(plain: Plain, start_weights: Path) -> None:
    """Control: data-parallel ranks that draw the same noise, which is what one seed for all of them gives."""
    same = train_plainly(start_weights, lambda pack: pack - pack % PACKS_A_STEP)
    assert all(abs(got / wanted - 1) > 1e-3 for got, wanted in zip(same.losses, plain.losses, strict=True))


def test_captions_are_dropped_in_what_is_compared() -> None:
    packs = iter(MockLoader(PACKS, TINY_CONFIG, rank=0, ranks=1, multiple=1, seed=SEED))
    dropped = [
        not text.any()
        for number in range(PACKS_A_STEP * STEPS)
        for text in FLOW.corrupt(next(packs), generator_for("noise", SEED, number), EMPTY_CAPTION).text_BTD
    ]
    assert 0 < sum(dropped) < len(dropped)
