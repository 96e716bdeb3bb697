"""Sequence mixers: layers that take attention's place in a language model, with a state for generation."""
