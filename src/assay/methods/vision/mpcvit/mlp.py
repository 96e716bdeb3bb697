"""MPCViT+: which tokens need a GELU. Where they do not, the two layers of the MLP are one matrix.

y_t = W2 (beta_t GELU(u_t) + (1 - beta_t) u_t) + b2,   u = W1 x + b1          beta = 0:  y = (W2 W1) x + (W2 b1 + b2)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks


class TokenMlp(nn.Module):
    """An MLP whose GELU is weighted by one number a token: (batch, tokens, width) to the same.

    `beta` (tokens,) begins at 1, the usual MLP. Once it is hard (`set_tokens`), tokens with a GELU and the others are computed apart, each
    with its own work alone. `relu_after`: tokens without a GELU get a ReLU after the second layer, as in some networks of the release;
    while beta is searched it is weighted by 1 - beta. Without `tokens` there is no beta: an MLP for any number of tokens.
    """

    beta: nn.Parameter | None

    def __init__(self, width: int, hidden: int, *, tokens: int | None = None, relu_after: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.relu_after = checks.flag("relu_after", relu_after)
        self.tokens = None if tokens is None else checks.whole("tokens", tokens, low=1)
        self.beta = None if tokens is None else nn.Parameter(torch.ones(tokens))
        self.hard = False

    def set_tokens(self, chosen: Tensor) -> None:
        """A GELU where `chosen`, bool (tokens,), is True, from now on; beta becomes 0 and 1 and is trained no more."""
        if self.beta is None:
            raise ValueError("this MLP has no beta: it was made without tokens")
        checks.tensor("chosen", chosen, shape=(self.tokens or 0,), dtype="bool")
        self.beta = nn.Parameter(chosen.to(self.beta), requires_grad=False)
        self.hard = True

    @property
    def gelu_tokens(self) -> list[int] | None:
        """The places of the tokens with a GELU; None for all of any number."""
        if self.beta is None or not self.hard:
            return None
        return [place for place, value in enumerate(self.beta.tolist()) if value == 1]

    def forward(self, x: Tensor) -> Tensor:
        if self.beta is None:
            return self.full(x)
        if x.shape[-2] != self.tokens:
            raise ValueError(f"x must have {self.tokens} tokens, one a beta, got {x.shape[-2]}")
        if self.hard:
            return _apart(x, self.gelu_tokens or [], self.full, self.linear)
        u, beta = self.fc1(x), self.beta[:, None].to(x.dtype)
        y: Tensor = self.fc2(beta * F.gelu(u) + (1 - beta) * u)
        return (1 - beta) * y.relu() + beta * y if self.relu_after else y

    def full(self, x: Tensor) -> Tensor:
        """The usual MLP."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y

    def linear(self, x: Tensor) -> Tensor:
        """Both layers with nothing between them."""
        y: Tensor = self.fc2(self.fc1(x))
        return y.relu() if self.relu_after else y


class FusedMlp(nn.Module):
    """A hard `TokenMlp` with its two layers multiplied together for the tokens without a GELU: width^2 products for 2 width hidden.

    For inference: what `fuse` makes. The product is taken in float64 and rounded once.
    """

    def __init__(self, mlp: TokenMlp) -> None:
        super().__init__()
        if mlp.gelu_tokens is None:
            raise ValueError("mlp must be hard: call set_tokens before it is fused")
        self.gelu_tokens, self.tokens, self.relu_after = mlp.gelu_tokens, mlp.tokens, mlp.relu_after
        self.fc1: nn.Linear | None = mlp.fc1 if self.gelu_tokens else None
        self.fc2: nn.Linear | None = mlp.fc2 if self.gelu_tokens else None
        with torch.no_grad():
            w1, w2, b1 = mlp.fc1.weight.double(), mlp.fc2.weight.double(), mlp.fc1.bias.double()
            self.fused = nn.Linear(w1.shape[1], w2.shape[0]).to(mlp.fc1.weight)
            self.fused.weight.copy_(w2 @ w1)
            self.fused.bias.copy_(w2 @ b1 + mlp.fc2.bias.double())

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] != self.tokens:
            raise ValueError(f"x must have {self.tokens} tokens, got {x.shape[-2]}")
        return _apart(x, self.gelu_tokens, self.full, self.linear)

    def full(self, x: Tensor) -> Tensor:
        """The usual MLP."""
        assert self.fc1 is not None
        assert self.fc2 is not None
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y

    def linear(self, x: Tensor) -> Tensor:
        """The one matrix that is left."""
        y: Tensor = self.fused(x)
        return y.relu() if self.relu_after else y


def _apart(
    x: Tensor, gelu: Sequence[int], full: Callable[[Tensor], Tensor], linear: Callable[[Tensor], Tensor]
) -> Tensor:
    """`full` for the tokens at `gelu`, `linear` for the others, put together in their order."""
    tokens = x.shape[-2]
    rest = [place for place in range(tokens) if place not in set(gelu)]
    if not rest:
        return full(x)
    if not gelu:
        return linear(x)
    order = [*gelu, *rest]
    both = torch.cat([full(x[..., list(gelu), :]), linear(x[..., rest, :])], -2)
    return both[..., sorted(range(tokens), key=order.__getitem__), :]


def token_mlps(model: nn.Module) -> list[TokenMlp]:
    """The MLPs with a beta, in the order of the layers."""
    return [module for module in model.modules() if isinstance(module, TokenMlp) and module.beta is not None]


def harden_tokens(model: nn.Module, chosen: Sequence[Tensor]) -> None:
    """Give every MLP with a beta its tokens: a bool tensor (tokens,) a layer, as `search.select` makes them of the betas.

    Raises ValueError, before anything is changed, for what does not fit.
    """
    found = token_mlps(model)
    if not found or len(chosen) != len(found):
        raise ValueError(f"chosen must have one tensor for each of {len(found)} MLPs with a beta, got {len(chosen)}")
    for module, some in zip(found, chosen, strict=True):
        checks.tensor("chosen", some, shape=(module.tokens or 0,), dtype="bool")
    for module, some in zip(found, chosen, strict=True):
        module.set_tokens(some)


def fuse(model: nn.Module) -> int:
    """Replace every hard MLP that has a token without a GELU by its `FusedMlp`, in place; how many were replaced. For inference only."""
    places = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, TokenMlp)
        and module.gelu_tokens is not None
        and len(module.gelu_tokens) < (module.tokens or 0)
    ]
    for name, module in places:
        model.set_submodule(name, FusedMlp(module).train(module.training))
    return len(places)
