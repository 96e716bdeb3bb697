"""Sequence mixers: what stands where attention stands in a language model, with a state for generation."""
