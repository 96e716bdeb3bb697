"""Experiments on the sequence mixers."""
