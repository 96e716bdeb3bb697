"""Which keys a new token attends to: blocks of keys chosen by their mean key, and attention over those blocks alone.

One query vector stands for a group of query heads: the mean of the group. One key stands for a block: its mean. Their
product is the mean of all scores between the group and the block, so that nothing is lost by averaging first, and
choosing reads one key a block. All heads of a group attend to the same blocks, the best `budget` tokens' worth of them.
With blocks of one token this is plain top-k, which reads every key to choose and saves the values alone.

The blocks chosen are gathered into one short run of keys and values, in the order of their positions, over which the
exact decoding kernel runs; keys outside are not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from assay import checks
from assay.methods.core import kernels
from assay.methods.core.attention.plan import AttentionPlan, execute

Select = Literal["top", "recent", "random"]


@dataclass(frozen=True)
class BlockTopK:
    """How many keys a token of a sparse layer attends to, and which: the settings of block top-k attention.

    `budget` counts all tokens that are read for one token and key head, in whole blocks of `block`: the blocks of the
    first `sinks` tokens and of the newest `local` ones (at least the block that is being filled), and the best of the
    rest. `dense_layers` stay as they are, the first one as in the released code. `select` replaces the choice: "recent"
    takes the newest blocks (sinks and a sliding window), "random" any of them, drawn from torch's generator. At least
    one token is a sink: where a row begins is always kept.

    Blocks lie on a grid from position 0 of the cache, so that they never change; the released code lays its grid behind
    the sinks, and counts sinks on top of the budget (our choice). Defaults are those of the paper's decoding benchmark:
    64 blocks of 16. Raises TypeError and ValueError for settings out of range, and a budget that what is always kept
    would fill.

    >>> BlockTopK(budget=512).blocks, BlockTopK(budget=256, block=1).forced
    (32, 5)
    """

    budget: int = 1024
    block: int = 16
    sinks: int = 4
    local: int = 0
    dense_layers: tuple[int, ...] = (0,)
    select: Select = "top"

    def __post_init__(self) -> None:
        block = checks.whole("block", self.block, low=1)
        budget = checks.whole("budget", self.budget, low=block)
        checks.whole("sinks", self.sinks, low=1)
        checks.whole("local", self.local, low=0)
        checks.choice("select", self.select, get_args(Select))
        layers = self.dense_layers
        if isinstance(layers, str) or not isinstance(layers, tuple | list):
            raise TypeError(f"dense_layers must be a tuple of layer numbers, got {checks.shown(layers)}")
        object.__setattr__(self, "dense_layers", tuple(checks.whole("dense_layers", n, low=0) for n in layers))
        if budget % block:
            raise ValueError(f"budget must be whole blocks of {block} tokens, got {budget}")
        if self.blocks < self.forced:
            least = self.forced * block
            raise ValueError(f"budget must be at least {least} tokens, for sinks and the newest blocks, got {budget}")

    @property
    def blocks(self) -> int:
        """Blocks that are read for a token and key head."""
        return self.budget // self.block

    @property
    def forced(self) -> int:
        """The most of them that are kept whatever their score: sinks and newest tokens, wherever the edges of blocks
        fall."""
        return sum(-(-(tokens + self.block - 1) // self.block) for tokens in (self.sinks, max(self.local, 1)))


def block_sums(keys: Tensor, block: int) -> Tensor:
    """The sum of the keys of each block, (batch, key heads, blocks, dim) in float32; the last block may be partly
    filled.

    >>> block_sums(torch.ones(1, 1, 5, 2), 4)[0, 0, :, 0].tolist()
    [4.0, 1.0]
    """
    whole = keys.shape[2] // block * block
    full = keys[:, :, :whole].unflatten(2, (-1, block)).sum(3, dtype=torch.float32)
    if whole == keys.shape[2]:
        return full
    return torch.cat([full, keys[:, :, whole:].sum(2, keepdim=True, dtype=torch.float32)], 2)


def block_scores(q: Tensor, sums: Tensor) -> Tensor:
    """(batch, key heads, blocks) float32: the mean query of each group times the summed keys of each block.

    q (batch, heads, 1, dim). Blocks that are all full are in the same order as by their mean scores, whatever scales
    the scores.
    """
    pooled = q.float().reshape(q.shape[0], sums.shape[1], -1, q.shape[3]).mean(2)
    return (sums.float() @ pooled[..., None])[..., 0]


def choose(scores: Tensor, settings: BlockTopK, keys: int, starts: Tensor | None = None) -> Tensor:
    """The blocks that are kept, int64 (batch, key heads, `settings.blocks`), in the order of their positions.

    `scores` (batch, key heads, blocks of `keys` tokens). `starts` int64 (batch,) are the first tokens of left-padded
    rows: a row that holds fewer blocks than are kept gets blocks of its padding in front, which nobody may attend to.
    Chosen sets grow with the budget: a larger one holds the smaller one. Raises ValueError for scores of another number
    of blocks, or no more blocks than are kept.
    """
    block, count = settings.block, -(-keys // settings.block)
    if scores.shape[-1] != count or count < settings.blocks:
        raise ValueError(
            f"scores must be of the {count} blocks of {keys} keys, {settings.blocks} or more, got {scores.shape[-1]}"
        )
    places = torch.arange(count, device=scores.device)
    if settings.select == "recent":
        scores = places.to(scores.dtype).expand(scores.shape)
    elif settings.select == "random":
        scores = torch.rand_like(scores)
    first = (
        torch.zeros(1, 1, 1, dtype=torch.int64, device=scores.device)
        if starts is None
        else starts.to(scores.device)[:, None, None]
    )
    forced = (places >= (keys - max(settings.local, 1)) // block) | (places <= (first + settings.sinks - 1) // block)
    scores = scores.masked_fill(forced, torch.inf).masked_fill(places < first // block, -torch.inf)
    return scores.topk(settings.blocks, -1, sorted=False).indices.sort(-1).values


def gathered(x: Tensor, chosen: Tensor, block: int, room: Tensor | None = None) -> Tensor:
    """The tokens of the chosen blocks, (batch, heads, blocks * block, dim): a copy of those alone.

    x (batch, heads, tokens, dim). `room` is the memory that x is a view of, (batch, heads, whole blocks, dim) and
    contiguous: with it whole blocks are copied at once. Without it tokens are, and those behind the last are its
    copies.
    """
    batch, heads, kept = chosen.shape
    if room is not None:
        rows = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * (room.shape[2] // block) + chosen
        found = room.reshape(-1, block * room.shape[3]).index_select(0, rows.flatten())
        return found.view(batch, heads, kept * block, room.shape[3])
    tokens = (chosen[..., None] * block + torch.arange(block, device=x.device)).flatten(2).clamp(max=x.shape[2] - 1)
    row = torch.arange(batch, device=x.device)[:, None, None]
    head = torch.arange(heads, device=x.device)[None, :, None]
    return x[row, head, tokens]


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    settings: BlockTopK,
    *,
    sums: Tensor | None = None,
    room: tuple[Tensor, Tensor] | None = None,
    starts: Tensor | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one new token a row over the blocks that its heads choose: (batch, heads, 1, value dim), in the
    dtype of q.

    q (batch, heads, 1, dim); k, v (batch, key heads, tokens, dim), heads a multiple of key heads. `sums` are
    `block_sums` of k, which a cache keeps up to date (without them every key is read to make them), and `room` the
    memory of k and v, see `gathered`. `starts` int64 (batch,) are the first tokens of left-padded rows, `sinks`
    (heads,) learnt logits. A budget of all blocks or more is dense attention, by the same kernel. Source: section on
    sparse attention and the released `sparsity_utils` and `blocktopk_decoder`, with the grid as in `BlockTopK`. Raises
    ValueError for several queries and tensors that do not fit together.

    When NOT to use it: short contexts, where choosing costs more than reading; prompts
    (`methods.attention.xattention`).

    >>> q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 640, 16), torch.randn(1, 2, 640, 16)
    >>> sparse_attention(q, k, v, BlockTopK(budget=128)).shape
    torch.Size([1, 4, 1, 16])
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, x, shape=("batch", "heads", "tokens", "dim"), dtype="floating", empty=True)
    if q.shape[2] != 1:
        raise ValueError(f"q must hold one token a row, got {q.shape[2]}")
    if not k.shape[1] or q.shape[1] % k.shape[1] or q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    keys, block = k.shape[2], settings.block
    last = -(-keys // block)
    if last <= settings.blocks:
        return execute(AttentionPlan(1, keys, key_start=starts), q, k, v, scale=scale, sinks=sinks)
    if sums is None:
        sums = k if block == 1 else block_sums(k, block)
        kernels.ran("block top-k", "all keys read to choose")
    else:
        kernels.ran("block top-k", "one key read a block")
    chosen = choose(block_scores(q, sums), settings, keys, starts)
    short, left = settings.budget - (last * block - keys), None
    if starts is not None:  # blocks of padding come first, then a block that may begin with some
        missing = (settings.blocks - (last - starts // block)).clamp(min=0)
        left = missing * block + starts % block
    keys_room, values_room = room if room is not None else (None, None)
    short_k = gathered(k, chosen, block, keys_room)[:, :, :short]
    short_v = gathered(v, chosen, block, values_room)[:, :, :short]
    return execute(AttentionPlan(1, short, key_start=left), q, short_k, short_v, scale=scale, sinks=sinks)
