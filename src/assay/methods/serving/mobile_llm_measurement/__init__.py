"""Where should an application's language model run: on the device, at the edge or in the cloud? A matrix of measured deployments.

After "Are We There Yet? A Measurement Study of Efficiency for LLM Applications on Mobile Devices" (arXiv 2504.00002), which runs one
application in all three places. We know its abstract only; the design is ours:

    model = Model("smollm2", "path/to/a/folder/of/safetensors")
    phone = Site("phone", threads=1, memory_bytes=2 << 30)
    cloud = Site("cloud", "cloud", threads=2, link=Link(bandwidth=2.5e6, latency=0.05), price=0.5, offline=0.01)
    matrix = cells([model], [phone, cloud], engines=[TRANSFORMERS, LOOP], formats=["bf16", "int4"])
    rows = deployment_matrix(matrix, module_questions(12), say=print)
    print(table(rows))
    recommend(rows, {"in a second": Limits(seconds=1.0), "offline too": Limits(available=1.0, memory_bytes=1 << 30)})

- `cells` combines models, formats, engines (transformers, assay's compiled loop, `assay serve`; llama.cpp and OpenVINO GenAI where they are
  installed, any other as an `EngineKind`) and `Site`s; `deployment_matrix` runs each in processes of its own under the site's memory
  limit, and gives a `Row`: cold and warm times in parts that add up, memory, accuracy and parse failures on a task with known answers.
  What cannot run is a row too, and says why.
- `Limits`, `feasible`, `pareto`, `recommend`, `table`: which to take.
- `sizes_of`, `lower_bounds`, `calibrated`, `judged`, `trivial`: memory and latency of a cell that was not run, from two that were, with
  the error on cells held out, and that of predictors which need no thought.

Links are imitated on this machine (`LinkProxy`); no phone and no network is measured. Devices and links are those of
`assay.methods.core.fleet.hardware`.
"""

from __future__ import annotations

from assay.methods.core.fleet.hardware import Device, Link
from assay.methods.serving.mobile_llm_measurement.asking import (
    PARTS,
    Answer,
    HttpSession,
    LocalSession,
    Session,
    Started,
    Starting,
    hosted,
    starting,
)
from assay.methods.serving.mobile_llm_measurement.choosing import Limits, feasible, pareto, recommend, table, why_not
from assay.methods.serving.mobile_llm_measurement.engines import (
    ALWAYS,
    ASSAY_SERVE,
    LLAMA_CPP,
    LOOP,
    OPENVINO,
    PEERS,
    TRANSFORMERS,
    Engine,
    EngineKind,
    open_transformers,
    opened,
)
from assay.methods.serving.mobile_llm_measurement.link import Crossing, LinkProxy
from assay.methods.serving.mobile_llm_measurement.matrix import (
    Cell,
    Model,
    Row,
    Site,
    cells,
    deployment_matrix,
    numbered,
)
from assay.methods.serving.mobile_llm_measurement.predictor import (
    NAMES,
    Figures,
    Judged,
    Line,
    Predictor,
    Seen,
    calibrated,
    judged,
    lower_bounds,
    through,
    trivial,
)
from assay.methods.serving.mobile_llm_measurement.questions import (
    MODULES,
    Question,
    Scores,
    by_shared_words,
    module_questions,
    parsed,
    scored,
    without_text,
)
from assay.methods.serving.mobile_llm_measurement.sizes import Sizes, gguf_bytes, grown, sizes_of

__all__ = [
    "ALWAYS",
    "ASSAY_SERVE",
    "Answer",
    "Cell",
    "Crossing",
    "Device",
    "Engine",
    "EngineKind",
    "Figures",
    "HttpSession",
    "Judged",
    "LLAMA_CPP",
    "LOOP",
    "Limits",
    "Line",
    "Link",
    "LinkProxy",
    "LocalSession",
    "MODULES",
    "Model",
    "NAMES",
    "OPENVINO",
    "PARTS",
    "PEERS",
    "Predictor",
    "Question",
    "Row",
    "Scores",
    "Seen",
    "Session",
    "Site",
    "Sizes",
    "Started",
    "Starting",
    "TRANSFORMERS",
    "by_shared_words",
    "calibrated",
    "cells",
    "deployment_matrix",
    "feasible",
    "gguf_bytes",
    "grown",
    "hosted",
    "judged",
    "lower_bounds",
    "module_questions",
    "numbered",
    "open_transformers",
    "opened",
    "pareto",
    "parsed",
    "recommend",
    "scored",
    "sizes_of",
    "starting",
    "table",
    "through",
    "trivial",
    "why_not",
    "without_text",
]
