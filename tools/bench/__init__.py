"""The benchmarks of ``nox -s bench``: comparisons on the CPU and, if there is one, on a GPU."""
