"""Seeds of the run's random numbers."""

import torch

from wan_train.data.seeds import generator_for


def test_a_seed_depends_on_purpose_and_numbers_alone() -> None:
    def draw(*key: int, purpose: str = "noise") -> list[float]:
        return torch.rand(3, generator=generator_for(purpose, *key)).tolist()

    state = torch.get_rng_state()
    assert draw(1, 2) == draw(1, 2)
    assert len({tuple(draw(*key)) for key in [(1, 2), (2, 1), (12,), (1, 2, 0)]}) == 4
    assert draw(1, 2) != draw(1, 2, purpose="mock")
    assert torch.equal(torch.get_rng_state(), state)
