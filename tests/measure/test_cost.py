"""Counted cost against formulas worked out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.properties.architectures import CAUSAL, build, inputs
from tests.tiny import tiny_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from assay.measure.cost import _cudnn_rnn, attention_macs, count_cost, register_macs


def by_name(cost):
    return {row.name: row for row in cost.modules}


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(grad_mode, dtype, bias):
    layer = nn.Linear(32, 64, bias=bias).to(dtype)
    x = torch.randn(3, 5, 32, dtype=dtype)
    with grad_mode():
        cost = count_cost(layer, x)
    size = dtype.itemsize
    parameters = 32 * 64 + 64 * bias
    assert cost.params == parameters
    assert cost.macs == 15 * 32 * 64
    assert cost.flops == 2 * cost.macs
    assert cost.total().bytes_read == size * (15 * 32 + parameters)
    assert cost.total().bytes_written == size * 15 * 64
    assert cost.weight_bytes == size * parameters
    assert [(row.kind, row.dtype) for row in cost.modules] == [("linear", str(dtype).removeprefix("torch."))]


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution(groups, stride):
    layer = nn.Conv2d(8, 16, 3, groups=groups, stride=stride, padding=1)
    cost = count_cost(layer, torch.randn(2, 8, 10, 12))
    out = 2 * (10 // stride) * (12 // stride)
    assert cost.macs == out * 16 * (8 // groups) * 9
    assert cost.params == 16 * (8 // groups) * 9 + 16
    assert cost.total().bytes_read == 4 * (2 * 8 * 120 + cost.params)
    assert cost.total().bytes_written == 4 * out * 16
    assert cost.modules[0].kind == "linear"


def test_transposed_convolution_counts_by_its_input():
    cost = count_cost(nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False), torch.randn(1, 4, 5, 5))
    assert cost.macs == 25 * 4 * 6 * 4


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_attention(grad_mode, causal, backend):
    q, k, v = (torch.randn(2, 3, 20, 16) for _ in range(3))

    def run():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    with grad_mode():
        cost = count_cost(run)
    full = 2 * 3 * 20 * 20 * 32
    # the math backend multiplies the whole score matrix and masks it
    assert cost.macs == (full // 2 if causal and backend == SDPBackend.FLASH_ATTENTION else full)
    if backend == SDPBackend.FLASH_ATTENTION:
        assert cost.modules[0].kind == "attention"
        assert cost.total().bytes_read == 4 * 3 * q.numel()


def test_masked_attention_is_counted_whole():
    q = torch.randn(1, 2, 20, 16)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    cost = count_cost(lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=mask))
    assert cost.macs == 2 * 20 * 20 * 32


def test_grouped_query_attention_counts_the_heads_of_the_queries():
    q, k = torch.randn(1, 6, 10, 8), torch.randn(1, 2, 30, 8)
    cost = count_cost(lambda: F.scaled_dot_product_attention(q, k, k, enable_gqa=True))
    assert cost.macs == 6 * 10 * 30 * 16
    assert attention_macs(q, k, k) == 6 * 10 * 30 * 16
    assert attention_macs(q, k, k, causal=True) == 3 * 10 * 30 * 16


def test_backward_of_linear_is_twice_the_forward():
    layer, x = nn.Linear(8, 16), torch.randn(4, 8, requires_grad=True)
    cost = count_cost(lambda: layer(x).sum().backward())
    assert cost.macs == 3 * 4 * 8 * 16


@pytest.mark.parametrize(
    ("run", "macs"),
    [
        (lambda a, b: a @ b, 6 * 7 * 8),
        (lambda a, b: torch.einsum("ik,kj->ij", a, b), 6 * 7 * 8),
        (lambda a, b: torch.addmm(torch.zeros(6, 8), a, b), 6 * 7 * 8),
        (lambda a, b: torch.bmm(a.expand(3, 6, 7), b.expand(3, 7, 8)), 3 * 6 * 7 * 8),
        (lambda a, b: a @ b[:, 0], 6 * 7),
        (lambda a, b: a[0] @ b[:, 0], 7),
        (lambda a, b: torch.addmv(torch.zeros(6), a, b[:, 0]), 6 * 7),
    ],
)
def test_products(run, macs):
    a, b = torch.randn(6, 7), torch.randn(7, 8)
    assert count_cost(lambda: run(a, b)).macs == macs


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("build", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers(grad_mode, build, batch_first):
    """Two layers in two directions: every token goes through the matrices of each."""
    layer = build(8, 4, num_layers=2, bidirectional=True, batch_first=batch_first)
    matrices = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    with grad_mode():
        cost = count_cost(layer, torch.randn(3, 5, 8))
    assert (cost.macs, cost.uncounted) == (15 * matrices, {})
    assert cost.total("linear").macs == cost.macs


@pytest.mark.parametrize("build", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells(build):
    cell = build(8, 4)
    cost = count_cost(cell, torch.randn(3, 8))
    assert (cost.macs, cost.uncounted) == (3 * (cell.weight_ih.numel() + cell.weight_hh.numel()), {})


def test_a_packed_sequence_counts_its_tokens():
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 8) for n in (5, 3, 1)])
    layer = nn.LSTM(8, 4)
    assert count_cost(layer, packed).macs == 9 * (8 + 4) * 16


def test_cudnn_recurrent_layers_count_their_matrices():
    weights = [torch.zeros(16, 8), torch.zeros(16, 4), torch.zeros(16), torch.zeros(16)]
    assert _cudnn_rnn(torch.zeros(5, 3, 8), weights, 4, out=None) == 15 * (16 * 8 + 16 * 4)
    for operator in (torch.ops.aten._cudnn_rnn, torch.ops.aten.miopen_rnn):
        assert [argument.name for argument in operator.default._schema.arguments][:2] == ["input", "weight"]


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("run", "macs"),
    [
        (lambda a, b: F.bilinear(a, a, torch.ones(5, 7, 7)), 6 * 5 * 7 * 7),
        (lambda a, b: torch.outer(a[0], b[0]), 7 * 8),
        (lambda a, b: torch.ger(a[0], b[0]), 7 * 8),
        (lambda a, b: torch.einsum("i,j->ij", a[0], b[0]), 7 * 8),
        (lambda a, b: a[:, :, None] * a[:, None, :], 6 * 7 * 7),
        (lambda a, b: torch.addr(torch.zeros(7, 8), a[0], b[0]), 7 * 8),
        (lambda a, b: torch.zeros(7, 8).addr_(a[0], b[0]), 7 * 8),
        (lambda a, b: torch.kron(a, b), 6 * 7 * 7 * 8),
        (lambda a, b: torch.cdist(a, b.t()), 6 * 8 * 7),
        (lambda a, b: torch.cdist(torch.ones(30, 7), torch.ones(40, 7)), 30 * 40 * 7),  # by another operator
        (lambda a, b: torch.cdist(a, b.t(), p=1), 6 * 8 * 7),
        (lambda a, b: F.pdist(a), 15 * 7),
        (lambda a, b: torch.baddbmm(torch.zeros(3, 6, 8), a.expand(3, 6, 7), b.expand(3, 7, 8)), 3 * 6 * 7 * 8),
        (lambda a, b: torch.zeros(3, 6, 8).baddbmm_(a.expand(3, 6, 7), b.expand(3, 7, 8)), 3 * 6 * 7 * 8),
        (lambda a, b: torch.addbmm(torch.zeros(6, 8), a.expand(3, 6, 7), b.expand(3, 7, 8)), 3 * 6 * 7 * 8),
        (lambda a, b: torch.zeros(6, 8).addbmm_(a.expand(3, 6, 7), b.expand(3, 7, 8)), 3 * 6 * 7 * 8),
        (lambda a, b: torch.zeros(6, 8).addmm_(a, b), 6 * 7 * 8),
        (lambda a, b: torch.zeros(6).addmv_(a, b[:, 0]), 6 * 7),
        (lambda a, b: torch.vdot(a[0], a[0]), 7),
        (lambda a, b: torch.conv_tbc(torch.ones(9, 2, 4), torch.ones(3, 4, 6), torch.zeros(6)), 7 * 2 * 6 * 3 * 4),
        (lambda a, b: a.to(torch.complex64) @ b.to(torch.complex64), 4 * 6 * 7 * 8),
        (lambda a, b: torch.outer(a[0].to(torch.complex64), b[0].to(torch.complex64)), 4 * 7 * 8),
        (lambda a, b: F.embedding_bag(torch.zeros(4, dtype=torch.int64), a, torch.tensor([0, 2])), 0),
        (
            lambda a, b: F.embedding_bag(
                torch.zeros(4, dtype=torch.int64), a, torch.tensor([0, 2]), mode="sum", per_sample_weights=a[0, :4]
            ),
            4 * 7,
        ),
    ],
)
def test_other_products(grad_mode, run, macs):
    a, b = torch.randn(6, 7), torch.randn(7, 8)
    with grad_mode():
        cost = count_cost(lambda: run(a, b))
    assert (cost.macs, cost.uncounted) == (macs, {})


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x * x,
        lambda x: 2 * x,
        lambda x: x * x[:1],
        lambda x: x * x[:, :1],
        lambda x: (x > 0)[0] * (x > 0)[:, :1],
    ],
)
def test_element_wise_products_are_no_outer_product(run):
    """One of the two has all dimensions of a matrix, or they hold no floating-point numbers."""
    cost = count_cost(lambda: run(torch.randn(4, 5)))
    assert (cost.macs, cost.uncounted) == (0, {})


STORED = torch.tensor([[1.0, 2, 0, 0, 0, 0], [0, 3, 0, 0, 0, 0], [0, 0, 0, 0, 4, 0], [0, 0, 0, 0, 5, 6]])  # 6 of 4 x 6
LAYOUTS = {
    "coo": lambda: STORED.to_sparse(),
    "csr": lambda: STORED.to_sparse_csr(),
    "csc": lambda: STORED.to_sparse_csc(),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("run", "macs"),
    [
        (lambda s, d: s @ d, 6 * 8),
        (lambda s, d: torch.sparse.mm(s, d), 6 * 8),
        (lambda s, d: torch.addmm(torch.zeros(4, 8), s, d), 6 * 8),
        (lambda s, d: torch.sparse.addmm(torch.zeros(4, 8), s, d), 6 * 8),
        (lambda s, d: s @ d[:, 0], 6),
        (lambda s, d: torch.ones(3, 4) @ s, 3 * 6),
        (lambda s, d: F.linear(d.t(), s), 6 * 8),
    ],
)
def test_products_with_a_sparse_matrix_count_what_it_stores(layout, run, macs):
    cost = count_cost(lambda: run(LAYOUTS[layout](), torch.randn(6, 8)))
    assert (cost.macs, cost.uncounted) == (macs, {})


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_blocks_batches_and_samples():
    blocks, dense = STORED.to_sparse_bsr((2, 2)), torch.randn(6, 8)
    assert count_cost(lambda: blocks @ dense).macs == 8 * 8  # two blocks of four
    batch = STORED.expand(2, 4, 6).to_sparse()
    assert count_cost(lambda: torch.bmm(batch, torch.randn(2, 6, 8))).macs == 12 * 8
    pattern = STORED.to_sparse_csr()
    cost = count_cost(lambda: torch.sparse.sampled_addmm(pattern, torch.randn(4, 9), torch.randn(9, 6)))
    assert cost.macs == 6 * 9


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_product_of_two_sparse_matrices_is_listed(layout):
    one, other = (
        LAYOUTS[layout](),
        STORED.t().contiguous().to_sparse() if layout == "coo" else STORED.t().to_sparse_csr(),
    )
    cost = count_cost(lambda: one @ other)
    assert cost.macs == 0
    assert cost.uncounted == {"aten::mm": 1}


@pytest.mark.filterwarnings("ignore:Sparse")
def test_bytes_of_a_sparse_matrix_are_those_it_stores():
    dense = torch.randn(6, 8)
    for matrix, places in (
        (STORED.to_sparse(), 2 * 6 * 8),
        (STORED.to_sparse_csr(), (5 + 6) * 8),
        (STORED.to_sparse_csc(), (7 + 6) * 8),
    ):
        assert count_cost(lambda matrix=matrix: matrix @ dense).total().bytes_read == 4 * 6 + places + 4 * 48


@pytest.mark.parametrize(
    ("run", "names"),
    [
        (lambda x: torch.fft.irfft(torch.fft.rfft(x)), {"aten::_fft_c2r": 1, "aten::_fft_r2c": 1}),
        (lambda x: [torch.fft.fft(x.to(torch.complex64)) for _ in range(3)], {"aten::_fft_c2c": 3}),
        (torch.linalg.inv, {"aten::linalg_inv_ex": 1}),
        (lambda x: torch.linalg.solve(x, x), {"aten::_linalg_solve_ex": 1}),
        (torch.linalg.qr, {"aten::linalg_qr": 1}),
        (torch.linalg.svd, {"aten::_linalg_svd": 1}),
        (lambda x: torch.linalg.matrix_exp(x), {"aten::linalg_matrix_exp": 1}),
    ],
)
def test_what_cannot_be_counted_is_listed_with_its_calls(run, names):
    cost = count_cost(lambda: run(torch.eye(4) + 0.1))
    assert (cost.macs, cost.uncounted) == (0, names)


@pytest.mark.parametrize(
    "run",
    [
        lambda x: F.layer_norm(x, (8,)),
        lambda x: F.rms_norm(x, (8,)),
        lambda x: F.group_norm(x, 2),
        lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4)),
        lambda x: F.softmax(x, -1) + F.log_softmax(x, -1),
        lambda x: F.cross_entropy(x[:, 0], torch.tensor([1, 2])) + F.mse_loss(x, 2 * x),
        lambda x: F.max_pool1d(F.avg_pool1d(x, 2), 2) + F.adaptive_avg_pool1d(x, 2),
        lambda x: F.interpolate(x[None], scale_factor=2, mode="bilinear"),
        lambda x: F.grid_sample(x[None], torch.zeros(1, 3, 3, 2), align_corners=False),
        lambda x: (
            x.sum(),
            x.mean(-1),
            x.std(),
            x.norm(),
            x.cumsum(-1),
            x.amax(),
            x.median(),
            x.sort(),
            x.topk(2),
            x.logsumexp(-1),
        ),
        lambda x: (
            torch.cat([x, x]),
            x.flip(0),
            x.roll(1),
            F.pad(x, (1, 1)),
            x.tril(),
            x.gather(0, torch.zeros_like(x).long()),
        ),
        lambda x: (
            x.clone().abs_().masked_fill_(x > 0, 1.0).index_add_(0, torch.tensor([0]), x[:1]),
            x.to(torch.bfloat16),
        ),
        lambda x: (
            F.gelu(x),
            F.silu(x),
            F.glu(x),
            F.leaky_relu(x),
            F.prelu(x, torch.ones(1)),
            F.softplus(x),
            x.exp() / x.sqrt(),
        ),
        lambda x: (
            torch.rand_like(x),
            F.dropout(x),
            torch.bernoulli(x.abs().clamp(0, 1)),
            x.new_zeros(3),
            torch.full_like(x, 2),
        ),
        lambda x: torch.cross(x[..., :3], x[..., 3:6], -1),
        lambda x: torch._foreach_mul([x, x], 2.0),
    ],
)
def test_work_without_products_that_are_added_up_is_not_listed(run):
    x = torch.randn(2, 4, 8)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            cost = count_cost(lambda: run(x))
        assert (cost.macs, cost.uncounted) == (0, {})


@pytest.mark.parametrize("causal", [True, False])
def test_backward_of_attention_is_five_products(causal):
    q, k, v = (torch.randn(2, 3, 20, 16, requires_grad=True) for _ in range(3))
    cost = count_cost(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward())
    product = 2 * 3 * 20 * 20 * 16 // (2 if causal else 1)
    assert (cost.macs, cost.uncounted) == (2 * product + 5 * product, {})


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "mamba", "t5", "whisper", "vit"])
def test_nothing_of_ordinary_models_is_left_uncounted(name):
    model, given = build(name), inputs(name)
    assert count_cost(model, **given).uncounted == {}
    if name in CAUSAL:
        assert count_cost(lambda: model(**given).logits.sum().backward()).uncounted == {}


def test_bags_of_embeddings_read_what_they_fetch():
    bag, ids = nn.EmbeddingBag(1000, 8, mode="sum"), torch.tensor([[1, 2, 3]])
    cost = count_cost(bag, ids)
    table, indices, offsets = 3 * 8 * 4, 3 * 8, 8
    assert cost.total().bytes_read <= table + indices + 4 * offsets
    assert cost.total().bytes_read >= table + indices + offsets


def test_integer_product():
    a, b = torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 24, dtype=torch.int8)
    cost = count_cost(lambda: torch._int_mm(a, b))
    assert cost.macs == 32 * 16 * 24
    assert cost.bytes == 32 * 16 + 16 * 24 + 4 * 32 * 24
    assert cost.modules[0].dtype == "int8"


@pytest.mark.parametrize(
    "view", [lambda x: x.t(), lambda x: x[:, 1:], lambda x: x.view(-1), lambda x: x.expand(3, 4, 5), torch.detach]
)
def test_views_cost_nothing(view):
    x = torch.randn(4, 5)
    cost = count_cost(lambda: view(x))
    assert cost.bytes == 0


def test_reshape_costs_only_when_it_copies():
    x = torch.randn(4, 5)
    assert count_cost(lambda: x.reshape(20)).bytes == 0
    assert count_cost(lambda: x.t().reshape(20)).bytes == 2 * 4 * 20


def test_an_operand_used_twice_is_read_once():
    x = torch.randn(100)
    cost = count_cost(lambda: x * x)
    assert (cost.total().bytes_read, cost.total().bytes_written) == (400, 400)


def test_lookups_read_what_they_fetch():
    table, ids = nn.Embedding(1000, 8), torch.tensor([[1, 2, 3]])
    cost = count_cost(table, ids)
    assert cost.total().bytes_read == 3 * 8 * 4 + 3 * 8
    assert cost.total().bytes_written == 3 * 8 * 4
    assert cost.weight_bytes == 32000
    assert cost.modules[0].kind == "other"


def test_writing_into_a_buffer_does_not_read_it():
    buffer, row = torch.zeros(100, 8), torch.ones(1, 8)
    cost = count_cost(lambda: buffer[3:4].copy_(row))
    assert (cost.total().bytes_read, cost.total().bytes_written) == (32, 32)
    cost = count_cost(lambda: buffer.index_copy_(0, torch.tensor([5]), row))
    assert (cost.total().bytes_read, cost.total().bytes_written) == (32 + 8, 32)
    assert count_cost(lambda: torch.empty(100)).bytes == 0
    assert count_cost(lambda: torch.zeros(100)).total().bytes_written == 400


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)
        self.unused = nn.Linear(4, 2, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.inner.weight

    def forward(self, x):
        return self.tied(self.inner(self.inner(x))) + 1


def test_shared_module_counts_twice_in_work_and_once_in_parameters():
    cost = count_cost(Twice(), torch.randn(5, 4))
    rows = by_name(cost)
    assert (rows["inner"].calls, rows["inner"].macs, rows["inner"].params) == (2, 2 * 5 * 16, 16)
    assert (rows["tied"].macs, rows["tied"].params) == (5 * 16, 0)
    assert (rows["unused"].calls, rows["unused"].macs, rows["unused"].params) == (0, 0, 8)
    assert rows[""].bytes == 2 * 4 * 20  # the addition
    assert cost.params == sum(p.numel() for p in Twice().parameters())


def test_error_in_a_module_leaves_no_hook_behind():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        count_cost(nn.Sequential(nn.Identity(), Fails()), torch.zeros(1))
    assert count_cost(nn.Linear(2, 2), torch.zeros(1, 2)).macs == 4
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_multihead_attention_is_taken_apart():
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 10, 16)
    cost = count_cost(lambda: attention(x, x, x, need_weights=False))
    assert cost.macs == 4 * 20 * 16 * 16 + 2 * 4 * 100 * 8
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.fixture
def custom_op():
    library = torch.library.Library("assay_cost_test", "FRAGMENT")
    library.define("double_mm(Tensor a, Tensor b) -> Tensor")
    library.impl("double_mm", lambda a, b: 2 * (a @ b), "CPU")
    yield torch.ops.assay_cost_test.double_mm
    library._destroy()


def test_custom_operators_are_named_until_registered(custom_op, monkeypatch):
    a = torch.randn(4, 4)
    assert count_cost(lambda: custom_op(a, a)).uncounted == {"assay_cost_test::double_mm": 1}
    monkeypatch.setattr("assay.measure.cost._MACS", {})
    register_macs("assay_cost_test::double_mm", lambda a, b, *, out: a.numel() * b.shape[1], kind="attention")
    cost = count_cost(lambda: custom_op(a, a))
    assert (cost.macs, cost.uncounted, cost.modules[0].kind) == (64, {}, "attention")
    assert cost.modules[0].dtype == "float32"
    register_macs("assay_cost_test::double_mm", lambda a, b, *, out: 1, dtype="int8")
    assert count_cost(lambda: custom_op(a, a)).modules[0].dtype == "int8"
    assert cost.bytes == 4 * 16 * 2  # inside it nothing is seen: one input, one output


def test_compiled_functions_are_counted_uncompiled():
    layer = nn.Linear(8, 8)
    cost = count_cost(torch.compile(layer), torch.randn(2, 8))
    assert cost.macs == 2 * 64


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_two_layer_llama(implementation):
    shape = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48}
    model, n = tiny_model(**shape, attn_implementation=implementation), 12
    cost = count_cost(model, input_ids=torch.arange(n)[None], use_cache=True)
    rows = by_name(cost)
    projections = 32 * 32 + 2 * 32 * 16 + 32 * 32
    linear = n * (2 * (projections + 3 * 32 * 48) + 32 * 100)
    scores = 2 * 4 * n * n * 16
    assert cost.total("linear").macs == linear
    assert cost.total("attention").macs == (scores // 2 if implementation == "sdpa" else scores)
    assert cost.params == model.num_parameters()
    assert rows["model.layers.1.mlp.down_proj"].macs == n * 48 * 32
    assert rows["model.layers.0.self_attn"].kind == "attention"
    assert rows["model.layers.0.input_layernorm"].kind == "other"
    assert rows["model.embed_tokens"].bytes_read == n * 32 * 4 + n * 8


@pytest.mark.parametrize(
    ("arguments", "message"), [(("plain", lambda: 0), "op_name"), (("a::b", lambda: 0, "convolution"), "kind")]
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        register_macs(*arguments)
