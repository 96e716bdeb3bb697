"""Computation on shares: right, hidden, and counted as the cost model says."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from assay.methods.vision.mpcvit import (
    KINDS,
    LAN,
    WAN,
    HeadMixture,
    MPCCostModel,
    MPCViT,
    Protocol,
    Traffic,
    TwoParties,
    attend,
    fuse,
    harden,
    harden_tokens,
    mixtures,
    private_attention,
    private_forward,
    select,
    token_mlps,
)

UNIT = 2.0**-16
TINY = {"num_classes": 3, "in_chans": 1, "input_size": 8, "depth": 2, "num_heads": 4, "embed_dim": 16}


def values(*shape, seed=0, low=-3.0, high=3.0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


def on_shares(operation, *tensors, seed=0):
    """The result of `operation(parties, *shares)`, and the traffic it took."""
    parties = TwoParties(seed=seed)
    shares = [parties.share(t) for t in tensors]
    out = operation(parties, *shares)
    traffic = parties.transcript.total
    return parties.reveal(out), Traffic(traffic.rounds - 1, traffic.bytes - 8 * math.prod(out.shape))


# -------------------------------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize(
    ("name", "exact", "low", "high", "error"),
    [
        ("square", torch.square, -30, 30, 0.003),
        ("relu", torch.relu, -30, 30, 2 * UNIT),
        ("exp", torch.exp, -4, 1, 0.06),
        ("reciprocal", torch.reciprocal, 0.5, 400, 0.002),
        ("rsqrt", torch.rsqrt, 0.1, 150, 0.01),
        ("gelu", F.gelu, -8, 8, 0.0055),
    ],
)
def test_operations_give_what_they_say_and_send_what_the_model_counts(name, exact, low, high, error):
    x = values(7, 5, low=low, high=high)
    found, traffic = on_shares(lambda parties, x: getattr(parties, name)(x), x)
    assert float((found - exact(x)).abs().max()) < error
    assert traffic == getattr(MPCCostModel(), name)(35)


def test_the_exponential_is_its_limit():
    x = values(50, low=-30, high=2)
    found, _ = on_shares(lambda parties, x: parties.exp(x), x)
    limit = (1 + x.double() / 256) ** 256
    assert float((found - limit).abs().max()) < 0.03
    assert float(on_shares(lambda parties, x: parties.exp(x), torch.full((1,), -400.0))[0]) == pytest.approx(
        0, abs=1e-3
    )


def test_small_numbers_have_reciprocals_too():
    x = torch.tensor([0.01, 0.02, 0.1, 1.0, 499.0])
    found, _ = on_shares(lambda parties, x: parties.reciprocal(x), x)
    torch.testing.assert_close(found, 1 / x, rtol=0.02, atol=2e-4)


def test_comparisons_are_exact():
    x = torch.cat([values(500, low=-1e6, high=1e6), torch.tensor([0.0, UNIT, -UNIT, 2.0**40, -(2.0**40)])])
    for seed in range(3):
        found, traffic = on_shares(lambda parties, x: parties.multiply(parties.share(torch.ones(505)), parties.negative(x),
                                                                      whole=True), x, seed=seed)  # fmt: skip
        assert torch.equal(found, (x < 0).float())
        assert traffic == MPCCostModel().negative(505) + MPCCostModel().multiply(505, 505)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
def test_the_maximum_of_rows_of_any_length(n):
    x = values(4, n, low=-100, high=100, seed=n)
    found, traffic = on_shares(lambda parties, x: parties.maximum(x), x)
    assert float((found - x.amax(-1, keepdim=True)).abs().max()) < 4 * UNIT
    assert traffic == MPCCostModel().maximum(4, n)
    assert traffic.rounds == 9 * math.ceil(math.log2(n))


def test_products_with_broadcasting_and_of_matrices():
    x, y = values(3, 5, 4), values(5, 1, seed=1)
    found, traffic = on_shares(lambda parties, x, y: parties.multiply(x, y), x, y)
    assert float((found - x * y).abs().max()) < 4 * UNIT * 3
    assert traffic == MPCCostModel().multiply(60, 5) == Traffic(1, 8 * 65)
    a, b = values(3, 5, 4), values(4, 6, seed=2)
    found, traffic = on_shares(lambda parties, a, b: parties.matmul(a, b), a, b)
    assert float((found - a @ b).abs().max()) < 4 * UNIT * 4
    assert traffic == Traffic(1, 8 * (60 + 24))


def test_what_is_linear_is_free():
    x, y = values(4, 3), values(3, seed=1)

    def linear(parties, x, y):
        return parties.add(parties.scale(x + y - (-x), -1 / 257), 1.5).map(lambda t: t[:2].flip(0))

    found, traffic = on_shares(linear, x, y)
    torch.testing.assert_close(found, (1.5 - (2 * x + y) / 257)[:2].flip(0), atol=3 * UNIT, rtol=0)
    assert traffic == Traffic()
    nothing, _ = on_shares(lambda parties, x: parties.scale(x, 0.0), x)
    assert torch.equal(nothing, torch.zeros(4, 3))


def test_layer_norm_on_shares():
    x, weight, bias = values(6, 16, low=-4, high=4), values(16, seed=1), values(16, seed=2)
    found, traffic = on_shares(lambda parties, x, w, b: parties.layer_norm(x, w, b, 1e-5), x, weight, bias)
    assert float((found - F.layer_norm(x, (16,), weight, bias)).abs().max()) < 0.02
    assert traffic == MPCCostModel().layer_norm(6, 16)
    assert traffic.rounds == 20


def test_the_ring_wraps_as_it_should():
    """Products of shares pass 2^63 all the time; only the sum of both has to be right."""
    x = torch.tensor([1234.5, -0.25, 3.0])
    for seed in range(20):
        found, _ = on_shares(lambda parties, x: parties.multiply(x, x), x, seed=seed)
        torch.testing.assert_close(found, x * x, rtol=1e-6, atol=2 * UNIT)


# ------------------------------------------------------------------------------------------------------------------------ hidden


def bits_set(messages):
    """The share of ones at every place of a word, over all words of one party, and of single bits."""
    words = torch.cat([m[0].flatten() for m in messages if m.dtype == torch.int64])
    bits = torch.cat([m[0].flatten() for m in messages if m.dtype == torch.bool])
    return ((words.unsqueeze(-1) >> torch.arange(64)) & 1).double().mean(0), bits.double().mean()


def test_messages_and_shares_look_random_whatever_the_secret():
    for secret in (torch.zeros(3000), torch.full((3000,), -7.25)):
        parties = TwoParties(seed=1, keep_messages=True)
        x = parties.share(secret)
        for part in x.parts:
            ones = ((part.unsqueeze(-1) >> torch.arange(64)) & 1).double().mean(0)
            assert float((ones - 0.5).abs().max()) < 0.05
        parties.gelu(x)
        parties.matmul(x.map(lambda t: t[:, None]), x.map(lambda t: t[None, :5]))
        words, bits = bits_set(parties.messages)
        assert float((words - 0.5).abs().max()) < 0.02
        assert float((bits - 0.5).abs()) < 0.01


def test_no_share_of_the_other_party_is_read_but_through_messages():
    """The first party's messages up to the first answer depend on its own share alone: the other half of everything is garbage here."""
    parties = [TwoParties(seed=3, keep_messages=True) for _ in range(2)]
    x = values(40)
    first, second = (p.share(x) for p in parties)
    assert torch.equal(first.parts, second.parts)
    second.parts[1] = torch.randint_like(second.parts[1], 2**40)
    for p, shares in zip(parties, (first, second), strict=True):
        p.multiply(shares, shares)
        p.negative(shares)
    for place in range(3):  # both openings of the product, and the first message of the comparison
        assert torch.equal(parties[0].messages[place][0], parties[1].messages[place][0])
    assert not torch.equal(parties[0].messages[0][1], parties[1].messages[0][1])


# --------------------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("kind", KINDS)
def test_attention_on_shares_is_attention(kind):
    q, k, v = (values(3, 17, 8, seed=seed, low=-1.5, high=1.5) for seed in range(3))
    found, traffic = on_shares(lambda parties, *t: private_attention(parties, kind, *t), q, k, v)
    exact = attend(kind, q[None], k[None], v[None])[0]
    assert float((found - exact).abs().max()) < {"scaling": 20 * UNIT, "softmax": 0.02}.get(kind, 0.01)
    assert traffic == MPCCostModel().attention(kind, 3, 17, 8)


def test_scaling_attention_sends_nothing_for_its_weights():
    """Two products of secrets and no more; those of Q (K^T V) are smaller than those of (Q K^T) V."""
    model, n, d = MPCCostModel(), 257, 16
    assert model.attention("scaling", 1, n, d) == model.multiply(n * d, n * d) + model.multiply(n * d, d * d)
    products = model.multiply(n * d, n * d) + model.multiply(n * n, n * d)
    for kind in ("softmax", "relu_softmax", "two_quad"):
        normalised = model.attention(kind, 1, n, d)
        assert normalised.rounds >= products.rounds + 29
        assert normalised.bytes > 2 * products.bytes
    assert model.attention("scaling", 1, n, d).bytes < products.bytes / 4


def test_no_positive_score_gives_zeros_on_shares_too():
    q, k, v = -torch.ones(1, 4, 8), torch.ones(1, 4, 8), values(1, 4, 8)
    found, _ = on_shares(lambda parties, *t: private_attention(parties, "relu_softmax", *t), q, k, v)
    assert float(found.abs().max()) < 0.01


# ---------------------------------------------------------------------------------------------------------------- whole networks


def hard_model(share=0.5, *, plus=False, relu_after=False, fused=False, seed=0):
    torch.manual_seed(seed)
    model = MPCViT(**TINY, linear_gelu=plus, relu_after=relu_after).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(2)  # out of the small numbers of the beginning
    harden(model, select([torch.rand(4) for _ in range(2)], share))
    if plus:
        harden_tokens(model, select([torch.rand(5) for _ in range(2)], 0.4))
    if fused:
        fuse(model)
    return model


@pytest.mark.parametrize(
    "settings",
    [{}, {"share": 0.0}, {"share": 1.0}, {"plus": True}, {"plus": True, "fused": True, "relu_after": True}],
)
def test_a_network_on_shares_gives_its_logits_and_sends_what_the_model_counts(settings):
    model = hard_model(**settings)
    images = values(2, 1, 8, 8)
    parties = TwoParties(seed=5)
    logits = private_forward(model, images, parties)
    with torch.no_grad():
        exact = model(images)
    assert float((logits - exact).abs().max()) < 0.05
    assert float(exact.std()) > 0.2
    counted = MPCCostModel().network(model, batch=2)
    seen = parties.transcript.during
    assert {name: counted[name] for name in ("linear", "norm", "gelu", "attention")} == {**seen}
    assert parties.transcript.total == sum(counted.values(), Traffic())
    assert parties.transcript.dealt > parties.transcript.total.bytes


@pytest.mark.parametrize("kind", ["softmax", "two_quad"])
def test_the_rivals_on_shares(kind):
    torch.manual_seed(0)
    model = MPCViT(**TINY, attention=kind).eval()
    images = values(1, 1, 8, 8)
    parties = TwoParties()
    logits = private_forward(model, images, parties)
    with torch.no_grad():
        assert float((logits - model(images)).abs().max()) < 0.05
    assert parties.transcript.total == sum(MPCCostModel().network(model).values(), Traffic())


def test_other_numbers_of_steps_are_counted_too():
    protocol = Protocol(fraction=14, exp_steps=6, reciprocal_steps=7, rsqrt_steps=4)
    parties = TwoParties(protocol)
    model = hard_model()
    private_forward(model, values(1, 1, 8, 8), parties)
    assert parties.transcript.total == sum(MPCCostModel(protocol).network(model).values(), Traffic())


def test_bytes_are_affine_in_the_heads_with_relu_softmax_and_so_is_the_latency_where_every_layer_has_both():
    with torch.device("meta"):
        model = MPCViT(num_classes=10, depth=7, num_heads=4, embed_dim=256)

    def spread(counts):
        return [tuple(["relu_softmax"] * count + ["scaling"] * (4 - count)) for count in counts]

    def total(counts):
        return sum(WAN.network(model, heads=spread(counts)).values(), Traffic())

    sent = [total([count, *[0] * 6]).bytes for count in range(5)]
    steps = {after - before for before, after in zip(sent[:-1], sent[1:], strict=True)}
    assert max(steps) - min(steps) <= 16  # whole bytes of messages of bits
    taken = [WAN.latency(model, heads=spread([count] * 7)) for count in (1, 2, 3)]
    assert taken[2] - taken[1] == pytest.approx(taken[1] - taken[0], rel=1e-4)
    assert total([1] * 7).rounds == total([3] * 7).rounds
    assert total([1, *[0] * 6]).rounds == total([0] * 7).rounds + 40  # the first of a layer brings the rounds
    assert WAN.latency(model, heads=spread([0] * 7)) < WAN.latency(model, heads=spread([1] * 7))
    softmax = [("softmax",) * 4] * 7
    assert WAN.latency(model, heads=softmax) > WAN.latency(model, heads=spread([4] * 7))
    assert LAN.latency(model, heads=softmax) < WAN.latency(model, heads=softmax) / 5


def test_seconds_are_half_round_trips_and_bytes():
    model = MPCCostModel(rtt=0.1, bandwidth=1000.0)
    assert model.seconds(Traffic(3, 500)) == pytest.approx(0.65)
    assert set(model.table()) > {"multiply", "relu", "exp", "reciprocal", "gelu"}
    assert model.table()["reciprocal"].rounds == 28


def test_what_is_refused():
    parties = TwoParties()
    with pytest.raises(ValueError, match="x must be finite"):
        parties.share(torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="x must be below"):
        parties.share(torch.tensor([1e15]))
    with pytest.raises(ValueError, match="fraction must be"):
        Protocol(fraction=30)
    with pytest.raises(ValueError, match="bandwidth must be"):
        MPCCostModel(bandwidth=0.0)
    searched = MPCViT(**TINY).eval()
    with pytest.raises(ValueError, match="heads are searched"):
        private_forward(searched, torch.zeros(1, 1, 8, 8), parties)
    with pytest.raises(ValueError, match="heads are searched"):
        WAN.network(searched)
    with pytest.raises(ValueError, match="heads must name kinds for 2 layers"):
        WAN.network(searched, heads=[("scaling",) * 4])
    with pytest.raises(ValueError, match="heads must name kinds for 4 heads a layer, got 3"):
        WAN.network(searched, heads=[("scaling",) * 4, ("scaling",) * 3])
    with pytest.raises(ValueError, match="heads must be one of"):
        WAN.network(searched, heads=[("scaling",) * 4, ("linear",) * 4])
    with pytest.raises(ValueError, match="kind must be one of"):
        WAN.attention("linear", 4, 5, 4)
    with pytest.raises(ValueError, match="8 pixels a side"):
        private_forward(hard_model(), torch.zeros(1, 1, 12, 12), parties)
    plus = MPCViT(**TINY, linear_gelu=True, attention="scaling").eval()
    assert token_mlps(plus)
    assert isinstance(mixtures(plus)[0], HeadMixture)
    with pytest.raises(ValueError, match="betas are searched"):
        private_forward(plus, torch.zeros(1, 1, 8, 8), parties)
    with pytest.raises(ValueError, match="betas are searched"):
        WAN.network(plus)
