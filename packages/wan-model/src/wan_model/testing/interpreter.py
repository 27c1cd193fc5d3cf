"""Whether kernels can be tested without a GPU."""

import importlib.metadata


def interpreter_problem() -> str | None:
    """Why Triton's interpreter (``TRITON_INTERPRET=1``) cannot load a value with this NumPy, or None.

    Before 3.7 it makes a number of an array of one element, which NumPy 2.4 ended.
    """

    def release(name: str) -> tuple[int, ...]:
        try:
            return tuple(map(int, importlib.metadata.version(name).split(".")[:2]))
        except importlib.metadata.PackageNotFoundError:
            return (0, 0)

    if release("triton") >= (3, 7) or release("numpy") < (2, 4):
        return None
    found = importlib.metadata.version("numpy")
    return f"Triton before 3.7 interprets nothing with NumPy {found}; it needs 2.3"
