"""AWRS: constrained generation that proposes tokens and tests those, instead of testing the whole vocabulary (arXiv 2504.05410).

Masking asks a constraint about every token at every step. Here tokens are drawn from the model without replacement until one is
allowed: the same distribution, with as many evaluations as the model needs to hit what is allowed, a few where it has understood
the task. A second round of draws gives each token an unbiased weight, with which a particle filter over sequences
corrects what choosing token by token distorts.

- `generate_constrained`: weighted samples of a transformers model under a constraint.
- `Chooser` and `decode`: one sample without weights, for decoding loops and servers.
- `draw`: one token, of any log-probabilities and any test; `smc`: the particle filter over any model.
- constraints: `regex`, `json_schema`, `json_object`, `python`, `sql`, `functions`, and `both` of two.

When NOT to use it: constraints with a compiled grammar, whose masks cost microseconds; prompts behind which the model wants something
forbidden, so that nearly everything is drawn before something is allowed (the chooser then makes a mask after 64 refusals).
"""

from assay.methods.inference.awrs.constraints import Automaton, Constraint, Incremental, both, functions
from assay.methods.inference.awrs.generation import (
    Chooser,
    DeadEnd,
    Decoded,
    ModelRows,
    decode,
    end_tokens,
    generate_constrained,
)
from assay.methods.inference.awrs.json_acceptor import json_object, json_schema
from assay.methods.inference.awrs.programs import python, sql
from assay.methods.inference.awrs.regular import regex
from assay.methods.inference.awrs.sampling import VARIANTS, Draw, draw
from assay.methods.inference.awrs.smc import Particle, Particles, Rows, smc
from assay.methods.inference.awrs.tokens import Rules, TokenBytes

__all__ = [
    "VARIANTS",
    "Automaton",
    "Chooser",
    "Constraint",
    "DeadEnd",
    "Decoded",
    "Draw",
    "Incremental",
    "ModelRows",
    "Particle",
    "Particles",
    "Rows",
    "Rules",
    "TokenBytes",
    "both",
    "decode",
    "draw",
    "end_tokens",
    "functions",
    "generate_constrained",
    "json_object",
    "json_schema",
    "python",
    "regex",
    "smc",
    "sql",
]
