"""Who writes: a `Generator` continues prompts by samples, drawn so that each is the same whatever is drawn beside it.

    generator = TransformersGenerator(model, tokenizer)
    samples = generator(["2 + 3 ="], Sampling(temperature=0.8, max_new_tokens=8, stop=("\\n",)), n=4)

`HttpGenerator` asks any OpenAI-compatible server for the same (assay's own, vLLM, llama.cpp). Both give what a sample cost.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.core.generation.cache import left_pad
from assay.methods.core.generation.loop import padding_token, prefill, why_not
from assay.methods.core.generation.slices import selected
from assay.methods.core.reasoning.budget import Spent


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn: at temperature 0 the likeliest token, else by softmax(logits / temperature) among the fewest tokens whose
    probability reaches `top_p`. A sample ends before the first of the `stop` texts, with the model's end token, or at its limit.

    Raises ValueError and TypeError for values out of range and a stop text that is empty.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks.number("temperature", self.temperature, low=0)
        checks.number("top_p", self.top_p, above=0, high=1)
        checks.whole("max_new_tokens", self.max_new_tokens, low=1)
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise TypeError(f"stop must be a tuple of texts that are not empty, got {checks.shown(self.stop)}")


@dataclass(frozen=True)
class Sample:
    """A continuation of a prompt.

    `text` is without the stop text; `tokens` are all that were generated, `logprobs` their natural log-probabilities at temperature 1 and
    without top_p (empty where a server gives none). `ended` says how: "stop" (a stop text or the end token) or "length".
    `matched` is the stop text that was met, "" for none.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: str
    spent: Spent
    matched: str = ""

    def __post_init__(self) -> None:
        if self.logprobs and len(self.logprobs) != len(self.tokens):
            raise ValueError(f"logprobs must be as many as tokens, {len(self.tokens)}, got {len(self.logprobs)}")
        checks.choice("ended", self.ended, ("stop", "length"))

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of a token; 0 for a sample without any."""
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else 0.0


class Generator(Protocol):
    """Continues prompts. `name` says what writes, weights included: samples of equal name, prompt, sampling and seed are the same."""

    @property
    def name(self) -> str: ...

    def __call__(
        self, prompts: Sequence[str], sampling: Sampling, *, n: int = 1, first: int = 0, seed: int = 0
    ) -> list[list[Sample]]:
        """`n` samples for each prompt, numbers `first` to `first + n - 1` of those that `seed` stands for.

        Asking for samples 0 to 7 gives the same as asking for 0 to 3 and then for 4 to 7 (as far as the arithmetic of a batch allows).
        The prompt is charged to the first sample of a call only: it is read once.
        """
        ...


def seed_of(*parts: object) -> int:
    """A seed of 63 bits from numbers and texts, the same in every process.

    >>> seed_of("2 + 3 =", 0) == seed_of("2 + 3 =", 0), seed_of("a", 1) == seed_of("a1")
    (True, False)
    """
    text = json.dumps([str(part) for part in parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class TransformersGenerator:
    """Samples of a causal model of transformers and its tokenizer. Each prompt is read once, however many samples are drawn of it.

    Every sample has a random stream of its own (of seed, prompt and number), so that it does not depend on what else is drawn; rounding may
    still differ with the batch, and turn a near tie. `batch` is how many rows run at once; `name` is made from the configuration and a hash
    over the weights unless it is given. `special` False leaves special tokens out when prompts are encoded.

    Raises ValueError for a model that does not continue prompts, an empty prompt, or one that does not fit into the model's context
    together with its new tokens.

    When NOT to use it: to serve, or for long texts on many cores: a server batches requests as they come (`HttpGenerator`).
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, batch: int = 64, name: str = "", special: bool = True
    ) -> None:
        if reason := why_not(model):
            raise ValueError(f"model must continue prompts: {reason}")
        self.model: Any = model
        self.tokenizer = tokenizer
        self.batch = checks.whole("batch", batch, low=1)
        self.special = checks.flag("special", special)
        self._name = name

    @property
    def name(self) -> str:
        """The model's type and a hash over its configuration and weights, or the name given."""
        if not self._name:
            seen = hashlib.blake2b(digest_size=8)
            seen.update(self.model.config.to_json_string().encode())
            for key, value in sorted(self.model.state_dict().items()):
                seen.update(key.encode())
                seen.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self._name = f"{type(self.model).__name__}-{seen.hexdigest()}"
        return self._name

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], sampling: Sampling, *, n: int = 1, first: int = 0, seed: int = 0
    ) -> list[list[Sample]]:
        n, first = checks.whole("n", n, low=1), checks.whole("first", first, low=0)
        seed = checks.whole("seed", seed)
        encoded = [self._encode(prompt, sampling) for prompt in prompts]
        found: list[list[Sample]] = [[] for _ in prompts]
        together = max(1, self.batch // n)
        order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))  # little padding
        for start in range(0, len(order), together):
            members = order[start : start + together]
            for low in range(0, n, self.batch):
                numbers = range(first + low, first + min(low + self.batch, n))
                drawn = self._draw(
                    [encoded[i] for i in members], [prompts[i] for i in members], sampling, numbers, seed
                )
                for i, samples in zip(members, drawn, strict=True):
                    if found[i]:  # the prompt is charged once
                        samples[0] = replace(samples[0], spent=replace(samples[0].spent, prompt=0))
                    found[i] += samples
        return found

    def _encode(self, prompt: str, sampling: Sampling) -> list[int]:
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=self.special)["input_ids"]
        if not ids:
            raise ValueError(f"prompts must hold at least one token each, got {checks.shown(prompt)}")
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and len(ids) + sampling.max_new_tokens > context:
            raise ValueError(
                f"prompts must fit into {context} tokens with {sampling.max_new_tokens} new ones, got {len(ids)} in "
                f"{checks.shown(prompt)}"
            )
        return ids

    def _read(self, encoded: list[list[int]]) -> tuple[Any, Tensor, Tensor]:
        """The prompts' cache, padded on the left, the logits of their last tokens, and the mask of what is in the cache."""
        ids, mask = left_pad(encoded, padding_token(self.model), self.model.device)
        read = prefill(self.model, ids, mask)
        assert read.logits is not None
        return read.cache, read.logits, read.attention_mask

    def _draw(
        self, encoded: list[list[int]], prompts: list[str], sampling: Sampling, numbers: range, seed: int
    ) -> list[list[Sample]]:
        began = time.perf_counter()
        n = len(numbers)
        cache, logits, mask = self._read(encoded)
        rows = torch.arange(len(encoded)).repeat_interleave(n)
        cache = selected(cache, rows) if n > 1 else cache
        logits = logits[rows.to(logits.device)].float()
        mask = mask[rows.to(mask.device)]
        streams = [
            torch.Generator().manual_seed(seed_of(seed, prompt, number)) for prompt in prompts for number in numbers
        ]
        texts = [Growing(self.tokenizer, sampling.stop) for _ in streams]
        alive = list(range(len(streams)))
        ends = end_tokens(self.model)
        while True:
            tokens = choose(logits, sampling, [streams[i] for i in alive])
            scored = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
            for i, token, value in zip(alive, tokens.tolist(), scored, strict=True):
                texts[i].add(token, value, ends, sampling.max_new_tokens)
            kept = [place for place, i in enumerate(alive) if not texts[i].ended]
            if not kept:
                break
            if len(kept) < len(alive):  # rows that ended cost nothing any more
                cache, mask, tokens = selected(cache, kept), mask[kept], tokens[kept]
                alive = [alive[place] for place in kept]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
            out = self.model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                cache=cache,
                use_cache=True,
            )
            cache, logits = out.cache, out.logits[:, -1].float()
        seconds = (time.perf_counter() - began) / len(streams)
        drawn = []
        for at, own in enumerate(encoded):
            group = texts[at * n : (at + 1) * n]
            drawn.append([text.sample(len(own) if not k else 0, seconds) for k, text in enumerate(group)])
        return drawn


def end_tokens(model: Any) -> set[int]:
    """The tokens that end a sample of a model, by its generation configuration."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {ends} if isinstance(ends, int) else set(ends or ())


def choose(logits: Tensor, sampling: Sampling, streams: Sequence[torch.Generator]) -> Tensor:
    """One token a row of logits, (rows, vocabulary): the likeliest, or drawn by each row's own stream."""
    if not sampling.temperature:
        return logits.argmax(-1)
    shares = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, places = shares.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # the mass in front of each token
        ordered = ordered.masked_fill(before >= sampling.top_p, 0)
        shares = torch.zeros_like(shares).scatter(1, places, ordered)
    where = torch.stack([torch.rand(1, generator=stream, dtype=torch.float64) for stream in streams]).to(shares.device)
    mass = shares.double().cumsum(-1)
    return torch.searchsorted(mass, where * mass[:, -1:], right=True).clamp(max=shares.shape[-1] - 1)[:, 0]


class Growing:
    """A sample as it grows: its text is decoded as a whole, since a character may take several tokens."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.text = self.matched = self.ended = ""

    def add(self, token: int, logprob: float, ends: set[int], most: int) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in ends:
            self.text, self.ended = self.tokenizer.decode(self.tokens[:-1]), "stop"
        elif self.stop:
            self.text = self.tokenizer.decode(self.tokens)
            met = [(at, text) for text in self.stop if (at := self.text.find(text)) >= 0]
            if met:
                at, self.matched = min(met, key=lambda found: (found[0], -len(found[1])))
                self.text, self.ended = self.text[:at], "stop"
        if not self.ended and len(self.tokens) == most:
            self.text, self.ended = self.tokenizer.decode(self.tokens), "length"

    def sample(self, prompt_tokens: int, seconds: float) -> Sample:
        spent = Spent(prompt=prompt_tokens, completion=len(self.tokens), calls=1, seconds=seconds)
        return Sample(self.text, tuple(self.tokens), tuple(self.logprobs), self.ended, spent, self.matched)


class HttpGenerator:
    """Samples of an OpenAI-compatible server's completions at `base_url` (".../v1"). `close` it, or use it in a `with`.

    `name` is the model's at a server unless it is given: give one that changes when the weights behind it do. Servers give no token ids:
    `tokens` of a sample are 0s, as many as the server counted. One request asks for one sample, so that its seed, prompt and cost are
    its own. Raises ConnectionError when the server cannot be reached or refuses, ValueError for an answer of another form or without
    counts.
    """

    def __init__(
        self, base_url: str, model: str, *, api_key: str | None = None, timeout: float = 120.0, name: str = ""
    ) -> None:
        import httpx

        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"base_url must begin with http:// or https:// and name a host, got {checks.shown(base_url)}"
            )
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.base_url, self.model, self._name = base_url.rstrip("/"), model, name or f"{model} at a server"
        self._client = httpx.Client(
            base_url=self.base_url + "/", headers=headers, timeout=checks.number("timeout", timeout, above=0)
        )

    def __enter__(self) -> HttpGenerator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    @property
    def name(self) -> str:
        """What writes, as the samples' key has it."""
        return self._name

    def __call__(
        self, prompts: Sequence[str], sampling: Sampling, *, n: int = 1, first: int = 0, seed: int = 0
    ) -> list[list[Sample]]:
        n, first = checks.whole("n", n, low=1), checks.whole("first", first, low=0)
        return [
            [self._ask(prompt, sampling, seed_of(seed, prompt, number) >> 32) for number in range(first, first + n)]
            for prompt in prompts
        ]

    def _ask(self, prompt: str, sampling: Sampling, seed: int) -> Sample:
        import httpx

        body: dict[str, Any] = {
            "model": self.model, "prompt": prompt, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens, "seed": seed,
        }  # fmt: skip
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        began = time.perf_counter()
        try:
            response = self._client.post("completions", json=body)
        except httpx.HTTPError as error:
            raise ConnectionError(f"{self.base_url} cannot be reached: {error or type(error).__name__}") from error
        if response.status_code != 200:
            raise ConnectionError(f"{self.base_url} answered {response.status_code}: {response.text[:300]}")
        try:
            document = response.json()
            choice, usage = document["choices"][0], document["usage"]
            details = usage.get("prompt_tokens_details") or {}
            spent = Spent(
                usage["prompt_tokens"], usage["completion_tokens"], details.get("cached_tokens") or 0, 1,
                time.perf_counter() - began,
            )  # fmt: skip
            ended = "length" if choice["finish_reason"] == "length" else "stop"
            return Sample(str(choice["text"]), (0,) * spent.completion, (), ended, spent)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{self.base_url} gave no completion: {response.text[:300]}") from error


def as_record(sample: Sample) -> dict[str, Any]:
    """A sample as plain JSON values; `from_record` reads it back, equal."""
    return asdict(sample)


def from_record(record: dict[str, Any]) -> Sample:
    """A sample from plain values. Raises ValueError or TypeError for what is none."""
    try:
        values = dict(record)
        spent = Spent(**values.pop("spent"))
        sample = Sample(
            **{**values, "tokens": tuple(values["tokens"]), "logprobs": tuple(values["logprobs"])}, spent=spent
        )
    except (KeyError, AttributeError) as error:
        raise ValueError(f"a sample's record must hold text, tokens, logprobs, ended and spent, got {error}") from None
    for token in sample.tokens:
        checks.whole("tokens", token, low=0)
    for value in sample.logprobs:
        checks.number("logprobs", value)
    if not isinstance(sample.text, str) or not isinstance(sample.matched, str):
        raise TypeError(f"text must be text, got {checks.shown(sample.text)}")
    return sample
