"""Probing an OpenAI-compatible server."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from assay import checks
from assay.methods.serving.idealized_runtime.model import RuntimeModel, Slope, fastest, fit, require
from assay.methods.serving.idealized_runtime.profiling import lengths_of

# fmt: off
_WORDS = ("the", "of", "and", "to", "in", "is", "for", "on", "that", "with", "as", "at", "by", "from", "it", "be", "are", "was",
          "this", "have", "not", "or", "an", "which", "one", "all", "but", "they")
# fmt: on


@dataclass(frozen=True)
class Streamed:
    """One streamed request: when the pieces of the answer arrived, in seconds after the request was sent."""

    asked_prompt_tokens: int
    prompt_tokens: int  # as the server counts them, else as asked
    output_tokens: int
    arrivals: tuple[float, ...]  # of every piece with text
    seconds: float  # until the end of the stream

    @property
    def ttft(self) -> float:
        """Time to the first piece."""
        return self.arrivals[0]


@dataclass(frozen=True)
class EndpointProfile:
    """The result of probing an endpoint. `raw_mean_seconds` per (p, o) is the naive figure that the model denoises."""

    model: RuntimeModel
    requests: tuple[Streamed, ...]
    dropped: int  # answers of another length than asked for, and requests that failed
    missing: tuple[
        tuple[int, int], ...
    ]  # cells (p, o) as asked that no answer came for: the model is fitted without them
    ttft: dict[int, float]  # fastest, by prompt tokens
    inter_token_seconds: float  # median gap between pieces; servers may send several tokens in one piece
    raw_mean_seconds: dict[tuple[int, int], float]


class ProbeError(RuntimeError):
    """A probe whose answers do not determine a model. `requests` are those that were paid for, for `fit` with other settings."""

    def __init__(self, message: str, requests: tuple[Streamed, ...]) -> None:
        super().__init__(message)
        self.requests = requests


def probe_endpoint(
    base_url: str,
    model: str,
    *,
    prompt_tokens: Sequence[int] = (16, 128, 512),
    output_tokens: Sequence[int] = (1, 16, 64),
    repeats: int = 5,
    concurrency: int = 1,
    chat: bool = False,
    api_key: str | None = None,
    timeout: float = 120.0,
    overhead_seconds: float | None = None,
    make_prompt: Callable[[int, random.Random], str] | None = None,
    slope: Slope = "constant",
    isotonic: bool = False,
    seed: int = 0,
) -> EndpointProfile:
    """Denoised runtime model of an OpenAI-compatible server at `base_url` (".../v1"), through streamed requests.

    Every cell is asked `repeats` times, shuffled, `concurrency` requests at a time. The model is fitted to whole-request times,
    since streams come in bursts. The overhead, unless given, is the fastest of several requests for the list of models, which
    generate nothing (our choice).
    The server is asked to ignore the end token (`ignore_eos`, `min_tokens`); an answer of another length than asked for is
    dropped, and so is a request that fails. Cells left without an answer are `missing` and the rest is fitted. Prompts are random
    common words; `make_prompt(p, rng)` makes others. Prompt lengths are those the server reports.

    Raises ValueError or TypeError for bad arguments before the first request, ConnectionError when the server cannot
    be reached or refuses every request, ProbeError, which holds the answers, when they do not determine a model.
    """
    import httpx

    repeats, concurrency = checks.whole("repeats", repeats, low=1), checks.whole("concurrency", concurrency, low=1)
    timeout = checks.number("timeout", timeout, above=0)
    require(slope, ("constant", "context"), "slope")
    checks.flag("isotonic", isotonic), checks.flag("chat", chat)
    if overhead_seconds is not None:
        overhead_seconds = checks.number("overhead_seconds", overhead_seconds, low=0)
    prompts, outputs = lengths_of("prompt_tokens", prompt_tokens), lengths_of("output_tokens", output_tokens)
    rng = random.Random(seed)
    prompt_of = make_prompt or random_words
    orders: list[tuple[int, int, str]] = []
    for _ in range(repeats):
        cells = [(p, o) for p in prompts for o in outputs]
        rng.shuffle(cells)
        orders += [(p, o, prompt_of(p, rng)) for p, o in cells]
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    start = time.perf_counter()
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    with httpx.Client(base_url=base_url.rstrip("/") + "/", headers=headers, timeout=timeout, limits=limits) as client:
        try:
            if overhead_seconds is None:
                overhead_seconds = min(_list_models(client) for _ in range(max(5, repeats)))
        except httpx.HTTPError as error:
            raise _unreachable(base_url, error) from error
        with ThreadPoolExecutor(concurrency) as pool:
            answers = list(pool.map(lambda order: _answer(client, model, order, chat), orders))
    seconds = time.perf_counter() - start
    came = [answer for answer in answers if isinstance(answer, Streamed)]
    if not came:
        failure = next(answer for answer in answers if not isinstance(answer, Streamed))
        raise _unreachable(base_url, failure) from failure
    pairs = zip(orders, answers, strict=True)
    kept = [a for (_, o, _), a in pairs if isinstance(a, Streamed) and a.output_tokens == o]
    wanted = {(p, o) for p in prompts for o in outputs}
    missing = sorted(wanted - {(answer.asked_prompt_tokens, answer.output_tokens) for answer in kept})
    counted = {
        p: int(np.median([answer.prompt_tokens for answer in kept if answer.asked_prompt_tokens == p]))
        for p in {answer.asked_prompt_tokens for answer in kept}
    }
    runs = [(counted[answer.asked_prompt_tokens], answer.output_tokens, answer.seconds) for answer in kept]
    if runs and overhead_seconds >= min(seconds for _, _, seconds in runs):
        raise ProbeError(
            f"the list of models takes {overhead_seconds:.3g} s, longer than an answer; pass overhead_seconds",
            tuple(came),
        )
    enough = {p for p, _, _ in runs if len({o for q, o, _ in runs if q == p}) > 1}  # a line needs two output lengths
    try:
        fitted = fit(
            [run for run in runs if run[0] in enough],
            method="denoised",
            slope=slope,
            isotonic=isotonic,
            overhead_seconds=overhead_seconds,
        )
    except ValueError as error:
        raise ProbeError(
            f"no answer had the asked length for (prompt, output) tokens {missing}, and the others do not do: {error}",
            tuple(came),
        ) from error
    gaps = [gap for answer in kept for gap in np.diff(answer.arrivals)]
    means = {cell: float(np.mean([run[2] for run in runs if run[:2] == cell])) for cell in sorted(fastest(runs))}
    return EndpointProfile(
        model=replace(fitted, profiling_seconds=seconds),
        requests=tuple(kept),
        dropped=len(answers) - len(kept),
        missing=tuple(missing),
        ttft={counted[p]: min(a.ttft for a in kept if a.asked_prompt_tokens == p) for p in sorted(counted)},
        inter_token_seconds=float(np.median(gaps)) if gaps else float("nan"),
        raw_mean_seconds=means,
    )


def _unreachable(base_url: str, error: Exception) -> ConnectionError:
    response = getattr(error, "response", None)
    if response is not None:
        return ConnectionError(f"{base_url} answered {response.status_code} to {response.request.url}")
    return ConnectionError(f"{base_url} cannot be reached: {error or type(error).__name__}")


def _answer(client: Any, model: str, order: tuple[int, int, str], chat: bool) -> Streamed | Exception:
    """The answer, or why there is none, so that a failed request does not cost the others."""
    import httpx

    try:
        return _stream(client, model, order, chat)
    except (httpx.HTTPError, ValueError) as error:  # also a stream that is no JSON
        return error


def random_words(tokens: int, rng: random.Random) -> str:
    """`tokens` common words in random order: about one token each, and no two prompts alike, so that no cache has them."""
    return " ".join(rng.choices(_WORDS, k=tokens))


def _list_models(client: Any) -> float:
    start = time.perf_counter()
    client.get("models").raise_for_status()
    return time.perf_counter() - start


def _stream(client: Any, model: str, order: tuple[int, int, str], chat: bool) -> Streamed:
    p, o, prompt = order
    body: dict[str, Any] = {"model": model, "max_tokens": o, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "ignore_eos": True, "min_tokens": o}
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    usage: dict[str, int] = {}
    arrivals: list[float] = []
    finished = ""
    start = time.perf_counter()
    with client.stream("POST", "chat/completions" if chat else "completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data:") or line.removeprefix("data:").strip() == "[DONE]":
                continue
            event = json.loads(line.removeprefix("data:"))
            usage = event.get("usage") or usage
            for choice in event.get("choices", []):
                finished = choice.get("finish_reason") or finished
                if choice.get("text") or choice.get("delta", {}).get("content"):
                    arrivals.append(time.perf_counter() - start)
    seconds = time.perf_counter() - start
    made = usage.get("completion_tokens", o if finished == "length" else -1)
    return Streamed(p, usage.get("prompt_tokens", p), made, tuple(arrivals) or (seconds,), seconds)
