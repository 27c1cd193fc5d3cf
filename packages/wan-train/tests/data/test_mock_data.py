"""Packs of random data."""

import torch

from wan_model.tiny import TINY_CONFIG
from wan_train.data.mock_data import MockConfig, MockLoader

SHAPES = MockConfig(shapes=[[2, 4, 6], [1, 2, 2]], context_length=5, number_packed_samples=3)


def mock(rank: int = 0, ranks: int = 1, multiple: int = 1) -> MockLoader:
    return MockLoader(SHAPES, TINY_CONFIG, rank=rank, ranks=ranks, multiple=multiple, seed=7)


def test_mock_packs_take_the_shapes_in_turn_and_are_truly_random() -> None:
    packs = iter(mock(multiple=4))
    first, second = next(packs), next(packs)
    assert first.layout.grids == ((2, 2, 3), (1, 1, 1), (2, 2, 3))
    assert first.layout.total % 4 == 0
    assert not torch.equal(first.tokens_SC, second.tokens_SC)
    texts = [*first.text_BTD, *second.text_BTD]
    assert len({text.sum(1)[0].item() for text in texts}) == len(texts)
    assert float(first.text_BTD[:, 5:].abs().max()) == 0.0


def test_two_ranks_share_the_packs_of_one() -> None:
    alone, left, right = iter(mock()), iter(mock(0, 2)), iter(mock(1, 2))
    for pack in (next(left), next(right), next(left), next(right)):
        assert torch.equal(pack.tokens_SC, next(alone).tokens_SC)


def test_mock_packs_continue_where_they_were() -> None:
    loader = mock()
    packs = iter(loader)
    next(packs)
    state = loader.state_dict()
    wanted = next(packs)
    resumed = mock()
    resumed.load_state_dict(state)
    assert torch.equal(next(iter(resumed)).tokens_SC, wanted.tokens_SC)
