r"""ToRA (arXiv 2309.17452): mathematics solved by turns of text and programs, whose output the model reads before it goes on.

    loop = ToolLoop(model, tokenizer)
    ((trajectory,),) = loop([prompt], Sampling(temperature=0, max_new_tokens=1024), PythonTool())
    trajectory.answer, total(trajectory)

- `text`: a trajectory's text: blocks, the program that waits, the answer, where it can be cut.
- `tools`: `PythonTool` runs a program in the sandbox.
- `restart`: `with_tools`, the loop through any `Generator`; `loop`: `ToolLoop`, on a local model, which keeps the cache.
- `trajectory`: `Trajectory` and what it took.
- `grading`: whether an answer is the reference; `learning`: the loss mask, and the shaping of the output space.
"""

from assay.methods.reasoning.tora.grading import grade
from assay.methods.reasoning.tora.learning import Example, batch_of, example, shaped
from assay.methods.reasoning.tora.loop import ToolLoop
from assay.methods.reasoning.tora.restart import CALLS, with_tools
from assay.methods.reasoning.tora.text import answer_of, blocks, cuts, waiting
from assay.methods.reasoning.tora.tools import Output, PythonTool, Tool
from assay.methods.reasoning.tora.trajectory import Trajectory, total

__all__ = [
    "CALLS", "Example", "Output", "PythonTool", "Tool", "ToolLoop", "Trajectory", "answer_of", "batch_of", "blocks",
    "cuts", "example", "grade", "shaped", "total", "waiting", "with_tools",
]  # fmt: skip
