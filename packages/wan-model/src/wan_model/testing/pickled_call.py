"""A pickle that runs code, for tests that a file is refused before its code has run."""


class PickledCall:
    """Its pickle is a call, which whoever unpickles it makes."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        """Asked for by pickle."""
        return self._call
