"""The GPU check of ``tools/gpu_check.py``: whether the project is right and fast on a GPU, as a table of rows.

Without a GPU every stage runs at a tiny size on the CPU, so that on a GPU nothing is new but the device.
"""
