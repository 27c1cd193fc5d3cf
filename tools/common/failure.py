"""The error of the tools that run the programs one after another, and a check that raises it."""


class ToolFailure(Exception):
    """A command or a check failed; the message is one sentence with the actual and the expected value."""


def require(holds: bool, sentence: str) -> None:
    """End the tool with a sentence unless a condition holds.

    Raises:
        ToolFailure: it does not hold.
    """
    if not holds:
        raise ToolFailure(sentence)
