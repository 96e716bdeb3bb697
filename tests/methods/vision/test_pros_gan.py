"""ProS-GAN: published sizes, average precision over ties, what the attacks aim at and keep within, and that the model stays as it was."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.measure.cost import count_cost
from assay.methods.vision import pros_gan
from assay.methods.vision.pros_gan import (
    DHTA,
    P2P,
    Database,
    Discriminator,
    Generator,
    HashRobustness,
    Noise,
    ProSGAN,
    PrototypeNet,
    Victim,
    anchor_code,
    average_precision,
    bits_of,
    change,
    code_loss,
    hamming,
    networks,
    pack,
    perceptibility,
    pull,
    share_class,
    slope_at,
    targets_for,
    train_on_attacked,
    unpack,
    within,
)
from assay.methods.vision.pros_gan.training import rate_share

CLASSES, BITS, SIZE = 4, 12, 16
TINY = {
    "epochs": 8, "batch": 24, "rate": 3e-3, "rec_weight": 1.0, "prototype_steps": 60, "prototype_rate": 3e-3, "hidden": 32,
    "width": 4, "label_width": 16, "discriminator_width": 4, "depth": 4,
}  # fmt: skip


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def codes_of(n, bits=BITS, seed=0):
    return bits_of(drawn(n, bits, seed=seed))


def bars(n, seed):
    """Images whose class is which of four bars is bright, with noise."""
    classes = torch.arange(n) % CLASSES
    images = 0.3 + 0.15 * drawn(n, 1, SIZE, SIZE, seed=seed)
    for row, kind in enumerate(classes.tolist()):
        images[row, :, 4 * kind : 4 * kind + 4] += 0.35
    return images.clamp(0, 1), F.one_hot(classes, CLASSES).float()


class Net(nn.Module):
    """A small hashing model with everything that could be changed by mistake: BatchNorm's statistics, dropout, gradients."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(128, BITS)
        )

    def forward(self, x):
        return self.body(x)


@pytest.fixture(scope="module")
def world():
    """A trained model, its database, and queries that it has not seen."""
    torch.manual_seed(0)
    images, labels = bars(96, 1)
    model = train_on_attacked(Net(), images, labels, steps=60, rate=1e-2, attack_steps=0)
    return model, Database.of(model, images, labels), *bars(40, 2)


@pytest.fixture(scope="module")
def fitted(world):
    model, database, _, _ = world
    return ProSGAN(**TINY).fit(Victim(model), database)


# ------------------------------------------------------------------------------------------------------------ published sizes


def parameters(net):
    return sum(value.numel() for value in net.parameters())


def test_parameters_are_those_of_the_released_networks(monkeypatch):
    monkeypatch.setattr(networks, "spectral_norm", lambda layer: layer)  # it adds none, and takes long
    with torch.device("meta"):
        assert parameters(PrototypeNet(21, 32)) == 2_214_965
        assert parameters(Generator()) == 21_454_121
        assert parameters(Discriminator(21)) == 12_250_048


def test_work_of_a_forward_pass_is_known_before_it_runs():
    size, width, wide, channels = 32, 4, 16, 3  # at 224 pixels, of 64 and 128 channels, the sum is the same
    first = size // 16
    label = 512 * wide * first**2 + sum((first << i) ** 2 * (wide >> i) * (wide >> i + 1) * 16 for i in range(4))
    label += size**2 * (wide >> 4) * channels * 9
    encoder = (
        size**2 * 2 * channels * width * 49
        + (size // 2) ** 2 * 2 * width**2 * 16
        + (size // 4) ** 2 * 8 * width**2 * 16
    )
    blocks = 12 * (size // 4) ** 2 * (4 * width) ** 2 * 9
    decoder = (size // 4) ** 2 * 8 * width**2 * 16 + (size // 2) ** 2 * 2 * width**2 * 16
    decoder += size**2 * (width + channels) * channels * 9
    net = Generator(width=width, label_width=wide, image_size=size, in_chans=channels).eval()
    found = count_cost(net, torch.zeros(1, channels, size, size), torch.zeros(1, 512))
    assert found.macs == label + encoder + blocks + decoder


def test_released_weights_are_taken_by_name_and_shape():
    with torch.device("meta"):
        made, prototypes = Generator(), PrototypeNet(21, 32)
    state = {"label_encoder.fc.0.weight": (25088, 512), "label_encoder.fc.0.bias": (25088,)}
    state |= {f"label_encoder.transform.{3 * i}.weight": (128 >> i, 64 >> i, 4, 4) for i in range(4)}
    state |= {"label_encoder.transform.12.weight": (3, 8, 3, 3)}
    for place, shape in ((0, (64, 6, 7, 7)), (3, (128, 64, 4, 4)), (6, (256, 128, 4, 4))):
        state |= {f"image_encoder.{place}.weight": shape, f"image_encoder.{place}.bias": shape[:1]}
    for part, first in (("image_encoder", 9), ("decoder", 0)):
        state |= {f"{part}.{first + i}.main.{j}.weight": (256, 256, 3, 3) for i in range(3) for j in (0, 3)}
    state |= {
        "decoder.3.weight": (256, 128, 4, 4),
        "decoder.6.weight": (128, 64, 4, 4),
        "residual.0.weight": (3, 67, 3, 3),
    }
    given = {key: torch.empty(shape, device="meta") for key, shape in state.items()}
    made.load_state_dict(pros_gan.generator_from_official(given), assign=True)
    shapes = {"feature.0": (4096, 21), "feature.2": (512, 4096), "hashing.0": (32, 512), "classifier.0": (21, 512)}
    given = {f"{key}.weight": torch.empty(shape, device="meta") for key, shape in shapes.items()}
    given |= {f"{key}.bias": torch.empty(shape[0], device="meta") for key, shape in shapes.items()}
    prototypes.load_state_dict(pros_gan.prototypes_from_official(given), assign=True)
    with pytest.raises(ValueError, match=r"state must have the released code's keys .* got 'other.weight'"):
        pros_gan.generator_from_official({"other.weight": torch.zeros(1)})


# --------------------------------------------------------------------------------------------------------------- the networks


def tiny_generator(**settings):
    torch.manual_seed(0)
    return Generator(**{"width": 4, "label_width": 16, "image_size": 32, **settings}).eval()


def test_the_generator_gives_images_that_depend_on_the_image_and_the_label_alone():
    made, x, feature = tiny_generator(), 2 * uniform(3, 3, 32, 32) - 1, drawn(3, 512)
    out = made(x, feature)
    assert out.shape == x.shape
    assert out.abs().max() <= 1
    assert torch.allclose(out[1:2], made(x[1:2], feature[1:2]), atol=1e-5)
    assert not torch.allclose(out, made(x, feature.flip(0)), atol=1e-3)
    assert not torch.allclose(out, made(x.flip(0), feature), atol=1e-3)
    assert torch.allclose(out, made(x.contiguous(memory_format=torch.channels_last), feature), atol=1e-5)
    half = copy.deepcopy(made).bfloat16()(x.bfloat16(), feature.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), out, atol=0.1)


def test_every_parameter_of_the_networks_has_a_gradient():
    made, judge = tiny_generator().train(), Discriminator(CLASSES, width=4, image_size=32)
    net = PrototypeNet(CLASSES, BITS, hidden=16)
    found = net(torch.eye(CLASSES))
    out = judge(made(2 * uniform(4, 3, 32, 32) - 1, found.feature))
    (out.square().sum() + found.code.sum() + found.label.sum()).backward()
    for each in (made, judge, net):
        for name, value in each.named_parameters():
            assert value.grad is not None, name
    quiet = {"encoder.0.bias", "encoder.3.bias", "encoder.6.bias"}  # a norm takes away what they add
    assert all(value.grad.abs().max() > 0 for name, value in made.named_parameters() if name not in quiet)


@pytest.mark.slow
def test_the_generator_can_be_exported():
    made, x, feature = tiny_generator(image_size=16, in_chans=1), uniform(2, 1, 16, 16), drawn(2, 512)
    exported = torch.export.export(made, (x, feature)).module()
    assert torch.allclose(exported(x, feature), made(x, feature), atol=1e-5)


def test_the_discriminator_keeps_its_batch_and_its_largest_singular_values():
    judge = Discriminator(CLASSES, width=4, image_size=32).train()
    for _ in range(60):
        judge(uniform(1, 3, 32, 32))
    judge.eval()
    assert judge(uniform(1, 3, 32, 32)).shape == (1, CLASSES + 1)
    for layer in judge.body:
        if isinstance(layer, nn.Conv2d):
            assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=0.02)


# ------------------------------------------------------------------------------------------------- codes and average precision


def plain_average_precision(relevant):
    hits = [rank for rank, good in enumerate(relevant, 1) if good]
    return sum(number / rank for number, rank in enumerate(hits, 1)) / len(hits)


def test_average_precision_is_the_mean_over_all_orders_of_ties():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        items = bits_of(torch.randn(6, 2, generator=generator))
        query, relevant = bits_of(torch.randn(1, 2, generator=generator)), torch.rand(6, generator=generator) < 0.5
        relevant[int(torch.randint(6, (), generator=generator))] = True
        distances = hamming(query, items)[0].tolist()
        orders = [
            p
            for p in itertools.permutations(range(6))
            if all(distances[a] <= distances[b] for a, b in itertools.pairwise(p))
        ]
        expected = sum(plain_average_precision([bool(relevant[i]) for i in order]) for order in orders) / len(orders)
        assert float(average_precision(query, items, relevant[None])[0]) == pytest.approx(expected, abs=1e-12)


def test_without_ties_it_is_the_average_precision_of_the_sorted_items():
    query, items = torch.ones(1, 8), torch.ones(9, 8).tril(-1)[:, :8] * 2 - 1
    relevant = torch.tensor([[True, False, True, True, False, False, True, False, True]])
    order = hamming(query, items)[0].argsort()
    assert hamming(query, items).unique().numel() == 9
    expected = plain_average_precision(relevant[0, order].tolist())
    assert float(average_precision(query, items, relevant)[0]) == pytest.approx(expected, abs=1e-12)
    assert float(average_precision(query, items, ~relevant & False)[0]) == 0


def test_the_order_of_the_database_changes_nothing():
    queries, items = codes_of(5, 4), codes_of(200, 4, seed=1)
    relevant, order = uniform(5, 200) < 0.2, torch.randperm(200, generator=torch.Generator().manual_seed(0))
    expected = average_precision(queries, items, relevant)
    assert torch.allclose(average_precision(queries, items[order], relevant[:, order]), expected)
    assert (
        average_precision(queries, items[:1].expand(200, 4), relevant).sub(relevant.double().mean(1)).abs().max() < 0.05
    )


def test_distances_are_those_of_packed_bytes_and_of_faiss():
    faiss = pytest.importorskip("faiss")
    queries, items = codes_of(3, 32), codes_of(50, 32, seed=1)
    assert torch.equal(unpack(pack(items)), items)
    index = faiss.IndexBinaryFlat(32)
    index.add(pack(items).numpy())
    distances, found = index.search(pack(queries).numpy(), 50)
    ours = hamming(queries, items).gather(1, torch.from_numpy(found))
    assert torch.equal(ours, torch.from_numpy(distances).long())


def test_zero_is_a_bit_and_the_loss_is_a_distance():
    assert bits_of(torch.tensor([0.0, -0.0, -1e-9])).tolist() == [1, 1, -1]
    a, b = codes_of(1), codes_of(1, seed=1)
    assert float(code_loss(a, b)) == pytest.approx(2 * int(hamming(a, b)) / BITS)


def test_no_code_is_nearer_to_the_items_than_their_anchor():
    items = codes_of(9, 6)
    everything = torch.tensor(list(itertools.product((1.0, -1.0), repeat=6)))
    sums = hamming(everything, items).sum(1)
    assert int(hamming(anchor_code(items)[None], items).sum()) == int(sums.min())
    assert (items.sum(0) != 0).all()  # nine votes: no bit is undecided
    assert anchor_code(torch.tensor([[1.0], [-1.0]])).tolist() == [1.0]


def test_targets_are_drawn_uniformly_or_from_other_classes():
    labels, candidates = torch.eye(3)[torch.arange(3000) % 3], torch.eye(3)
    generator = torch.Generator().manual_seed(0)
    counts = targets_for(labels, candidates, generator=generator).mean(0)
    assert torch.allclose(counts, torch.full((3,), 1 / 3), atol=0.05)
    others = targets_for(labels, candidates, generator=generator, own=False)
    assert not (others * labels).any()
    assert share_class(labels[:3], candidates).tolist() == torch.eye(3).bool().tolist()
    with pytest.raises(ValueError, match="candidates must have a label that shares no class"):
        targets_for(torch.ones(1, 3), candidates, own=False)


# ------------------------------------------------------------------------------------------------------------ within a bound


@pytest.mark.parametrize("norm", ["linf", "rms"])
def test_bounds_hold_for_every_image(norm):
    images, attacked = uniform(4, 3, 5, 5), uniform(4, 3, 5, 5, seed=1)
    bound = torch.tensor([0.01, 0.1, 0.2, 2.0])
    found = within(attacked, images, bound, norm)
    sizes = (found - images).flatten(1).abs().amax(1) if norm == "linf" else change(images, found)
    assert (sizes <= bound + 1e-6).all()
    assert torch.allclose(found[3], attacked[3], atol=1e-6)
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.allclose(within(attacked, images, 0.1, norm)[1], found[1], atol=1e-7)
    still = images.clone().requires_grad_()
    within(still, images, 0.1, norm).sum().backward()
    assert torch.isfinite(still.grad).all()


def test_perceptibility_is_the_root_of_the_mean_square():
    images, attacked = uniform(4, 3, 5, 5), uniform(4, 3, 5, 5, seed=1)
    assert perceptibility(images, attacked) == pytest.approx(math.sqrt(F.mse_loss(attacked, images)), rel=1e-6)
    assert perceptibility(images[:1], attacked[:1]) == pytest.approx(float(change(images, attacked)[0]), rel=1e-6)


def test_what_leaves_the_range_of_pixels_takes_no_share_of_the_bound():
    images = torch.zeros(2, 1, 8, 8)
    attacked = images + codes_of(2, 64).view(2, 1, 8, 8)  # half of it would be darker than black
    assert torch.allclose(change(images, within(attacked, images, 0.1, "rms")), torch.full((2,), 0.1), atol=1e-6)


def test_noise_is_random_on_black_and_white_too(world):
    model, database, _, labels = world
    for flat in (0.0, 1.0):
        images = torch.full((40, 1, SIZE, SIZE), flat)
        noise = Noise(norm="rms").fit(Victim(model), database)(images, labels, bound=0.1)
        assert (noise - images).flatten(1).std(1).min() > 0.03
        assert torch.allclose(change(images, noise), torch.full((40,), 0.1), atol=1e-5)


def test_noise_changes_each_image_as_much_as_it_is_told(world):
    model, database, images, labels = world
    bound = torch.linspace(0.01, 0.4, len(images))
    for norm in ("linf", "rms"):
        noise = Noise(norm=norm).fit(Victim(model), database)(images, labels, bound=bound)
        assert torch.allclose(change(images, noise), bound, atol=1e-5)
        assert noise.min() >= 0
        assert noise.max() <= 1


# ------------------------------------------------------------------------------------------------------------ iterative attacks


def test_slopes_are_the_released_ones_at_2000_steps():
    expected = {
        0: 0.1,
        999: 0.1,
        1000: 0.2,
        1199: 0.2,
        1200: 0.3,
        1400: 0.5,
        1600: 0.7,
        1799: 0.7,
        1800: 1.0,
        1999: 1.0,
    }
    assert {step: slope_at(step, 2000) for step in expected} == expected
    assert [slope_at(step, 10) for step in range(10)] == [0.1] * 5 + [0.2, 0.3, 0.5, 0.7, 1.0]


@pytest.mark.parametrize("direction", ["gradient", "sign", "unit"])
def test_steps_follow_the_formula(direction):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, BITS)).double()
    images, codes = uniform(3, 1, 4, 4).double(), codes_of(3).double()
    found = pull(Victim(model), images, codes, steps=4, step=0.05, bound=0.08, direction=direction)
    x, (weight, bias) = images.flatten(1), (value.detach() for value in model[1].parameters())
    for step in range(4):
        slope = {0: 0.1, 1: 0.1, 2: 0.2, 3: 0.5}[step]
        relaxed = torch.tanh(slope * (x @ weight.T + bias))
        gradient = (codes * (1 - relaxed**2) * slope / BITS) @ weight
        if direction == "sign":
            gradient = gradient.sign()
        if direction == "unit":
            gradient = gradient / gradient.square().mean(1, keepdim=True).sqrt()
        x = (images.flatten(1) + (x + 0.05 * gradient - images.flatten(1)).clamp(-0.08, 0.08)).clamp(0, 1)
    assert torch.allclose(found.flatten(1), x, atol=1e-9)


def test_an_attack_of_an_image_does_not_depend_on_its_batch(world):
    model, _, images, _ = world
    settings = {"steps": 5, "step": 0.02, "bound": 0.1, "direction": "unit", "norm": "rms"}
    codes = codes_of(4)
    together = pull(Victim(model), images[:4], codes, **settings)
    assert torch.allclose(together[2:3], pull(Victim(model), images[2:3], codes[2:3], **settings), atol=1e-5)


def test_p2p_aims_at_an_item_and_dhta_at_the_majority_of_nine(world):
    model, database, images, labels = world
    p2p, dhta = (kind(steps=1).fit(Victim(model), database) for kind in (P2P, DHTA))
    assert (p2p.n, dhta.n, p2p.name, dhta.name) == (1, 9, "p2p-1", "dhta-1")
    for target, code in zip(labels[:4], p2p.target_codes(labels[:4]), strict=True):
        assert (database.codes[database.rows_of(target)] == code).all(1).any()
    own = database.codes[database.rows_of(labels[0])]
    mean = hamming(dhta.target_codes(labels[:1]), own).double().mean()
    assert mean <= hamming(own, own).double().mean()
    assert torch.equal(dhta.target_codes(labels), dhta.target_codes(labels))


def test_more_steps_at_a_larger_bound_reach_the_target_and_go_no_further_than_its_code(world):
    model, database, images, labels = world
    attacks = [DHTA(steps=40, direction="sign", step=0.02, bound=bound, name=f"{bound}") for bound in (0.02, 0.3)]
    report = HashRobustness(model, database, attacks).report(images, labels)
    clean, weak, strong = report.rows
    assert clean.t_map < 0.45 < clean.map
    assert weak.t_map < strong.t_map
    assert strong.t_map > 0.9
    assert strong.noise_t_map < 0.5
    assert strong.map < clean.map
    assert strong.t_map <= strong.ceiling + 0.02
    assert weak.largest <= 0.02 + 1e-6


# --------------------------------------------------------------------------------------------------------------------- losses


def test_losses_are_those_of_the_formulas():
    net = PrototypeNet(CLASSES, BITS, hidden=16).double()
    labels, codes = torch.eye(CLASSES).double(), codes_of(7).double()
    similar = uniform(CLASSES, 7) < 0.4
    found = net(labels)
    theta = found.code @ codes.T / 2
    likelihood = torch.where(similar, theta.sigmoid(), 1 - theta.sigmoid()).log().mean()
    expected = (
        -likelihood
        + (found.code.sign() - found.code).square().sum() / (1e4 * CLASSES)
        + (found.label - labels).square().mean()
    )
    assert torch.allclose(pros_gan.prototype_loss(found, labels, codes, similar), expected)
    judged = drawn(2, CLASSES + 1)
    for made in (False, True):
        wanted = torch.cat([torch.eye(CLASSES)[:2], torch.full((2, 1), float(made))], 1)
        assert torch.allclose(
            pros_gan.adversarial_loss(judged, torch.eye(CLASSES)[:2], made=made), F.mse_loss(judged, wanted)
        )


def test_the_rate_is_whole_for_fifty_epochs_and_falls_to_nothing_in_fifty():
    assert [rate_share(epoch, 100) for epoch in (0, 49)] == [1, 1]
    assert rate_share(50, 100) == pytest.approx(50 / 51)
    assert rate_share(99, 100) == pytest.approx(1 / 51)
    assert rate_share(0, 1) == 1


# -------------------------------------------------------------------------------------------------------------------- ProS-GAN


def test_prototypes_lie_nearest_to_the_codes_of_their_label(fitted, world):
    _, database, _, _ = world
    codes = fitted.target_codes(torch.eye(CLASSES))
    mean = torch.stack(
        [hamming(codes, database.codes[database.rows_of(own)]).double().mean(1) for own in torch.eye(CLASSES)]
    )
    assert mean.argmin(0).tolist() == [0, 1, 2, 3]
    assert database.average_precision(codes, torch.eye(CLASSES)).min() > 0.9


def test_one_forward_pass_attacks_any_image_towards_any_label(fitted, world):
    model, database, images, labels = world
    report = HashRobustness(model, database, [fitted]).report(images, labels)
    clean, attacked = report.rows
    assert attacked.t_map > max(clean.t_map, attacked.noise_t_map) + 0.3
    assert attacked.t_map <= attacked.ceiling + 0.02
    targets = labels.roll(1, 0)
    found = fitted(images, targets)
    assert torch.allclose(found[3:4], fitted(images[3:4], targets[3:4]), atol=1e-5)
    assert not torch.allclose(found, fitted(images, targets.roll(1, 0)), atol=1e-3)
    bounded = fitted(images, targets, bound=0.05)
    assert (bounded - images).abs().max() <= 0.05 + 1e-6


def test_the_model_is_bit_for_bit_what_it_was(world):
    model, database, images, labels = world
    model = copy.deepcopy(model)
    model.body[3].train()  # a mode that somebody set
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    attacks = [ProSGAN(**{**TINY, "epochs": 1, "prototype_steps": 2}), DHTA(steps=2), Noise()]
    HashRobustness(model, database, attacks).report(images[:8], labels[:8])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(value.grad is None and value.requires_grad for value in model.parameters())


def test_training_is_repeatable_and_leaves_the_global_generator_alone(world):
    model, database, images, labels = world
    short = {**TINY, "epochs": 1, "prototype_steps": 2}
    torch.manual_seed(3)
    first = ProSGAN(**short).fit(Victim(model), database)(images[:2], labels[:2])
    after = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(()))
    assert torch.equal(first, ProSGAN(**short).fit(Victim(model), database)(images[:2], labels[:2]))
    assert not torch.equal(first, ProSGAN(**short, seed=1).fit(Victim(model), database)(images[:2], labels[:2]))


@pytest.mark.slow
def test_a_heavier_reconstruction_gives_back_the_image(fitted, world):
    model, database, images, labels = world
    faithful = ProSGAN(**{**TINY, "rec_weight": 1e4}).fit(Victim(model), database)
    faithful.name = "faithful"
    report = HashRobustness(model, database, [fitted, faithful]).report(images, labels)
    clean, free, held = report.rows
    assert held.perceptibility < 0.7 * free.perceptibility
    assert abs(held.t_map - clean.t_map) < 0.5 * (free.t_map - clean.t_map)


# --------------------------------------------------------------------------------------------------------- report and defence


def test_the_report_is_a_table_and_plain_json(world):
    model, database, images, labels = world
    report = HashRobustness(model, database, [Noise(), DHTA(steps=1)]).report(images, labels)
    assert [line.split()[0] for line in report.table().splitlines()] == ["attack", "clean", "noise", "dhta-1"]
    assert (report.queries, report.items, report.bits) == (40, 96, BITS)
    assert json.loads(json.dumps(report.to_dict()))["rows"][2]["attack"] == "dhta-1"
    assert all(row.low <= row.t_map <= row.high for row in report.rows)
    assert report["clean"].perceptibility == 0
    assert report["noise"].t_map == pytest.approx(report["noise"].noise_t_map, abs=0.1)
    with pytest.raises(KeyError, match="attack must be one of clean, noise, dhta-1, got 'other'"):
        report["other"]


def test_an_attack_made_for_one_model_is_judged_on_another(world):
    model, database, images, labels = world
    torch.manual_seed(5)
    other = train_on_attacked(Net(), database.images, database.labels, steps=40, rate=1e-2, attack_steps=0)
    attack = DHTA(steps=20, direction="sign", step=0.02, bound=0.15).fit(Victim(model), database)
    found = HashRobustness(other, Database.of(other, database.images, database.labels), [attack]).report(images, labels)
    assert attack.victim.model is model
    assert found.rows[1].ceiling is None
    assert found.rows[1].t_map > found.rows[0].t_map


def test_an_index_without_images_is_enough_for_iterative_attacks(world):
    model, database, images, labels = world
    index = Database(
        unpack(pack(torch.cat([database.codes] * 2, 1)))[:, :BITS], database.labels
    )  # as bytes somebody stored
    again = HashRobustness(model, index, [DHTA(steps=1)]).report(images, labels)
    assert again.rows[0] == HashRobustness(model, database, []).report(images, labels).rows[0]
    with pytest.raises(ValueError, match="pros_gan learns from images: the database must have them"):
        HashRobustness(model, index, [ProSGAN(**TINY)]).report(images, labels)


def test_a_model_that_ends_in_a_tanh_says_so(world):
    model, database, images, labels = world
    ended, codes = Victim(nn.Sequential(model, nn.Tanh()), ends_in_tanh=True), codes_of(4)
    plain = Victim(model)
    assert torch.allclose(ended.relaxed(images, 0.1), plain.relaxed(images))
    assert torch.equal(ended.bits(images), plain.bits(images))
    assert pull(ended, images[:4], codes, steps=1, step=1.0, bound=0.1).shape == images[:4].shape


def test_without_attacks_the_defence_is_plain_training():
    images, labels = bars(16, 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIZE**2, BITS))
    found = train_on_attacked(model, images, labels, steps=3, rate=1e-2, attack_steps=0, batch=16, seed=4)
    plain, generator = copy.deepcopy(model), torch.Generator().manual_seed(4)
    optimizer = torch.optim.Adam(plain.parameters(), 1e-2)
    for step in range(3):
        rows = torch.randperm(16, generator=generator)
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / 3))
        optimizer.zero_grad()
        pros_gan.dpsh_loss(plain(images[rows]).tanh(), labels[rows]).backward()
        optimizer.step()
    assert torch.allclose(found[1].weight, plain[1].weight, atol=1e-6)
    assert not torch.equal(found[1].weight, model[1].weight)


def test_training_on_attacked_images_makes_attacks_fail(world):
    model, database, images, labels = world
    attack = {"steps": 10, "direction": "sign", "step": 0.03, "bound": 0.15}
    settings = {"steps": 40, "rate": 5e-3, "bound": 0.15}
    found = {}
    for name, attack_steps in (("plain", 0), ("hardened", 3)):
        trained = train_on_attacked(model, database.images, database.labels, attack_steps=attack_steps, **settings)
        again = Database.of(trained, database.images, database.labels)
        found[name] = HashRobustness(trained, again, [DHTA(**attack)]).report(images, labels)["dhta-10"]
    assert found["hardened"].t_map < found["plain"].t_map - 0.15


# -------------------------------------------------------------------------------------------------------------------- bad input

IMAGES, LABELS = torch.zeros(2, 1, 16, 16), torch.eye(2)
MODEL = nn.Sequential(nn.Flatten(), nn.Linear(256, 8))
INDEX = Database(torch.ones(2, 8), LABELS)
LONG = Database(torch.ones(2, 16), LABELS)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: Generator(image_size=40), ValueError, "image_size must be a multiple of 16, got 40"),
        (lambda: Generator(label_width=24), ValueError, "label_width must be a multiple of 16, got 24"),
        (lambda: tiny_generator()(torch.zeros(1, 3, 16, 16), torch.zeros(1, 512)), ValueError, "images must have shape"),
        (lambda: tiny_generator()(torch.zeros(2, 3, 32, 32), torch.zeros(1, 512)), ValueError, "feature must have shape"),
        (lambda: Discriminator(2, image_size=16), ValueError, "image_size must be a whole number at least 32, got 16"),
        (lambda: PrototypeNet(0, 8), ValueError, "num_classes must be a whole number at least 1, got 0"),
        (lambda: DHTA(steps=0), ValueError, "steps must be a whole number at least 1, got 0"),
        (lambda: DHTA(norm="l2"), ValueError, "norm must be one of 'linf', 'rms', got 'l2'"),
        (lambda: DHTA(bound=0), ValueError, "bound must be a finite number above 0, got 0"),
        (lambda: DHTA(direction="up"), ValueError, "direction must be one of"),
        (lambda: ProSGAN(rate=float("nan")), ValueError, "rate must be a finite number above 0, got nan"),
        (lambda: DHTA()(IMAGES, LABELS), ValueError, "dhta-2000 must be fitted first"),
        (lambda: Victim("model"), TypeError, "model must be a torch.nn.Module, got str"),
        (lambda: Victim(nn.Flatten(2)).bits(IMAGES), ValueError, "the model's output must have shape"),
        (lambda: Database.of(MODEL, IMAGES + 2, LABELS), ValueError, r"images must lie in \[0, 1\], got 2 to 2"),
        (lambda: Database.of(MODEL, IMAGES, torch.zeros(2, 2)), ValueError, "labels must be vectors of 0 and 1"),
        (lambda: Database(torch.zeros(2, 8), LABELS), ValueError, r"codes must be \+1 and -1"),
        (lambda: Database(torch.ones(2, 8), LABELS, IMAGES[:1]), ValueError, "images must be as many as codes, 2, got 1"),
        (lambda: INDEX.rows_of(torch.ones(2)), ValueError, r"one of the database's, got \[0, 1\]"),
        (lambda: HashRobustness(MODEL, INDEX, [DHTA(), DHTA()]), ValueError, "attacks must have different names"),
        (lambda: HashRobustness(MODEL, LONG, []).report(IMAGES, LABELS), ValueError, "items must have shape"),
        (lambda: pack(torch.ones(1, 12)), ValueError, "bits must be a multiple of 8 to be packed, got 12"),
        (lambda: unpack(torch.ones(1, 2)), TypeError, "packed must hold torch.uint8"),
        (lambda: train_on_attacked(MODEL, IMAGES, LABELS, steps=0, rate=1e-3), ValueError, "steps must be a whole number at least 1"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
