"""What the tokens of a vocabulary spell, and which of them a constraint allows next.

`TokenBytes` knows the bytes of each token. `Rules` joins a constraint, a vocabulary and the tokens that end a sequence; a `Position` is
a state of the constraint with what has been found out about the tokens behind it, and a mask says it of all tokens at once: by a walk
down the trie of their bytes, all tokens abreast, where the constraint is an automaton, else token by token, without those whose
beginning is a token that is not allowed itself.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay import checks
from assay.methods.inference.awrs.constraints import Automaton, Constraint, State, checked, incremental

Bools = NDArray[np.bool_]
MASKS_KEPT = 256
DEAD = -1


class TokenBytes:
    """The bytes that each token of a tokenizer adds to a text.

    `tokenizer` is one of transformers' with a `tokenizers` backend that decodes byte-level pieces (GPT-2, SmolLM2, Qwen, Llama 3) or
    SentencePiece's (Llama 2, Gemma, Mistral: the space is kept that decoding drops from the first token). Special tokens spell nothing:
    no constraint allows them. Making one takes a tenth of a second; keep it for the tokenizer's lifetime.
    Raises TypeError for a tokenizer without such a backend, ValueError for one whose pieces are no bytes (WordPiece).

    >>> letters = TokenBytes.from_pieces([b"a", b"b", b"ab", b""], special=[3])
    >>> letters.of(2), letters.text([0, 1]), letters.special
    (b'ab', b'ab', frozenset({3}))
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TypeError(f"tokenizer must have a `tokenizers` backend, got {type(tokenizer).__name__}")
        spell = _spelling(json.loads(backend.to_str()))
        added = tokenizer.added_tokens_decoder
        vocabulary = tokenizer.get_vocab()
        self.pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for piece, token in vocabulary.items():
            self.pieces[token] = piece.encode() if token in added else spell(piece)
        special = {token for token, one in added.items() if one.special} | set(tokenizer.all_special_ids)
        self._finish({token for token in special if token in range(len(self.pieces))})

    @classmethod
    def from_pieces(cls, pieces: Sequence[bytes], special: Iterable[int] = ()) -> TokenBytes:
        """A vocabulary given piece by piece."""
        made = cls.__new__(cls)
        if not pieces or not all(isinstance(piece, bytes) for piece in pieces):
            raise TypeError(f"pieces must be at least one byte string, got {checks.shown(pieces)}")
        made.pieces = list(pieces)
        made._finish({checks.whole("special", token, low=0, high=len(pieces) - 1) for token in special})
        return made

    def _finish(self, special: set[int]) -> None:
        self.special = frozenset(special)
        for token in special:
            self.pieces[token] = b""

    def __len__(self) -> int:
        return len(self.pieces)

    def of(self, token: int) -> bytes:
        """The bytes of a token; none for special tokens, and for ids beyond the tokenizer's, which padded vocabularies have."""
        return self.pieces[token] if 0 <= token < len(self.pieces) else b""

    def text(self, tokens: Iterable[int]) -> bytes:
        return b"".join(map(self.of, tokens))

    @cached_property
    def silent(self) -> Bools:
        """Of each token, whether it spells nothing."""
        return np.array([not piece for piece in self.pieces])

    @cached_property
    def levels(self) -> list[Level]:
        """The trie of all pieces, level by level: its nodes' parents and bytes, and the tokens that end there."""
        lengths = np.array([len(piece) for piece in self.pieces])
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        flat = np.frombuffer(b"".join(self.pieces), dtype=np.uint8).astype(np.int64)
        node = np.zeros(len(self.pieces), dtype=np.int64)
        levels = []
        for depth in range(int(lengths.max())):
            alive = np.flatnonzero(lengths > depth)
            keys, places = np.unique(node[alive] * 256 + flat[starts[alive] + depth], return_inverse=True)
            node[alive] = places
            ending = alive[lengths[alive] == depth + 1]
            levels.append(Level(keys >> 8, keys & 255, ending, node[ending]))
        return levels

    @cached_property
    def nested(self) -> list[tuple[int, int]]:
        """All tokens that spell something, sorted, each with the longest other token that begins it (-1: none), which stands before it."""
        order = sorted((token for token, piece in enumerate(self.pieces) if piece), key=self.pieces.__getitem__)
        above: list[int] = []
        found = []
        for token in order:
            while above and not self.pieces[token].startswith(self.pieces[above[-1]]):
                above.pop()
            found.append((token, above[-1] if above else -1))
            above.append(token)
        return found


@dataclass(frozen=True)
class Level:
    """One level of the trie: its nodes' parents (numbered within the level above) and bytes, and the tokens that end at which nodes."""

    parents: NDArray[np.int64]
    byte: NDArray[np.int64]
    tokens: NDArray[np.int64]
    nodes: NDArray[np.int64]


class Rules:
    """A constraint over a vocabulary: which tokens may follow a state, `ends` among them where the text is complete.

    `mask_calls` counts the evaluations of the constraint for masks (of an automaton: nodes of the trie).
    """

    def __init__(self, constraint: Constraint, token_bytes: TokenBytes, ends: Iterable[int]) -> None:
        self.constraint = incremental(checked("constraint", constraint))
        if not isinstance(token_bytes, TokenBytes):
            raise TypeError(f"token_bytes must be a TokenBytes, got {checks.shown(token_bytes)}")
        self.token_bytes = token_bytes
        if not isinstance(ends, Iterable):
            raise TypeError(f"ends must be token ids, got {checks.shown(ends)}")
        self.ends = frozenset(checks.whole("ends", token, low=0) for token in ends)
        if not self.ends:
            raise ValueError("ends must hold at least one token, got none: nothing could end a sequence")
        self.mask_calls = 0
        self._masks: OrderedDict[State, Bools] = OrderedDict()
        self._barred: dict[int, Bools] = {}

    def start(self) -> Position:
        return Position(self, self.constraint.start)

    def barred(self, size: int) -> Bools:
        """Of a vocabulary of `size` rows, the tokens that never follow: they spell nothing and end nothing."""
        if size not in self._barred:
            found = np.ones(size, dtype=bool)
            common = min(size, len(self.token_bytes))
            found[:common] = self.token_bytes.silent[:common]
            found[[token for token in self.ends if token < size]] = False
            self._barred[size] = found
        return self._barred[size]

    def mask(self, state: State, size: int) -> Bools:
        """Which of `size` tokens may follow `state`. The last 256 are kept; do not write into one."""
        if state in self._masks and len(self._masks[state]) == size:
            self._masks.move_to_end(state)
            return self._masks[state]
        if isinstance(self.constraint, Automaton):
            allowed, count = automaton_mask(self.constraint, self.token_bytes, state)
        else:
            allowed, count = token_mask(self.constraint, self.token_bytes, state)
        found = np.zeros(size, dtype=bool)
        common = min(size, len(allowed))
        found[:common] = allowed[:common]
        ends = [token for token in self.ends if token < size]
        found[ends] = self.constraint.accepts(state)
        self.mask_calls += count + 1
        self._masks[state] = found
        if len(self._masks) > MASKS_KEPT:
            self._masks.popitem(last=False)
        return found


class Position:
    """A state, and what is known of the tokens behind it. `calls` counts the evaluations of the constraint."""

    def __init__(self, rules: Rules, state: State) -> None:
        self.rules, self.state, self.calls = rules, state, 0
        self._after: dict[int, State | None] = {}
        self._complete: bool | None = None

    @property
    def complete(self) -> bool:
        """Whether the text so far may end here."""
        if self._complete is None:
            self._complete = self.rules.constraint.accepts(self.state)
            self.calls += 1
        return self._complete

    def allows(self, token: int) -> bool:
        """Whether `token` may follow: an end where the text is complete, another where it can still become so."""
        if token in self.rules.ends:
            return self.complete
        piece = self.rules.token_bytes.of(token)
        if not piece:
            return False
        if token not in self._after:
            self._after[token] = self.rules.constraint.advance(self.state, piece)
            self.calls += 1
        return self._after[token] is not None

    def behind(self, token: int) -> Position:
        """The position behind an allowed token that is no end. Raises ValueError for one that is not allowed."""
        if token in self.rules.ends or not self.allows(token):
            raise ValueError(f"token must be allowed and no end, got {token} ({self.rules.token_bytes.of(token)!r})")
        return Position(self.rules, self._after[token])


def automaton_mask(automaton: Automaton, token_bytes: TokenBytes, state: Any) -> tuple[Bools, int]:
    """Which tokens may follow, by a walk down the trie, all nodes of a level at once; and the number of nodes visited."""
    allowed = np.zeros(len(token_bytes), dtype=bool)
    states = np.array([state], dtype=np.int64)
    visited = 0
    for level in token_bytes.levels:
        before = states[level.parents]
        live = np.flatnonzero(before != DEAD)
        if not len(live):
            break
        visited += len(live)
        # few different steps stand for many nodes
        steps, places = np.unique(before[live] * 256 + level.byte[live], return_inverse=True)
        after = [automaton.step(step >> 8, step & 255) for step in steps.tolist()]
        states = np.full(len(before), DEAD, dtype=np.int64)
        states[live] = np.array([DEAD if one is None else one for one in after], dtype=np.int64)[places]
        allowed[level.tokens] = states[level.nodes] != DEAD
    return allowed, visited


def token_mask(constraint: Any, token_bytes: TokenBytes, state: Any) -> tuple[Bools, int]:
    """Which tokens may follow, token by token: none is tried whose beginning is a token that may not; and the number of trials."""
    allowed = np.zeros(len(token_bytes), dtype=bool)
    after: dict[int, Any] = {-1: state}
    tried = 0
    for token, begin in token_bytes.nested:
        known = after[begin]
        if known is not None:
            rest = token_bytes.of(token)[len(token_bytes.of(begin)) :]
            if rest:
                known = constraint.advance(known, rest)
                tried += 1
        after[token] = known
        allowed[token] = known is not None
    return allowed, tried


# ------------------------------------------------------------------------------------------------------------- spelling


def _spelling(tokenizer: dict[str, Any]) -> Any:
    """How a piece of the vocabulary becomes bytes, by the tokenizer's decoder."""
    decoder = tokenizer.get("decoder") or {}
    steps = [one for one in decoder.get("decoders", [decoder]) if "type" in one]
    kinds = [one["type"] for one in steps]
    if "ByteLevel" in kinds:
        letters = _byte_letters()
        return lambda piece: (
            bytes(letters[letter] for letter in piece) if set(piece) <= letters.keys() else piece.encode()
        )
    for one in steps:
        if one["type"] == "Metaspace":
            return partial(_sentencepiece, space=one["replacement"])
        if (
            one["type"] == "Replace"
            and one["content"] == " "
            and "ByteFallback" in kinds
            and "String" in one["pattern"]
        ):
            return partial(_sentencepiece, space=one["pattern"]["String"])
    raise ValueError(
        f"tokenizer must decode byte-level or SentencePiece pieces, got a decoder of {', '.join(kinds) or 'none'}"
    )


def _byte_letters() -> dict[str, int]:
    """The characters that stand for bytes in byte-level pieces: printable ones for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _sentencepiece(piece: str, space: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes((int(piece[3:5], 16),))
    return piece.replace(space, " ").encode()
