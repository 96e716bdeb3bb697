"""Does speculative decoding pay here? Prompt look-up against plain decoding on the bundled model, one sequence, in paired runs.

    python benchmarks/speculation.py [--paths torch compiled] [--kinds summary edit free] [--draft-model FOLDER] [--out FILE]

Prompts are of three kinds, from the texts that every Python has: summaries that may quote, edits of code that mostly repeat it, and
free text, where there is nothing to quote. Each is answered greedily and sampled (temperature 0.7, top-p 0.9), with a fixed number of
tokens. On the torch path (bfloat16) transformers' own look-up is timed too (`free`), on the compiled path (int4) there is none.
A small model that decodes greedily repeats itself, which look-up then guesses: `repeated` is the share of runs of four tokens
in the answers that stood in the same answer before, and says how much of the gain is that. Also measured: what a pass over several
tokens costs, which decides how long drafts should be (`more` of the engines).

One JSON line a path, kind and way of choosing tokens, and one a path for its passes, with machine, versions, commit and command.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from assay.evidence.place import here
from assay.measure.clock import Paired, compare
from assay.measure.stats import Interval
from assay.methods.builtin import decode_loop
from assay.methods.builtin.speculation import Counts, ModelEngine, PagedEngine, attach
from assay.methods.core import kernels
from assay.methods.core.generation.loop import plain_generation
from assay.methods.transform import TuneContext
from assay.workloads.models import load_model
from assay.workloads.text import code_text, encode, english_text

MODEL = "smollm2-135m"
KINDS = ("summary", "edit", "free")
FREE = (
    "Write a short story about a lighthouse keeper who learns to play the violin.",
    "Explain to a child why the sky is blue and sunsets are red.",
    "What should somebody consider who moves from a city to the country?",
    "Describe a market in the morning, with all that can be heard and smelt there.",
    "Give three reasons for and three against longer school holidays.",
    "Invent a new ball game and write down its rules.",
)
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
LENGTH = 512  # tokens before the passes that are timed


def texts(kind: str, count: int) -> list[str]:
    """What the user says, `count` times."""
    chosen = random.Random(kind)
    if kind == "free":
        return list(FREE[:count])
    if kind == "summary":
        paragraphs = [text for text in english_text().split("\n\n") if 500 <= len(text) <= 1500]
        ask = "Summarise this text in its own words, quoting its most important sentences:\n\n"
        return [ask + text for text in chosen.sample(paragraphs, count)]
    functions = re.findall(r"^def [a-z]\w+\(.*?(?=^\S)", code_text(), flags=re.MULTILINE | re.DOTALL)
    functions = [text for text in functions if 400 <= len(text) <= 1200]
    ask = "Add type hints to this function and repeat it as a whole:\n\n"
    return [f"{ask}```python\n{text.strip()}\n```" for text in chosen.sample(functions, count)]


def prompts(tokenizer: Any, kind: str, count: int) -> list[Tensor]:
    """The same as token ids (1, tokens), by the model's chat template if it has one."""
    found = []
    for text in texts(kind, count):
        if tokenizer.chat_template:
            turn = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        found.append(torch.tensor([encode(tokenizer, text)]))
    return found


def answers(
    model: Any, asked: list[Tensor], new_tokens: int, options: dict[str, Any], first: int = 0
) -> list[list[int]]:
    """The answers, of exactly `new_tokens` tokens each; each has its seed, from `first` on."""
    found = []
    for seed, ids in enumerate(asked, first):
        torch.manual_seed(seed)
        with plain_generation(model):
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                pad_token_id=0,
                **options,
            )
        found.append(made[0, ids.shape[1] :].tolist())
    return found


def repeated(answer: list[int], run: int = 4) -> float:
    """The share of runs of tokens that stood in the answer before."""
    runs = [tuple(answer[place : place + run]) for place in range(len(answer) - run + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def interval(found: Interval) -> dict[str, float]:
    return {"median": found.median, "low": found.low, "high": found.high}


def paired(found: Paired, tokens: int) -> dict[str, Any]:
    """Speed-up over plain decoding, and tokens a second of both."""
    return {
        "speedup": interval(found.speedup),
        "plain_tokens_per_second": tokens / found.baseline_time.median,
        "tokens_per_second": tokens / found.candidate_time.median,
        "noisy": found.noisy,
        "trend": found.trend,
    }


def row(
    plain: nn.Module, tuned: Any, asked: list[Tensor], options: argparse.Namespace, sampled: bool
) -> dict[str, Any]:
    """One kind of prompts, answered one way."""
    choosing = SAMPLED if sampled else {"do_sample": False}
    new, counts = options.new_tokens, Counts()
    expected, made = answers(plain, asked, new, choosing), []
    for number, ids in enumerate(asked):
        made += answers(tuned, [ids], new, choosing, number)
        own: Counts = tuned.speculation.counts
        for name in vars(counts):
            setattr(counts, name, getattr(counts, name) + getattr(own, name))
    tokens = new * len(asked)

    def against(model: nn.Module, more: dict[str, Any]) -> dict[str, Any]:
        found = compare(
            lambda: answers(plain, asked, new, choosing),
            lambda: answers(model, asked, new, {**choosing, **more}),
            pairs=options.pairs,
            max_seconds=options.seconds,
        )
        return paired(found, tokens)

    found = against(tuned, {}) | {
        "accept_rate": counts.accept_rate,
        "drafted_per_pass": counts.drafted / max(counts.passes, 1),
        "tokens_per_pass": counts.tokens / max(counts.passes, 1),
        "repeated": sum(map(repeated, made)) / len(made),
        "prompt_tokens": [ids.shape[1] for ids in asked],
        "new_tokens": new,
    }
    if not sampled:  # sampled tokens of transformers' loop come from other random numbers
        found["same_answers"] = sum(a == b for a, b in zip(expected, made, strict=True)) / len(made)
    if not isinstance(plain, decode_loop.DecodeLoopMixin) and options.draft_model is None:
        found["free"] = against(plain, {"prompt_lookup_num_tokens": 8, "max_matching_ngram_size": 3})
    return found


def passes(extend: Callable[[list[int]], Any], pairs: int) -> dict[str, Any]:
    """What a pass over several tokens costs, in passes over one, and so each further token (`more`)."""
    found: dict[str, Any] = {}
    for count in (2, 3, 5, 9):
        seen = compare(lambda: extend([100]), lambda count=count: extend([100] * count), pairs=3 * pairs).speedup
        ratio = 1 / seen.median
        found[str(count)] = {
            "passes": ratio,
            "low": 1 / seen.high,
            "high": 1 / seen.low,
            "more": (ratio - 1) / (count - 1),
        }
    return found


def engine_of(model: Any) -> ModelEngine | PagedEngine:
    """An engine that holds a text of LENGTH tokens."""
    engine = ModelEngine(model)
    engine.extend(list(range(1000, 1000 + LENGTH)), last=True)
    if isinstance(model, decode_loop.DecodeLoopMixin):
        return PagedEngine.of_cache(model.decode_loop, engine.cache, 16)
    return engine


def models(path: str, options: argparse.Namespace) -> tuple[Any, nn.Module, nn.Module]:
    """The tokenizer, the model that decodes plainly, and the one that speculates. Raises ValueError where the path is not there."""
    loaded = load_model(MODEL, dtype=torch.bfloat16)
    plain: nn.Module = loaded.model
    if path == "compiled":
        context = TuneContext("decode", 256, options.new_tokens)
        plain = decode_loop.transform.apply(plain, {"weights": "int4"}, context)
    more: dict[str, Any] = {}
    if options.draft_model is not None:
        small = load_model(options.draft_model, dtype=torch.bfloat16)
        more = {"draft_model": small.model, "tokenizer": loaded.tokenizer, "draft_tokenizer": small.tokenizer}
    return loaded.tokenizer, plain, attach(copy.deepcopy(plain), ngram=options.ngram, draft=options.draft, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", nargs="*", choices=("torch", "compiled"), default=["torch", "compiled"])
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--prompts", type=int, default=3, choices=range(1, len(FREE) + 1), help="of each kind")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=120.0, help="for a comparison at most, two pairs at least")
    parser.add_argument("--ngram", type=int, default=3)
    parser.add_argument("--draft", type=int, default=8)
    parser.add_argument("--draft-model", default=None, help="a small model to draft with, in place of look-up")
    parser.add_argument("--out", type=Path, default=None, help="append the lines to this file too")
    options = parser.parse_args()
    place = here()
    origin = {"machine": place.machine, "commit": place.commit, "command": " ".join(["python", *sys.argv])}
    setting = {"ngram": options.ngram, "draft": options.draft, "draft_model": options.draft_model}

    def tell(found: dict[str, Any]) -> None:
        made = {"threads": torch.get_num_threads(), "created": datetime.now(UTC).isoformat(timespec="seconds")}
        line = json.dumps(found | origin | made)
        print(line, flush=True)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    for path in options.paths:
        try:
            tokenizer, plain, tuned = models(path, options)
        except ValueError as error:
            tell({"path": path, "status": "failed", "error": str(error)})
            continue
        with torch.inference_mode():
            engine = engine_of(plain)

            def extend(tokens: list[int], engine: ModelEngine | PagedEngine = engine) -> None:
                engine.extend(tokens)
                engine.crop(LENGTH)

            tell(
                {
                    "path": path,
                    "length": LENGTH,
                    "assumed_more": engine.more,
                    "pass_costs": passes(extend, options.pairs),
                }
            )
        for kind in options.kinds:
            asked = prompts(tokenizer, kind, options.prompts)
            for sampled in (False, True):
                print(f"{path}, {kind}, {'sampled' if sampled else 'greedy'} ...", file=sys.stderr)
                about = {"path": path, "kind": kind, "tokens": "sampled" if sampled else "greedy", **setting}
                tell(about | row(plain, tuned, asked, options, sampled) | {"paths": kernels.paths()})


if __name__ == "__main__":
    main()
