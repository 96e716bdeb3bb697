"""BASED: what a state of fixed size can recall, and what generation costs with it, against attention and its cache.

Models are trained here on associative recall, with fresh sequences at every step. Widths, channel mixers, steps and tokens are the
same in all arms; only the mixers differ, and each arm has the learning rate that suits it best (`assay.experiments.rates`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.mixers.training import evaluate, in_parallel, over_seeds, train
from assay.experiments.rates import chosen, searched
from assay.methods.builtin.decode_loop import Decoder
from assay.methods.core.generation.paged import PagePool, Sequence, pages_for
from assay.methods.core.mixers.model import MixerConfig, MixerForCausalLM, StateCache
from assay.workloads.sequences import associative_recall, batches_of, byte_windows

# Two mixing layers, each after one short convolution, as the paper's layouts start. The linear rivals hold at least as many bytes as
# BASED ("taylor only" about as many), the window alone fewer: more of a window would be attention on these lengths.
ARMS: dict[str, list[list[Any]]] = {
    "attention": [["attention", {"heads": 2}]] * 2,
    "based": [["based", {"heads": 2, "feature_dim": 8}], ["based_window", {"heads": 2, "window": 8}]],
    "elu linear attention": [["based", {"heads": 2, "feature_dim": 27, "feature": "elu"}]] * 2,
    "mamba-2": [["mamba2", {"states": 16, "head_dim": 16}]] * 2,
    "taylor only": [["based", {"heads": 2, "feature_dim": 5}]] * 2,
    "window only": [["based_window", {"heads": 2, "window": 8}]] * 2,
    "convolutions only": [["baseconv", {}]] * 2,
}
RIVAL = "elu linear attention"  # sub-quadratic, without the paper's feature map
# of the sequences by which a learning rate is chosen; training counts up from its seed, the test is 0
CHOICE_SEED = 2**40
HELD_OUT = 256  # sequences
SEEDS = (0, 1, 2)
MANY = tuple(range(10, 18))  # for the two arms whose difference is the claim: the rival's recall varies by ten points
TASK: dict[str, int] = {"pairs": 4, "length": 16, "vocab": 16, "width": 32, "steps": 400}
BATCH = 32


def recall_model(arm: str, width: int, vocab: int, seed: int) -> MixerForCausalLM:
    """The weights begin as wide as their fan-in asks: the narrow ones of large models would learn nothing in a few hundred steps."""
    torch.manual_seed(seed)
    layers = [["baseconv", {}], *ARMS[arm]]
    return MixerForCausalLM(
        MixerConfig(
            vocab_size=vocab,
            hidden_size=width,
            layers=layers,
            intermediate_size=2 * width,
            initializer_range=width**-0.5,
        )
    )


def recall_trained(
    arm: str, rate: float, seed: int, task: Mapping[str, int]
) -> tuple[MixerForCausalLM, dict[str, int]]:
    """A model trained on one thread, and the options of `associative_recall` it was trained with."""
    torch.set_num_threads(1)
    data = {name: task[name] for name in ("pairs", "length", "vocab")}
    model = recall_model(arm, task["width"], task["vocab"], seed)
    batches = batches_of(associative_recall, BATCH, seed=1 + 10**6 * seed, **data)
    train(model, batches, steps=task["steps"], lr=rate, weight_decay=0.0)
    return model.eval(), data


@searched("based/recall", arms=list(ARMS), grid=(2e-3, 5e-3, 1e-2, 2e-2, 4e-2))
def recall_loss(arm: str, rate: float) -> float:
    """Nats an answer on sequences that nothing else uses; less than a thousandth counts as one, so that the least rate that solves
    the task is taken."""
    model, data = recall_trained(arm, rate, 0, TASK)
    return max(1e-3, float(evaluate(model, *associative_recall(HELD_OUT, seed=CHOICE_SEED, **data))["nll"].mean()))


def hand_out_at_random(model: nn.Module) -> None:
    """From now on every key stands at a random token, so that values answer to keys that are not theirs."""
    generator = torch.Generator().manual_seed(0)

    def shuffled(_module: nn.Module, _inputs: Any, keys: Tensor) -> Tensor:
        return keys[:, torch.randperm(keys.shape[1], generator=generator)]

    for name, module in model.named_modules():
        if name.endswith("k_proj"):
            module.register_forward_hook(shuffled)


def recall_score(arm: str, seed: int, task: Mapping[str, int]) -> dict[str, float]:
    """One training: the share of right answers on the test sequences, also with keys at random, and what the model holds."""
    model, data = recall_trained(arm, chosen("based/recall", arm).rate, seed, task)
    test = associative_recall(HELD_OUT, seed=0, **data)
    found = {
        "accuracy": float(evaluate(model, *test)["accuracy"].mean()),
        "state_bytes": model.state_bytes(data["length"]),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    hand_out_at_random(model)
    return found | {"random": float(evaluate(model, *test)["accuracy"].mean())}


def recall_scores(
    arms: list[str], task: Mapping[str, int], many: tuple[str, ...] = ()
) -> dict[str, list[dict[str, float]]]:
    """`recall_score` of each arm under each of `SEEDS`, of those in `many` under each of `MANY`."""
    runs = [(arm, seed, dict(task)) for arm in arms for seed in (MANY if arm in many else SEEDS)]
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for (arm, _, _), score in zip(runs, in_parallel(recall_score, runs), strict=True):
        found[arm].append(score)
    return found


def of(scores: Mapping[str, list[dict[str, float]]], arm: str, name: str = "accuracy") -> list[float]:
    """One score of all runs of an arm."""
    return [score[name] for score in scores[arm]]


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def as_trained(scores: Mapping[str, list[dict[str, float]]], arms: tuple[str, ...], pairs: int) -> dict[str, Trained]:
    """The arms with their floor: a model that knows which values stood there, but not whose, is right 1 / `pairs` of the time."""
    return {
        arm: Trained(
            of(scores, arm),
            1 / pairs,
            "one of the values that stood there",
            chosen("based/recall", arm).rate,
            chosen("based/recall", arm).rates,
            higher_is_better=True,
        )
        for arm in arms
    }


def resolution(pairs: int) -> float:
    """The accuracy of one answer."""
    return 1 / (HELD_OUT * pairs)


RECALL = Operator("recall from a state of fixed size", free="linear attention (elu + 1) with as large a state")


@experiment(
    "based/recall-gain",
    points={
        "smoke": [{"pairs": 2, "length": 8, "vocab": 8, "width": 16, "steps": 100, "arms": ["based", "elu linear attention"]}],
        "small": [{**TASK, "arms": list(ARMS)}],
        "full": [
            {"pairs": pairs, "length": 256, "vocab": 256, "width": 64, "steps": 20_000, "arms": list(ARMS)}
            for pairs in (16, 32, 64)
        ],
    },
    decides={"full": {"pairs": 16, "length": 256, "vocab": 256, "width": 64, "steps": 20_000, "arms": list(ARMS)}},
    operator=RECALL,
    paper={
        "width": 1792,
        "vocab": 50264,
        "length": 2048,
        "steps": "50B tokens of the Pile",
        "pairs": "real documents",
        "rivals": "linear attention, Mamba and others",
    },
    departures={
        "width": "a 1.3B model cannot be trained here",
        "vocab": "the synthetic task needs a key and a value for each pair, no more",
        "length": "as long as its pairs and questions need",
        "steps": "as many as fit into seconds; the same for every arm",
        "rivals": "linear attention alone: in these steps Mamba leaves the trivial floor at no rate, and Mamba-2 not with every seed",
        "pairs": "the paper's three tasks ask for facts of a document; multi-query associative recall is its model of them",
    },
    measured_here="accuracy on synthetic multi-query associative recall",
    refuted_if="the whole interval over seeds shows BASED recalling less than linear attention with as large a state",
    minutes=60,
)  # fmt: skip
def recall_gain(pairs: int, length: int, vocab: int, width: int, steps: int, arms: list[str]) -> Figure:
    """Points of recall accuracy that BASED gains on linear attention with elu + 1, whose state has no fewer bytes.

    The interval is Student's t over the differences of eight seeds. Controls, as gains over the same rival: both of BASED's layers
    replaced by short convolutions, the trained model with its keys at random tokens, and the rival itself. Arms, of three seeds: each
    of its two parts alone, Mamba-2, and attention, whose state grows. All are trained for as long: what is compared is what they have
    learned by then, not the most that a state can hold.
    """
    task = {"pairs": pairs, "length": length, "vocab": vocab, "width": width, "steps": steps}
    scores = recall_scores([*dict.fromkeys([*arms, "convolutions only"])], task, ("based", RIVAL))
    gains = [100 * (ours - theirs) for ours, theirs in zip(of(scores, "based"), of(scores, RIVAL), strict=True)]
    gain = over_seeds(gains, resolution=100 * resolution(pairs))

    def over_rival(arm: str, name: str = "accuracy") -> float:
        return 100 * (mean(of(scores, arm, name)) - mean(of(scores, RIVAL)))

    return Figure(
        gain.median,
        "points",
        low=gain.low,
        high=gain.high,
        baseline=0.0,
        free=0.0,
        controls={"deleted": over_rival("convolutions only"), "random": over_rival("based", "random"), "rival": 0.0},
        arms={arm: over_rival(arm) for arm in ("attention", "taylor only", "window only", "mamba-2") if arm in scores},
        trained=as_trained(scores, tuple(arm for arm in ("based", "attention", RIVAL) if arm in scores), pairs),
        details={"floor": 1 / pairs, "arms": scores},
    )


# ---- generation ------------------------------------------------------------------------------------------------------------------

GENERATION = Operator(
    "generation by a language model behind a context",
    free="attention in bfloat16, weights and cache, by torch",
    exact="attention in bfloat16 by assay's compiled decode loop",
)
PROMPT = 1024  # bytes of text that are really read; caches of longer contexts repeat them, which costs a step the same


def language_model(arm: str, width: int, layers: int) -> MixerForCausalLM:
    """Bytes to bytes. "based": convolutions with one linear and one window layer in every four, else attention throughout."""
    heads = width // 64
    if arm == "attention":
        mixers: list[Any] = [["attention", {"heads": heads}]] * layers
    else:
        four = [
            ["baseconv", {}],
            ["based", {"heads": heads}],
            ["based_window", {"heads": heads, "window": 128}],
            ["baseconv", {}],
        ]
        mixers = [four[i % 4] for i in range(layers)]
    torch.manual_seed(0)
    return MixerForCausalLM(
        MixerConfig(vocab_size=256, hidden_size=width, layers=mixers, intermediate_size=2 * width)
    ).eval()


@torch.no_grad()
def generate_from(model: MixerForCausalLM, cache: StateCache, token: Tensor, tokens: int) -> Tensor:
    """Greedy generation of `tokens` tokens from `cache`: (batch, tokens)."""
    made = []
    for _ in range(tokens):
        token = model(token, cache=cache).logits[:, -1:].argmax(-1)
        made.append(token)
    return torch.cat(made, 1)


@torch.no_grad()
def prefilled(model: MixerForCausalLM, ids: Tensor, chunk: int = 1024) -> StateCache:
    """The states after `ids`, and after one token more, so that a growing cache has room for those to come."""
    cache = model.new_cache(len(ids))
    for part in [*ids.split(chunk, 1), ids[:, :1]]:
        model(part, cache=cache, logits_to_keep=1)
    return cache


def longer(states: list[dict[str, Tensor]], tokens: int, context: int, room: int) -> list[dict[str, Tensor]]:
    """Attention's states with their first `tokens` tokens repeated up to `context`, and room for `room` more."""
    found = []
    for state in states:
        batch = len(state["seen"])
        made = {"seen": torch.full_like(state["seen"], context), "there": state["there"].new_ones(batch, context)}
        for name in ("k", "v"):
            kept = state[name][:, :, :tokens]
            made[name] = kept.new_empty(*kept.shape[:2], context + room, kept.shape[3])
            for start in range(0, context, tokens):
                made[name][:, :, start : min(start + tokens, context)] = kept[:, :, : context - start]
        found.append(made)
    return found


def as_llama(model: MixerForCausalLM, positions: int) -> nn.Module:
    """The attention model as transformers' Llama, which it equals, so that the compiled loop takes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = model.config
    heads = config.layers[0][1]["heads"]
    llama: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=len(config.layers),
            num_attention_heads=heads,
            rms_norm_eps=config.norm_eps,
            max_position_embeddings=positions,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
        )
    ).eval()
    renamed = {
        "embed_tokens.": "model.embed_tokens.",
        "norm.": "model.norm.",
        "lm_head.": "lm_head.",
    }
    weights = {}
    for name, value in model.state_dict().items():
        for old, new in (
            ("blocks.", "model.layers."),
            (".mixer_norm.", ".input_layernorm."),
            (".mlp_norm.", ".post_attention_layernorm."),
            (".mixer.", ".self_attn."),
        ):
            name = name.replace(old, new)
        head = name.split(".")[0] + "."
        weights[renamed[head] + name[len(head) :] if head in renamed else name] = value
    llama.load_state_dict(weights)
    return llama


def loop_pages(
    decoder: Decoder, states: list[dict[str, Tensor]], context: int, room: int
) -> tuple[PagePool, list[Sequence]]:
    """Attention's states as the compiled loop's sequences."""
    rows, count = len(states[0]["seen"]), pages_for(context + room)
    pool = decoder.new_pool(rows * count)
    sequences = [Sequence(pool.take(count), context) for _ in range(rows)]
    for row, sequence in enumerate(sequences):
        keys, values = (torch.stack([state[name][row, :, :context] for state in states]) for name in ("k", "v"))
        pool.write(sequence.pages, 0, keys, values)
    return pool, sequences


@experiment(
    "based/generation-throughput",
    points={
        "smoke": [{"context": 64, "batch": 2, "tokens": 2, "width": 64, "layers": 4, "task": {**TASK, "steps": 20}}],
        "small": [{"context": 1024, "batch": 32, "tokens": 8, "width": 256, "layers": 8, "task": TASK}],
        "full": [
            {"context": context, "batch": batch, "tokens": 64, "width": 1024, "layers": 24, "task": TASK}
            for context, batch in ((1024, 128), (16384, 4))
        ],
    },
    decides={"full": {"context": 1024, "batch": 128, "tokens": 64, "width": 1024, "layers": 24, "task": TASK}},
    operator=GENERATION,
    paper={"context": 1024, "batch": 128, "tokens": 1024, "width": 1792, "layers": 36},
    departures={
        "batch": "where a machine's memory does not hold 128 caches, as many as it does",
        "tokens": "a few tokens behind a context of 1024: every step costs about the same",
        "width": "smaller, so that twelve rounds of five arms take seconds",
        "layers": "fewer, for the same reason",
    },
    guard=Guard("right answers in associative recall", 0.05, higher_is_better=True, relative=False),
    refuted_if="generation with BASED's states is slower than with attention's cache at the paper's length, the whole interval below 1x",
    minutes=30,
)  # fmt: skip
def generation_throughput(
    context: int, batch: int, tokens: int, width: int, layers: int, task: dict[str, int]
) -> Trial:
    """Generating behind a context of real text: attention with its cache against BASED with its states, same width and depth.

    Both in float32; the operator's baselines run the same attention in bfloat16, in torch and in the compiled loop. The quality is
    what small models of the same two kinds recall after equal training (`task`): at most five points may be lost, a fifth of the way
    from chance to all, which is less than any control loses. Its interval is Student's t over the seeds.
    """
    torch.manual_seed(0)
    models = {arm: language_model(arm, width, layers) for arm in ("attention", "based")}
    read = min(context, PROMPT)
    few = byte_windows(read, min(batch, 4))[0]
    ids = few.repeat(-(-batch // len(few)), 1)[:batch]
    rows = torch.arange(batch) % len(few)
    short = {arm: prefilled(model, few) for arm, model in models.items()}
    states = {arm: [{n: x[rows] for n, x in state.items()} for state in cache.states] for arm, cache in short.items()}
    states["attention"] = longer(states["attention"], read, context, tokens)
    models["bfloat16"] = copy.deepcopy(models["attention"]).bfloat16()
    states["bfloat16"] = [
        {name: x.bfloat16() if x.is_floating_point() else x for name, x in state.items()}
        for state in states["attention"]
    ]
    decoder = Decoder(as_llama(models["attention"], context + tokens), weights="bf16", cache="bfloat16")
    pool, sequences = loop_pages(decoder, states["attention"], context, tokens)
    token = ids[:, -1:]

    def run(arm: str) -> Callable[[], Tensor]:
        # every run writes behind the same context; sums carry over from run to run, which does not affect the time
        return lambda: generate_from(models[arm], StateCache([dict(state) for state in states[arm]]), token, tokens)

    def loop() -> Tensor:
        for sequence in sequences:
            sequence.length = context
        return decoder.run(pool, sequences, token[:, 0].tolist(), tokens)[0]

    scores: dict[str, list[dict[str, float]]] = {}

    def recalled() -> dict[str, list[dict[str, float]]]:
        if not scores:
            arms = ["attention", "based", "convolutions only", "elu linear attention"]
            scores.update(recall_scores(arms, task))
        return scores

    def quality() -> Quality:
        found = recalled()
        base = mean(of(found, "attention"))
        lost = [ours - theirs for ours, theirs in zip(of(found, "based"), of(found, "attention"), strict=True)]
        gain = over_seeds(lost, resolution=resolution(task["pairs"]))
        controls = {
            "deleted": mean(of(found, "convolutions only")),
            "random": mean(of(found, "based", "random")),
            "rival": mean(of(found, "elu linear attention")),
        }
        rival = "linear attention (elu + 1) with as large a state"
        return Quality(base + gain.median, base, base + gain.low, base + gain.high, controls, rival)

    return Trial(
        baseline=run("attention"),
        candidate=run("based"),
        free=run("bfloat16"),
        exact=loop,
        quality=quality,
        trained=lambda: as_trained(recalled(), ("attention", "based"), task["pairs"]),
        details=lambda: {
            "state_bytes": {arm: models[arm].state_bytes(context, batch) for arm in models},
            "parameters": {arm: sum(p.numel() for p in models[arm].parameters()) for arm in ("attention", "based")},
            "tokens": tokens * batch,
            "recall": dict(scores),
        },
    )
