"""Devices, memory and parallelism."""
