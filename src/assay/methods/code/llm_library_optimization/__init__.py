"""Making a place in a library faster, as a protocol: candidates in a conversation, a gate, times in pairs, and a ledger of all attempts.

    case = Case("sums", "the sum of a list of numbers", Candidate("as shipped", text), inputs, decides="long")
    bench = Bench(case, PythonSandboxed("total"))
    found = converse(bench, Endpoint("http://localhost:8000/v1", "a-model"), rounds=3, ledger=Ledger("attempts.jsonl"))
    print(table(found.attempts), found.best)

After "LLM Interactive Optimization of Open Source Python Libraries - Case Studies and Generalization" (arXiv 2312.14949), in which
an expert and ChatGPT-4 made places in pillow and numpy faster, up to 38 times, without a failed attempt. The paper is a qualitative
study; what makes a procedure of it, so that others can apply it, is our formalisation:

- `Case`, `Candidate`, `Tree`: a place with its contract and recorded inputs, and proposals by people, models or tools.
- `Bench.attempt`: a candidate that does not answer as the reference does, on every recorded and random input, is never timed. C goes
  through the address and undefined-behaviour sanitizers too.
- `Compared`: runs in pairs and in turns, an exact interval of their ratio for each kind of input, never over all of them. Accepted is
  what is shown to be faster by 5 % on the kind that was named beforehand.
- `Ledger`, `reproduce`, `pyperf`: attempts with the digests of what they were taken with, failed ones too.
- `converse`, `Endpoint`, `Scripted`, `Hint`: the loop with a model and an expert, and its transcript.
- `applied`, `source_of`: a library's own Python text with a change, in a copy.

When NOT to use it: as a success rate of models or of people (a handful of places that somebody chose), for places that change what
they are given, and for speed that depends on what else the machine does, such as input and output.
"""

from __future__ import annotations

from assay.methods.code.llm_library_optimization.backends import (
    Answer,
    Backend,
    Binding,
    BuildError,
    CHere,
    CInterface,
    CSandboxed,
    Program,
    PythonHere,
    PythonSandboxed,
    RunError,
    shared_library,
)
from assay.methods.code.llm_library_optimization.bench import Attempt, Bench, Gate
from assay.methods.code.llm_library_optimization.case import (
    Candidate,
    Case,
    Input,
    Tree,
    digest_of,
    patch_between,
    same,
)
from assay.methods.code.llm_library_optimization.chat import (
    Conversation,
    Endpoint,
    Hint,
    Message,
    Scripted,
    converse,
    program_of,
    read_script,
)
from assay.methods.code.llm_library_optimization.ledger import Again, Ledger, pyperf, reproduce, table
from assay.methods.code.llm_library_optimization.patches import PatchError, applied, source_of
from assay.methods.code.llm_library_optimization.timing import (
    PROTOCOL,
    Compared,
    Energy,
    Measurement,
    Rules,
    in_turns,
    judged,
    sign_test,
    timed,
)

__all__ = [
    "PROTOCOL",
    "Again",
    "Answer",
    "Attempt",
    "Backend",
    "Bench",
    "Binding",
    "BuildError",
    "CHere",
    "CInterface",
    "CSandboxed",
    "Candidate",
    "Case",
    "Compared",
    "Conversation",
    "Endpoint",
    "Energy",
    "Gate",
    "Hint",
    "Input",
    "Ledger",
    "Measurement",
    "Message",
    "PatchError",
    "Program",
    "PythonHere",
    "PythonSandboxed",
    "Rules",
    "RunError",
    "Scripted",
    "Tree",
    "applied",
    "converse",
    "digest_of",
    "in_turns",
    "judged",
    "patch_between",
    "program_of",
    "pyperf",
    "read_script",
    "reproduce",
    "same",
    "shared_library",
    "sign_test",
    "source_of",
    "table",
    "timed",
]
