"""The thesis' search: Gumbel weights, tables of costs that add up, and what theta learns where one half of the loss is silent."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.errors import InputError
from assay.measure.cost import count_cost
from assay.methods.compression import efficient_dnns as room
from assay.methods.compression.efficient_dnns import tables


class Slow(nn.Module):
    """A layer of the toy space: `gain` times the input, or noise that hides it."""

    def __init__(self, gain: float, noise: float = 0.0) -> None:
        super().__init__()
        self.gain, self.noise = nn.Parameter(torch.tensor(gain)), noise

    def forward(self, x):
        return self.gain * x + self.noise * torch.randn_like(x)


class Head(nn.Module):
    """Two classes: whether the mean of the map is below or above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, x):
        mean = self.scale * x.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


def toy(layers=2):
    """At every layer an operator that keeps the image and one that buries it under noise."""
    choices = {"keep": lambda: Slow(1.0), "bury": lambda: Slow(1.0, 20.0)}
    return room.Space(nn.Identity, tuple(dict(choices) for _ in range(layers)), Head)


def toy_data(n=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=generator)
    images = torch.randn(n, 1, 2, 2, generator=generator) * 0.3 + (2.0 * labels - 1)[:, None, None, None]
    return images, labels


def net_of(space, seed=0):
    torch.manual_seed(seed)
    return room.SuperNet(space)


def convolutions():
    """Two layers of convolutions, the second of which halves the map."""

    def conv(inputs, outputs, kernel, stride):
        return lambda: nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)

    first = {"skip": nn.Identity, "k3": conv(4, 4, 3, 1), "k5": conv(4, 4, 5, 1)}
    second = {"k1": conv(4, 8, 1, 2), "k3": conv(4, 8, 3, 2)}
    head = lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))  # noqa: E731
    return room.Space(conv(1, 4, 3, 1), (first, second), head)


# ------------------------------------------------------------------------------------------------------------ Gumbel weights


def test_gumbel_weights_lie_on_the_simplex():
    theta = torch.randn(7, requires_grad=True)
    for tau in (0.05, 1.0, 5.0):
        weights = room.gumbel_weights(theta, tau)
        assert bool((weights >= 0).all())
        assert float(weights.sum().detach()) == pytest.approx(1, abs=1e-5)
    weights[0].backward()
    assert float(theta.grad.abs().sum()) > 0


def test_as_tau_falls_weights_become_one_hot_with_the_right_odds():
    generator = torch.Generator().manual_seed(0)
    theta = torch.tensor([0.0, 1.0, 2.0])
    draws = torch.stack([room.gumbel_weights(theta, 1e-4, generator=generator) for _ in range(3000)])
    assert float((draws.amax(1) > 0.999).float().mean()) > 0.99
    assert draws.mean(0).tolist() == pytest.approx(theta.softmax(0).tolist(), abs=0.03)
    shifted = torch.stack([room.gumbel_weights(theta, 50.0, generator=generator) for _ in range(300)])
    assert float((shifted - 1 / 3).abs().max()) < 0.2
    with pytest.raises(ValueError, match="tau must be"):
        room.gumbel_weights(theta, 0.0)


def test_the_temperature_falls_from_5_to_the_same_end_however_many_epochs():
    assert room.anneal(0) == 5.0
    assert room.anneal(1) == pytest.approx(5 * math.exp(-0.045))
    assert room.anneal(90) == pytest.approx(room.anneal(9, 9))
    assert room.anneal(9, 9) == pytest.approx(5 * math.exp(-4.05))


# -------------------------------------------------------------------------------------------------------------------- tables


def test_the_expected_cost_of_one_hot_weights_is_the_cost_of_that_network():
    table = room.CostTable("us", ({"a": 1.5, "b": 4.0}, {"c": 2.0, "d": 3.0, "e": 7.0}), fixed=10.0)
    hot = [torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0, 1.0])]
    assert float(table.expected(hot)) == table.cost(("b", "e")) == 21.0
    assert float(table.expected([torch.tensor([0.5, 0.5]), hot[1]])) == 10 + 2.75 + 7
    with pytest.raises(ValueError, match="weights must have"):
        table.expected(hot[:1])
    with pytest.raises(ValueError, match="architecture\\[1\\] must be one of"):
        table.cost(("a", "a"))
    with pytest.raises(ValueError, match="architecture must name 2"):
        table.cost(("a",))


def test_the_gradient_of_the_expected_cost_lowers_slow_operators():
    table = room.CostTable("us", ({"fast": 1.0, "slow": 9.0, "middle": 5.0},))
    theta = torch.zeros(3, requires_grad=True)
    table.expected([theta.softmax(0)]).backward()
    assert theta.grad.tolist() == pytest.approx([-4 / 3, 4 / 3, 0], abs=1e-6)
    sampled = torch.zeros(3, requires_grad=True)
    for _ in range(50):
        table.expected([room.gumbel_weights(sampled, 1.0)]).backward()
    assert float(sampled.grad[1]) > 0 > float(sampled.grad[0])  # descent lowers the slow one


def test_a_table_is_written_and_read(tmp_path):
    table = room.CostTable("us", ({"a": 1.0, "b": 2.5},), fixed=3.0)
    table.write(tmp_path / "table.json")
    assert room.CostTable.read(tmp_path / "table.json") == table
    for text in ("{", "[]", '{"unit": "us", "fixed": 0, "layers": [{"a": "x"}]}', json.dumps({"unit": "us"})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match="holds no table"):
            room.CostTable.read(tmp_path / "bad.json")
    with pytest.raises(InputError, match="holds no table"):
        room.CostTable.read(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="must be a finite number"):
        room.CostTable("us", ({"a": float("nan")},))


@pytest.mark.parametrize("what", ["macs", "params"])
def test_a_counted_table_adds_up_to_the_count_of_the_network(what):
    space, x = convolutions(), torch.randn(2, 1, 8, 8)
    table = room.counted_table(space, x, what)
    for architecture in (("skip", "k1"), ("k5", "k3"), ("k3", "k1")):
        assert table.cost(architecture) == getattr(count_cost(space.network(architecture).eval(), x), what)
    if what == "macs":
        assert table.layers[1] == {"k1": 2 * 16 * 32, "k3": 2 * 16 * 32 * 9}


def test_a_measured_table_has_the_median_of_each_operator_on_its_own_input(monkeypatch):
    """The clock is a toy: every run takes as many microseconds as the module has parameters."""
    seen = []

    def clock(functions, rounds):
        seen.append({name: tuple(function.args[1].shape) for name, function in functions.items()})
        for function in functions.values():
            function()
        micro = {name: 1e-6 * sum(p.numel() for p in f.args[0].parameters()) for name, f in functions.items()}
        timings = type("Timings", (), {})()
        timings.seconds = {name: [9.0, value, 0.0] for name, value in micro.items()}
        return timings

    monkeypatch.setattr(tables, "compare_many", clock)
    space = convolutions()
    table = room.measured_table(space, torch.randn(2, 1, 8, 8), rounds=3)
    assert table.unit == "us"
    for architecture in (("skip", "k1"), ("k5", "k3")):
        params = sum(p.numel() for p in space.network(architecture).parameters())
        assert table.cost(architecture) == pytest.approx(params)
    assert table.cheapest() == ("skip", "k1")
    assert seen == [
        {"stem": (2, 1, 8, 8)},
        {"skip": (2, 4, 8, 8), "k3": (2, 4, 8, 8), "k5": (2, 4, 8, 8)},
        {"k1": (2, 4, 8, 8), "k3": (2, 4, 8, 8)},
        {"head": (2, 8, 4, 4)},
    ]


def test_a_really_measured_table_has_times():
    table = room.measured_table(convolutions(), torch.randn(1, 1, 8, 8), rounds=2)
    assert all(0 < value < 1e6 for layer in table.layers for value in layer.values())
    assert table.fixed > 0


def test_operators_of_a_layer_must_agree_in_shape():
    space = room.Space(nn.Identity, ({"a": nn.Identity, "b": lambda: nn.MaxPool2d(2)},), nn.Flatten)
    with pytest.raises(ValueError, match="layers\\[0\\] must give maps of one shape"):
        room.counted_table(space, torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="at least one layer"):
        room.Space(nn.Identity, (), nn.Identity)


def test_random_networks_are_equally_likely():
    space, generator = convolutions(), torch.Generator().manual_seed(0)
    drawn = [space.random(generator) for _ in range(600)]
    assert len(set(drawn)) == 6
    assert sum(first == "k5" for first, _ in drawn) / 600 == pytest.approx(1 / 3, abs=0.07)


def test_bit_widths_are_a_table_too():
    table = room.bits_table([100, 300], (2, 8), unit="bits")
    assert table.layers == ({"2": 200.0, "8": 800.0}, {"2": 600.0, "8": 2400.0})
    assert room.bits_table([100], (2,)).cost(("2",)) == 25


# ------------------------------------------------------------------------------------------------------------------ the search


def test_a_super_net_with_one_hot_weights_is_that_network():
    space = convolutions()
    net = net_of(space)
    network = space.network(("k5", "k1"))
    network[0].load_state_dict(net.stem.state_dict())
    network[1].load_state_dict(net.layers[0].operators[2].state_dict())
    network[2].load_state_dict(net.layers[1].operators[0].state_dict())
    network[3].load_state_dict(net.head.state_dict())
    x = torch.randn(3, 1, 8, 8)
    out = net(x, [torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0])])
    torch.testing.assert_close(out, network(x))
    ids = {id(p) for p in net.weights()} | {id(p) for p in net.thetas()}
    assert ids == {id(p) for p in net.parameters()}
    assert [len(theta) for theta in net.thetas()] == [3, 2]


def test_the_loss_is_cross_entropy_times_a_power_of_the_logarithm_of_the_cost():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    expected = F.cross_entropy(logits, labels) * 0.2 * math.log(250.0) ** 0.6
    torch.testing.assert_close(room.fbnet_loss(logits, labels, torch.tensor(250.0)), expected)


def test_with_equal_costs_only_accuracy_moves_theta():
    space = toy()
    equal = room.CostTable("us", tuple({"keep": 40.0, "bury": 40.0} for _ in range(2)), fixed=20.0)
    net, (images, labels) = net_of(space), toy_data()
    weights = net.draw(1.0, generator=torch.Generator().manual_seed(1))
    logits = net(images, weights)
    both = torch.autograd.grad(
        room.fbnet_loss(logits, labels, equal.expected(weights)), net.thetas(), retain_graph=True
    )
    alone = torch.autograd.grad(F.cross_entropy(logits, labels), net.thetas())
    factor = 0.2 * math.log(100.0) ** 0.6
    for a, b in zip(both, alone, strict=True):
        torch.testing.assert_close(a, factor * b, atol=1e-6, rtol=1e-4)
    found = room.search(
        net, equal, toy_data(seed=1), toy_data(seed=2), epochs=12, warmup=1, batch=16, rate=1e-4, theta_rate=0.2
    )
    assert found.best == ("keep", "keep")
    assert all(layer["keep"] > 0.8 for layer in found.probabilities)


def test_without_cross_entropy_the_fastest_operator_of_every_layer_wins():
    costs = ({"keep": 9.0, "bury": 2.0}, {"keep": 3.0, "bury": 8.0})
    table = room.CostTable("us", costs, fixed=5.0)
    found = room.search(
        net_of(toy()), table, toy_data(seed=1), toy_data(seed=2), epochs=12, warmup=1, batch=16, rate=1e-4, theta_rate=0.2,
        loss=lambda logits, labels, cost: torch.log(cost),
    )  # fmt: skip
    assert found.best == table.cheapest() == ("bury", "keep")
    assert found.losses[-1] < found.losses[0]


def test_cost_and_accuracy_are_weighed():
    """The useful operator is taken although it costs more."""
    dear = room.CostTable("us", ({"keep": 3.0, "bury": 2.0}, {"keep": 3.0, "bury": 2.0}), fixed=5.0)
    found = room.search(
        net_of(toy()),
        dear,
        toy_data(seed=1),
        toy_data(seed=2),
        epochs=12,
        warmup=1,
        batch=16,
        rate=1e-4,
        theta_rate=0.2,
    )
    assert found.best == ("keep", "keep")


def test_theta_rests_while_weights_warm_up_and_images_are_counted():
    net = net_of(toy())
    table = room.CostTable("us", ({"keep": 5.0, "bury": 2.0},) * 2, fixed=1.0)
    seen = []

    def loss(logits, labels, cost):
        seen.append(len(labels))
        return cost.log()

    found = room.search(
        net, table, toy_data(40), toy_data(24, seed=3), epochs=3, warmup=2, batch=16, rate=1e-4, loss=loss
    )
    assert seen == [16, 8]  # one epoch of three
    assert found.images == 3 * 40 + 24
    assert len(found.losses) == 1
    before = [p.clone() for p in net.weights()]
    room.search(net, table, toy_data(40), toy_data(24, seed=3), epochs=1, warmup=0, rate=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(before, net.weights(), strict=True))


def test_the_same_seed_finds_the_same():
    table = room.CostTable("us", ({"keep": 5.0, "bury": 2.0},) * 2, fixed=1.0)

    def once():
        torch.manual_seed(5)
        net = room.SuperNet(
            room.Space(nn.Identity, ({"keep": lambda: Slow(1.0), "bury": lambda: Slow(0.2)},) * 2, Head)
        )
        return room.search(net, table, toy_data(seed=1), toy_data(seed=2), epochs=2, warmup=1, rate=0.01, seed=7)

    assert once() == once()


def test_networks_are_drawn_from_what_was_learnt():
    net = net_of(convolutions())
    with torch.no_grad():
        net.thetas()[0].copy_(torch.tensor([0.0, 8.0, 0.0]))
    generator = torch.Generator().manual_seed(0)
    drawn = [net.sample(generator) for _ in range(200)]
    assert sum(first == "k3" for first, _ in drawn) > 190
    assert {second for _, second in drawn} == {"k1", "k3"}


def test_bit_widths_are_searched_by_the_same_code():
    """Layers that are copies in different bits, and the bytes of each: the cheapest widths where accuracy says nothing."""
    from torch.nn.utils import parametrize

    def copy(bits):
        def make():
            layer = nn.Conv2d(1, 1, 1)
            parametrize.register_parametrization(layer, "weight", room.FewBits(bits))
            return layer

        return make

    space = room.Space(nn.Identity, ({"2": copy(2), "4": copy(4), "8": copy(8)},) * 2, Head)
    table = room.bits_table([4000, 8000], (2, 4, 8))
    found = room.search(
        net_of(space), table, toy_data(seed=1), toy_data(seed=2), epochs=6, warmup=0, batch=16, rate=1e-4, theta_rate=0.3,
        loss=lambda logits, labels, cost: cost.log(),
    )  # fmt: skip
    assert found.best == ("2", "2")


def test_bad_searches_are_refused():
    net, data = net_of(toy()), toy_data()
    table = room.CostTable("us", ({"keep": 5.0, "bury": 2.0},) * 2)
    with pytest.raises(ValueError, match="table must have the operators"):
        room.search(net, room.CostTable("us", ({"bury": 5.0, "keep": 2.0},) * 2), data, data)
    with pytest.raises(ValueError, match="take a smaller unit"):
        room.search(net, room.CostTable("s", ({"keep": 0.2, "bury": 0.1},) * 2), data, data)
    with pytest.raises(ValueError, match="cost must be above 1"):
        room.fbnet_loss(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), torch.tensor(0.5))
    with pytest.raises(ValueError, match="batch must be"):
        room.search(net, table, data, data, epochs=1, warmup=0, batch=1)
    with pytest.raises(ValueError, match="warmup must be"):
        room.search(net, table, data, data, epochs=3, warmup=3)
    with pytest.raises(ValueError, match="the labels of theta_data"):
        room.search(net, table, data, (data[0], data[1][:5]), epochs=1, warmup=0)
    with pytest.raises(ValueError, match="loss must be finite"):
        room.search(net, table, data, data, epochs=1, warmup=0, loss=lambda logits, labels, cost: cost * float("nan"))


@pytest.mark.parametrize(("name", "kernel", "expansion", "groups"), [("k3_e1_g2", 3, 1, 2), ("k5_e6", 5, 6, 1)])
def test_a_block_of_the_space_has_the_counts_of_its_formula(name, kernel, expansion, groups):
    space = room.fbnet_space([(8, 2, 1), (12, 1, 2)], stem=8, stem_stride=1, num_classes=3, in_chans=1)
    assert [len(layer) for layer in space.layers] == [9, 9, 8]  # no skip where the width changes
    x = torch.randn(1, 1, 6, 6)
    table = room.counted_table(space, x)
    middle = 8 * expansion
    assert table.layers[0][name] == 36 * (8 * middle // groups + kernel**2 * middle + middle * 8 // groups)
    assert table.layers[2][name] == 36 * 8 * middle // groups + 9 * (kernel**2 * middle + middle * 12 // groups)
    assert table.layers[1]["skip"] == 0
    assert table.fixed == 36 * 9 * 8 + 12 * 3
    block = space.layers[2][name]()
    convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.weight.numel() for m in convolutions) == (
        8 * middle // groups + kernel**2 * middle + middle * 12 // groups
    )
    assert space.network((name, "skip", name))(x).shape == (1, 3)


def test_a_block_adds_its_input_where_it_fits():
    x = torch.randn(2, 8, 4, 4)
    block = room.FBNetBlock(8, 8, groups=2, expansion=1).eval()
    assert torch.equal(block(x), block.layers(x) + x)
    strided = room.FBNetBlock(8, 8, 2).eval()
    assert torch.equal(strided(x), strided.layers(x))
    with pytest.raises(ValueError, match="operators\\[0\\] must be one of"):
        room.fbnet_space([(8, 1, 1)], operators=("k7_e1",))
    with pytest.raises(ValueError, match="at least one operator"):
        room.fbnet_space([(8, 1, 1)], stem=16, operators=("skip",))


def test_checkpoints_give_the_same_gradients_from_fewer_kept_numbers():
    space = room.fbnet_space([(8, 2, 1)], stem=8, stem_stride=1, num_classes=3, in_chans=1)
    x, labels = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    seen = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        net = room.SuperNet(space, checkpoint=checkpoint)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            loss = F.cross_entropy(net(x, [theta.softmax(0) for theta in net.thetas()]), labels)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        seen.append((loss.detach(), grads, sum(kept)))
    torch.testing.assert_close(seen[0][0], seen[1][0])
    for plain, again in zip(seen[0][1], seen[1][1], strict=True):
        torch.testing.assert_close(plain, again, atol=1e-5, rtol=1e-4)
    assert seen[1][2] < seen[0][2] / 2
