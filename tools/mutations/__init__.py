"""Mutation testing by hand: realistic one-line mistakes in the four packages, and whether the tests notice each."""
