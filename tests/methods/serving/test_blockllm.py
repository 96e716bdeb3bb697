"""A zoo of blocks: what is kept once, that every chain is its model to the bit, and batches that cross models."""

from __future__ import annotations

import copy
import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache

from assay.errors import InputError
from assay.methods.core import kernels
from assay.methods.serving.blockllm import (
    Answer,
    Batch,
    Chain,
    Engine,
    Factors,
    SharedModel,
    Zoo,
    attach,
    classes,
    digest_of,
    distinct_bytes,
    layer,
    read_adapter,
    scores,
    substituted,
    write_adapter,
)
from assay.methods.serving.blockllm.adapters import CONFIG, WEIGHTS
from assay.methods.serving.blockllm.shared import SharedLinear, Switch
from properties.architectures import CAUSAL, build
from tiny import LLAMA, tiny_model, token_ids

RANKS = {"sql": 4, "french": 2}


def adapter_of(model, seed, rank=4, targets=("q_proj", "down_proj")):
    chance = torch.Generator().manual_seed(seed)
    made = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets:
            down, up = (
                torch.randn(*shape, generator=chance)
                for shape in ((rank, module.in_features), (module.out_features, rank))
            )
            made[name] = Factors((0.3 * down).to(module.weight.dtype), (0.3 * up).to(module.weight.dtype), 0.5)
    return made


def top_tuned(model, seed, layers=(1,)):
    """A copy whose layers of these numbers have other weights."""
    other, chance = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for number in layers:
        for weight in other.model.layers[number].parameters():
            weight.data += 0.1 * torch.randn(weight.shape, generator=chance, dtype=torch.float32).to(weight.dtype)
    return other


def zoo_of(model) -> tuple[Zoo, dict]:
    """A base, two models with a layer of their own, two with adapters; and the full models."""
    full = {"base": model, "german": top_tuned(model, 1), "verse": top_tuned(model, 2)}
    zoo = Zoo()
    for name, one in full.items():
        zoo.add(name, one)
    for seed, (name, rank) in enumerate(RANKS.items()):
        zoo.add_adapter(name, "base", adapter_of(model, seed, rank))
    return zoo, full


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def made(model):
    return zoo_of(model)


def prompts(count=6, names=("base", "german", "sql", "french", "verse", "sql")):
    return [(names[i % len(names)], token_ids(1, 5 + 3 * i, seed=i)[0].tolist()) for i in range(count)]


def steps_of(model, ids, tokens):
    """Logits after the prompt and after each further token, by the model's own cache."""
    cache, found = DynamicCache(config=model.config), []
    with torch.inference_mode():
        for part in (ids, *([token] for token in tokens)):
            found.append(
                model(input_ids=torch.tensor([part]), cache=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            )
    return torch.stack(found)


def chain_steps(shared, name, ids, tokens):
    batch, row = Batch(shared), Answer(name, ids, 99)
    found = [batch.prefill(row)]
    for token in tokens:
        row.made.append(token)
        found.append(batch.advance([row], [token])[0])
    return torch.stack(found)


# ---- the bits of the model


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Mistral"])
def test_a_chain_is_its_model_to_the_bit(kind):
    zoo, full = zoo_of(tiny_model(kind))
    shared = SharedModel(zoo)
    for name, one in full.items():
        ids, more = token_ids(1, 12, seed=3)[0].tolist(), [5, 9, 11]
        assert torch.equal(chain_steps(shared, name, ids, more), steps_of(one, ids, more)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_other_dtypes_too(dtype):
    zoo, full = zoo_of(tiny_model().to(dtype))
    ids = token_ids(1, 9)[0].tolist()
    found = chain_steps(SharedModel(zoo), "german", ids, [4])
    assert torch.equal(found, steps_of(full["german"], ids, [4]).float())


def test_a_tied_model_too():
    zoo, full = zoo_of(tiny_model(tie_word_embeddings=True))
    ids = token_ids(1, 9)[0].tolist()
    for name in full:
        assert torch.equal(chain_steps(SharedModel(zoo), name, ids, [4, 5]), steps_of(full[name], ids, [4, 5]))


def test_an_adapter_is_pefts_to_the_bit(made, model, tmp_path):
    peft = pytest.importorskip("peft")
    zoo, _ = made
    write_adapter(tmp_path / "sql", adapter_of(model, 0, RANKS["sql"]))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "sql").eval()
    ids = token_ids(1, 12, seed=3)[0].tolist()
    with torch.inference_mode():
        wanted = theirs(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
    shared = SharedModel(zoo)
    assert torch.equal(Batch(shared).prefill(Answer("sql", ids, 1)), wanted)
    assert not torch.equal(Batch(shared).prefill(Answer("base", ids, 1)), wanted)


def test_one_models_batch_has_the_bits_of_its_own(made):
    """Rows of one model, of different lengths, in one batch: the same bits as the same batch of transformers."""
    zoo, full = made
    rows = [Answer("german", token_ids(1, length, seed=length)[0].tolist(), 9) for length in (5, 9, 6)]
    again = [Answer("german", row.ids, 9) for row in rows]
    shared, own = Batch(SharedModel(zoo)), Batch(full["german"])
    for batch, answers in ((shared, rows), (own, again)):
        for row in answers:
            row.made.append(int(batch.prefill(row).argmax()))
    assert torch.equal(shared.advance(rows, [7, 8, 9]), own.advance(again, [7, 8, 9]))


# ---- batches that cross models


def test_a_batch_of_all_models_is_each_model_alone():
    zoo, full = zoo_of(tiny_model().double())
    names = [*full, *RANKS]
    shared, batch = SharedModel(zoo), Batch(SharedModel(zoo))
    rows = [Answer(name, token_ids(1, 4 + 2 * i, seed=i)[0].tolist(), 9) for i, name in enumerate(names)]
    more = [[3 + i, 7 + i, 11 + i] for i in range(len(rows))]
    for row in rows:
        batch.prefill(row)
    for step in range(3):
        for row, tokens in zip(rows, more, strict=True):
            row.made.append(tokens[step])
        together = batch.advance(rows, [row.made[-1] for row in rows])
        for row, tokens, found in zip(rows, more, together, strict=True):
            alone = steps_of(zoo.monolith(row.tenant), row.ids, tokens[: step + 1])[-1]
            torch.testing.assert_close(found, alone.float(), rtol=1e-6, atol=1e-6)
    assert shared.names == tuple(names)


def test_a_shared_block_runs_once_for_all_rows_and_an_own_one_once_a_block(made):
    zoo, _ = made
    shared = SharedModel(zoo)
    calls = []
    for number in range(LLAMA["num_hidden_layers"]):
        one = shared.model.model.layers[number].mlp.up_proj
        for which, variant in enumerate(one.variants):
            variant.register_forward_hook(lambda m, args, y, at=(number, which): calls.append((*at, len(args[0]))))
    shared.use(["base", "german", "sql", "german"])
    with torch.inference_mode():
        shared.model(input_ids=token_ids(4, 3))
    assert calls == [(0, 0, 4), (1, 0, 2), (1, 1, 2)]
    assert len(shared.model.model.layers[0].mlp.up_proj.variants) == 1
    assert len(shared.model.model.layers[1].mlp.up_proj.variants) == 3


def test_adapters_are_a_grouped_product_without_a_loop(made):
    zoo, _ = made
    shared = SharedModel(zoo)
    shared.use(["sql", "base", "french", "sql"])
    before = kernels.paths()
    products = []

    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.bmm:
                products.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    with torch.inference_mode(), Counted():
        shared.model(input_ids=token_ids(4, 2))
    layers = 2 * LLAMA["num_hidden_layers"]  # q_proj and down_proj
    assert len(products) == 2 * layers
    assert {shape[:2] for shape in products} == {(2, 2 * 2)}  # two adapters, each over two rows of two tokens
    assert kernels.paths()["adapters: grouped"] - before.get("adapters: grouped", 0) == layers


@pytest.mark.parametrize("who", [[0, 1, 2, 0, 3], [3, 2, 2, 2, 1], [0, 0, 1], [2, 1, 3]])
def test_the_grouped_product_is_each_rows_own(who):
    """By hand, row by row, in float64: chains without an adapter (0) and with one of rank 3, 1 and 5."""
    chance = torch.Generator().manual_seed(len(who))
    linear = torch.nn.Linear(6, 4).double().requires_grad_(False)
    draw = lambda *shape: torch.randn(*shape, generator=chance, dtype=torch.float64)  # noqa: E731
    factors = [Factors(draw(rank, 6), draw(4, rank), scale) for rank, scale in ((3, 0.5), (1, -2.0), (5, 4 / 3))]
    switch = Switch()
    one = SharedLinear(switch, [linear], (0, 0, 0, 0), factors, (-1, 0, 1, 2))
    switch.set(who)
    for x in (draw(len(who), 3, 6), draw(len(who), 6)):
        wanted = torch.stack(
            [linear(row) + (row @ factors[w - 1].delta().double().T if w else 0) for row, w in zip(x, who, strict=True)]
        )
        torch.testing.assert_close(one(x), wanted, rtol=1e-5, atol=1e-5)
    assert all(len(part) == len({w for w in who if w}) for part in one.stacked(switch.by_adapter(one.slots).slots))


def test_adapters_take_no_memory_of_their_own_until_they_meet(model):
    """Neither padding to the largest rank of all, nor a copy a row."""
    zoo = Zoo()
    zoo.add("base", model)
    for seed, rank in enumerate((2, 2, 60)):
        zoo.add_adapter(f"a{rank}.{seed}", "base", adapter_of(model, seed, rank))
    shared = SharedModel(zoo)

    def held():
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in shared.tensors()}.values())

    for module in shared.model.modules():
        if isinstance(module, SharedLinear):
            module.together = None
    small = sum(2 * (one.down.nbytes + one.up.nbytes) for one in adapter_of(model, 0, 2).values())
    before = held()
    assert before <= zoo.bytes + 4096  # rotary frequencies
    shared.use(["a2.0", "a2.1"] * 8)
    with torch.inference_mode():
        shared.model(input_ids=token_ids(16, 2))
    assert before < held() <= before + small + 1024


def test_passes_of_two_threads_do_not_meet(made):
    """Two engines over one shared model, each in a thread of its own."""
    shared = SharedModel(made[0])
    asked = {"one": prompts(6), "two": prompts(6, names=("sql", "verse", "french"))}
    alone = {who: Engine(shared).generate(asked[who], 12) for who in asked}
    with ThreadPoolExecutor(2) as pool:
        futures = {who: pool.submit(Engine(shared).generate, asked[who], 12) for who in asked}
        assert {who: future.result() for who, future in futures.items()} == alone


def test_answers_of_many_models_that_come_and_go(made):
    zoo, _ = made
    engine = Engine(SharedModel(zoo), most=4)
    asked = prompts(8)
    found = engine.generate(asked, 6)
    for (tenant, ids), answer in zip(asked, found, strict=True):
        alone = Engine(zoo.monolith(tenant)).generate([(tenant, ids)], 6)[0]
        assert answer == alone
    assert max(len(one.tenants) for one in engine.passes) == 4
    assert not engine.busy


def test_an_end_token_ends_one_row_and_no_other(made):
    zoo, _ = made
    asked = prompts(3)
    plain = Engine(SharedModel(zoo)).generate(asked, 6)
    end = plain[1][2]
    found = Engine(SharedModel(zoo)).generate(asked, 6, ends=[end])
    for one, other in zip(plain, found, strict=True):
        assert other == (one[: one.index(end) + 1] if end in one else one)


def test_a_step_that_fails_leaves_nothing_behind(made, monkeypatch):
    engine, asked = Engine(SharedModel(made[0])), prompts(3)
    plain = Engine(SharedModel(made[0])).generate(asked, 4)
    model, honest = engine.batch.model, type(engine.batch.model).forward
    calls = []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if self is model and len(calls) == 4:  # a prompt, a step, a prompt, and this
            raise RuntimeError("broken")
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", failing)
    for tenant, ids in asked:
        engine.submit(tenant, ids, 4)
    with pytest.raises(RuntimeError, match="broken"):
        while engine.busy:
            engine.step()
    assert (len(engine.running), len(engine.waiting)) == (0, 1)
    while engine.busy:
        engine.step()
    assert engine.generate(asked, 4) == plain


def test_a_model_whose_numbers_are_not_finite_ends_its_own_rows_only(model):
    broken = copy.deepcopy(model)
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    zoo = Zoo()
    zoo.add("base", model)
    zoo.add("broken", broken)
    engine = Engine(SharedModel(zoo))
    alone = engine.generate([("base", [5, 6, 7])], 4)[0]
    rows = [engine.submit(name, [5, 6, 7], 4) for name in ("base", "broken", "base")]
    while engine.busy:
        engine.step()
    assert [row.made for row in rows] == [alone, [], alone]
    assert [bool(row.error) for row in rows] == [False, True, False]
    with pytest.raises(FloatingPointError, match="'broken' cannot answer"):
        engine.generate([("base", [5, 6, 7]), ("broken", [5])], 4)
    assert not engine.busy


def test_what_an_engine_refuses(made):
    engine = Engine(SharedModel(made[0]))
    with pytest.raises(ValueError, match="must fit 512 positions, got 500 and 13"):
        engine.submit("base", [3] * 500, 13)
    with pytest.raises(ValueError, match="name must be one of base, german"):
        engine.generate([("base", [3]), ("nobody", [3])], 2)
    assert not engine.busy
    for ids in ([], [97], [-1]):
        with pytest.raises(ValueError, match="ids"):
            engine.submit("base", ids, 2)
    with pytest.raises(TypeError, match="ids"):
        engine.submit("base", [1.5], 2)
    with pytest.raises(ValueError, match="new_tokens"):
        engine.submit("base", [3], 0)


def test_a_pass_of_other_rows_than_announced_is_refused(made):
    shared = SharedModel(made[0])
    for names in ([], ["base"] * 3, ["base", "german", "sql"]):
        shared.use(names)
        for rows in (1, 2):
            match = f"a pass must have the rows it was announced with, {len(names)}, got {rows}"
            with pytest.raises(ValueError, match=match), torch.inference_mode():
                shared.model(input_ids=token_ids(rows, 3))


# ---- bytes


def bytes_of(model):
    own = {id(weight): weight.nbytes for weight in model.parameters()}
    return sum(own.values())


def test_what_a_zoo_holds(made, model):
    zoo, full = made
    factors = {
        name: sum(one.down.nbytes + one.up.nbytes + 8 for one in adapter_of(model, seed, rank).values())
        for seed, (name, rank) in enumerate(RANKS.items())
    }
    top = sum(weight.nbytes for weight in model.model.layers[1].parameters())
    assert zoo.bytes == bytes_of(model) + 2 * top + sum(factors.values())
    assert zoo.bytes == sum(block.bytes for block in zoo.blocks.values())
    assert zoo.separate_bytes == 5 * bytes_of(model) + sum(factors.values())
    assert zoo.bytes_of("sql") == bytes_of(model) + factors["sql"]


def test_a_duplicate_costs_nothing_and_what_nobody_has_goes(model):
    zoo, _ = zoo_of(model)
    before, blocks = zoo.bytes, set(zoo.blocks)
    zoo.add("again", copy.deepcopy(model))
    zoo.add_adapter("sql too", "again", adapter_of(model, 0, RANKS["sql"]))
    assert (zoo.bytes, set(zoo.blocks)) == (before, blocks)
    for name in ("again", "sql too", "german"):
        zoo.remove(name)
    assert before - zoo.bytes == sum(weight.nbytes for weight in model.model.layers[1].parameters())
    zoo.remove("base")  # its blocks are still those of its adapters
    assert set(zoo.chains) == {"verse", "sql", "french"}
    ids = token_ids(1, 5)
    with torch.inference_mode():
        assert torch.equal(
            zoo.monolith("sql")(input_ids=ids).logits, zoo_of(model)[0].monolith("sql")(input_ids=ids).logits
        )


def test_an_empty_zoo_takes_any_shape(tmp_path):
    zoo = Zoo()
    zoo.add("a", tiny_model())
    zoo.remove("a")
    assert (zoo.bytes, zoo.places, zoo.blocks) == (0, [], {})
    for call in (zoo.shell, lambda: zoo.dtype, lambda: zoo.save(tmp_path / "zoo")):
        with pytest.raises(ValueError, match="no model yet"):
            call()
    assert not (tmp_path / "zoo").exists()
    zoo.add("b", tiny_model(hidden_size=32))
    assert zoo.monolith("b").config.hidden_size == 32


def test_a_tied_head_is_the_embedding_and_counted_once():
    model = tiny_model(tie_word_embeddings=True)
    zoo = Zoo()
    chain = zoo.add("base", model)
    assert chain.blocks["head"] == chain.blocks["embed"]
    assert zoo.bytes == zoo.separate_bytes == bytes_of(model)


def test_models_share_memory_and_not_with_what_was_added(made, model):
    zoo, full = made
    one, other = zoo.monolith("sql"), zoo.monolith("german")
    assert one.model.layers[0].mlp.up_proj.weight.data_ptr() == other.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert one.model.layers[1].mlp.up_proj.weight.data_ptr() != other.model.layers[1].mlp.up_proj.weight.data_ptr()
    assert one.model.embed_tokens.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    own = zoo.monolith("sql", own=True)
    ours = {block.data_ptr() for group in zoo.blocks.values() for block in group.tensors.values()}
    assert not ours & {
        weight.data_ptr() for name, weight in own.named_parameters() if ".down" not in name and ".up" not in name
    }


def test_merged_weights_answer_as_the_adapter_beside_them(made):
    zoo, _ = made
    ids = token_ids(1, 9)
    with torch.inference_mode():
        beside, merged = (zoo.monolith("sql", merge=merge)(input_ids=ids).logits for merge in (False, True))
    torch.testing.assert_close(beside, merged, rtol=1e-4, atol=1e-4)


def test_digests_know_names_types_shapes_and_bytes():
    x = torch.arange(6.0)
    known = [
        digest_of(one)
        for one in ({"a": x}, {"b": x}, {"a": x.view(2, 3)}, {"a": x.double()}, {"a": x + 1}, {"a": x, "b": x})
    ]
    assert len(set(known)) == len(known)
    assert digest_of({"a": x.view(2, 3).T}) == digest_of({"a": x.view(2, 3).T.contiguous()})


def test_what_a_zoo_refuses(made, model):
    zoo, _ = zoo_of(model)
    before = set(zoo.blocks)
    for name, error, other, match in (
        ("base", ValueError, model, "name must be new"),
        ("", TypeError, model, "name must be a text"),
        ("x", ValueError, tiny_model(hidden_size=32), "configuration"),
        ("x", ValueError, copy.deepcopy(model).double(), "float32"),
        ("x", TypeError, "model", "model must be"),
    ):
        with pytest.raises(error, match=match):
            zoo.add(name, other)
    with pytest.raises(ValueError, match="without an adapter"):
        zoo.add_adapter("x", "sql", adapter_of(model, 0))
    with pytest.raises(ValueError, match="linear layers"):
        zoo.add_adapter("x", "base", {"model.norm": Factors(torch.zeros(2, 64), torch.zeros(64, 2), 1.0)})
    with pytest.raises(ValueError, match="must fit"):
        zoo.add_adapter(
            "x", "base", {"model.layers.0.mlp.up_proj": Factors(torch.zeros(2, 9), torch.zeros(96, 2), 1.0)}
        )
    with pytest.raises(ValueError, match="at least one layer"):
        zoo.add_adapter("x", "base", {})
    half, large = Zoo(), {"model.layers.0.mlp.up_proj": Factors(torch.ones(1, 64), torch.ones(96, 1), 1e5)}
    half.add("base", copy.deepcopy(model).half())
    with pytest.raises(ValueError, match=r"finite in torch.float16.*layers.0.mlp.up_proj"):
        half.add_adapter("x", "base", large)
    assert set(zoo.blocks) == before
    with pytest.raises(ValueError, match="no models yet"):
        Zoo().chain("x")
    with pytest.raises(ValueError, match="at least one model"):
        SharedModel(zoo, {})


REFUSED = dict.fromkeys(("mamba", "gpt_oss"), "parameters in layers of their own")


@pytest.mark.parametrize("kind", CAUSAL)
def test_other_architectures_answer_as_each_model_alone_or_are_refused(kind):
    """Experts, learned positions, windows, tied heads: every block of the second model is another than the first's."""
    one = build(kind)
    other, chance = copy.deepcopy(one), torch.Generator().manual_seed(0)
    for weight in other.parameters():
        weight.data *= 1 + 0.2 * torch.rand(weight.shape, generator=chance)
    zoo = Zoo()
    if kind in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[kind]):
            zoo.add("a", one)
        return
    zoo.add("a", one)
    zoo.add("b", other)
    shared, alone = Batch(SharedModel(zoo)), {"a": one, "b": other}
    rows = [
        Answer(name, token_ids(1, length, seed=length)[0].tolist(), 9)
        for name, length in (("a", 20), ("b", 5), ("a", 7))
    ]
    for row in rows:
        shared.prefill(row)
    for tokens in ([5, 6, 7], [8, 9, 10]):
        for row, token in zip(rows, tokens, strict=True):
            row.made.append(token)
        found = shared.advance(rows, tokens)
    with torch.inference_mode():
        wanted = [alone[row.tenant](input_ids=torch.tensor([row.ids + row.made])).logits[0, -1] for row in rows]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=2e-3, atol=2e-3)


def test_a_layer_that_looks_into_another_is_refused(monkeypatch):
    """What is not called but read would be the first model's for everybody."""
    from transformers.models.llama import modeling_llama

    model = tiny_model()

    def forward(self, x):
        return torch.nn.functional.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    zoo = Zoo()
    zoo.add("base", model)
    zoo.add("same but for its head", copy.deepcopy(model))
    assert SharedModel(zoo)
    zoo.add("other", top_tuned(model, 1))
    with pytest.raises(ValueError, match="the weight of a Linear is used from outside it"):
        SharedModel(zoo)


# ---- on disk


def test_a_zoo_comes_back_from_its_folder(made, tmp_path):
    zoo, _ = made
    zoo.save(tmp_path / "zoo")
    files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "zoo" / "blocks").iterdir()}
    assert set(files) == {f"{digest}.safetensors" for digest in zoo.blocks}
    zoo.save(tmp_path / "zoo")
    assert files == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "zoo" / "blocks").iterdir()}
    back = Zoo.open(tmp_path / "zoo")
    assert (back.bytes, back.chains) == (zoo.bytes, zoo.chains)
    asked = prompts(4)
    assert Engine(SharedModel(back)).generate(asked, 4) == Engine(SharedModel(zoo)).generate(asked, 4)


def test_a_folder_that_was_changed_is_refused(made, tmp_path):
    zoo, _ = made
    zoo.save(tmp_path / "zoo")
    digest = zoo.chains["german"].blocks[layer(1)]

    def changed(name, change):
        shutil.copytree(tmp_path / "zoo", tmp_path / name)
        change(tmp_path / name)
        with pytest.raises(InputError, match="no zoo that can be read"):
            Zoo.open(tmp_path / name)

    def damage(folder):
        file = folder / "blocks" / f"{digest}.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    def edit(folder, how):
        index = json.loads((folder / "zoo.json").read_text())
        how(index)
        (folder / "zoo.json").write_text(json.dumps(index))

    changed("damaged", damage)
    changed("missing", lambda folder: (folder / "blocks" / f"{digest}.safetensors").unlink())
    changed(
        "path", lambda folder: edit(folder, lambda i: i["models"]["german"]["blocks"].update({layer(1): "../../x"}))
    )
    changed(
        "swapped",
        lambda folder: edit(
            folder, lambda i: i["models"]["german"]["blocks"].update({layer(1): zoo.chains["base"].blocks["embed"]})
        ),
    )
    changed("kind", lambda folder: edit(folder, lambda i: i["config"].update(model_type="mine")))
    changed("format", lambda folder: edit(folder, lambda i: i.update(format=2)))
    changed("short", lambda folder: edit(folder, lambda i: i["models"]["german"]["blocks"].pop("embed")))
    changed("none", lambda folder: edit(folder, lambda i: i.update(models={})))
    changed("list", lambda folder: edit(folder, lambda i: i.update(models=[1])))
    changed("deep", lambda folder: (folder / "zoo.json").write_text("[" * 100_000))
    for name, config in (
        ("tall", {"num_hidden_layers": 1_000_000}),
        ("wide", {"vocab_size": 10**12}),
        ("vast", {"intermediate_size": 10**15}),
        ("negative", {"hidden_size": -64}),
    ):
        changed(name, lambda folder, config=config: edit(folder, lambda i: i["config"].update(config)))

    def with_two_scales(folder):
        from safetensors.torch import save_file

        place = next(iter(zoo.chains["sql"].adapters))
        tensors = dict(zoo.blocks[zoo.chains["sql"].adapters[place]].tensors)
        scale = next(name for name in tensors if name.endswith("scale"))
        tensors[scale] = torch.ones(2, dtype=torch.float64)
        new = digest_of(tensors)
        save_file(tensors, folder / "blocks" / f"{new}.safetensors")
        edit(folder, lambda i: i["models"]["sql"]["adapters"].update({place: new}))

    changed("scales", with_two_scales)
    with pytest.raises(InputError):
        Zoo.open(tmp_path / "nowhere")


def test_an_adapter_comes_back_from_its_folder_and_from_peft(model, tmp_path):
    peft = pytest.importorskip("peft")
    own = adapter_of(model, 5)
    write_adapter(tmp_path / "own", own)
    back = read_adapter(tmp_path / "own")
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name].delta(), own[name].delta()) for name in own)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_rslora=True, alpha_pattern={"up_proj": 3}
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    zoo = Zoo()
    zoo.add("base", model)
    zoo.add_adapter("theirs", "base", read_adapter(tmp_path / "theirs"))
    ids = token_ids(1, 8)
    with torch.inference_mode():
        assert torch.equal(zoo.monolith("theirs")(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c, t: c.update(peft_type="IA3"), "peft_type"),
        (lambda c, t: c.update(use_dora=True), "use_dora"),
        (lambda c, t: c.update(modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda c, t: c.update(init_lora_weights="pissa"), "init_lora_weights"),
        (lambda c, t: c.update(init_lora_weights=["eva"]), "init_lora_weights"),
        (lambda c, t: c.update(arrow_config={"top_k": 3}), "arrow_config"),
        (lambda c, t: c.update(lora_alpha="8"), "lora_alpha"),
        (lambda c, t: c.update(alpha_pattern={"(a+)+$": 1}), "alpha_pattern"),
        (lambda c, t: t.update({"x.weight": torch.zeros(1)}), "no factor"),
        (lambda c, t: t.pop(next(name for name in t if "lora_B" in name)), "only lora_A"),
        (lambda c, t: next(iter(t.values())).fill_(float("nan")), "NaN"),
        (lambda c, t: t.clear(), "no factors"),
        (lambda c, t: t.update({n.removeprefix("base_model.model."): x.clone() for n, x in t.items()}), "there twice"),
    ],
)
def test_an_adapter_that_is_damaged_or_not_understood_is_refused(model, tmp_path, change, match):
    from safetensors.torch import load_file, save_file

    write_adapter(tmp_path / "a", adapter_of(model, 5))
    config, tensors = json.loads((tmp_path / "a" / CONFIG).read_text()), load_file(tmp_path / "a" / WEIGHTS)
    change(config, tensors)
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    with pytest.raises(InputError, match=match):
        read_adapter(tmp_path / "a")


def test_pickled_and_missing_weights_are_refused(model, tmp_path):
    write_adapter(tmp_path / "a", adapter_of(model, 5))
    (tmp_path / "a" / WEIGHTS).rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(InputError, match="pickled"):
        read_adapter(tmp_path / "a")
    with pytest.raises(InputError, match="this is no adapter"):
        read_adapter(tmp_path)
    (tmp_path / "a" / WEIGHTS).write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="cannot be read, truncated or damaged"):
        read_adapter(tmp_path / "a")
    (tmp_path / "a" / CONFIG).write_text("[" * 100_000)
    with pytest.raises(InputError, match="cannot be read"):
        read_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match="one rank"):
        write_adapter(
            tmp_path / "b",
            {
                "x": Factors(torch.zeros(2, 4), torch.zeros(4, 2), 1.0),
                "y": Factors(torch.zeros(1, 4), torch.zeros(4, 1), 1.0),
            },
        )


def test_a_new_adapter_changes_nothing_and_learns(model):
    one, ids = copy.deepcopy(model), token_ids(2, 10)
    before = one(input_ids=ids).logits
    layers = attach(one, ["q_proj", "up_proj"], rank=4, alpha=8.0)
    assert len(layers) == 2 * LLAMA["num_hidden_layers"]
    assert torch.equal(one(input_ids=ids).logits, before)
    one(input_ids=ids).logits.square().mean().backward()
    learning = [name for name, weight in one.named_parameters() if weight.requires_grad]
    assert all(name.endswith((".down", ".up")) for name in learning)
    assert all(layer.up.grad.abs().sum() > 0 for layer in layers.values())
    with pytest.raises(ValueError, match="targets"):
        attach(copy.deepcopy(model), ["nothing"], rank=4, alpha=8.0)


# ---- equivalence


@pytest.fixture(scope="module")
def near():
    """Models whose upper layer is the base's up to a little, or to a lot."""
    model, zoo = tiny_model(initializer_range=0.1), Zoo()
    zoo.add("base", model)
    for name, size in (("near", 1e-4), ("far", 0.3), ("farther", 0.6)):
        other, chance = copy.deepcopy(model), torch.Generator().manual_seed(len(name))
        for weight in other.model.layers[1].parameters():
            weight.data += size * torch.randn(weight.shape, generator=chance)
        zoo.add(name, other)
    return zoo, scores(zoo, token_ids(2, 12))


def test_equivalence_is_symmetric_and_reflexive(near):
    zoo, found = near
    digests = {one.blocks[layer(i)] for one in zoo.chains.values() for i in range(2)}
    assert {digest for pair in found for digest in pair} == digests
    for (a, b), value in found.items():
        assert found[b, a] == value
        assert value <= 1
        assert value == 1 or a != b
    of = {name: one.blocks[layer(1)] for name, one in zoo.chains.items()}
    assert found[of["base"], of["near"]] > 0.9999
    assert found[of["base"], of["near"]] > found[of["base"], of["far"]]


def test_it_is_the_cosine_of_what_the_head_makes(near):
    """By hand, from the models' own layers."""
    zoo, found = near
    base, far = zoo.monolith("base"), zoo.monolith("far")
    with torch.inference_mode():
        out = base(input_ids=token_ids(2, 12), output_hidden_states=True)
        x, here = out.hidden_states[1], torch.arange(12)[None]
        rope = base.model.rotary_emb(x, here)
        said = []
        for model in (base, far):
            y = model.model.layers[1](x, attention_mask=None, position_embeddings=rope, position_ids=here)
            said.append(base.lm_head(base.model.norm(y)).softmax(-1))
        wanted = torch.cosine_similarity(*said, dim=-1).mean()
    of = {name: one.blocks[layer(1)] for name, one in zoo.chains.items()}
    assert found[of["base"], of["far"]] == pytest.approx(float(wanted), abs=1e-5)


def test_a_lower_threshold_never_leaves_more_blocks_and_above_one_nothing_is_shared(near):
    zoo, found = near
    counts, sizes = [], []
    for threshold in (1.5, 1.0000001, 1.0, 0.99999, 0.99, 0.9, 0.5, 0.0, -1.0):
        chains = substituted(zoo, found, threshold)
        counts.append(len(set().union(*(one.digests() for one in chains.values()))))
        sizes.append(distinct_bytes(zoo, chains))
    assert counts == sorted(counts, reverse=True)
    assert sizes == sorted(sizes, reverse=True)
    assert counts[0] > counts[4] > counts[-1]
    assert substituted(zoo, found, 1.5) == zoo.chains
    assert sizes[0] == zoo.bytes


def test_classes_hold_every_pair_to_the_threshold():
    """b is like a and c, which are not alike: no class has all three."""
    found = {("a", "b"): 0.95, ("b", "c"): 0.94, ("a", "c"): 0.2}
    both = found | {(b, a): value for (a, b), value in found.items()}
    assert sorted(map(sorted, classes(["a", "b", "c"], both, 0.9))) == [["a", "b"], ["c"]]
    assert sorted(map(sorted, classes(["a", "b", "c"], both, 0.1))) == [["a", "b", "c"]]
    assert classes(["a", "x"], both, -5.0) == [["a"], ["x"]]
    with pytest.raises(ValueError, match="threshold"):
        classes(["a"], both, float("nan"))
    odd = both | {("a", "b"): float("nan"), ("b", "a"): float("nan")}
    assert sorted(map(sorted, classes(["a", "b", "c"], odd, 0.9))) == [["a"], ["b", "c"]]


def joined_by_looking_at_all(digests, found, limit):
    """Complete linkage as it is defined: the two classes whose least alike pair is most alike become one, while that is enough."""
    groups = [[digest] for digest in digests]
    while len(groups) > 1:
        links = {
            (i, j): min(found.get((a, b), -9.0) for a in groups[i] for b in groups[j])
            for i in range(len(groups))
            for j in range(i)
        }
        i, j = max(links, key=lambda pair: (links[pair], -pair[0], -pair[1]))
        if links[i, j] < limit or links[i, j] == -9.0:
            break
        groups[j] += groups.pop(i)
    return sorted(map(sorted, groups))


def test_classes_are_complete_linkage():
    chance = random.Random(0)
    for size in (1, 2, 7, 12):
        digests = [f"d{i:02}" for i in range(size)]
        found = {}
        for i, a in enumerate(digests):
            for b in digests[:i]:
                if chance.random() < 0.8:
                    found[a, b] = found[b, a] = chance.random()
        for limit in (0.0, 0.3, 0.7, 0.95):
            assert sorted(map(sorted, classes(digests, found, limit))) == joined_by_looking_at_all(
                digests, found, limit
            )


def test_the_blocks_of_many_models_are_sorted_in_no_time():
    """Twenty models of eighty layers; layers of one depth are alike. To look at all pairs at every step would take an hour."""
    digests = [f"{model}/{depth}" for depth in range(80) for model in range(20)]
    found = {(f"{a}/{d}", f"{b}/{d}"): 0.99 for d in range(80) for a in range(20) for b in range(a)}
    assert sorted(map(len, classes(digests, found, 0.98))) == [20] * 80


def test_a_substituted_chain_is_the_model_with_that_block(near):
    zoo, found = near
    chains = substituted(zoo, found, 0.9999)
    assert chains["near"].blocks[layer(1)] == chains["base"].blocks[layer(1)]
    assert chains["far"] == zoo.chains["far"]
    ids = token_ids(1, 8)[0].tolist()
    shared = SharedModel(zoo, chains)
    assert torch.equal(chain_steps(shared, "near", ids, [3, 4]), steps_of(zoo.monolith("base"), ids, [3, 4]))


def test_layers_at_other_depths_are_compared_where_asked(near):
    zoo, found = near
    wider = scores(zoo, token_ids(2, 12), reach=1)
    lower = zoo.chains["base"].blocks[layer(0)]
    upper = zoo.chains["base"].blocks[layer(1)]
    assert (lower, upper) not in found
    assert wider[lower, upper] == wider[upper, lower] < 1
    assert {pair: wider[pair] for pair in found} == pytest.approx(found)


def test_a_chain_is_a_plain_value():
    assert Chain({"embed": "a"}, {"embed": "b"}).digests() == {"a", "b"}
