"""The experiments of inference_hyperparameters notice a setting that changes the lines."""

from types import SimpleNamespace

import pytest
import torch
from tests.properties.sabotage import PAYS, verdict_of

from assay.evidence.types import Verdict
from assay.experiments.serving import inference_hyperparameters as room

POINT = {"batches": [1, 3], "problems": 16, "longest": 120, "new_tokens": 3, "repeats": 1, "pairs": 3}


def lines_of(model, prompts, params, *, new_tokens, **_):
    """Greedy generation in its place: each problem has its own line, whatever the batch."""
    lines = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(sum(prompt))
        lines.append(torch.randint(0, 1000, (new_tokens,), generator=generator).tolist())
    return None, lines


@pytest.fixture
def tuned(monkeypatch):
    """The model and the search are short-cut: what is tried is how the experiment judges lines."""
    letters = SimpleNamespace(encode=lambda text: [ord(letter) for letter in text])
    monkeypatch.setattr(room, "load_model", lambda name: SimpleNamespace(model=None, folder=None, tokenizer=letters))
    monkeypatch.setattr(room, "encode", lambda tokenizer, text: tokenizer.encode(text))
    monkeypatch.setattr(room, "measure_settings", lines_of)

    class Engine:
        def __init__(self, folder, prompts, *, new_tokens):
            self.prompts, self.new_tokens = prompts, new_tokens

    monkeypatch.setattr(room, "HuggingFaceEngine", Engine)
    axis = SimpleNamespace(mean_maxima=1)
    report = SimpleNamespace(gap_percent=0.0, best_to_median=1.0, noise=0.0, axes={"batch_size": axis})
    monkeypatch.setattr(room, "landscape", lambda *_: report)
    monkeypatch.setattr(room, "transfer_matrix", lambda *_: {})

    def found(space, engine, **_):
        best = {"batch_size": 3, "sort_by_length": True}
        return SimpleNamespace(best_params=best, trials=[], search_seconds=1.0, break_even_tokens=1.0)

    monkeypatch.setattr(room, "search", found)


@pytest.mark.parametrize("claim", ["retuning-gain", "retuning-gain-downgrade"])
def test_lines_that_change_are_noticed(tuned, monkeypatch, claim):
    claim = f"inference_hyperparameters/{claim}"
    assert verdict_of(claim, POINT) in PAYS
    torch.manual_seed(0)

    def random_lines(model, prompts, params, **options):
        outcome, lines = lines_of(model, prompts, params, **options)
        return outcome, [torch.randint(0, 1000, (len(line),)).tolist() for line in lines]

    monkeypatch.setattr(room, "measure_settings", random_lines)
    assert verdict_of(claim, POINT) is Verdict.DOES_NOT_PAY
