"""A language model's answers to the tasks of GeoJSEval, round by round."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from assay.methods.code.geojseval import Answer, completed
from assay.workloads.programs.geospatial import Task

NAMES = {
    "turf": "Turf.js, which is there as `turf`", "jsts": "JSTS, which is there as `jsts`", "leaflet": "Leaflet, which is there as `L`",
    "geolib": "Geolib, which is there as `geolib`", "none": "no library",
}  # fmt: skip
TEMPERATURE = 0.2
"""The paper's."""


def question(task: Task) -> str:
    """What the model is asked."""
    asked = f"Write the JavaScript function `{task.header}` with {NAMES[task.library]}. {task.about}"
    return f"{asked} Answer with the function alone, without imports."


def opening(task: Task) -> str:
    """How its answer begins; it goes on from there, so that a small model does not have to find the form."""
    return f"```javascript\n{task.header} {{"


def draw(
    model: Any, tokenizer: Any, chosen: Sequence[Task], *, rounds: int, tokens: int, batch: int, seed: int
) -> dict[str, list[Answer]]:
    """Answers by task and round: drawn at `TEMPERATURE`, of at most `tokens` tokens.

    The program is what follows up to the brace that closes the function. `seconds` are those of the batch over the answers in it.
    """
    import torch

    asked = [(task, number) for task in chosen for number in range(rounds)]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question(task)}], tokenize=False, add_generation_prompt=True
        )
        + opening(task)
        for task, _ in asked
    ]
    order = sorted(range(len(asked)), key=lambda n: len(texts[n]))
    found: dict[str, list[Answer | None]] = {task.id: [None] * rounds for task in chosen}
    torch.manual_seed(seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        ids = [tokenizer(texts[n], add_special_tokens=False)["input_ids"] for n in some]
        longest = max(map(len, ids))
        given = torch.tensor([[pad] * (longest - len(one)) + one for one in ids])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids])
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                given,
                attention_mask=mask,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                max_new_tokens=tokens,
                pad_token_id=pad,
            )
        seconds = (time.perf_counter() - began) / len(some)
        for n, row in zip(some, out[:, longest:], strict=True):
            task, number = asked[n]
            raw = tokenizer.decode(row, skip_special_tokens=True)
            code = completed(raw, f"{task.header} {{")
            many = int((row != pad).sum())
            found[task.id][number] = Answer(raw, code, many, seconds)
    return {name: [answer for answer in answers if answer is not None] for name, answers in found.items()}
