"""Path256's arms: the block-sparse one is attention under the butterfly's mask, and the arms are what the experiment says."""

from __future__ import annotations

import pytest
import torch

from assay.experiments.mixers import long_convs_path as path
from assay.experiments.mixers.pixels import learned
from assay.methods.core.attention.plan import AttentionPlan, execute
from assay.workloads.sequences import pathfinder


def butterfly(blocks: int) -> torch.Tensor:
    """(blocks, blocks) bool, by the definition."""
    apart = torch.arange(blocks)[:, None] ^ torch.arange(blocks)
    return (apart & (apart - 1)) == 0


def test_block_sparse_attention_is_attention_under_the_butterfly_mask():
    torch.manual_seed(0)
    sparse = path.Attention(16, block=16).double()
    x = torch.randn(2, 256, 16, dtype=torch.float64)
    q, k, v = sparse.qkv(x).unflatten(2, (3, path.HEADS, -1)).permute(2, 0, 3, 1, 4)
    plan = AttentionPlan(256, 256, 16, False, butterfly(16).expand(2, path.HEADS, -1, -1).contiguous())
    expected = sparse.proj(execute(plan, q, k, v, backend="reference").transpose(1, 2).flatten(2))
    torch.testing.assert_close(sparse(x), expected)


def test_two_blocks_see_everything():
    torch.manual_seed(0)
    sparse, dense = path.Attention(16, block=16).double(), path.Attention(16).double()
    dense.load_state_dict(sparse.state_dict())
    x = torch.randn(1, 32, 16, dtype=torch.float64)
    torch.testing.assert_close(sparse(x), dense(x))


def test_gradients_of_the_block_sparse_attention():
    torch.manual_seed(0)
    sparse = path.Attention(4, block=2).double()
    x = torch.randn(1, 16, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sparse, x)


def test_blocks_that_are_no_power_of_two():
    with pytest.raises(ValueError, match="power of two"):
        path.partners(torch.zeros(1, 1, 48, 4), 16)


@pytest.mark.parametrize("side", [16, 32, 64, 128, 256])
def test_what_is_kept_is_a_small_part_of_the_square(side):
    block = path.block_of(side**2)
    kept = (side**2 // block).bit_length()  # itself and one for each bit
    assert butterfly(side**2 // block).sum(1).unique().tolist() == [kept]
    assert kept * block / side**2 < 0.35


@pytest.mark.parametrize("arm", [*path.ARMS, "dense"])
def test_a_step_of_training_lowers_the_loss(arm):
    step = path.step_of(arm, *pathfinder(4, 16), dim=16, depth=1)
    losses = [step() for _ in range(30)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("arm", ["long convolution", "block-sparse", "dense"])
def test_every_arm_sees_from_one_end_to_the_other(arm):
    torch.manual_seed(0)
    model = path.network(arm, 256, 2, 16, 4).eval()
    layers = model.layers if arm == "long convolution" else model.mixing
    x = torch.randn(1, 256, 16, requires_grad=True)
    y = x
    for layer in layers:
        y = y + layer(y)
    y[0, 0].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).all()


def test_always_the_same_answer_is_the_majority():
    """Held-out answers are not spread evenly: a network that never looks must not seem to have learned."""

    class Same(torch.nn.Linear):
        def forward(self, x):
            return super().forward(torch.ones(len(x), 1))

    found = learned(lambda tokens, classes, dim, depth: Same(1, classes), 1e-3, 0, "tiny")
    assert found["majority"] >= 0.1
    assert found["accuracy"] <= found["majority"]
    assert "disturbed" not in found


def test_a_rate_is_chosen_on_pictures_that_are_not_the_tests(monkeypatch):
    from assay.experiments.mixers import pixels

    asked = []

    class Watch(torch.nn.Linear):
        def forward(self, x):
            asked.append(x.detach().flatten(1))
            return super().forward(x.mean(1))

    for seed in (0, pixels.CHOICE_SEED):
        learned(lambda tokens, classes, dim, depth: Watch(1, classes), 1e-3, seed, "tiny")
    test, choice = asked[4], asked[-1]  # after four steps of training
    assert not (test[:, None] == choice[None]).all(-1).any()
