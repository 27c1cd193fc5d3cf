"""Names of options as click reads them."""

import pytest

from wan_model.system.option_names import option_names


@pytest.mark.parametrize(
    ("names", "declared"),
    [
        (["model"], ["--model", "model"]),
        (["min-frames"], ["--min-frames", "--min_frames", "min_frames"]),
        (["listing", "manifest"], ["--listing", "--manifest", "listing"]),
        (["json", "as-json"], ["--json", "--as-json", "--as_json", "json"]),
        (["a-b/no-a-b"], ["--a-b/--no-a-b", "--a_b/--no_a_b", "a_b"]),
    ],
)
def test_an_option_has_hyphens_or_underscores(names: list[str], declared: list[str]) -> None:
    assert option_names(*names) == declared
