"""Requests and options, validated before anything is loaded."""
