"""Experiments of the sequence mixers."""
