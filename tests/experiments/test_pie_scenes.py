"""Scenes of PIE's experiment: the edit leads from the old text to the new, and where it must matter it does."""

from __future__ import annotations

import pytest
import torch

from assay.experiments.attention.pie_positional_integrity import AHEAD, scene

pytestmark = pytest.mark.model


@pytest.mark.parametrize("kind", ["insert", "delete", "edit", "define", "rename"])
@pytest.mark.parametrize("seed", [0, 3])
def test_the_edit_makes_the_new_text_of_the_old(smollm2, kind, seed):
    found = scene(smollm2.tokenizer, 300, 30, 64, kind, seed=seed)
    start, stop, run = found["at"]
    assert torch.equal(torch.cat([found["old"][:start], run, found["old"][stop:]]), found["new"])
    assert len(found["new"]) == 300
    assert len(found["ahead"]) == AHEAD
    assert not torch.equal(found["old"], found["new"])


@pytest.mark.parametrize("kind", ["define", "rename"])
@pytest.mark.parametrize("seed", [0, 3])
def test_only_the_edit_brings_the_name_that_is_used_at_the_cursor(smollm2, kind, seed):
    found = scene(smollm2.tokenizer, 300, 30, 64, kind, seed=seed)
    name = smollm2.tokenizer.decode(found["ahead"][found["name"]]).strip()
    old, new, run = (smollm2.tokenizer.decode(ids) for ids in (found["old"], found["new"], found["at"][2]))
    assert name in run
    assert name not in old
    assert name not in new.replace(run, "")


def test_more_sites_than_there_are(smollm2):
    with pytest.raises(ValueError, match="number of sites"):
        scene(smollm2.tokenizer, 300, 30, 64, "define", seed=100_000)
