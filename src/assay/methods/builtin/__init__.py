"""Transforms that are not from any paper: dtype, attention back end, compilation, weight-only quantisation, the decode loop."""
