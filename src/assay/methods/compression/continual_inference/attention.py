"""Attention over the last `window` tokens, token by token: one output a step, or all of them brought up to date.

After arXiv 2201.06268. Plain attention over the window does 2 n^2 d multiplications a step for n tokens of width d.

    out, state = single_output_step(q, k, v, state, window=64)      one query: 2 n d
    out, state = retroactive_step(q, k, v, state, window=64)        all n queries: about 6 n d
    net = ContinualEncoder(encoder, window=64)                      torch's nn.TransformerEncoder as a stream
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.compression.continual_inference.modules import Streaming, hookless, in_evaluation
from assay.methods.compression.continual_inference.state import EMPTY, StreamState, matching
from assay.methods.core import kernels

LIMIT = 64.0
LARGEST = math.exp(20.0)  # a key this far above the row's shift gets the row a new one (our choice)


def attention_over(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention (batch, heads, tokens, dim) of all queries over all keys, written out: the reference."""
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    return scores.softmax(-1) @ v


def single_output_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: StreamState = EMPTY,
    *,
    window: int,
    query: int = -1,
    scale: float | None = None,
) -> tuple[Tensor | None, StreamState]:
    """One token's q, k, v (batch, heads, dim): the attention of one query of the window, (batch, heads, dim), or None.

    `query` names the query by its place from the end of the window, -1 the newest (queries wait until they are there). None until the
    window is full. Raises ValueError for a place outside the window, shapes that differ, NaN and infinity, and a state that is not
    of as many streams and of this window and query.
    """
    window = checks.whole("window", window, low=1)
    query = checks.whole("query", query, low=-window, high=-1)
    _check_token(q, k, v, scale)
    _check_state(state, 3, k, window)
    if state.buffers and state.buffers[0].shape[2] != min(state.seen, -query):
        raise ValueError(
            f"state must be of steps with query={query}, got one that keeps {state.buffers[0].shape[2]} queries"
        )
    new = [x[:, :, None].clone() for x in (q, k, v)]  # the caller may write over its tensors
    if state.buffers:
        new = [torch.cat([old, x], 2) for old, x in zip(state.buffers, new, strict=True)]
    queries, keys, values = new[0][:, :, query:], new[1][:, :, -window:], new[2][:, :, -window:]
    state = StreamState(keys.shape[2], (queries, keys, values))
    if keys.shape[2] < window:
        return None, state
    out = F.scaled_dot_product_attention(queries[:, :, :1], keys, values, scale=scale)
    return out[:, :, 0], state


def retroactive_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: StreamState = EMPTY,
    *,
    window: int,
    limit: float = LIMIT,
    scale: float | None = None,
) -> tuple[Tensor | None, StreamState]:
    """One token's q, k, v (batch, heads, dim): the attention of all queries of the window over it, oldest first, or None.

    Returns (batch, heads, window, dim); None until the window is full. For every query the sum of the exponentials of its scores
    and the sum of the values weighted with them are kept: the oldest key's share is taken out, the new key's put in, and
    the new query gets its sums once over all keys.

    Taking out cancels where the oldest key had most of the weight. So each row's exponentials are relative to the largest score it had
    when it was summed up, and a row is summed up anew where its sum has fallen below 1 / `limit` of the most it was since, or a new
    score is e^20 times the largest (`our choice`; the paper subtracts without a guard). What is left
    is about `limit` times the rounding of a score (eps times its size) and of the window's additions, as a share of the largest value;
    the price is n d multiplications more for such rows.
    Half precision is kept in float32. Raises ValueError for shapes that differ, NaN and infinity (which would stay in the sums after
    their token has left), a limit that is not above 1, and a state that is not of as many streams and of this window.
    """
    window, limit = checks.whole("window", window, low=1), checks.number("limit", limit, above=1)
    _check_token(q, k, v, scale)
    _check_state(state, 7, k, window)
    wide = torch.promote_types(q.dtype, torch.float32)
    query = (q.to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale))[:, :, None]
    key, value = k.to(wide)[:, :, None], v.to(wide)[:, :, None]
    if not state.buffers:
        queries, keys, values = query, key.clone(), value.clone()  # the caller may write over its tensors
        total, shift, weighted = torch.ones_like(query[..., 0]), (query * key).sum(-1), values
        peak = total
    else:
        keep = slice(int(state.seen == window), None)  # all but the oldest, once the window is full
        rows, total, shift, peak, weighted = (x[:, :, keep] for x in (state.buffers[0], *state.buffers[3:]))
        keys, values = (torch.cat([old, new], 2) for old, new in zip(state.buffers[1:3], (key, value), strict=True))
        changed, terms, signs = key, value, [1.0]
        if state.seen == window:
            changed, terms = torch.cat([keys[:, :, :1], key], 2), torch.cat([values[:, :, :1], value], 2)
            signs = [-1.0, 1.0]
            keys, values = keys[:, :, 1:], values[:, :, 1:]
        weights = (rows @ changed.transpose(-1, -2) - shift[..., None]).exp()
        signed = weights * torch.tensor(signs, dtype=wide, device=q.device)
        total, weighted = total + signed.sum(-1), weighted + signed @ terms
        peak = torch.maximum(peak, total)
        sound = (total * limit >= peak) & (weights[..., -1] <= LARGEST)
        if not bool(sound.all()):
            total, shift, peak, weighted = _anew(~sound, rows, keys, values, total, shift, peak, weighted)
        own = (keys @ query.transpose(-1, -2))[..., 0]  # the new query's scores
        top = own.amax(-1, keepdim=True)
        shares = (own - top).exp()
        queries = torch.cat([rows, query], 2)
        total, shift = torch.cat([total, shares.sum(-1, keepdim=True)], 2), torch.cat([shift, top], 2)
        peak = torch.cat([peak, total[:, :, -1:]], 2)
        weighted = torch.cat([weighted, shares[:, :, None] @ values], 2)
    kept = StreamState(keys.shape[2], (queries, keys, values, total, shift, peak, weighted))
    if keys.shape[2] < window:
        return None, kept
    return (weighted / total[..., None]).to(q.dtype), kept


def _anew(
    which: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    total: Tensor,
    shift: Tensor,
    peak: Tensor,
    weighted: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum up again the rows of `which` (batch, heads, rows)."""
    kernels.ran("retroactive attention", "rows summed up anew")
    b, h, i = which.nonzero(as_tuple=True)
    scores = (keys[b, h] @ rows[b, h, i][..., None])[..., 0]
    top = scores.amax(-1, keepdim=True)
    shares = (scores - top).exp()
    total, shift, peak, weighted = (x.clone() for x in (total, shift, peak, weighted))
    total[b, h, i] = peak[b, h, i] = shares.sum(-1)
    shift[b, h, i] = top[:, 0]
    weighted[b, h, i] = (shares[:, None] @ values[b, h])[:, 0]
    return total, shift, peak, weighted


def _check_token(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    if scale is not None:
        checks.number("scale", scale)
    checks.tensor("q", q, shape=("batch", "heads", "dim"))
    checks.tensor("k", k, shape=tuple(q.shape))
    checks.tensor("v", v, shape=tuple(q.shape))
    checks.together(q=q, k=k, v=v)
    if not bool(torch.stack((q, k, v)).isfinite().all()):
        raise ValueError("q, k and v must be finite, got NaN or infinity in them")


def _check_state(state: StreamState, count: int, k: Tensor, window: int) -> None:
    """A state of these steps has `count` buffers, and the keys that it keeps come second."""
    if not state.buffers:
        return
    matching(state, k)
    known = state.buffers[1].shape if len(state.buffers) == count else None
    if known is None or (known[1], known[3]) != tuple(k.shape[1:]) or known[2] > window:
        shown = [tuple(b.shape) for b in state.buffers[:3]]
        raise ValueError(
            f"state must be of {k.shape[1]} heads of {k.shape[2]} over a window of {window}, got buffers {shown}"
        )


class RecycledPositions(Streaming):
    """Learned positions that come again: token t gets position t modulo `period`, (batch, dim, time) to the same.

    With a period of 2 window - 1 (the default), any two tokens that are in the window together differ as they would without end,
    and each keeps its position while it lives. A clip's first token has position 0. Raises ValueError for other shapes.
    """

    def __init__(self, window: int, dim: int, period: int | None = None) -> None:
        super().__init__()
        window = checks.whole("window", window, low=1)
        self.period = 2 * window - 1 if period is None else checks.whole("period", period, low=window)
        self.table = nn.Parameter(0.02 * torch.randn(self.period, checks.whole("dim", dim, low=1)))

    def forward(self, x: Tensor) -> Tensor:
        return self._added(x, 0)

    def advance(self, x: Tensor, state: StreamState = EMPTY) -> tuple[Tensor | None, StreamState]:
        return self._added(x, state.seen), StreamState((state.seen + x.shape[2]) % self.period)

    def _added(self, x: Tensor, first: int) -> Tensor:
        checks.tensor("x", x, shape=("batch", self.table.shape[1], "time"))
        places = torch.arange(first, first + x.shape[2], device=x.device) % self.period
        return x + self.table[places].T


class ContinualEncoder(Streaming):
    """A transformer encoder over the last `window` tokens: (batch, dim, time) to the newest token's output, (batch, dim, 1) a step.

    `encoder` is torch's `nn.TransformerEncoder` in evaluation mode; it is copied. With one layer only the newest query attends, over
    keys and values that are kept: the work of a step does not grow with the window but for 2 n d. With more layers the first one's
    attention is retroactive, its output changes for all tokens, and so everything after it is done for all of them; the last
    layer has one query again. Gains there are small (2.6 times for two layers in the paper).

    In training mode `advance` raises RuntimeError, since `forward` would drop out and it does not. Raises ValueError for an
    encoder with a part in training mode or with hooks, a window below 1, no layers, and attention with extra keys or of several widths.
    """

    def __init__(self, encoder: nn.TransformerEncoder, window: int, limit: float = LIMIT) -> None:
        super().__init__(checks.whole("window", window, low=1))
        if not isinstance(encoder, nn.TransformerEncoder):
            raise TypeError(f"encoder must be an nn.TransformerEncoder, got {type(encoder).__name__}")
        in_evaluation("encoder", encoder)
        for part in encoder.modules():
            hookless("encoder", part)
        layers: list[Any] = list(encoder.layers)
        if not layers:
            raise ValueError("encoder must have at least one layer, got none")
        for layer in layers:
            if type(layer) is not nn.TransformerEncoderLayer:
                raise ValueError(f"encoder must be of nn.TransformerEncoderLayer, got {type(layer).__name__}")
            attention = layer.self_attn
            if attention.bias_k is not None or attention.add_zero_attn or not attention._qkv_same_embed_dim:
                raise ValueError("encoder's attention must have one width and no extra keys")
        self.window, self.limit = window, checks.number("limit", limit, above=1)
        self.encoder = copy.deepcopy(encoder)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """The encoder over every window of a clip (batch, dim, time): (batch, dim, time - window + 1)."""
        windows = x.unfold(2, self.window, 1).permute(0, 2, 3, 1)  # (batch, outputs, window, dim)
        flat = windows.flatten(0, 1)
        first: Any = self.encoder.layers[0]
        if first.self_attn.batch_first:
            newest = self.encoder(flat)[:, -1]
        else:
            newest = self.encoder(flat.transpose(0, 1))[-1]
        return newest.unflatten(0, windows.shape[:2]).transpose(1, 2)

    def advance(self, x: Tensor, state: StreamState = EMPTY) -> tuple[Tensor | None, StreamState]:
        if self.training:
            raise RuntimeError("a stream needs the evaluation mode: the encoder is in training mode")
        outs = []
        for token in x.unbind(2):
            out, state = self._token(token, state)
            if out is not None:
                outs.append(out)
        return torch.stack(outs, 2) if outs else None, state

    def _token(self, x: Tensor, state: StreamState) -> tuple[Tensor | None, StreamState]:
        layers: list[Any] = list(self.encoder.layers)
        first, *others = layers
        q, k, v = _projected(first, x)
        if not others:
            one, inner = single_output_step(q, k, v, state.part(0), window=self.window)
            out = None if one is None else self._end(_after(first, x, one.flatten(1)))
            return out, StreamState(0, (), (inner,))
        tokens = torch.cat([*state.buffers, x[:, None]], 1)[:, -self.window :]
        many, inner = retroactive_step(q, k, v, state.part(0), window=self.window, limit=self.limit)
        state = StreamState(0, (tokens,), (inner,))
        if many is None:
            return None, state
        y = _after(first, tokens, many.transpose(1, 2).flatten(2))
        for layer in others[:-1]:
            y = _after(layer, y, _attended(*_projected(layer, y)))
        last = others[-1]
        q, k, v = _projected(last, y)
        return self._end(_after(last, y[:, -1:], _attended(q[:, :, -1:], k, v)))[:, 0], state

    def _end(self, x: Tensor) -> Tensor:
        norm = self.encoder.norm
        out: Tensor = x if norm is None else norm(x)
        return out


def _projected(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (batch, dim) or (batch, tokens, dim) to q, k, v (batch, heads, head dim) or (batch, heads, tokens, head dim)."""
    attention = layer.self_attn
    given = layer.norm1(x) if layer.norm_first else x
    parts = F.linear(given, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    heads = [part.unflatten(-1, (attention.num_heads, -1)) for part in parts]
    q, k, v = heads if x.dim() == 2 else [part.transpose(1, 2) for part in heads]
    return q, k, v


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _after(layer: Any, x: Tensor, heads: Tensor) -> Tensor:
    """The rest of a layer, given its attention's heads side by side."""
    attended = layer.self_attn.out_proj(heads)
    if layer.norm_first:
        x = x + attended
        out: Tensor = x + layer.linear2(layer.activation(layer.linear1(layer.norm2(x))))
        return out
    x = layer.norm1(x + attended)
    normed: Tensor = layer.norm2(x + layer.linear2(layer.activation(layer.linear1(x))))
    return normed
