"""A cache is cut in all layers or in none."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from assay.methods.core.generation.crop import croppable


def filled(tokens: int, *, recording: bool = False, pieces: int = 1) -> DynamicCache:
    """A layer of all tokens and one of a window of 4, each entry its own number."""
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicSlidingWindowLayer(4)]
    if recording:
        cache.activate_past_recording()
    for piece in torch.arange(float(tokens)).chunk(pieces):
        for layer in cache.layers:
            layer.update(piece.view(1, 1, -1, 1), piece.view(1, 1, -1, 1))
    return cache


def held(cache: DynamicCache) -> list[list[float]]:
    return [layer.keys.flatten().tolist() for layer in cache.layers]


@pytest.mark.parametrize(("tokens", "removed", "recording"), [(3, 3, False), (3, 1, False), (9, 5, True), (9, 9, True)])
def test_what_may_be_cut_is_cut(tokens, removed, recording):
    cache = filled(tokens, recording=recording, pieces=3)
    assert croppable(cache, -removed, tokens) == -removed
    cache.crop(-removed)
    left = [float(place) for place in range(tokens - removed)]
    assert held(cache) == [left, left[-3:]]


@pytest.mark.parametrize(("tokens", "removed"), [(4, 1), (5, 2), (9, 1), (9, 9)])
def test_a_window_that_let_go_of_tokens_is_not_cut(tokens, removed):
    cache = filled(tokens)
    before = held(cache)
    with pytest.raises(ValueError, match=f"a window of 4 has left tokens behind.* got -{removed}"):
        croppable(cache, -removed, tokens)
    assert held(cache) == before
    assert croppable(cache, 0, tokens) == 0


def test_more_than_there_is():
    for wrong in (-4, 1):
        with pytest.raises(ValueError, match="tokens_to_remove must be a whole number at least -3 and at most 0"):
            croppable(filled(3), wrong, 3)
    with pytest.raises(TypeError, match="tokens_to_remove"):
        croppable(filled(3), -1.0, 3)
