"""When another sample, or another round of rethinking, no longer pays (Wang et al., 2025, arXiv 2505.20522).

    found = fit("results/samples_gsm8k_2026-01-01.jsonl", upto=8)   # samples that were logged: nothing is generated
    found.curve.saturation(0.01)                                    # so many; the next one gains 0.01 at most
    found.predict(32)                                               # accuracy with 32 by that curve, and an interval
    found.model.predict(32)                                         # where items are unequal: by the Beta model

- `curve`: the paper's model of one chance for all items, F(N) = F_max (1 - (1 - p)^N), its gains, its saturation
  point, and its fit.
- `beta`: the same for items of unequal chances, which follow a Beta distribution (our extension), and for one item
  after some samples.
- `rounds`: rethinking as a Markov chain: right answers stay (the paper), or may be lost again (our extension).
- `planning`: how many samples for each item or group, under a threshold or a total, and when to stop while sampling.
- `logs`: all of it from logged samples; coverage (an oracle chooses) and majority vote.
"""

from assay.methods.reasoning.ttspm.beta import BetaTTSPM
from assay.methods.reasoning.ttspm.curve import TTSPM
from assay.methods.reasoning.ttspm.logs import Fit, accuracies, fit
from assay.methods.reasoning.ttspm.planning import Stopper, allocate, plan
from assay.methods.reasoning.ttspm.rounds import Chain, rethinking_rate

__all__ = [
    "TTSPM", "BetaTTSPM", "Chain", "Fit", "Stopper", "accuracies", "allocate", "fit", "plan", "rethinking_rate",
]  # fmt: skip
