"""The property kit refuses mixers that break one property each."""

from __future__ import annotations

import pytest
import torch
from tests.properties import mixers as kit
from torch import nn
from torch.autograd.gradcheck import GradcheckError

from assay.methods.mixers.based import TaylorAttention


class Sound(TaylorAttention):
    def __init__(self):
        super().__init__(8, heads=2, feature_dim=3)


class LooksAhead(Sound):
    def forward(self, x, mask=None):
        return super().forward(x, mask) + 1e-6 * x.roll(-1, 1)


class Forgets(Sound):
    def advance(self, x, state, mask=None):
        return super().advance(x, self.init_state(len(x), dtype=x.dtype), mask)


class LosesFullChunks(Sound):
    def advance(self, x, state, mask=None):
        kept = {name: value.clone() for name, value in state.items()}
        y, after = super().advance(x, state, mask)
        return y, kept if x.shape[1] == 16 else after


class SpoilsLongSequences(Sound):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * (1.001 if x.shape[1] > 512 else 1.0)


class MixesRows(Sound):
    def forward(self, x, mask=None):
        return super().forward(x, mask) + 1e-6 * x.mean(0)


class SeesPadding(Sound):
    def forward(self, x, mask=None):
        return super().forward(x)


class SeesPaddingInChunks(Sound):
    def advance(self, x, state, mask=None):
        return super().advance(x, state)


class SaysTooLittle(Sound):
    def state_bytes(self, tokens, batch=1, dtype=None):
        return super().state_bytes(tokens, batch, dtype) // 2


class SaysTooMuch(Sound):
    def state_bytes(self, tokens, batch=1, dtype=None):
        return 2 * super().state_bytes(tokens, batch, dtype)


class GrowsInSecret(Sound):
    def advance(self, x, state, mask=None):
        y, after = super().advance(x, state, mask)
        return y, {**after, "inputs": x}


class RoundsInChunks(Sound):
    def advance(self, x, state, mask=None):
        y, after = super().advance(x, state, mask)
        return y * (1 + 1e-3) if y.dtype == torch.float32 else y, after


class SumsInBfloat16(Sound):
    def init_state(self, batch, *, device=None, dtype=None):
        return {name: x.to(self.q_proj.weight.dtype) for name, x in super().init_state(batch, device=device).items()}

    def state_bytes(self, tokens, batch=1, dtype=None):
        return 0


class CutsGradients(Sound):
    def forward(self, x, mask=None):
        y = super().forward(x, mask)
        return y * (1 + y.detach() ** 2)


class CutsGradientsOfTheState(Sound):
    def advance(self, x, state, mask=None):
        y, after = super().advance(x, state, mask)
        return y, {name: value.detach() for name, value in after.items()}


class ForgetsAParameter(Sound):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x, mask=None):
        return super().forward(x, mask) * self.scale.detach()


class CountsNothing(Sound):
    """Its state knows how long it is, and zeros in it are not what it began with."""

    def init_state(self, batch, *, device=None, dtype=None):
        state = super().init_state(batch, device=device, dtype=dtype)
        return {**state, "row": torch.arange(batch, device=device)}

    def advance(self, x, state, mask=None):
        y, after = super().advance(x, {name: state[name] for name in ("s", "z")}, mask)
        return y, {**after, "row": state["row"]}


class KeepsItsWeights(Sound):
    kept = None

    def forward(self, x, mask=None):
        if self.kept is None:
            self.kept = self.o_proj.weight.detach().clone()
        return super().forward(x, mask) @ self.kept


class Casts(Sound):
    def chunked(self, x, state=None, *, chunk=64, mask=None):
        return super().chunked(x.to(self.q_proj.weight.dtype), state, chunk=chunk, mask=mask)


class LosesEmptyBatches(Sound):
    def chunked(self, x, state=None, *, chunk=64, mask=None):
        return super().chunked(
            x if x.shape[1] else x[:, :1].new_zeros(len(x), 1, self.dim), state, chunk=chunk, mask=mask
        )


def gradients(mixer):
    kit.check_gradients(mixer, 5)


def float32(mixer):
    kit.check_float32(mixer.float(), 2e-5)


def bfloat16(mixer):
    kit.check_half(mixer.float(), torch.bfloat16)


def weights(mixer):
    torch.manual_seed(1)
    kit.check_follows_weights(mixer, type(mixer)().double().eval())


CHECKS = {
    kit.check_forms_agree: [Forgets, LosesFullChunks],
    kit.check_long: [SpoilsLongSequences, Forgets],
    kit.check_causal: [LooksAhead],
    kit.check_batch_independent: [MixesRows],
    kit.check_padding: [SeesPadding, SeesPaddingInChunks],
    kit.check_state: [SaysTooLittle, SaysTooMuch, GrowsInSecret],
    float32: [RoundsInChunks],
    bfloat16: [SumsInBfloat16],
    kit.check_empty: [LosesEmptyBatches],
    kit.check_reset: [CountsNothing],
    kit.check_refusals: [Casts],
    weights: [KeepsItsWeights],
    kit.check_gradients_of_chunks: [CutsGradientsOfTheState],
    gradients: [CutsGradients, ForgetsAParameter],
}


@pytest.mark.parametrize(("check", "broken"), [(check, kind) for check, kinds in CHECKS.items() for kind in kinds])
def test_each_check_refuses_what_breaks_its_property(check, broken):
    torch.manual_seed(0)
    check(Sound().double().eval())
    with pytest.raises((AssertionError, GradcheckError, pytest.fail.Exception)):
        check(broken().double().eval())
