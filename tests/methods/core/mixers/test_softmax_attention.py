from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.properties.mixers import check_mixer

from assay.methods.core.mixers.attention import SoftmaxAttention, local_attention, rotate


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2},
        {"heads": 9, "kv_heads": 3},
        {"heads": 2, "reach": 5},
        {"heads": 2, "reach": 0},
        {"heads": 2, "rotary": False},
    ],
    ids=str,
)
def test_is_a_mixer(options):
    check_mixer(lambda: SoftmaxAttention(36, **options), longest=768)


def test_local_blocks_are_the_masked_whole():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 75, 8), torch.randn(2, 2, 75, 8), torch.randn(2, 2, 75, 8)
    mask = torch.ones(2, 75, dtype=torch.bool)
    mask[1, :30] = False
    for reach in (0, 1, 7, 20, 74, 200):
        distance = torch.arange(75)[:, None] - torch.arange(75)
        seen = ((distance >= 0) & (distance <= reach) & mask[:, None, None, :]) | (distance == 0)
        expected = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
        found = local_attention(q, k, v, reach, mask)
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1, :, 30:], expected[1, :, 30:])


def test_nothing_from_beyond_the_reach():
    mixer = SoftmaxAttention(16, heads=2, reach=3).double()
    x = torch.randn(1, 40, 16, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(mixer(x)[:, 30].sum(), x)
    assert grad[:, :27].abs().max() == 0
    assert grad[:, 27:31].abs().amax(-1).min() > 0


def test_rotary_scores_depend_on_differences_only():
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        return (rotate(q, torch.tensor([[i]])) * rotate(k, torch.tensor([[j]]))).sum()

    torch.testing.assert_close(score(17, 5), score(112, 100))
    assert not torch.isclose(score(17, 5), score(17, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"heads": 5}, "heads"), ({"heads": 4, "kv_heads": 3}, "kv_heads"), ({"reach": -1}, "reach")],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxAttention(16, **options)
