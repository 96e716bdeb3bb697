"""Masks, ranks and bits: what the papers on sparse and small models share.

scores.py            how much a weight matters: magnitude, SNIP, Taylor, Wanda, movement, and what a group of weights is worth
projections.py       from scores to masks with exact counts: global, per layer, per row, groups, blocks, N:M, transposable N:M
straight_through.py  gradients past a mask, to the weights and to learned scores
schedules.py         how sparse at which step, and iterative magnitude pruning
allocate.py          densities, ranks and bits for every layer under one budget
masks.py             masks on a model, in the form of `torch.nn.utils.prune`
units.py             which channels, neurons and heads can go one by one
removal.py           and taking them out for real
formats.py           N:M and bitmask storage, and torch's semi-structured tensors

Weights, scores and masks are always (out, in, ...): transformers' transposed `Conv1D` is turned around where it is read and written.
"""
