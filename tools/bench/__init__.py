"""The benchmarks of ``nox -s bench``: ratios measured side by side, on the CPU and, where there is one, on a GPU."""
