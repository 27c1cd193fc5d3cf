"""Mutation testing with a fixed list: realistic one-line mistakes, and whether the tests detect each of them."""
