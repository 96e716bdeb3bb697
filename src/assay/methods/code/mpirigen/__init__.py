"""MPIrigen: the calls of MPI are written at the end of a program, each with its line, after the whole of it has been seen.

    found = take_out(program)                                 # code without calls; the calls with the lines they stand after
    sample(found)                                            # what a model is trained on: numbered code, `parallel`, the label
    answer = model(prompt(found.code))
    print(put_back(found.code, read(answer)))                 # the program with the calls that the model wrote
    score(found.calls, placed(read(answer)), tolerance=2)

After arXiv 2402.09126: a model that completes from left to right must write a call before it has seen what follows; here it reads the whole
program first. `record` makes rows with the columns of the released data, `masked` token ids for a trainer, `naming` and `renamed` replace
identifiers as the paper's variant does. `score` counts as the paper does, and one to one beside it, for the paper's figures do not mind
calls too many; `score_as_released` has the quirks of the released scorer. `run` compiles and runs a program in the sandbox: a
high score is no working program. `Template`, `Nearest`, `at_random`, `everywhere` answer without a model.

The released data cut a call out of a longer line and leave a hole; here the whole line goes, so that every program can be made again.

When NOT to use it: as proof that a program is parallel and right; on C++ beyond what reads as C; for programs that no line number fits.
"""

from __future__ import annotations

from assay.methods.code.mpirigen.baselines import (
    ANCHORS,
    Annotator,
    Nearest,
    Template,
    anchors,
    at_random,
    corresponding,
    everywhere,
    nothing,
    numbered_items,
    usual_arguments,
)
from assay.methods.code.mpirigen.marks import (
    SEPARATOR,
    Item,
    Stripped,
    holds_call,
    masked,
    merged,
    numbered,
    prompt,
    put_back,
    read,
    record,
    sample,
    take_out,
    write,
)
from assay.methods.code.mpirigen.names import naming, renamed, stays
from assay.methods.code.mpirigen.running import MpiMissing, MpiRun, have_mpi, run
from assay.methods.code.mpirigen.scores import (
    CORE,
    TOLERANCES,
    Placed,
    Score,
    calls_as_released,
    curve,
    equal_share,
    over_programs,
    placed,
    score,
    score_as_released,
)
from assay.methods.code.mpirigen.tokens import Call, Token, calls, indented, joined, layout, line_tokens, tokens

__all__ = [
    "ANCHORS",
    "CORE",
    "SEPARATOR",
    "TOLERANCES",
    "Annotator",
    "Call",
    "Item",
    "MpiMissing",
    "MpiRun",
    "Nearest",
    "Placed",
    "Score",
    "Stripped",
    "Template",
    "Token",
    "anchors",
    "at_random",
    "calls",
    "calls_as_released",
    "corresponding",
    "curve",
    "equal_share",
    "everywhere",
    "have_mpi",
    "holds_call",
    "indented",
    "joined",
    "layout",
    "line_tokens",
    "masked",
    "merged",
    "naming",
    "nothing",
    "numbered",
    "numbered_items",
    "over_programs",
    "placed",
    "prompt",
    "read",
    "record",
    "renamed",
    "put_back",
    "run",
    "sample",
    "score",
    "score_as_released",
    "stays",
    "take_out",
    "tokens",
    "usual_arguments",
    "write",
]
