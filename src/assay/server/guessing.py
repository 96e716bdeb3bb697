"""Drafts for a row that runs alone, where the recipe speculates (`methods/builtin/speculation`), looked up in the row's own text.

Only greedy rows are guessed for, and only while no other runs: a batch reads the weights once for all rows anyway. What the model
makes of a draft is what it would have made without, to the bit.
"""

from __future__ import annotations

from assay.methods.builtin.speculation import DraftLength, Lookup, PagedEngine, Speculation
from assay.server.rows import Row


class Guesses:
    """The drafts of one row, as long as they pay."""

    def __init__(self, speculation: Speculation) -> None:
        self._lookup = Lookup(ngram=speculation.ngram)
        self._length = DraftLength(speculation.draft, more=PagedEngine.more)

    def next(self, row: Row) -> list[int]:
        """Tokens that may follow what the row has; empty where nothing is known, or guessing does not pay."""
        known, prompt = len(self._lookup.tokens), len(row.ids)
        self._lookup.add(row.ids[known:])
        self._lookup.add(row.made[max(0, known - prompt) :])
        most = min(self._length.next(), row.settings.max_tokens - len(row.made) - 1)
        draft = self._lookup.propose(max(0, most))
        end = next((place + 1 for place, token in enumerate(draft) if token in row.settings.ends), len(draft))
        return draft[:end]  # nothing follows an end

    def seen(self, drafted: int, accepted: int) -> None:
        """What became of a draft."""
        self._length.seen(drafted, accepted)
