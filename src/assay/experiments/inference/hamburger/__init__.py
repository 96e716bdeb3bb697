"""HAMburger: how many cache entries and how much time groups of tokens save, on a small byte model that was grafted and trained on.

All arms produce the same text, byte by byte, as if each byte had been chosen: records of Unicode's characters in JSON that nothing was
trained on (`records`). What is saved thus depends on where the stop head ends its groups on unseen text, and not on how a small model
repeats itself. The quality is what the same decoding gives each byte: nats a byte. Every arm starts from the same base and is trained
on for as many steps on as many bytes (`arms`), those with as many groups at regular and at random places too. What saves entries
without any training, and what saves time without loss, stands beside it (`losses`, `decoding`).
"""

from __future__ import annotations

from typing import Any

from assay.experiments.core import Figure, Guard, Operator, Trial, experiment
from assay.experiments.inference.hamburger.arms import CONFIDENCE, FASTER, HEAD
from assay.experiments.inference.hamburger.decoding import Decoding
from assay.experiments.inference.hamburger.losses import TASK, as_trained, mean, of, quality, refutes, scores
from assay.experiments.mixers.training import over_seeds

SMALL: dict[str, int] = {**TASK, "replays": 2, "timed_width": 768}
FULL: dict[str, int] = {
    **TASK, "width": 192, "layers": 6, "length": 128, "steps": 1000, "grafting": 400, "windows": 64, "replays": 2,
    "timed_width": 1536,
}  # fmt: skip
SMOKE: dict[str, int] = {
    **TASK, "width": 32, "layers": 2, "length": 32, "batch": 4, "steps": 8, "grafting": 6, "windows": 4, "replays": 1,
    "timed_width": 128,
}  # fmt: skip

DECODING = Operator(
    "decoding of one text",
    free="transformers' own speculative decoding with drafts looked up in the text, exact",
    exact="speculative decoding with looked-up drafts in assay's compiled loop",
)
DECLARED: dict[str, Any] = {
    "points": {"smoke": [SMOKE], "small": [SMALL], "full": [FULL]},
    "operator": DECODING,
    "paper": {
        "base": "Llama-3.2-1B-Instruct",
        "max_steps": 4,
        "micro_layers": 4,
        "strategy": "decreasing_v2",
        "confidence": CONFIDENCE,
        "new modules' rate over the base's": FASTER,
        "text": "chat tasks and LongBench",
        "vocabulary": 128256,
        "width": 2048,
        "layers": 16,
        "length": "thousands of tokens",
        "batch": "8 x 2 texts on each of 8 GPUs; 1 in decoding",
        "steps": "Llama 3.2's pretraining",
        "grafting": "an epoch of nineteen instruction data sets",
        "rates": "5e-5 for the base, 1e-4 for new modules",
    },
    "departures": {
        "base": "a byte model trained here: no 1B model is at hand, and none could be trained on in minutes",
        "micro_layers": "the paper's share of the base's layers, a quarter, or less",
        "text": "lines of JSON that can be guessed in part; on code a model so small merges next to nothing",
        "vocabulary": "bytes; where time is measured, so many tokens that the head has a quarter of the layers' weights, as in the base",
        "width": "as much as trains in seconds (small) or an hour (full)",
        "layers": "as many as train in seconds or an hour",
        "length": "windows of bytes",
        "batch": "windows a step of training; 1 in decoding, as in the paper",
        "steps": "as many as fit; the same for every arm",
        "grafting": "as many as fit; the same for every arm, the base trained on included",
        "rates": "searched at the size of small; full takes the same",
    },
    "guard": Guard("nats a byte of held-out records, as decoded", margin=0.05),
    "minutes": 90,
}


@experiment(
    "hamburger/kv-entries",
    refuted_if="the stop head ends every group at its first token on unseen text, so that no entry is saved; or the base that evicts, "
    "with as many entries at each byte (the prompt's and the last ones), loses no more, over the whole 95 % interval",
    refutes=refutes,
    measured_here="entries that grow with the answer, on bytes of JSON",
    **DECLARED,
)
def kv_entries(replays: int, timed_width: int, **task: int) -> Figure:
    """Tokens for each cache entry that an answer adds, where its own stop head ends the groups; one for the base and for speculation.

    The interval is Student's t over three seeds. Beside it: what the base's own uncertainty would merge, which is known in training only;
    how few entries the base needs with the prompt and a window of recent bytes, no worse than HAMburger on the text of the choice; and
    what a cache of 8 bits saves in bytes of a bfloat16 one, with every entry, whose loss is among the controls. The margin of the quality,
    5 %, is our choice, as is that of other papers here; the confidence is the paper's.
    """
    found = scores(task)
    gain = over_seeds(of(found, "hamburger", "per_entry"))
    decoding = Decoding(task, replays, timed_width)
    return Figure(
        gain.median,
        "x",
        low=gain.low,
        high=gain.high,
        baseline=1.0,
        free=1.0,
        exact=1.0,
        arms={
            "cut by the base's uncertainty, which decoding does not know": mean(
                of(found, "hamburger", "cut by the base")
            ),
            "the base with the prompt and a window of recent bytes, no worse": mean(
                of(found, "hamburger", "window, bytes an entry")
            ),
            "all entries in 8 bits, by bytes of bfloat16": 2 * HEAD / (HEAD + 2),
        },
        quality=quality(found),
        trained=as_trained(found, task),
        details={"arms": found, **decoding.counted()},
    )


@experiment(
    "hamburger/decode-speedup",
    refuted_if="producing the same text in groups takes longer than token by token over the whole 95 % interval",
    measured_here="the time of a model wide enough that its arithmetic takes it, with new weights, which replays the groups that the "
    "trained one made on unseen JSON; the quality is the trained one's",
    **DECLARED,
)
def decode_speedup(replays: int, timed_width: int, **task: int) -> Trial:
    """Producing `replays` rows of held-out records, prompts of 16 bytes included: the base token by token against HAMburger in groups.

    Rows are typical ones by how many groups they have. Both in float32 and in loops of torch without overhead, over memory taken once; the
    operator's baselines are exact. An arm of groups of one token in the same loop says what the loop itself gains or costs, the base
    token by token in the compiled loop what compiling gains without drafts, one with weights of 8 bits what is lost less dearly. The
    details hold entries and bytes a second together, and bytes an entry of the rows that are replayed beside those of all.
    """
    decoding = Decoding(task, replays, timed_width)
    return Trial(
        baseline=decoding.plain,
        candidate=decoding.groups,
        free=decoding.free,
        exact=decoding.exact,
        arms={
            "groups of one token, the same loop": decoding.groups_of_one,
            "token by token, compiled": decoding.plain_compiled,
            "weights of 8 bits, compiled, with looked-up drafts": decoding.in_8_bits,
        },
        quality=lambda: quality(scores(task)),
        trained=lambda: as_trained(scores(task), task),
        details=lambda: {**decoding.counted(), "bytes an entry, by seed": of(scores(task), "hamburger", "per_entry")},
    )
