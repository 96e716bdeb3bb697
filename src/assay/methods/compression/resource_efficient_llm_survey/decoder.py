"""A decoder's sizes, read from its configuration, and what follows from them by counting: parameters, operations, bytes.

Nothing is loaded and nothing is run. Operations are FLOPs: a multiply-add is two. Bytes are bytes (GB is 1e9 of them, GiB 2**30).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from assay import checks

GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
PLAIN = ("nemotron", "starcoder2")
KINDS = (*GATED, *PLAIN)
"""Model types of transformers whose blocks `decoder_of` knows."""
NORMS = {"gemma2": 4, "gemma3_text": 4}  # of a block over the model's width; all others have two
HEAD_NORMS = ("qwen3", "gemma3_text")  # a norm of the queries' and one of the keys' heads besides
UNFUSED = ("gemma2",)  # transformers has no attention for it but the one that writes all scores down
FORMATS = ("fp32", "bf16", "fp16", "int8", "int4")
FLOATS = ("fp32", "bf16", "fp16")
"""What `weight_bytes` knows: three kinds of floats (`FLOATS`), and two packed ones. "int8" and "int4" pack the linear layers of the blocks,
a scale for 32 weights (int4: a minimum too), and the projection onto the vocabulary in 8 bits; the table in which tokens are looked up
stays in float32, and so does a layer whose inputs are no multiple of 32."""


@dataclass(frozen=True)
class Decoder:
    """A decoder in numbers. `windows` has for each layer how many positions it sees at most, 0 for all of them.

    `block_rest` and `rest` are parameters that are in no matrix: norms and biases of one block, and the last norm. `unfused`: its attention
    holds the scores of all pairs of a prompt at once, as transformers runs it.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    gated: bool
    vocabulary: int
    tied: bool
    block_rest: int = 0
    rest: int = 0
    windows: tuple[int, ...] = ()
    unfused: bool = False

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "kv_heads", "head_dim", "feed_forward", "vocabulary"):
            checks.whole(name, getattr(self, name), low=1)
        for name in ("block_rest", "rest"):
            checks.whole(name, getattr(self, name), low=0)
        for name in ("gated", "tied", "unfused"):
            checks.flag(name, getattr(self, name))
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads ({self.heads}), got {self.kv_heads}")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"windows must have one entry for each of {self.layers} layers, got {len(self.windows)}")
        for window in self.windows:
            checks.whole("a window", window, low=0)

    # ------------------------------------------------------------------------------------------------------------ parameters

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of the linear layers of one block: q, k, v, o, then the feed-forward's."""
        d, f, inner, shared = self.width, self.feed_forward, self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(inner, d), (shared, d), (shared, d), (d, inner)]
        return attention + [(f, d)] * (2 if self.gated else 1) + [(d, f)]

    @property
    def block_matmul(self) -> int:
        """Parameters of one block that are in a matrix."""
        return sum(n * k for n, k in self.matrices)

    @property
    def head(self) -> int:
        """Parameters of the projection onto the vocabulary."""
        return self.vocabulary * self.width

    @property
    def matmul_parameters(self) -> int:
        """Those that a token is multiplied by: the blocks' matrices and the projection onto the vocabulary."""
        return self.layers * self.block_matmul + self.head

    @property
    def parameters(self) -> int:
        """All of them, a table that is both the embedding and the projection once."""
        tables = self.head * (1 if self.tied else 2)
        return self.layers * (self.block_matmul + self.block_rest) + tables + self.rest

    @property
    def parameters_without_tables(self) -> int:
        """All but the embedding and the projection, which in small models are most of them."""
        return self.layers * (self.block_matmul + self.block_rest) + self.rest

    # ------------------------------------------------------------------------------------------------------------ operations

    def pairs(self, tokens: int) -> int:
        """Pairs of a query and a key that it may see, summed over the layers, of a causal prompt of so many tokens."""
        checks.whole("tokens", tokens, low=0)
        found = 0
        for window in self.windows or (0,) * self.layers:
            beyond = max(tokens - window, 0) if window else 0
            found += tokens * (tokens + 1) // 2 - beyond * (beyond + 1) // 2
        return found

    def prefill_flops(self, tokens: int, logits: int = 1) -> float:
        """FLOPs of the matrix products of a prompt's forward pass of which the last `logits` tokens are projected onto the vocabulary.

        Causal attention is counted as it must be, not as kernels that compute the masked half take it.
        """
        checks.whole("tokens", tokens, low=1)
        checks.whole("logits", logits, low=0, high=tokens)
        blocks = 2.0 * self.layers * self.block_matmul * tokens
        return blocks + 2.0 * self.head * logits + 4.0 * self.heads * self.head_dim * self.pairs(tokens)

    def seen(self, context: int) -> int:
        """Positions that one more token looks at, itself included, summed over the layers: `context` in each that has no window."""
        return sum(min(context, window or context) for window in self.windows or (0,) * self.layers)

    def step_flops(self, context: int) -> float:
        """FLOPs of the matrix products of one token that sees `context` positions, itself included."""
        checks.whole("context", context, low=1)
        return 2.0 * self.matmul_parameters + 4.0 * self.heads * self.head_dim * self.seen(context)

    def training_flops(self, tokens: int, *, recomputed: bool = False) -> float:
        """FLOPs of a step over one sequence: three forward passes, four where all activations are computed again."""
        return (4 if checks.flag("recomputed", recomputed) else 3) * self.prefill_flops(tokens, tokens)

    def shorthand_training_flops(self, tokens: int) -> float:
        """The rule of thumb 6 P D, P being the parameters that a token is multiplied by."""
        return 6.0 * self.matmul_parameters * checks.whole("tokens", tokens, low=1)

    # ------------------------------------------------------------------------------------------------------------------- bytes

    def cache_bytes(self, tokens: int, *, batch: int = 1, element_bytes: float = 2.0) -> float:
        """Bytes of keys and values behind so many tokens of each row, when a token has followed the prompt."""
        checks.whole("tokens", tokens, low=0)
        checks.whole("batch", batch, low=1)
        checks.number("element_bytes", element_bytes, above=0)
        return 2.0 * self.kv_heads * self.head_dim * self.seen(tokens) * batch * element_bytes

    def prompt_cache_bytes(self, tokens: int, *, batch: int = 1, element_bytes: float = 2.0) -> float:
        """Bytes of keys and values right behind a prompt: layers with windows let go of what is beyond them with the next token only."""
        return replace(self, windows=()).cache_bytes(tokens, batch=batch, element_bytes=element_bytes)

    def weight_bytes(self, format: str) -> float:
        """Bytes of all weights as an engine of ours holds them in memory in one of `FORMATS`."""
        return self.step_weight_bytes(format) + self._looked_up(format)

    def step_weight_bytes(self, format: str) -> float:
        """Bytes of the weights that every token reads: not the table in which one row is looked up."""
        size = element_bytes(format)
        if format in FLOATS:
            return float(size * (self.parameters_without_tables + self.head))
        packed, head = matrix_bytes(format), matrix_bytes("int8")
        blocks = self.layers * sum(packed(n, k) for n, k in self.matrices)
        return float(blocks + head(self.vocabulary, self.width) + 4 * (self.layers * self.block_rest + self.rest))

    def _looked_up(self, format: str) -> float:
        """A table that is held besides the projection: one of its own, or the float one of which the projection is a packed copy."""
        separate = not self.tied or format in ("int8", "int4")
        return float(element_bytes(format) * self.head) if separate else 0.0

    def step_bytes(self, context: int, format: str) -> float:
        """Bytes that one token reads which sees `context` positions: weights, and the cache in the format's number type."""
        checks.whole("context", context, low=1)
        return self.step_weight_bytes(format) + self.cache_bytes(context, element_bytes=element_bytes(format))


def element_bytes(format: str) -> int:
    """Bytes of a number that is not packed: of activations and of the cache. Raises ValueError for a format that is not known."""
    return 2 if checks.choice("format", format, FORMATS) in ("bf16", "fp16") else 4


def matrix_bytes(format: str) -> Callable[[int, int], float]:
    """Bytes of a matrix (outputs, inputs) in a format: for the packed ones those of `core.quantize.formats`, padding included."""
    checks.choice("format", format, FORMATS)
    if format in FLOATS:
        size = element_bytes(format)
        return lambda n, k: float(n * k * size)
    from assay.methods.core.quantize.formats import FORMATS as KNOWN  # torch: not where only floats are asked for

    known = KNOWN[format]
    return lambda n, k: float(4 * n * k if k % known.multiple else known.bytes(n, k))


def bits_to_bytes(bits: float) -> float:
    """Bytes of so many bits: eight to one."""
    return checks.number("bits", bits, low=0) / 8


def decoder_of(config: Any) -> Decoder:
    """The sizes in a configuration of transformers; of one with several parts, such as a decoder that sees, those of its decoder alone.

    Raises ValueError for a model type that is not among `KINDS`: its blocks may hold what is not counted here.

    >>> from transformers import LlamaConfig
    >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    >>> decoder_of(LlamaConfig(**sizes, tie_word_embeddings=True)).parameters
    76352
    """
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    kind = getattr(config, "model_type", None)
    if kind not in KINDS:
        raise ValueError(f"config must be of one of the model types {', '.join(KINDS)}, got {kind!r}")
    width, heads = int(config.hidden_size), int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or width // heads)
    feed_forward, gated = int(config.intermediate_size), kind in GATED
    norm = 2 * width if kind in PLAIN else width  # of a LayerNorm there is a bias too
    rest = NORMS.get(kind, 2) * norm + (2 * head_dim if kind in HEAD_NORMS else 0)
    qkv, out, inner = _biases(kind, config)
    rest += (heads + 2 * kv_heads) * head_dim * qkv + width * out
    rest += ((2 if gated else 1) * feed_forward + width) * inner
    return Decoder(
        layers=int(config.num_hidden_layers),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        feed_forward=feed_forward,
        gated=gated,
        vocabulary=int(config.vocab_size),
        tied=bool(config.tie_word_embeddings),
        block_rest=rest,
        rest=norm,
        windows=_windows(config),
        unfused=kind in UNFUSED,
    )


def _biases(kind: str, config: Any) -> tuple[bool, bool, bool]:
    """Whether queries, keys and values have biases; the output of attention; the feed-forward."""
    if kind == "qwen2":
        return True, False, False
    if kind == "starcoder2":
        used = bool(config.use_bias)
        return used, used, used
    attention = bool(getattr(config, "attention_bias", False)) and kind != "mistral"
    return attention, attention, bool(getattr(config, "mlp_bias", False)) and kind in ("llama", "nemotron")


def _windows(config: Any) -> tuple[int, ...]:
    """How many positions each layer sees; () where all layers see all of them."""
    layers, window = int(config.num_hidden_layers), getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return ()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    found = tuple(int(window) if kind == "sliding_attention" else 0 for kind in kinds)
    return found if any(found) else ()
