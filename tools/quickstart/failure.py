"""The error of the quickstart, and a check that raises it."""


class QuickstartError(Exception):
    """A check failed; the message is one sentence with the actual and the expected value."""


def require(holds: bool, sentence: str) -> None:
    """End the quickstart with a sentence unless a condition holds.

    Raises:
        QuickstartError: it does not hold.
    """
    if not holds:
        raise QuickstartError(sentence)
