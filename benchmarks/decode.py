"""How close the compiled decode loop comes to what memory allows, batch 1 and a few more rows, for the shapes of known models.

    python benchmarks/decode.py [--only SHAPE ...] [--weights int4 ...] [--rows 1 ...] [--context 128] [--out FILE]

A step must read the packed weights once: the share is (their bytes / the read bandwidth) over the time of a step, so 1 would be a
loop that does nothing but read. The bandwidth is that of the same seconds, the best of several reads of main memory by torch before and
after each round, because a shared machine's changes by a factor of two within a minute. Keys and values are not counted, so the share is
the lower for long contexts. Weights
are random, which the time does not depend on; all but the first shape are cut to a few layers, with the whole vocabulary. With several
rows tokens a second are of all of them. Medians over rounds of 32 steps each, in which the rows begin behind the same context.
One JSON line a shape, with machine, versions, commit and command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from assay.evidence.place import here
from assay.measure.stats import positive_median
from assay.methods.builtin.decode_loop import Decoder
from assay.methods.core.generation.paged import Sequence, pages_for

STEPS = 32
READ_BYTES = 512 << 20  # far more than any cache
# name: (configuration class, model class, sizes); named after the model whose shape it has
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "smollm2-1.7b": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 49152,
        },
    ),
    "smollm2-135m": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "vocab_size": 49152,
        },
    ),
    "qwen2.5-1.5b, 8 layers": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {
            "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 8, "num_attention_heads": 12,
            "num_key_value_heads": 2, "vocab_size": 151936,
        },
    ),
    "qwen3-1.7b, 8 layers": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {
            "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 8, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        },
    ),
    "gemma3-1b, 8 layers": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 8, "num_attention_heads": 4,
            "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "sliding_window": 512,
        },
    ),
    "phi3-mini, 8 layers": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 32064, "pad_token_id": 0,
        },
    ),
}  # fmt: skip


def decoder_of(shape: str, weights: str) -> Decoder:
    """The packed weights of a random model of this shape; the model itself is not kept."""
    configuration, kind, sizes = SHAPES[shape]
    torch.manual_seed(0)
    config = getattr(transformers, configuration)(**sizes, max_position_embeddings=16384)
    model = getattr(transformers, kind)(config).to(torch.bfloat16).eval()
    return Decoder(model, weights=weights)


def rounds_of(decoder: Decoder, rows: int, context: int, rounds: int) -> list[tuple[float, float]]:
    """Seconds a step, and bytes a second that torch reads around it, of each round after one that is not counted."""
    count = pages_for(context + STEPS)
    pool = decoder.new_pool(rows * count)
    pool.keys.normal_()
    pool.values.normal_()
    sequences = [Sequence(pool.take(count)) for _ in range(rows)]
    memory = torch.ones(READ_BYTES // 4)
    found, before = [], bandwidth(memory)
    for _ in range(rounds + 1):
        for sequence in sequences:
            sequence.length = context
        start = time.perf_counter()
        decoder.run(pool, sequences, [1] * rows, STEPS)
        seconds = (time.perf_counter() - start) / STEPS
        after = bandwidth(memory)
        found.append((seconds, (before + after) / 2))
        before = after
    return found[1:]


def bandwidth(memory: torch.Tensor) -> float:
    """Bytes a second of the fastest of six passes over `memory`."""
    best = float("inf")
    for read in (memory.sum, memory.amax) * 3:
        start = time.perf_counter()
        read()
        best = min(best, time.perf_counter() - start)
    return memory.nbytes / best


def main() -> None:
    """Measure the chosen shapes and append one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--weights", nargs="*", choices=["int4", "int8", "bf16"], default=["int4"])
    parser.add_argument("--rows", nargs="*", type=int, default=[1])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=None, help="append the lines to this file too")
    options = parser.parse_args()
    place = here()
    for shape in options.only:
        for weights in options.weights:
            print(f"{shape}, {weights} ...", file=sys.stderr)
            decoder = decoder_of(shape, weights)
            for rows in options.rows:
                seen = rounds_of(decoder, rows, options.context, options.rounds)
                found = positive_median([seconds for seconds, _ in seen])
                share = positive_median([decoder.weight_bytes() / read / seconds for seconds, read in seen])
                read = statistics.median(read for _, read in seen)
                row = {
                    "shape": shape, "weights": weights, "rows": rows, "context": options.context,
                    "threads": torch.get_num_threads(), "weight_bytes": decoder.weight_bytes(), "read_bandwidth": read,
                    "tokens_per_second": {"median": rows / found.median, "low": rows / found.high, "high": rows / found.low},
                    "share_of_bandwidth": {"median": share.median, "low": share.low, "high": share.high},
                    "machine": place.machine, "commit": place.commit, "command": " ".join(["python", *sys.argv]),
                    "created": datetime.now(UTC).isoformat(timespec="seconds"),
                }  # fmt: skip
                line = json.dumps(row)
                print(line)
                if options.out is not None:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(line + "\n")


if __name__ == "__main__":
    main()
