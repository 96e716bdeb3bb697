"""Models of assay's own kinds from a folder: a process that has never heard of the room loads and serves them, as `assay serve` does."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import tiny

SERVE = """
import json, sys, threading
import torch
torch.set_num_threads(1)
from assay.tuner.artefact import load_tuned
from assay.server.backends import backend_for
from assay.server.embeddings import embed
from assay.server.engine import Engine
from assay.server.errors import ApiError
from assay.server.rows import Settings
from assay.server.scheduler import Scheduler

answers = {}
for folder in sys.argv[2:]:
    loaded = load_tuned(folder)
    scheduler = Scheduler(backend_for(loaded.model, loaded.tokenizer, kv_gib=0.05))
    tokens, done, errors = [], threading.Event(), []
    def heard(event):
        tokens.extend(event.tokens)
        if event.error is not None:
            errors.append(repr(event.error))
        if event.finish or event.error is not None:
            done.set()
    scheduler.submit(json.loads(sys.argv[1]), Settings(max_tokens=6), heard)
    done.wait(60)
    scheduler.stop()
    engine = Engine(loaded.model, loaded.tokenizer, scheduler, "m")
    try:
        _, texts = engine.prepare_embeddings({"model": "m", "input": "hello"})
        embedded = "yes" if len(embed(loaded.model, texts)[0]) else "empty"
    except ApiError as error:
        embedded = "refused" if "no embeddings" in error.message else error.message
    answers[folder] = [type(loaded.model).__name__, tokens, errors, embedded in ("yes", "refused")]
print(json.dumps(answers))
"""


def rooms():
    """A small model of every room, by slug."""
    from assay.methods.inference.encdec_gemma import EncDecForCausalLM, decoder_to_encdec
    from assay.methods.inference.hamburger import HamburgerForCausalLM
    from assay.methods.inference.kv_prediction import KVPredictor
    from assay.methods.inference.ladder_residual import to_ladder
    from assay.methods.inference.mor import MoRForCausalLM
    from assay.methods.inference.parscale import ParScaleForCausalLM

    def base(**changes):
        return tiny.tiny_model(vocab_size=512, **changes)

    return {
        "encdec_gemma": EncDecForCausalLM.of(decoder_to_encdec(base())),
        "hamburger": HamburgerForCausalLM.from_base(base()),
        "kv_prediction": KVPredictor.from_base(base(), auxiliary=0.5),
        "ladder_residual": to_ladder(base(), 1),
        "mor": MoRForCausalLM.from_base(base(num_hidden_layers=3), recursions=2),
        "parscale": ParScaleForCausalLM.from_base(base(), parscale_n=2),
    }


@pytest.mark.timeout(240)
def test_stored_models_are_served(tmp_path):
    prompt = [5, 9, 301, 44, 17, 8]
    wanted = {}
    for slug, model in rooms().items():
        folder = tmp_path / slug
        model.eval().save_pretrained(folder)
        tiny.tiny_tokenizer(512, 512).save_pretrained(folder)
        made = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist()
        wanted[str(folder)] = [type(model).__name__, made[-6:], [], True]
    done = subprocess.run(
        [sys.executable, "-c", SERVE, json.dumps(prompt), *wanted], capture_output=True, text=True, timeout=200, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == wanted
