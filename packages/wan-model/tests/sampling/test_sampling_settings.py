import pytest

from wan_model.sampling.settings import NEGATIVE_PROMPT, Settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "0 sampling steps"),
        ({"shift": 0.0}, "shift is 0"),
        ({"shift": float("inf")}, "shift is inf"),
        ({"guidance": 0.5}, "guidance scale is 0.5"),
        ({"guidance": float("nan")}, "guidance scale is nan"),
    ],
)
def test_impossible_settings_are_named(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**change)  # type: ignore[arg-type]


def test_official_defaults() -> None:
    settings = Settings()
    assert (settings.steps, settings.shift, settings.guidance, settings.solver) == (50, 5.0, 5.0, "unipc")
    assert len(NEGATIVE_PROMPT.split("\N{FULLWIDTH COMMA}")) == 28
    assert NEGATIVE_PROMPT.startswith("色调艳丽")
    assert NEGATIVE_PROMPT.endswith("倒着走")
