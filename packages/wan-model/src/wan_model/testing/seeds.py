"""The seeds of numerical tests: a few by default, many on request."""

import os

VARIABLE = "WAN_SEEDS"


def seeds(*few: int) -> list[int]:
    """The seeds that a numerical test is parametrised with.

    Args:
        few: the seeds of an ordinary run; 11 by default.

    Returns:
        These, or 1 to N where the environment variable ``WAN_SEEDS`` is N. Not 0, which Megatron refuses.

    Raises:
        ValueError: the variable is not a positive number.
    """
    count = os.environ.get(VARIABLE, "")
    if not count:
        return list(few or (11,))
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(f"{VARIABLE} is {count!r}; expected a number of seeds, such as 100")
    return list(range(1, int(count) + 1))
