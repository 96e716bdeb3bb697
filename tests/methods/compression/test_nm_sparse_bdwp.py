"""BDWP's layers: two masks of one weight, each along what its product sums over, and a dense gradient."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.properties.architectures import build, inputs, output
from tests.tiny import tiny_model, token_ids
from torch import nn
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass
from transformers.pytorch_utils import Conv1D

from assay.methods.compression.nm_sparse_bdwp import (
    NMConv2d,
    NMLinear,
    Pattern,
    gradient_cosines,
    largest,
    masks_of,
    nm_layers,
    remake,
    settle,
    sparse_training,
    training,
    why_not,
)
from assay.methods.core import kernels
from assay.methods.core.sparsity.formats import semi_structured_layout
from assay.methods.core.sparsity.masks import reach
from assay.methods.core.sparsity.projections import follows, n_m
from assay.methods.core.sparsity.straight_through import straight_through

EXACT = {"rtol": 1e-10, "atol": 1e-10}
PATTERNS = [(2, 4), (2, 8), (1, 4), (1, 8), (3, 5)]


def net() -> nn.Sequential:
    """A small network in float64: a stem, a convolution and a linear layer that fit 2:8, a classifier."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(16 * 9, 24), nn.ReLU(), nn.Linear(24, 5)),
    ).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 3, 6, 6, dtype=torch.float64), torch.arange(6) % 5


def bare(scheme="bdwp", n=2, m=4, **settings) -> Pattern:
    """Without the decay, so that gradients can be written down."""
    return Pattern(n, m, scheme, decay=0.0, **settings)


# ---- masks -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("shape", [(40, 80), (40, 80, 3, 2)])
def test_both_masks_are_those_of_the_checked_selection(n, m, shape):
    weight = torch.randint(-3, 4, shape).float()  # full of ties and zeros
    forward, backward = masks_of(weight, Pattern(n, m))
    assert torch.equal(forward, n_m(weight.abs(), n, m, axis=1))
    assert torch.equal(backward, n_m(weight.abs(), n, m, axis=0))


@pytest.mark.parametrize("axis", [0, 1])
def test_of_every_group_the_largest_magnitudes_survive(axis):
    weight = torch.randn(16, 24, 3, 3)
    weight[torch.rand(weight.shape) < 0.6] = 0  # groups with fewer than n
    kept = weight * masks_of(weight, Pattern(2, 8))[1 - axis]
    groups, before = (x.movedim(axis, -1).reshape(-1, 8) for x in (kept, weight))
    expected = before.abs().sort(1, descending=True).values[:, :2]
    assert torch.equal(groups.abs().sort(1, descending=True).values[:, :2], expected)
    assert torch.equal((groups != 0).sum(1), (before != 0).sum(1).clamp(max=2))


def test_the_first_of_equal_weights_stay():
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0]]).expand(4, 4)
    forward, backward = masks_of(weight, Pattern(2, 4))
    assert forward.tolist() == [[True, True, False, False]] * 4
    assert backward.tolist() == [[True] * 4, [True] * 4, [False] * 4, [False] * 4]


def test_nan_is_not_hidden_by_a_mask():
    assert bool(largest(torch.tensor([[1.0, 2.0, torch.nan, 3.0]]), 2, 4, 1)[0, 2])


@pytest.mark.parametrize("search", ["greedy", "exact"])
def test_a_transposable_mask_serves_both_products(search):
    weight = torch.randn(16, 16, 3, 3)
    forward, backward = masks_of(weight, Pattern(2, 8, "transposable", search=search))
    assert torch.equal(forward, backward)
    assert follows(forward.float(), 2, 8, axis=1)
    assert follows(forward.float(), 2, 8, axis=0)


@pytest.mark.parametrize("shape", [(16, 8), (16, 8, 3, 3)])
def test_the_forward_weight_of_the_transposed_layer_is_the_transpose_of_the_backward_weight(shape):
    weight = torch.randn(shape)
    turned = weight.transpose(0, 1).contiguous()
    forward, backward = masks_of(weight, Pattern(2, 4))
    assert torch.equal(masks_of(turned, Pattern(2, 4))[0], backward.transpose(0, 1))
    assert torch.equal(masks_of(turned, Pattern(2, 4))[1], forward.transpose(0, 1))
    assert not torch.equal(forward, backward)


def test_a_float32_weight_is_pruned_before_it_is_rounded():
    row = torch.tensor([[1.0, 1.001, 1.002, 1.003]])  # all the same in bfloat16
    layer = NMLinear(nn.Linear(4, 4, bias=False), Pattern(2, 4))
    with torch.no_grad():
        layer.weight.copy_(row.expand(4, 4))
    y = layer(torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert y.tolist() == [[12.0] * 4]


# ---- gradients -------------------------------------------------------------------------------------------------------------------


def test_a_linear_layer_has_the_three_products_of_the_paper():
    layer = nn.Linear(8, 16).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    ours = NMLinear(layer, bare())
    w = layer.weight.detach()
    forward, backward = masks_of(w, bare())
    y = ours(x)
    torch.testing.assert_close(y, x @ (w * forward).T + layer.bias, **EXACT)
    gy = torch.randn_like(y)
    y.backward(gy)
    torch.testing.assert_close(x.grad, gy @ (w * backward), **EXACT)
    for other in (w * forward, w):
        assert not torch.allclose(x.grad, gy @ other)
    torch.testing.assert_close(layer.weight.grad, torch.einsum("bto,bti->oi", gy, x.detach()), **EXACT)
    torch.testing.assert_close(layer.bias.grad, gy.sum((0, 1)), **EXACT)


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 0, 1), ((2, 1), (1, 2), (1, 2))])
def test_a_convolution_has_the_three_products_of_the_paper(stride, padding, dilation):
    layer = nn.Conv2d(8, 4, 3, stride, padding, dilation).double()
    x = torch.randn(3, 8, 7, 8, dtype=torch.float64, requires_grad=True)
    settings = {"stride": stride, "padding": padding, "dilation": dilation}
    w = layer.weight.detach()
    forward, backward = masks_of(w, bare())
    ours = NMConv2d(layer, bare())
    y = ours(x)
    torch.testing.assert_close(y, F.conv2d(x, w * forward, layer.bias, **settings), **EXACT)
    gy = torch.randn_like(y)
    y.backward(gy)
    by_backward = torch.autograd.grad(F.conv2d(x, w * backward, **settings), x, gy)[0]
    torch.testing.assert_close(x.grad, by_backward, **EXACT)
    dense = w.clone().requires_grad_()
    by_dense = torch.autograd.grad(F.conv2d(x, dense, **settings), (x, dense), gy)
    assert not torch.allclose(x.grad, by_dense[0])
    torch.testing.assert_close(layer.weight.grad, by_dense[1], **EXACT)
    torch.testing.assert_close(layer.bias.grad, gy.sum((0, 2, 3)), **EXACT)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_decay_draws_only_what_the_forward_mask_drops(kind):
    layer = nn.Linear(8, 8) if kind == "linear" else nn.Conv2d(8, 8, 1)
    x = torch.randn(4, 8) if kind == "linear" else torch.randn(4, 8, 3, 3)
    gradients = []
    for decay in (0.0, 0.5):
        ours = (NMLinear if kind == "linear" else NMConv2d)(copy.deepcopy(layer), Pattern(2, 4, decay=decay))
        ours(x).sum().backward()
        gradients.append(ours.weight.grad)
    forward, _ = masks_of(layer.weight, Pattern(2, 4))
    torch.testing.assert_close(gradients[1] - gradients[0], 0.5 * layer.weight.detach() * ~forward)


def test_sr_ste_without_decay_is_the_straight_through_gradient():
    layer = nn.Linear(8, 16).double()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    ours = NMLinear(copy.deepcopy(layer), bare("sr_ste"))
    mask = n_m(layer.weight.detach().abs(), 2, 4)
    theirs = F.linear(x, straight_through(layer.weight, layer.weight * mask), layer.bias)
    gy = torch.randn_like(theirs)
    expected = torch.autograd.grad(theirs, (x, layer.weight), gy)
    y = ours(x)
    torch.testing.assert_close(y, theirs, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(y, (x, ours.weight), gy), expected, **EXACT)


def test_forward_alone_goes_back_through_the_dense_weight():
    layer = nn.Linear(8, 16).double()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    y, sr_ste = NMLinear(layer, bare("forward"))(x), NMLinear(layer, bare("sr_ste"))(x)
    torch.testing.assert_close(y, sr_ste, **EXACT)
    gy = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, layer.weight), gy)
    torch.testing.assert_close(found[0], gy @ layer.weight.detach(), **EXACT)
    torch.testing.assert_close(found[1], torch.autograd.grad(sr_ste, layer.weight, gy)[0], **EXACT)


@pytest.mark.parametrize("scheme", ["bdwp", "transposable", "sr_ste", "forward"])
def test_with_n_equal_to_m_every_step_is_that_of_dense_training(scheme):
    dense = net()
    ours = copy.deepcopy(dense)
    assert set(sparse_training(ours, Pattern(4, 4, scheme, decay=0.5))) == {"2", "5"}
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in (dense, ours)]
    x, labels = data()
    for _ in range(4):
        for model, optimizer in zip((dense, ours), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
        for name, parameter in dense.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name), parameter, **EXACT)


def test_masks_follow_the_weight_and_pruned_weights_come_back():
    layer = NMLinear(nn.Linear(4, 4, bias=False), bare())
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]).expand(4, 4))
    x = torch.eye(4)
    assert layer(x)[:, 0].tolist() == [4.0, 3.0, 0.0, 0.0]
    layer.weight.data[:, 3] = 5.0  # as an optimiser or a loaded checkpoint would
    assert layer(x)[:, 0].tolist() == [4.0, 0.0, 0.0, 5.0]


# ---- backends --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["bdwp", "sr_ste"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_compressed_rows_compute_the_same(kind, scheme):
    if kind == "linear":
        layer, x = nn.Linear(16, 8).double(), torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    else:
        layer = nn.Conv2d(8, 16, (3, 2), (2, 1), (1, 0), (1, 2)).double()
        x = torch.randn(2, 8, 7, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for backend in ("dense", "csr"):
        ours = (NMLinear if kind == "linear" else NMConv2d)(layer, bare(scheme), backend)
        y = ours(x)
        gy = torch.ones_like(y) * torch.arange(y.shape[1]).view(1, -1, *[1] * (y.dim() - 2))
        found.append((y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), gy)))
    torch.testing.assert_close(found[1], found[0], **EXACT)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_what_is_compressed_is_n_m_along_its_rows(kind, monkeypatch):
    """The 2:4 units would drop what is not, without a word: a convolution's groups are channels, not places of its kernel."""
    seen = []
    real = training.compress
    monkeypatch.setattr(training, "compress", lambda matrix, backend: (seen.append(matrix), real(matrix, backend))[1])
    if kind == "linear":
        layer, x = NMLinear(nn.Linear(16, 8), bare(), "csr"), torch.randn(2, 16, requires_grad=True)
    else:
        layer, x = NMConv2d(nn.Conv2d(16, 8, 3), bare(), "csr"), torch.randn(2, 16, 4, 4, requires_grad=True)
    layer(x).sum().backward()
    assert [len(matrix) for matrix in seen] == [8, layer.weight[0].numel()]
    for matrix in seen:
        assert follows(matrix, 2, 4, axis=1)
        assert int((matrix != 0).sum()) == layer.weight.numel() // 2


@pytest.mark.parametrize("backend", ["dense", "csr"])
def test_nothing_in_is_nothing_out_and_no_gradient(backend):
    for layer, x in (
        (NMLinear(nn.Linear(8, 16), Pattern(), backend), torch.zeros(0, 3, 8, requires_grad=True)),
        (NMConv2d(nn.Conv2d(8, 16, 3), Pattern(decay=0.0), backend), torch.zeros(0, 8, 5, 5, requires_grad=True)),
    ):
        y = layer(x)
        y.sum().backward()
        assert len(y) == 0
        assert x.grad.shape == x.shape
    assert not bool(layer.weight.grad.any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compressed_rows_refuse_what_torch_cannot_multiply_by_them(dtype):
    layer = NMLinear(nn.Linear(8, 8), Pattern(), "csr")
    with pytest.raises(TypeError, match="input of the backend 'csr' must hold"):
        layer(torch.zeros(2, 8, dtype=dtype))


def test_the_2_4_units_refuse_what_their_format_would_cut():
    """Of float32 it takes 1:2, of patterns with more than 2:4 it drops the rest."""
    layer = NMLinear(nn.Linear(64, 64), Pattern(2, 4))
    layer.backend = "semi_structured"
    with pytest.raises(TypeError, match="input of the backend 'semi_structured' must hold"):
        layer(torch.zeros(2, 64))
    with pytest.raises(ValueError, match="must have the pattern 2:4, got 3:4"):
        NMLinear(nn.Linear(64, 64), Pattern(3, 4), "semi_structured")
    with pytest.raises(ValueError, match="must have its weights on a GPU"):
        NMLinear(nn.Linear(64, 64), Pattern(2, 4), "semi_structured")


def test_shapes_are_found_without_numbers():
    with torch.device("meta"):
        layers = nn.Sequential(NMLinear(nn.Linear(8, 16), Pattern()), nn.Unflatten(1, (16, 1, 1)), nn.Flatten())
        convolution = NMConv2d(nn.Conv2d(8, 16, 3), Pattern())
    assert layers(torch.zeros(2, 8, device="meta")).shape == (2, 16)
    assert convolution(torch.zeros(2, 8, 5, 4, device="meta")).shape == (2, 16, 3, 2)


def test_a_nan_is_seen_in_what_comes_out_and_goes_back():
    layer = NMLinear(nn.Linear(8, 8), Pattern())
    x = torch.randn(2, 8)
    x[0, 3] = torch.nan
    y = layer(x)
    assert bool(y[0].isnan().all())
    assert bool(y[1].isfinite().all())
    with torch.no_grad():
        layer.weight[2, 5] = torch.nan
    x = torch.randn(2, 8, requires_grad=True)
    y = layer(x)
    assert y.isnan()[:, 2].all()
    assert not y.isnan()[:, :2].any()
    y.sum().backward()
    assert x.grad.isnan()[:, 5].all()


def test_the_path_that_ran_is_noted():
    before = kernels.paths().get("N:M products: csr", 0)
    NMLinear(nn.Linear(8, 8), Pattern(2, 4), "csr")(torch.randn(2, 8))
    assert kernels.paths()["N:M products: csr"] == before + 1


def test_the_2_4_units_are_refused_where_there_are_none():
    model = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 4))
    with pytest.raises(ValueError, match="must have its weights on a GPU with sparse tensor cores, got 1 on cpu"):
        sparse_training(model, Pattern(2, 4), backend="semi_structured")
    with pytest.raises(ValueError, match="must have the pattern 2:4, got 2:8"):
        sparse_training(model, Pattern(2, 8), backend="semi_structured")
    assert not nm_layers(model)


@pytest.mark.gpu
def test_on_a_gpu_the_2_4_units_compute_the_same():
    torch.manual_seed(0)
    layer = nn.Linear(256, 128, device="cuda")
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    found = []
    for backend in ("dense", "semi_structured"):
        y = NMLinear(layer, bare(), backend)(x)
        found.append((y, *torch.autograd.grad(y, (x, layer.weight), torch.ones_like(y))))
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2)


# ---- models ----------------------------------------------------------------------------------------------------------------------


def test_first_and_last_layers_and_those_that_do_not_fit_stay_dense():
    model = nn.Sequential(
        *(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)),
        *(nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 16), nn.Linear(16, 8)),
    )
    assert set(sparse_training(copy.deepcopy(model), Pattern(2, 8))) == {"5", "7"}
    assert set(sparse_training(copy.deepcopy(model), Pattern(2, 8), first=True, head=True)) == {"0", "5", "7", "8"}
    chosen = sparse_training(model, Pattern(2, 4), exclude=["7"])
    assert set(chosen) == {"2", "3", "5"}
    share, rest = reach(model, chosen)
    assert share == pytest.approx((96 + 96 + 576) / (576 + 72 + 96 + 96 + 576 + 576 + 128 + 128))
    assert rest.startswith("5 layers")


def test_layers_whose_weights_are_read_stay_dense():
    block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 16), block, nn.Linear(16, 16), nn.Linear(16, 4))
    assert set(sparse_training(model, Pattern(2, 8))) == {"2"}
    assert why_not(Conv1D(8, 8), Pattern(2, 8)) != ""


def test_parameters_stay_the_same_objects_and_a_checkpoint_fits_before_and_after():
    model = net()
    before, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    sparse_training(model)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)
    settle(model)
    model.load_state_dict(state)


def test_a_settled_model_computes_the_same_and_is_plain():
    model = net().eval()
    x, _ = data()
    layers = sparse_training(model)
    expected = model(x)
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    assert settle(model) is model
    assert [type(layer) for layer in model] == [type(layer) for layer in net()]
    torch.testing.assert_close(model(x), expected, **EXACT)
    for name, weight in weights.items():
        plain = model.get_submodule(name).weight
        assert torch.equal(plain, weight * masks_of(weight, Pattern())[0])
        assert plain.requires_grad


def test_a_settled_2_4_layer_fits_torchs_semi_structured_tensors():
    model = nn.Sequential(nn.Linear(8, 128), nn.Linear(128, 64), nn.Linear(64, 8)).half()
    sparse_training(model, Pattern(2, 4))
    weight = settle(model)[1].weight.detach()
    assert follows(weight, 2, 4)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(*semi_structured_layout(weight)), weight)


def test_a_transformer_trains_and_is_not_saved_half_way(tmp_path):
    model = tiny_model()
    layers = sparse_training(model, Pattern(2, 8))
    assert len(layers) == 2 * 7  # all but the output layer: the embedding is the first one
    ids = token_ids(2, 12)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(6):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="must not be saved while it trains N:M"):
        model.save_pretrained(tmp_path)
    expected = model.eval()(ids).logits
    settle(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_settled_output_layer_is_not_tied_again_when_it_is_loaded(tmp_path):
    model = build("llama-tied")
    assert set(sparse_training(model, include=["lm_head"], head=True)) == {"lm_head"}
    expected = output(model, "llama-tied")
    settle(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(output(again, "llama-tied"), expected, rtol=1e-4, atol=1e-4)
    assert not follows(again.get_input_embeddings().weight, 2, 8)


@pytest.mark.parametrize("name", ["mamba", "mixtral", "t5", "vit"])
def test_every_layer_that_trains_n_m_is_really_called(name):
    model = build(name)
    layers = sparse_training(model)
    answer = model(**inputs(name))
    (answer.logits if "logits" in answer else answer.last_hidden_state).square().mean().backward()
    for path, layer in layers.items():
        assert layer.weight.grad is not None, path
        assert bool(layer.weight.grad.any()), path
    expected = output(model, name)
    torch.testing.assert_close(output(settle(model), name), expected, rtol=1e-4, atol=1e-5)


def test_autocast_is_followed_and_the_gradient_comes_back_in_float32():
    layer = nn.Linear(16, 8)
    ours = NMLinear(layer, bare())
    x = torch.randn(4, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), NMLinear(layer, bare())(x), rtol=2e-2, atol=2e-2)


def test_held_masks_change_when_they_are_made_anew_and_travel_with_the_state():
    model = net()
    sparse_training(model, Pattern(2, 8, held=True))
    layer = model[5]
    before = layer.forward_mask.clone()
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
    x, _ = data()
    model(x)
    assert torch.equal(layer.forward_mask, before)
    remake(model)
    assert torch.equal(layer.forward_mask, masks_of(layer.weight, Pattern(2, 8))[0])
    assert not torch.equal(layer.forward_mask, before)
    remake(model, lambda weight, pattern: (torch.zeros_like(weight, dtype=torch.bool),) * 2)
    assert not bool(layer.backward_mask.any())
    other = net()
    sparse_training(other, Pattern(2, 8, held=True))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    with pytest.raises(ValueError, match="must have layers that hold their masks"):
        remake(nn.Sequential(nn.Linear(8, 8)))


# ---- how far the gradients are off ----------------------------------------------------------------------------------------------


def cosines(model, pattern):
    x, labels = data()
    sparse_training(model, pattern)
    return gradient_cosines(model, lambda: F.cross_entropy(model(x), labels))


def test_the_cosines_of_an_unpruned_model_are_1():
    for found in cosines(net(), Pattern(4, 4)).values():
        assert (found.dense, found.exact, found.chain) == pytest.approx((1, 1, 1))


def test_which_gradient_is_exact_depends_on_the_scheme():
    start = net()
    sr_ste = cosines(copy.deepcopy(start), Pattern(2, 8, "sr_ste"))
    forward = cosines(copy.deepcopy(start), Pattern(2, 8, "forward"))
    bdwp = cosines(copy.deepcopy(start), Pattern(2, 8))
    assert set(bdwp) == {"2", "5"}
    for name, found in bdwp.items():
        assert sr_ste[name].exact == pytest.approx(1)
        assert (forward[name].dense, forward[name].chain) == pytest.approx((1, 1))
        assert 0.3 < found.dense < 0.99
        assert 0.1 < found.exact < 0.99
    assert bdwp["5"].chain == pytest.approx(bdwp["5"].dense)  # no pruned layer behind it
    assert bdwp["2"].chain < bdwp["2"].dense  # the errors of the layer behind come on top


def test_cosines_are_those_of_gradients_written_down():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    sparse_training(model, bare(m=8))
    found = gradient_cosines(model, lambda: model(x).sum())["1"]
    weight = model[1].weight.detach()
    gy = torch.ones(3, 2, dtype=torch.float64) @ model[2].weight.detach()
    forward, backward = masks_of(weight, bare(m=8))
    gx = (gy @ (weight * backward)).flatten()
    for value, other in ((found.dense, weight), (found.exact, weight * forward)):
        assert value == pytest.approx(float(torch.cosine_similarity(gx, (gy @ other).flatten(), dim=0)))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_frozen_layer_that_a_gradient_passes_through_has_its_cosines():
    model = net()
    x, labels = data()
    sparse_training(model)
    model[5].weight.requires_grad_(False)
    assert set(gradient_cosines(model, lambda: F.cross_entropy(model(x), labels))) == {"2", "5"}


# ---- arguments -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"n": 0}, ValueError, "n must be a whole number at least 1 and at most 8"),
        ({"n": 9}, ValueError, "n must be a whole number at least 1 and at most 8"),
        ({"m": 4.0}, TypeError, "m must be a whole number"),
        ({"scheme": "both"}, ValueError, "scheme must be one of 'bdwp', 'transposable', 'sr_ste', 'forward'"),
        ({"decay": -1.0}, ValueError, "decay must be a finite number at least 0"),
        ({"decay": float("nan")}, ValueError, "decay must be a finite number at least 0"),
        ({"search": "best"}, ValueError, "search must be one of"),
        ({"held": 1}, TypeError, "held must be True or False"),
    ],
)
def test_a_pattern_is_checked(settings, error, says):
    with pytest.raises(error, match=says):
        Pattern(**settings)


def test_bad_models_and_inputs_are_told_apart():
    small = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="model must have a layer that fits 2:8 beside the first and the last"):
        sparse_training(small)
    with pytest.raises(TypeError, match="pattern must be a Pattern, got 8"):
        sparse_training(small, 8)
    with pytest.raises(ValueError, match="backend must be one of 'dense', 'csr', 'semi_structured', got 'cuda'"):
        sparse_training(net(), backend="cuda")
    with pytest.raises(ValueError, match="include has 'nothing'"):
        sparse_training(net(), include=["nothing"])
    with pytest.raises(ValueError, match="layer must fit 2:8: its 6 inputs and 8 outputs are not both multiples of 8"):
        NMLinear(nn.Linear(6, 8), Pattern())
    layer = NMLinear(nn.Linear(8, 8), Pattern())
    with pytest.raises(ValueError, match=r"input must have shape \(\.\.\., 8\), got \(2, 7\)"):
        layer(torch.zeros(2, 7))
    with pytest.raises(TypeError, match="input must hold floating-point numbers"):
        layer(torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="input must have shape"):
        NMConv2d(nn.Conv2d(8, 8, 3), Pattern())(torch.zeros(8, 5, 5))
    with pytest.raises(ValueError, match="model must have layers that train N:M, got none"):
        gradient_cosines(small, lambda: torch.zeros(()))
    model = net()
    sparse_training(model)
    with pytest.raises(ValueError, match="loss must send a gradient to every N:M layer, got none that reaches 2"):
        gradient_cosines(model, lambda: model[5](torch.zeros(1, 144, dtype=torch.float64)).sum())
    model[2].weight.requires_grad_(False)
    model[5].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="got only frozen ones"):
        gradient_cosines(model, lambda: torch.zeros(()))


def test_a_pattern_cannot_be_put_on_twice():
    model = net()
    sparse_training(model)
    with pytest.raises(ValueError, match="model must have a layer that fits"):
        sparse_training(model)


def test_a_layer_keeps_no_mask_between_passes():
    """With `held` only; otherwise a layer has no state but its parameters."""
    layer = NMLinear(nn.Linear(8, 8), Pattern())
    layer(torch.randn(2, 8))
    assert not dict(layer.named_buffers())
