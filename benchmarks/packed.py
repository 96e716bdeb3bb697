"""What packed artefacts take: size on disk, seconds to load, peak memory until after the first token, before and after packing.

    python benchmarks/packed.py [--only MODEL ...] [--out FILE]

"before" is a folder with the source weights and the recipe, which is replayed when it is loaded; "after" is the artefact that
`assay tune` and `assay apply` write of the same recipe. Both are loaded in fresh processes, by turns, and the memory is what they take
at most beyond a process that has imported everything. The first token's logits must be equal to the last bit. SmolLM2-135M is the
bundled model; the other has the shape of Qwen2.5-0.5B with a third of its layers and random weights. One JSON line a model and recipe.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from assay.evidence.place import here
from assay.tuner import footprint
from assay.tuner.artefact import write
from assay.tuner.recipe import Recipe, Step
from assay.workloads.models import LoadedModel, load_model

ROUNDS = 3
HALF = Step(transform="dtype", config={"dtype": "bfloat16"})
RECIPES = {
    "W8A8": Step(transform="fp8_vs_int8", config={"rotation": 1, "smooth": None}),
    "W8A8 with rotation": Step(transform="fp8_vs_int8", config={"rotation": 16, "smooth": None}),
    "8-bit weights": Step(transform="weight_only", config={"bits": 8, "head_bits": None}),
    "4-bit weights": Step(transform="weight_only", config={"bits": 4, "head_bits": None}),
}
QWEN2 = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 8, "num_attention_heads": 14, "num_key_value_heads": 2,
    "vocab_size": 151936, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip


def smollm2(folder: Path) -> Path:
    return load_model("smollm2-135m").folder


def qwen2(folder: Path) -> Path:
    """Random weights in the shape of Qwen2.5-0.5B, cut, with the bundled model's tokenizer."""
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**QWEN2)).to(torch.bfloat16).save_pretrained(folder)
    load_model("smollm2-135m").tokenizer.save_pretrained(folder)
    return folder


MODELS = {"smollm2-135m": smollm2, "qwen2.5-0.5b, 8 layers": qwen2}


def compare(source: Path, step: Step, scratch: Path) -> dict[str, Any]:
    """Both folders of a recipe, measured by turns."""
    recipe = Recipe(steps=(HALF, step))
    before, after = scratch / "before", scratch / "after"
    shutil.copytree(source, before)
    recipe.save(before / "recipe.toml")
    loaded: LoadedModel = load_model(source, dtype="auto")
    write(after, loaded.model, loaded.tokenizer, recipe, [], {})
    del loaded
    rounds = [{"before": footprint.measure(before), "after": footprint.measure(after)} for _ in range(ROUNDS)]
    result: dict[str, Any] = {}
    for side in ("before", "after"):
        runs = [found[side] for found in rounds]
        result[side] = {
            "weights_mib": runs[0]["weights_bytes"] / 2**20,
            "load_seconds": statistics.median(run["load_seconds"] for run in runs),
            "peak_mib": statistics.median(run["peak_bytes"] for run in runs) / 2**20,
            "paths": runs[0]["paths"],
        }
    result["peak_over_packed"] = result["after"]["peak_mib"] / result["after"]["weights_mib"]
    result["equal_outputs"] = len({found[side]["logits"] for found in rounds for side in found}) == 1
    result["read_by_others"] = (after / "model.safetensors").is_file()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")
    options = parser.parse_args()
    place = here()
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            source = MODELS[name](Path(folder) / "model")
            for label, step in RECIPES.items():
                scratch = Path(folder) / label
                line = {
                    "model": name,
                    "recipe": label,
                    **compare(source, step, scratch),
                    "machine": place.machine,
                    "commit": place.commit,
                    "command": " ".join(["python", *sys.argv]),
                    "created": datetime.now(UTC).isoformat(timespec="seconds"),
                }
                shutil.rmtree(scratch)
                text = json.dumps(line, default=str)
                print(text, flush=True)
                if options.out is not None:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(text + "\n")


if __name__ == "__main__":
    main()
