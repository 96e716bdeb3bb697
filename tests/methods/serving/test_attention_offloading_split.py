"""The split that runs: slices of real models, pools of devices in this process and in others, `generate`, loss and restoring."""

from __future__ import annotations

import itertools
import os
import signal
import time

import psutil
import pytest
import torch
from tests.properties.architectures import CAUSAL, build, inputs
from tests.tiny import tiny_model, token_ids
from torch import fx

from assay.methods.core.fleet.hardware import Link
from assay.methods.serving.attention_offloading import (
    AttentionWorkers,
    LocalPool,
    SplitDecoder,
    Timeline,
    WorkerLost,
    bytes_a_step,
    offloaded,
    shape_of,
    slicing,
)
from assay.methods.serving.attention_offloading.pool import gathered

NEW = 5
REACHED = ("llama", "llama-tied", "qwen2", "phi3", "gpt2", "mistral", "gemma3", "opt", "biogpt", "mixtral")
PADDED = torch.tensor([[0, 0, 0, 0, 5, 9, 4], [7, 3, 8, 2, 6, 9, 5], [0, 0, 0, 0, 0, 0, 11], [0, 4, 4, 8, 15, 16, 23]])
MASK = (PADDED > 0).long()


def double(**changes):
    return tiny_model(**{"num_key_value_heads": 4, "num_hidden_layers": 3, **changes}).double()


@pytest.fixture(scope="module")
def llama():
    return double()


@pytest.fixture(scope="module")
def sliced(llama):
    """A decoder whose slices are made once for all tests."""
    return SplitDecoder(llama, LocalPool())


@pytest.fixture
def split(sliced):
    """`split(pool, overlap=...)`: the decoder with that pool."""

    def given(pool, *, overlap=True):
        sliced.pool, sliced.overlap, sliced.timeline = pool, overlap, None
        return sliced

    return given


@pytest.fixture(scope="module")
def graph(llama):
    return slicing.trace(llama, 2)


def own_tokens(model, ids, mask=None, new=NEW):
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        made = model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return made[:, ids.shape[1] :]


def own_logits(model, ids, mask=None):
    """Of the last token."""
    mask = torch.ones_like(ids) if mask is None else mask
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, -1]


# -------------------------------------------------------------------------------------------------------------------- slices


def test_slices_are_one_more_than_attentions(graph):
    slices = slicing.sliced(graph, 2).slices
    assert [one.layer for one in slices] == [0, 1, 2, -1]
    for one in slices[:-1]:
        assert one.query in one.ask.outputs
        assert {one.key, one.value} <= set(one.give.outputs)
        assert one.scale == pytest.approx(16**-0.5)


def test_the_query_needs_neither_key_nor_value(llama, graph):
    """What runs before the query is sent multiplies by its projection and by nothing of keys and values."""
    one = slicing.sliced(graph, 2).slices[1]
    attention = llama.model.layers[1].self_attn
    weights = {name: getattr(attention, f"{name}_proj").weight for name in "qkv"}

    def uses(part, weight):
        return any(tensor is weight for tensor in [*part.module.parameters(), *part.module.buffers()])

    assert uses(one.ask, weights["q"])
    assert not uses(one.ask, weights["k"])
    assert not uses(one.ask, weights["v"])
    assert uses(one.give, weights["k"])
    assert uses(one.give, weights["v"])
    assert not uses(one.give, weights["q"])


def test_what_crosses_a_cut_is_the_residual_stream(graph):
    slices = slicing.sliced(graph, 2).slices
    rotary = 2 * 16 * 8  # cosines and sines, the same for all rows or one of each
    for one in slices[:-2]:
        stream = 2 * 64 * 8
        assert one.carried_bytes - stream in (rotary, 2 * rotary)
    assert slices[-2].carried_bytes == 2 * 64 * 8  # nobody rotates any more


def random_graph(seed):
    """Operators that take one or two of those before them, values of several sizes, two attentions that follow from one another."""
    torch.manual_seed(seed)
    graph = fx.Graph()
    nodes = [graph.placeholder("a"), graph.placeholder("b")]
    for node in nodes:
        node.meta["val"] = torch.empty(1)
    draw = lambda n: int(torch.randint(n, (1,)))  # noqa: E731
    for number in range(11):
        if number in (4, 8):
            last = [node for node in nodes if node.target is torch.ops.assay_offloading.attend.default]
            start = last[0] if last else nodes[draw(len(nodes))]
            q = graph.call_function(torch.neg, (start,))
            q.meta["val"] = torch.empty(2)
            kv = nodes[draw(len(nodes))]
            node = graph.call_function(torch.ops.assay_offloading.attend.default, (q, kv, kv, len(last), 1.0))
            nodes += [q]
        else:
            node = graph.call_function(torch.add, (nodes[draw(len(nodes))], nodes[-1 - draw(min(3, len(nodes)))]))
        node.meta["val"] = torch.empty(1 + draw(5))
        nodes.append(node)
    graph.output(nodes[-1])
    return fx.GraphModule(torch.nn.Module(), graph), nodes


def closed_sets(nodes, must, never):
    """All sets that hold `must`, nothing of `never`, and whatever their members follow from."""
    free = [node for node in nodes if node not in must and node not in never]
    for chosen in itertools.product((False, True), repeat=len(free)):
        early = must | {node for node, take in zip(free, chosen, strict=True) if take}
        if all(source in early for node in early for source in node.all_input_nodes):
            yield early


def crossing(nodes, early, attend):
    return sum(
        slicing._size(node.meta["val"])
        for node in early
        if any(user not in early and user is not attend and user.op != "output" for user in node.users)
    )


@pytest.mark.parametrize("seed", range(12))
def test_a_cut_is_the_smallest_of_all(seed):
    graph, nodes = random_graph(seed)
    graph.graph.eliminate_dead_code()
    nodes = [node for node in graph.graph.nodes if node.op != "output"]
    attends = [node for node in nodes if node.target is torch.ops.assay_offloading.attend.default]
    before, after = slicing._ancestors(nodes, set()), slicing._descendants(nodes, set())
    for attend in attends:
        early, carried = slicing.cut(nodes, before[attend], after[attend], set(), attend)
        assert before[attend] <= early
        assert not early & (after[attend] | {attend})
        assert all(source in early for node in early for source in node.all_input_nodes)
        found = sum(slicing._size(node.meta["val"]) for node in carried)
        choices = list(closed_sets([n for n in nodes if n is not attend], before[attend], after[attend]))
        assert found == crossing(nodes, early, attend) == min(crossing(nodes, one, attend) for one in choices)


def test_branches_that_need_no_attention_run_while_it_is_under_way():
    """A layer whose MLP stands beside its attention, as in GPT-J: the MLP is done after query, key and value were sent."""

    class Beside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.up, self.down = (torch.nn.Linear(8, 8) for _ in range(5))

        def forward(self, x):
            q, k, v = (f(x)[:, None, None] for f in (self.q, self.k, self.v))
            attended = torch.ops.assay_offloading.attend(q, k, v, 0, 1.0)[:, 0, 0]
            return attended + self.down(torch.relu(self.up(x)))

    from torch.fx.experimental.proxy_tensor import make_fx

    model = Beside()
    with torch.no_grad():
        graph = make_fx(lambda x, y: model(x + 0 * y))(torch.randn(3, 8), torch.randn(3, 8))
    first, last = slicing.sliced(graph, 3).slices
    own = list(first.rest.module.parameters())
    assert any(tensor is model.up.weight for tensor in own)
    assert any(tensor is model.down.weight for tensor in own)
    values = dict(zip(("x_1", "y_1"), torch.randn(2, 3, 8), strict=True))
    expected = model(values["x_1"] + 0 * values["y_1"])
    for part in first.parts:
        part.run(values)
    values[first.output] = values[first.value]
    last.rest.run(values)
    assert torch.allclose(values[slicing.sliced(graph, 3).logits], expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("count", "partition"), [(1, "heads"), (2, "heads"), (4, "heads"), (3, "rows"), (5, "rows")])
def test_the_split_is_the_model(llama, split, count, partition, overlap):
    """Any number of devices, by heads or by rows, rows of other lengths: the model's own tokens and logits."""
    decoder = split(LocalPool(count, partition=partition), overlap=overlap)
    batch = decoder.open(PADDED, MASK)
    assert torch.allclose(batch.logits, own_logits(llama, PADDED, MASK), rtol=1e-9, atol=1e-9)
    expected = own_tokens(llama, PADDED, MASK)
    found = decoder.generate([batch], NEW)[0]
    assert torch.equal(found, expected)
    ids, mask = (
        torch.cat([PADDED, expected[:, :-1]], 1),
        torch.cat([MASK, torch.ones(4, NEW - 1, dtype=torch.int64)], 1),
    )
    assert torch.equal(batch.tokens, ids)
    assert torch.allclose(batch.logits, own_logits(llama, ids, mask), rtol=1e-9, atol=1e-9)


def test_in_bfloat16():
    model = double().bfloat16()
    decoder = SplitDecoder(model, LocalPool(2))
    ids = token_ids(2, 9)
    batch = decoder.open(ids)
    more = token_ids(2, 3, seed=1)
    for tokens in more.T:
        decoder.step(batch, tokens)
    expected = own_logits(model, torch.cat([ids, more], 1)).float()
    assert batch.logits.dtype == torch.bfloat16
    assert (batch.logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("name", REACHED)
def test_architectures_are_cut(name):
    """Beyond the windows of those that have some; then with a row that is padded on the left, beside one that is not."""
    model = build(name)
    ids = inputs(name, 2, 24)["input_ids"]
    mask = torch.ones_like(ids)
    decoder = SplitDecoder(model, LocalPool(2))
    for padding in (0, 5):
        mask[0, :padding] = 0
        batch = decoder.open(ids[:, :20], mask[:, :20])
        for tokens in ids.T[20:]:
            decoder.step(batch, tokens)
        assert torch.allclose(batch.logits, own_logits(model, ids, mask), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in REACHED])
def test_other_architectures_are_refused_and_left_alone(name):
    model = build(name)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="model must be a decoder whose attention can be offloaded"):
        SplitDecoder(model, LocalPool())
    assert model.config._attn_implementation == before


@pytest.mark.slow
def test_the_real_model(smollm2_slice):
    model, ids = smollm2_slice.model, token_ids(3, 12, vocab=1000)
    decoder = SplitDecoder(model, LocalPool(3))
    batch = decoder.open(ids)
    assert torch.equal(decoder.generate([batch], NEW)[0], own_tokens(model, ids))


def test_batches_take_turns(llama, split):
    """Of other sizes and lengths, some through the same pool: each as if it were alone."""
    prompts = [token_ids(2, 9), token_ids(4, 5, seed=1), token_ids(2, 7, seed=2)]
    decoder = split(LocalPool(2, slots=3))
    batches = [decoder.open(ids) for ids in prompts]
    for found, ids in zip(decoder.generate(batches, NEW), prompts, strict=True):
        assert torch.equal(found, own_tokens(llama, ids))
    logits = decoder.step_together(batches, [token_ids(len(ids), 1, seed=5)[:, 0] for ids in prompts])
    assert [tuple(one.shape) for one in logits] == [(2, 97), (4, 97), (2, 97)]
    with pytest.raises(ValueError, match="tokens must be given for each of the 3 batches, got 1"):
        decoder.step_together(batches, [prompts[0][:, 0]])


def test_what_is_wrong_with_one_batch_is_said_before_any_goes_on(llama, split):
    prompts = [token_ids(2, 9), token_ids(3, 5, seed=1)]
    decoder = split(LocalPool(slots=3))
    batches = [decoder.open(ids) for ids in prompts]
    good = [token_ids(2, 1)[:, 0], token_ids(3, 1)[:, 0]]
    for wrong, error, words in (
        (torch.tensor([5, 97, 5]), ValueError, "tokens must be at least 0 and below the vocabulary's 97"),
        (torch.tensor([5, -1, 5]), ValueError, "tokens must be at least 0"),
        (token_ids(2, 1)[:, 0], ValueError, "tokens must have shape"),
        (torch.tensor([5.0, 5.0, 5.0]), TypeError, "tokens must hold whole numbers"),
    ):
        with pytest.raises(error, match=words):
            decoder.step_together(batches, [good[0], wrong])
    first = batches[0]
    for run in (
        lambda: decoder.step_together([first, first], [good[0]] * 2),
        lambda: decoder.generate([first, first], 3),
    ):
        with pytest.raises(ValueError, match="batches must each be given once"):
            run()
    gone = decoder.open(token_ids(2, 4))
    decoder.close(gone)
    decoder.open(token_ids(2, 4))  # in its slot
    for run in (
        lambda: decoder.step_together([first, gone], [good[0]] * 2),
        lambda: decoder.generate([first, gone], 3),
    ):
        with pytest.raises(ValueError, match="batches must be open"):
            run()
    for found, ids in zip(decoder.generate(batches, NEW), prompts, strict=True):
        assert torch.equal(found, own_tokens(llama, ids))


def test_the_other_batch_runs_while_attention_is_under_way(llama, split):
    """With two batches a slice of one lies between what the other asked and what it takes."""
    seen = []

    class Noting(LocalPool):
        def ask(self, slot, layer, *rest):
            seen.append(("ask", slot))
            super().ask(slot, layer, *rest)

        def take(self, slot, layer):
            seen.append(("take", slot))
            return super().take(slot, layer)

    decoder = split(Noting(slots=2))
    batches = [decoder.open(token_ids(2, 4)), decoder.open(token_ids(2, 4, seed=1))]
    seen.clear()
    decoder.step_together(batches, [token_ids(2, 1)[:, 0]] * 2)
    asked = [("ask", 0), ("ask", 1)]
    assert seen == asked + [("take", 0), ("ask", 0), ("take", 1), ("ask", 1)] * 2 + [("take", 0), ("take", 1)]


def test_traffic_is_the_closed_form_to_the_byte(llama, split):
    shape, steps = shape_of(llama), 3
    for pool in (LocalPool(1), LocalPool(4), LocalPool(2, partition="rows")):
        decoder = split(pool)
        batch = decoder.open(PADDED, MASK)
        assert pool.meter.bytes["prompt"] == 4 * shape.cache_bytes(7)
        for overlap in (True, False):
            decoder.overlap = overlap
            pool.meter.clear()
            decoder.generate([batch], steps + 1)
            assert pool.meter.decoding == steps * bytes_a_step(shape, 4)
            assert set(pool.meter.messages.values()) == {steps * 3}
            assert pool.meter.bytes["query"] == pool.meter.bytes["output"] == steps * 3 * 4 * 64 * 8


def test_a_lost_device_is_made_up_for_from_the_tokens(llama, split):
    ids = token_ids(2, 6)
    decoder = split(LocalPool(2))
    batch = decoder.open(ids)
    first = decoder.generate([batch], 3)[0]
    decoder.pool.holders[1].open(batch.slot, decoder.pool.holders[1]._specs[batch.slot])  # forgets everything
    decoder.restore(batch, LocalPool(4))
    rest = decoder.generate([batch], 3)[0]
    assert torch.equal(torch.cat([first[:, :2], rest], 1), own_tokens(llama, ids, new=5))


def test_steps_are_taken_back(llama, split):
    ids = token_ids(2, 6)
    decoder = split(LocalPool(2))
    batch = decoder.open(ids)
    logits, kept = batch.logits, [pair[0].clone() for pair in gathered(decoder.pool, batch.slot)]
    first = decoder.generate([batch], 4)[0]
    decoder.rewind(batch, 3)
    batch.logits = logits
    assert torch.equal(batch.tokens, ids)
    assert all(torch.equal(a, pair[0]) for a, pair in zip(kept, gathered(decoder.pool, batch.slot), strict=True))
    assert torch.equal(decoder.generate([batch], 4)[0], first)


def test_no_row_loses_its_first_token(split):
    decoder = split(LocalPool(2))
    batch = decoder.open(PADDED, MASK)  # one row has a single token
    decoder.generate([batch], 3)
    with pytest.raises(ValueError, match="tokens must be a whole number at least 0 and at most 2, got 3"):
        decoder.rewind(batch, 3)
    decoder.rewind(batch, 2)
    assert torch.equal(batch.tokens, PADDED)


def test_a_prompt_that_was_run_elsewhere(llama, split):
    from transformers.cache_utils import DynamicCache

    ids, cache = token_ids(2, 6), DynamicCache(config=llama.config)
    with torch.no_grad():
        logits = llama(input_ids=ids, cache=cache, use_cache=True).logits[:, -1]
    decoder = split(LocalPool(2))
    batch = decoder.adopt(cache, ids, logits)
    assert torch.equal(decoder.generate([batch], NEW)[0], own_tokens(llama, ids))
    assert cache.get_seq_length() == 6
    with pytest.raises(ValueError, match="cache must have 3 layers of keys and values of 2 rows, 4 heads and 5 tokens"):
        decoder.adopt(cache, ids[:, :5], logits)


def test_weights_that_change_after_the_first_use_count():
    model, ids = double(), token_ids(2, 6)
    decoder = SplitDecoder(model, LocalPool())
    first = decoder.generate([decoder.open(ids)], NEW)[0]
    model.model.layers[0].mlp.up_proj.weight.data.mul_(-2)
    model.model.layers[1].self_attn.q_proj.weight.data = model.model.layers[1].self_attn.q_proj.weight.data * 3
    assert torch.equal(decoder.generate([decoder.open(ids)], NEW)[0], own_tokens(model, ids))
    assert not torch.equal(first, own_tokens(model, ids))
    model.model.layers[2].mlp.down_proj = torch.nn.Linear(96, 64, bias=False).double().requires_grad_(False)
    batch = decoder.open(ids)
    assert torch.equal(decoder.generate([batch], NEW)[0], own_tokens(model, ids))


def test_another_dtype_after_the_first_use_counts():
    model, ids = tiny_model(num_key_value_heads=4), token_ids(2, 6)
    decoder = SplitDecoder(model, LocalPool())
    batch = decoder.open(ids)
    decoder.generate([batch], NEW)
    model.double()
    decoder.restore(batch)
    decoder.step(batch, ids[:, 0])
    assert batch.logits.dtype == torch.float64
    assert torch.allclose(batch.logits, own_logits(model, batch.tokens), rtol=1e-9, atol=1e-9)


def test_bad_prompts_are_named(llama, split):
    decoder = split(LocalPool(slots=1))
    ids = token_ids(2, 4)
    for mask, words in (
        ([[1, 1, 1, 0], [1, 1, 1, 1]], "attention_mask must pad on the left only"),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], "attention_mask must leave a token in each row"),
    ):
        with pytest.raises(ValueError, match=words):
            decoder.open(ids, torch.tensor(mask))
    with pytest.raises(TypeError, match="input_ids must hold whole numbers"):
        decoder.open(ids.double())
    batch = decoder.open(ids)
    with pytest.raises(ValueError, match="at most 1 batches can be open at once"):
        decoder.open(ids)
    with pytest.raises(ValueError, match="tokens must have shape"):
        decoder.step(batch, ids[:1, 0])
    with pytest.raises(ValueError, match="new_tokens must be a whole number at least 1"):
        decoder.generate([batch], 0)
    decoder.close(batch)
    decoder.open(ids)
    with pytest.raises(ValueError, match="is in training mode: call eval"):
        SplitDecoder(double().train(), LocalPool())
    with pytest.raises(ValueError, match="must divide the 4 key-value heads, got 3"):
        split(LocalPool(3)).open(ids)


# ------------------------------------------------------------------------------------------------------------------ generate


@pytest.mark.parametrize(("count", "partition"), [(2, "heads"), (3, "rows")])
def test_generate_with_the_attention_elsewhere(llama, count, partition):
    """transformers' own `generate`, rows padded on the left; sampling too."""
    before = llama.config._attn_implementation
    expected = llama.generate(PADDED, attention_mask=MASK, max_new_tokens=NEW, do_sample=False)
    torch.manual_seed(3)
    drawn = llama.generate(PADDED, attention_mask=MASK, max_new_tokens=NEW, do_sample=True)
    pool = LocalPool(count, partition=partition)
    with offloaded(llama, pool) as cache:
        found = llama.generate(PADDED, attention_mask=MASK, max_new_tokens=NEW, do_sample=False, cache=cache)
        assert pool.meter.decoding == (NEW - 1) * bytes_a_step(shape_of(llama), 4)
        assert not [layer.keys for layer in cache.layers if layer.keys is not None]
    assert torch.equal(found, expected)
    with offloaded(llama, pool) as cache:
        torch.manual_seed(3)
        assert torch.equal(
            llama.generate(PADDED, attention_mask=MASK, max_new_tokens=NEW, do_sample=True, cache=cache), drawn
        )
    assert llama.config._attn_implementation == before
    assert not pool._batches


def test_generate_sends_all_at_once(llama):
    """A model's own code makes query, key and value together: one message a device, and one attention, are enough."""

    class Whole(LocalPool):
        def ask(self, *rest):
            raise AssertionError("nothing overlaps")

    expected = llama.generate(PADDED, attention_mask=MASK, max_new_tokens=NEW, do_sample=False)
    with offloaded(llama, Whole(2)) as cache:
        found = llama.generate(PADDED, attention_mask=MASK, max_new_tokens=NEW, do_sample=False, cache=cache)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", REACHED)
def test_architectures_generate_with_the_attention_elsewhere(name):
    model, ids = build(name), inputs(name, 2, 20)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **options)
    with offloaded(model, LocalPool(2)) as cache:
        assert torch.equal(model.generate(ids, cache=cache, **options), expected)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in REACHED])
def test_architectures_that_cannot_be_plugged_are_refused(name):
    model = build(name)
    with (
        pytest.raises(ValueError, match="model must be one whose attention can be offloaded"),
        offloaded(model, LocalPool()),
    ):
        pass


def test_what_an_offloaded_cache_cannot_do_is_named(llama):
    ids = token_ids(2, 4)
    with offloaded(llama, LocalPool()) as cache:
        llama.generate(ids, max_new_tokens=2, cache=cache, do_sample=False)
        with pytest.raises(ValueError, match="tokens must come one by one behind the prompt"):
            llama(input_ids=ids, cache=cache, use_cache=True)
        with pytest.raises(ValueError, match="not reordered, cropped or repeated"):
            cache.crop(-1)
        with pytest.raises(ValueError, match="cache must be the one that `offloaded` gave"):
            llama(input_ids=ids, use_cache=False)
    with offloaded(llama, LocalPool()) as cache, pytest.raises(ValueError, match="masks its attention"):
        odd = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
        odd[:, :, 3, 1] = False
        llama(input_ids=ids, attention_mask=odd, cache=cache, use_cache=True)


# ----------------------------------------------------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def two():
    """Two processes for all tests: starting them takes seconds."""
    with AttentionWorkers(2, slots=2, slot_bytes=4096 * 4, timeout=60) as pool:
        yield pool


@pytest.fixture
def workers(two):
    yield two
    for slot in range(two.slots):
        two.close_batch(slot)
    two.meter.clear()
    two.timeline = None
    two.set_link(None)


@pytest.mark.parametrize("partition", ["heads", "rows"])
@pytest.mark.parametrize("overlap", [True, False])
def test_real_processes_decode_the_model(llama, split, workers, partition, overlap):
    workers.partition = partition
    decoder = split(workers, overlap=overlap)
    batches = [decoder.open(PADDED, MASK), decoder.open(token_ids(2, 5))]
    workers.meter.clear()
    found = decoder.generate(batches, NEW)
    assert torch.equal(found[0], own_tokens(llama, PADDED, MASK))
    assert torch.equal(found[1], own_tokens(llama, token_ids(2, 5)))
    assert workers.meter.decoding == (NEW - 1) * bytes_a_step(shape_of(llama), 6)
    assert workers.paths()["offloaded attention: flash of torch"] > 0
    workers.partition = "heads"


def test_real_processes_inside_generate(llama, workers):
    expected = llama.generate(PADDED, attention_mask=MASK, max_new_tokens=NEW, do_sample=False)
    with offloaded(llama, workers) as cache:
        assert torch.equal(
            llama.generate(PADDED, attention_mask=MASK, max_new_tokens=NEW, do_sample=False, cache=cache), expected
        )


@pytest.mark.parametrize("real", [False, True])
def test_what_nobody_took_is_gone_with_its_batch(llama, workers, real):
    """A new batch in the slot does not get the old one's answer."""
    pool = workers if real else LocalPool(2)
    q, k, v = (torch.randn(2, 4, 1, 16, dtype=torch.float64) for _ in range(3))
    for again in (False, True):
        for anew in (lambda: pool.close_batch(0), lambda: None):  # opening one over another closes it too
            pool.open(0, heads=4, kv_heads=4, starts=[0, 0], windows=[0])
            pool.whole(0, 0, q, k, v, 0.25)
            if again and real:
                pool.paths()  # the answer has been read
            anew()
            pool.open(0, heads=4, kv_heads=4, starts=[0, 0], windows=[0])
            with pytest.raises(ValueError, match="nothing was asked of layer 0 in slot 0"):
                pool.take(0, 0)
            pool.whole(0, 0, q, k, -v, 0.25)
            assert torch.equal(pool.take(0, 0), -v)


def test_long_prompts_are_handed_over_in_pieces(llama, split, workers):
    """A slot holds a few dozen tokens of this prompt's keys."""
    ids = token_ids(4, 60)
    decoder = split(workers)
    batch = decoder.open(ids)
    decoder.generate([batch], 2)
    decoder.rewind(batch, 1)
    decoder.step(batch, own_tokens(llama, ids, new=1)[:, 0])
    assert torch.equal(batch.logits.argmax(-1), own_tokens(llama, ids, new=2)[:, 1])
    with pytest.raises(ValueError, match="slot_bytes must be at least 32768 for keys of 8192 bytes a token"):
        decoder.open(token_ids(4, 2).repeat(8, 1))
    assert workers.free_slot() == 1  # the slot is free again


def test_an_imitated_link_lets_attention_begin_before_key_and_value(split, workers):
    """Of 20 ms each way: with overlap the earlier tokens are done when key and value arrive, which were sent behind the query."""
    ids = token_ids(2, 6)
    lines = {}
    for overlap in (True, False):
        decoder = split(workers, overlap=overlap)
        workers.set_link(None)
        batch = decoder.open(ids)
        workers.set_link(Link(bandwidth=1e5, latency=0.02))
        decoder.timeline = workers.timeline = Timeline()
        decoder.step(batch, ids[:, 0])
        lines[overlap], workers.timeline = decoder.timeline, None
        decoder.close(batch)
    for overlap, line in lines.items():
        assert {"model", "wait", "memory 0", "memory 1", "link 0 out", "link 0 back"} == set(line.lanes) - {
            "link 1 out", "link 1 back",
        }  # fmt: skip
        assert line.seconds >= 3 * 2 * 0.0199
        for layer in range(3):
            out = sorted((e.start, e.end) for e in line.events if e.lane == "link 0 out" and e.layer == layer)
            assert all(end - start >= 0.0199 for start, end in out)
            work = sorted((e.start, e.end) for e in line.events if e.lane == "memory 0" and e.layer == layer)
            if overlap:
                assert len(work) == 2
                assert work[0][1] < out[1][1]  # earlier tokens done before key and value have arrived
            else:
                assert len(work) == 1
                assert work[0][0] >= out[-1][1] - 1e-4
    assert lines[True].together("link 0 out", "memory 0") > 0
    assert lines[False].together("link 0 out", "memory 0") < 1e-3


def gone(pids):
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def test_a_process_that_is_killed_loses_nothing_but_time(llama, split, two):
    """The last of the tests with these processes."""
    ids = token_ids(2, 6)
    decoder = split(two)
    batch = decoder.open(ids)
    first = decoder.generate([batch], 3)[0]
    pids = two.pids
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(WorkerLost, match="memory worker 1 died"):
        decoder.generate([batch], 3)
    assert gone(pids)
    with pytest.raises(ValueError, match="the workers were ended: make new ones"):
        two.open(0, heads=4, kv_heads=4, starts=[0], windows=[0])
    done = batch.length - ids.shape[1]
    decoder.restore(batch, LocalPool(2))
    rest = decoder.generate([batch], 5 - done)[0]
    assert torch.equal(torch.cat([first[:, :done], rest], 1), own_tokens(llama, ids, new=5))
    two.close()


@pytest.mark.slow
@pytest.mark.parametrize(("wrong", "error", "words"), [
    (True, RuntimeError, "memory worker 0 failed:(.|\n)*KeyError"), (False, TimeoutError, "memory worker 0 gave no answer within 2 s")
])  # fmt: skip
def test_workers_that_fail_and_hang_are_ended(wrong, error, words):
    pool = AttentionWorkers(1, timeout=2)
    pids = pool.pids
    with pytest.raises(error, match=words):
        if wrong:
            pool._rewind(0, 1, 3)  # of a batch that nobody opened
        pool._receive(0, 2)
    assert gone(pids)


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them():
    """Killed, so that nothing of its own can run any more."""
    import subprocess
    import sys

    code = (
        "import time\n"
        "from assay.methods.serving.attention_offloading import AttentionWorkers\n"
        "if __name__ == '__main__':\n"
        "    pool = AttentionWorkers(2)\n"
        "    print(*pool.pids, flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while not gone(pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert len(pids) == 2
    assert gone(pids)
