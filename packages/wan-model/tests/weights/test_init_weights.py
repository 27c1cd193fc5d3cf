"""The official initial values, and that they do not depend on who holds which part."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from wan_model import PackLayout, Stage, TorchOps, WanConfig, WanDiT, init_weights

CONFIG = WanConfig(num_heads=4, head_dim=32, num_layers=2, ffn_dim=384, text_dim=96, text_length=8, freq_dim=64)


def initialised(seed: int = 0, stage: Stage | None = None) -> dict[str, Tensor]:
    model = WanDiT(CONFIG, stage=stage)
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    init_weights(model, seed=seed)
    return dict(model.state_dict())


def test_official_statistics() -> None:
    width, tensors = CONFIG.hidden_size, initialised()
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    for key, tensor in tensors.items():
        if key.startswith("proj_out.") or key.endswith("bias"):
            assert not tensor.any(), key
        elif ".norm" in key:
            assert (tensor == 1).all(), key
        elif "scale_shift_table" in key:
            assert tensor.std().item() == pytest.approx(width**-0.5, rel=0.15), key
        elif "time_embedder" in key or "text_embedder" in key:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.05), key
            assert tensor.abs().max() > 0.05, f"{key} is normal, not uniform"
        else:
            rows = tensor.flatten(1)
            bound = math.sqrt(6 / sum(rows.shape))
            assert rows.abs().max().item() == pytest.approx(bound, rel=0.01), key
            assert rows.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), key
            assert abs(rows.mean().item()) < 0.05 * bound, key


def test_untrained_model_predicts_zero() -> None:
    model = WanDiT(CONFIG)
    init_weights(model, seed=0)
    out = model(torch.ones(4, 64), torch.tensor([500.0]), torch.ones(1, 8, 96), PackLayout(((1, 2, 2),)))
    assert torch.equal(out, torch.zeros(4, 64))


def test_every_tensor_has_its_own_draw_and_the_seed_matters() -> None:
    first, same, other = initialised(0), initialised(0), initialised(1)
    drawn = [key for key, tensor in first.items() if tensor.std() > 0]
    assert len(drawn) == 2 * 11 + 1 + 1 + 5  # blocks: ten weights and a table each; head's table; patch; embedders
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in drawn)
    queries = [first[key] for key in drawn if key.endswith("to_q.weight")]
    assert len(queries) == 4
    assert not any(torch.equal(queries[0], query) for query in queries[1:])


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    first = initialised()
    before = torch.get_rng_state()
    model = WanDiT(CONFIG)
    init_weights(model, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, first[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_tensors_whatever_the_partition(
    split_ops: Callable[[int, int], TorchOps], joined: Callable[[list[WanDiT]], dict[str, Tensor]], ranks: int
) -> None:
    whole, parts = initialised(), [WanDiT(CONFIG, split_ops(rank, ranks)) for rank in range(ranks)]
    for part in parts:
        init_weights(part, seed=0)
    assert sum(part.numel() for part in parts[0].parameters()) < sum(tensor.numel() for tensor in whole.values())
    together = joined(parts)
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[key], whole[key]) for key in whole)


def test_the_same_tensors_whatever_the_stage() -> None:
    whole, last = initialised(), initialised(stage=Stage(1, 2, is_first=False, is_last=True))
    assert "blocks.1.attn1.to_q.weight" in last
    assert all(torch.equal(tensor, whole[key]) for key, tensor in last.items())
