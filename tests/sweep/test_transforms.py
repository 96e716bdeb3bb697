"""Every transform on every architecture, as a user of the library calls it: it serves the model, or says why not and leaves it alone.

A few pairs run in `make test`, all of them in `make sweep`. What is asked of each:

- one that does not fit the model says so in a sentence, and `apply` then raises ValueError before anything of the model has changed;
- one that fits leaves a model that runs in float32 and in bfloat16 and answers what it should: what that is differs by slot;
- a sequence's answer does not depend on its neighbours in the batch;
- weights that are left to change still count after the transform;
- what is applied to a model that was saved and loaded gives the same as what is applied to the model itself;
- a configuration of the wrong kind is refused before anything is changed, in words that name the setting;
- two transforms together work, or the second refuses and leaves what the first made of the model.

What linear layers and attention must compute to the last digit is in `tests/methods/test_linear_sweep.py` and
`tests/methods/core/attention/test_attention_sweep.py`.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from functools import cache

import pytest
import torch
from tests.properties.architectures import ARCHITECTURES, CAUSAL, build, inputs, output
from tests.properties.dense_weights import reference

from assay.methods.core.generation.loop import generate_batch
from assay.methods.transform import LEAST_SHARE, SLOTS, TuneContext
from assay.tuner.transforms import transforms

SMALL = {
    ("fp8_vs_int8", "mamba"),
    ("xattention", "mistral"),
    ("weight_only", "gpt2"),
    ("decode_loop", "qwen2"),
    ("sorted_batches", "t5"),
    ("speculation", "mistral"),
    ("greenformers", "vit"),
}
LONG = 320  # tokens: several blocks of those that sparse attention chooses from
POSITIONS = {"gpt2": {"n_positions": 512}, "gpt_oss": {}}
PICTURES = ("vit", "clip-vision")
# How far from the untouched outputs, in float32: rounding to 8 and 4 bits and blocks left out, of random weights and inputs.
NEAR = {"fp8_vs_int8": 0.15, "weight_only": 0.3, "sageattention2": 0.1, "xattention": 0.35}
EXACT = 1e-4


@cache
def context(goal: str) -> TuneContext:
    return TuneContext(goal, 4096, 8, batch_size=8, calibration=tuple(inputs("llama", 4)["input_ids"].split(1)))


def context_of(transform) -> TuneContext:
    return context(sorted(transform.goals)[0])


def marks(transform, small: bool):
    if transform.name == "compile":
        return [pytest.mark.slow]
    return [] if small else [pytest.mark.sweep]


def cases(architectures=tuple(ARCHITECTURES)):
    for transform in transforms().values():
        for architecture in architectures:
            small = marks(transform, (transform.name, architecture) in SMALL)
            yield pytest.param(transform, architecture, marks=small, id=f"{transform.name}-{architecture}")


def made(architecture, tokens):
    """The model, with room for so many tokens."""
    if tokens == LONG:
        return build(architecture, **POSITIONS.get(architecture, {"max_position_embeddings": 512}))
    return build(architecture)


def state(model):
    """What may not change when a transform refuses."""
    tensors = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    parts = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    configs = [
        (name, copy.deepcopy(module.config.to_dict()), module.config._attn_implementation)
        for name, module in model.named_modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation")
    ]
    return tensors, parts, configs, dict(getattr(model, "assay_settings", {}))


def same_state(before, after):
    return before[1:] == after[1:] and all(
        before[0][name][0] == after[0][name][0] and torch.equal(before[0][name][1], after[0][name][1])
        for name in before[0] | after[0]
    )


def refused(transform, model, config, situation):
    """The error that `apply` raises, or None."""
    try:
        transform.apply(model, config, situation)
    except (TypeError, ValueError) as error:
        return error
    return None


def distance(found, expected):
    return float((found - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm().clamp(min=1e-9))


PROMPTS = [ids.tolist()[5 * row :] for row, ids in enumerate(inputs("llama", 4, 24, seed=3)["input_ids"])]


@torch.no_grad()
def greedy(model, prompt, tokens):
    """Whether each token is the likeliest after the prompt and the tokens before it, or as good as that: two may tie."""
    logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return bool((chosen > logits.amax(1) - 1e-4).all())


def routed(architecture):
    """A rounded input may choose another expert there."""
    return 4.0 if architecture in ("mixtral", "gpt_oss") else 1.0


@pytest.mark.parametrize(("transform", "architecture"), cases())
def test_it_serves_or_refuses(transform, architecture):
    tokens = (
        LONG if transform.slot == "attention" and architecture not in (*PICTURES, "t5", "m2m100", "whisper") else 48
    )
    situation, model = context_of(transform), made(architecture, tokens)
    before = state(model)
    fit = transform.applies_to(model, situation)
    configs = transform.configs(model, situation) if fit.applies else []
    assert same_state(before, state(model)), "looking changed the model"
    if fit.applies:
        assert configs
        assert LEAST_SHARE <= fit.share <= 1
        assert (fit.share == 1) == (not fit.reached)
    else:
        assert fit.reason
        assert "Error" not in fit.reason
        configs = [{"energy": 0.99} if transform.name == "greenformers" else {}]
        if refusal := refused(transform, model, configs[0], situation):
            assert "\n" not in str(refusal)
            assert same_state(before, state(model)), "apply refused after changing something"
            return
        # it serves this model all the same, only not this work or this machine
    plain = made(architecture, tokens)
    expected = output(plain, architecture, 8, tokens)
    for config in configs:
        if transform.slot == "attention" and "min_tokens" in vars(type(transform)):
            config = {**config, "min_tokens": 0}
        tuned = transform.apply(made(architecture, tokens), config, situation)
        found = output(tuned, architecture, 8, tokens)
        assert found.isfinite().all()
        if transform.slot == "structure":  # random weights have no low rank
            assert distance(found, output(reference(plain, tuned), architecture, 8, tokens)) < EXACT
        else:
            far = 0.1 if transform.slot == "dtype" else NEAR.get(transform.name, EXACT)
            assert distance(found, expected) < far * routed(architecture), config
        alone = output(tuned, architecture, 8, tokens, rows=slice(2, 3))
        assert distance(alone, found[2:3]) < (0.05 if transform.slot == "dtype" else 0.02) * routed(architecture)
    half = transform.apply(made(architecture, tokens).to(torch.bfloat16), configs[0], situation)
    stock = output(made(architecture, tokens).to(torch.bfloat16), architecture, 8, tokens)
    found_half = output(half, architecture, 8, tokens)
    assert found_half.isfinite().all()
    if transform.slot != "structure":
        assert distance(found_half, stock) < (0.1 + NEAR.get(transform.name, EXACT)) * routed(architecture)
    if transform.slot in ("batching", "settings", "decode"):
        exact = {"weights": "fp32", "cache": "float32"} if transform.slot == "decode" else configs[0]
        tuned, stock = transform.apply(build(architecture), exact, situation), build(architecture)
        for prompt, tokens in zip(PROMPTS, generate_batch(tuned, PROMPTS, new_tokens=5), strict=True):
            assert greedy(stock, prompt, tokens), f"{tokens} do not follow {prompt}"


@pytest.mark.parametrize(
    ("transform", "architecture"),
    [case for case in cases() if case.values[0].slot not in ("structure", "linear", "dtype")],
)
def test_weights_that_change_afterwards_count(transform, architecture):
    """By an optimizer's step, by `.data`, by another parameter in its place, by a state dict."""
    situation, first, second = context_of(transform), build(architecture), build(architecture)
    try:
        transform.apply(first, {}, situation)
    except ValueError:
        return  # it refuses, which the other test is about

    def larger(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        return model

    expected = output(transform.apply(larger(second), {}, situation), architecture)
    one, two, three, four = (copy.deepcopy(first) for _ in range(4))
    output(one, architecture)  # whatever it keeps, it has now
    optimizer = torch.optim.SGD(one.parameters(), lr=0.25)
    for parameter in one.parameters():
        parameter.grad = -parameter.detach()
    optimizer.step()
    for parameter in two.parameters():
        parameter.data = parameter.data * 1.25
    places: dict[int, torch.nn.Parameter] = {}
    for module in three.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = places.setdefault(
                    id(parameter), torch.nn.Parameter(parameter.detach() * 1.25)
                )
    four.load_state_dict(larger(build(architecture)).state_dict())
    for changed in (one, two, three, four):
        assert distance(output(changed, architecture), expected) < EXACT


@pytest.mark.parametrize(("transform", "architecture"), cases(CAUSAL))
def test_what_was_saved_and_loaded_becomes_the_same(transform, architecture):
    situation, model = context_of(transform), build(architecture)
    if not transform.applies_to(model, situation).applies:
        return  # the other test is about that
    config = transform.configs(model, situation)[0]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, attn_implementation=model.config._attn_implementation).eval()
    direct = output(transform.apply(model, config, situation), architecture)
    again = output(transform.apply(loaded, config, situation), architecture)
    torch.testing.assert_close(again, direct, atol=1e-5, rtol=1e-4)


# ---- configurations ---------------------------------------------------------------------------------------------------------

NAN, HUGE = float("nan"), 1e308
WRONG = {
    "greenformers": [
        *({"rank": value} for value in (HUGE, "half", True, 0, -1, 2.5, [1])),
        *({"energy": value} for value in (0, 1.0, True, float("inf"))),
        *({"budget": value} for value in (NAN, 1, "x", 1e-9)),
        {"rank": 4, "energy": 0.5},
        {"solver": "svd", "rank": 0.5},
    ],
    "dtype": [{"dtype": value} for value in (None, 16, "float16", ["bfloat16"])],
    "fp8_vs_int8": [
        *({"smooth": value} for value in ("0.5", NAN, 2, -1, True)),
        *({"rotation": value} for value in (16.0, True, 0, 3, None)),
        *(
            {"skip": value}
            for value in ("abc", b"abc", None, 5, [None], [3], {}, {"down_proj": 1}, ["no_layer"], ["*"])
        ),
        *({"head": value} for value in ("no", 0, None)),
    ],
    "weight_only": [
        *({"bits": value} for value in (4.0, "4", True, None, [4], {})),
        *({"head_bits": value} for value in (8.0, "no", False)),
    ],
    "attention_backend": [{"backend": value} for value in (None, 1, "flash", ["sdpa"])],
    "sageattention2": [
        *({"qk": value} for value in (1, None, "int3", ["int8"], ["int8", "int3"], ["int8", 3], {}, b"int8")),
        *({"min_tokens": value} for value in (1.0, -1, True, "512", None)),
        *({"smooth_q": value} for value in ("no", 1)),
        *({name: value} for name in ("granularity", "pv", "backend") for value in ("other", None, 3)),
        {"qk": "calibrated", "min_tokens": -1},
    ],
    "xattention": [
        *(
            {"tau": value}
            for value in (2, None, "x", True, NAN, [0.5], [0.5, NAN], [0.5, "x"], [True, False], [], {}, 1j)
        ),
        *({"tau": value} for value in ([[0.5] * 4], [[0.5] * 3] * 2)),
        *({"stride": value} for value in (0, 8.0, "8", None, True)),
        *({"block": value} for value in (0, True, 64.0, 12)),
        *({"dense_layers": value} for value in ([5], "0", 0, None, [-1], [True], [0.0], ["0"], {}, {0: 1})),
        *({"min_tokens": value} for value in (1.0, -1, True, "a")),
        *({name: value} for name in ("backend", "precision", "variant") for value in ("other", None)),
        {"tau": "calibrated", "stride": 0},
        {"tau": "calibrated", "dense_layers": [7]},
        {"tau": "calibrated", "dense_layers": 7},
    ],
    "decode_loop": [
        *({"weights": value} for value in (None, 4, "int3", ["int4"])),
        *({"cache": value} for value in (None, "bf16")),
        *({"keep_prefill_weights": value} for value in ("no", 1)),
        {"keep_prefill_weights": False, "weights": "bf16"},
    ],
    "prepacking": [
        *({"batch_size": value} for value in (0, True, 8.0, None)),
        *({"sort_by_length": value} for value in ("no", 1, None)),
        *({name: None} for name in ("prefill", "threads", "backend")),
    ],
    "sorted_batches": [
        *({"batch_size": value} for value in (0, True, None)),
        {"prefill": None},
        {"sort_by_length": False},
    ],
    "speculation": [
        *({"ngram": value} for value in (0, 17, 3.0, "3", True, None)),
        *({"draft": value} for value in (0, 65, 8.0, "8", True, None)),
        {"draft_model": "somewhere"},
    ],
    "compile": [{name: value} for name in ("mode", "region") for value in (None, "other")],
    "inference_hyperparameters": [
        *({"batch_size": value} for value in (0, True, 8.0, None)),
        *({"threads": value} for value in (0, True, "a", 10**9)),
        {"sort_by_length": 1},
    ],
}


@pytest.mark.parametrize("name", transforms())
def test_a_configuration_of_the_wrong_kind_is_refused_before_anything_is_changed(name):
    transform, model = transforms()[name], build("llama")
    before = state(model)
    for config in [*WRONG[name], {"speed": 1}, {1: 2}, None, [], "bits"]:
        refusal = refused(transform, model, config, context_of(transform))
        assert refusal is not None, f"{config} was accepted"
        keys = config if isinstance(config, dict) else ["config"]
        assert any(str(key) in str(refusal) for key in keys), f"{config} is not named: {refusal}"
        assert same_state(before, state(model)), f"{config} was refused after changing something"


# ---- together ---------------------------------------------------------------------------------------------------------------

SETTINGS = {
    "greenformers": {"energy": 0.99},
    "fp8_vs_int8": {"smooth": 0.5, "head": True},
    "sageattention2": {"min_tokens": 0},
    "xattention": {"tau": 0.95, "stride": 8, "block": 16, "min_tokens": 0},
    "prepacking": {"batch_size": 4},
}
PAIRS = [
    (first, second)
    for first, second in itertools.combinations([t for t in transforms().values() if t.name != "compile"], 2)
    if SLOTS.index(first.slot) < SLOTS.index(second.slot)
]
OFTEN = {("weight_only", "xattention"), ("decode_loop", "prepacking")}


def pair_cases():
    for architecture, (first, second) in itertools.product(("llama", "gpt2", "gpt_oss", "mamba"), PAIRS):
        small = architecture == "llama" and (first.name, second.name) in OFTEN
        name = f"{first.name}-{second.name}-{architecture}"
        yield pytest.param(first, second, architecture, marks=[] if small else [pytest.mark.sweep], id=name)


@pytest.mark.parametrize(("first", "second", "architecture"), pair_cases())
def test_two_together(first, second, architecture):
    situation, model = context("ttft"), build(architecture)
    if refused(first, model, SETTINGS.get(first.name, {}), situation):
        return
    alone = output(model, architecture, 8)
    before = state(model)
    with torch.no_grad():
        if refusal := refused(second, model, SETTINGS.get(second.name, {}), situation):
            assert str(refusal)
            assert same_state(before, state(model))
            return
    far = 0.1 if second.slot == "dtype" else NEAR.get(second.name, EXACT)
    far += {"dtype": 0.05, "linear": 0.01}.get(
        first.slot, 0.0
    )  # where inputs are rounded, the last digit may be a code
    with torch.inference_mode():
        found = output(model, architecture, 8)
        assert distance(found, alone) < far * routed(architecture)
        assert torch.equal(output(copy.deepcopy(model), architecture, 8), found)

        ids = inputs(architecture, 8)["input_ids"]
        lengths = [48 - 4 * row for row in range(8)]
        mask = torch.stack([(torch.arange(48) >= 48 - length).long() for length in lengths])
        places = {} if architecture == "mamba" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        padded = model(input_ids=ids * mask, attention_mask=mask, **places).logits.float()
        for row in (3, 6):
            own = model(input_ids=ids[row : row + 1, -lengths[row] :]).logits.float()
            assert distance(padded[row, -lengths[row] :], own[0]) < 0.05 * routed(architecture)
        prompts = [row[-length:] for row, length in zip(ids.tolist(), lengths, strict=True)]
        assert [len(tokens) for tokens in generate_batch(model, prompts, new_tokens=4)] == [4] * 8
    assert not model.train().eval().training
