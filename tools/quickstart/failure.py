"""How the quickstart ends when something is not as it claims."""


class QuickstartError(Exception):
    """One sentence: what was got, what was expected."""


def require(holds: bool, sentence: str) -> None:
    """Go on, or end the quickstart with a sentence.

    Raises:
        QuickstartError: the claim does not hold.
    """
    if not holds:
        raise QuickstartError(sentence)
