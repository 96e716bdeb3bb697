"""The models of the sweep run, differ from sequence to sequence, and are the same every time."""

from __future__ import annotations

import pytest
import torch
from tests.properties.architectures import ARCHITECTURES, build, output


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_runs(name):
    found = output(build(name), name)
    assert found.isfinite().all()
    assert not torch.allclose(found[0], found[1])
    assert torch.equal(found, output(build(name), name))
