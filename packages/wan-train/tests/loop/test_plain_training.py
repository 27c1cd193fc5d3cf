"""The engine against training written down plainly (``plain_training.py``): no Megatron, float64.

So Megatron's linears, schedules, scaling of gradients, clipping, learning rate and weight decay are all in what is
proven equal, and the noise, sigma and dropped captions of each pack are those of its number in the run. What may differ
is what fp32 rounding explains (``wan_model.testing``). With WAN_SEEDS=N in the environment N seeds are tried.
"""

from collections.abc import Callable

import pytest
from plain_training import (
    EMPTY_CAPTION,
    FLOW,
    PACKS_A_STEP,
    Reference,
    engine_results,
    kept_by,
    learning_rate,
    noisy_of,
    packs_of,
    train_plainly,
)
from training_runs import EQUALITY_SEED, EQUALITY_STEPS, read_log, steps_of

from wan_model.testing import assert_all_within, assert_within, seeds
from wan_model.tiny import TINY_CONFIG
from wan_model.weights.transformer import expected_shapes

pytestmark = pytest.mark.rounding


@pytest.mark.parametrize("seed", seeds(EQUALITY_SEED))
def test_one_process_of_the_engine_is_plain_torch(seed: int, reference_of: Callable[[int], Reference]) -> None:
    reference = reference_of(seed)
    rates = [entry["learning_rate"] for entry in steps_of(read_log(reference.run))]
    assert rates == pytest.approx([learning_rate(step) for step in range(EQUALITY_STEPS)])
    wanted, scale = kept_by([], reference.exact), kept_by([], reference.scale)
    assert_all_within(engine_results(reference.run), wanted, scale)


@pytest.mark.parametrize("seed", seeds(EQUALITY_SEED))
def test_an_error_of_1e_4_in_a_gradient_would_show(seed: int, reference_of: Callable[[int], Reference]) -> None:
    reference = reference_of(seed)
    for key in expected_shapes(TINY_CONFIG):
        exact, scale = reference.exact[f"gradient/{key}"], reference.scale[f"gradient/{key}"]
        # What is added to all keys of a text shifts all scores nearly alike: this gradient is what cancellation leaves.
        # To a lesser degree so are those that reach the output only through the scores of a few tokens' texts.
        of_queries = key.endswith(("attn2.to_q.bias", "norm2.bias", "norm2.weight"))
        planted = 2e-3 if key.endswith("attn2.to_k.bias") else 4e-4 if of_queries else 1e-4
        with pytest.raises(AssertionError, match="which rounding bounds"):
            assert_within(exact * (1 + planted), exact, scale)


def test_a_generator_shared_by_the_packs_of_a_step_would_show(reference_of: Callable[[int], Reference]) -> None:
    """Control: data-parallel ranks that draw the same noise, which is what one seed for all of them gives."""
    reference = reference_of(EQUALITY_SEED)
    same = train_plainly(reference.start, EQUALITY_SEED, lambda pack: pack - pack % PACKS_A_STEP)
    assert ((same["loss"] / reference.exact["loss"] - 1).abs() > 1e-3).all()


def test_captions_are_dropped_in_what_is_compared() -> None:
    packs = packs_of(EQUALITY_SEED)
    dropped = [
        not text.any()
        for number in range(PACKS_A_STEP * EQUALITY_STEPS)
        for text in noisy_of(next(packs), EQUALITY_SEED, number).text_BTD
    ]
    assert FLOW.caption_dropout > 0
    assert not EMPTY_CAPTION.any()
    assert 0 < sum(dropped) < len(dropped)
