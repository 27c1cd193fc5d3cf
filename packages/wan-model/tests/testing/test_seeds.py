"""How many seeds a numerical test runs with."""

import pytest

from wan_model.testing import seeds


def test_a_few_seeds_by_default_and_many_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WAN_SEEDS", raising=False)
    assert seeds() == [11]
    assert seeds(3, 7) == [3, 7]
    monkeypatch.setenv("WAN_SEEDS", "100")
    assert seeds(3, 7) == list(range(1, 101))


@pytest.mark.parametrize("value", ["0", "-3", "many", "1.5"])
def test_other_values_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_SEEDS", value)
    with pytest.raises(ValueError, match=rf"WAN_SEEDS is '{value}'; expected a number of seeds"):
        seeds()
