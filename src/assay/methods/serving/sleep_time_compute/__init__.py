"""Sleep-time compute: a context is thought about before anybody asks, and later questions about it are answered with few tokens.

After "Sleep-time Compute: Beyond Inference Scaling at Test-time" (2025). A request is a context c and a question q. While nobody waits,
a model S(c) writes c', the quantities, conclusions and answers that are likely to be needed; when q comes, T(q, c, c') answers with a
small budget what would otherwise be worked out anew for every question about c. Sleeping pays where several questions come about one
context and can be foreseen, and where a token in idle time is cheaper than one that somebody waits for.

    agent = SleepTimeAgent(Store("memories"), HttpChat("http://127.0.0.1:8000/v1", "my-model"), budget=0, model="my-model")
    sleeper = IdleSleeper(agent, server_idle("http://127.0.0.1:8000/v1"))
    sleeper.add(context); sleeper.step()                     # sleeps if the server has nothing to do
    agent.answer("How many in all?", context).text
    sum(Prices().cost(agent.ledger.total(phase), phase) for phase in PHASES)

Every token of every call is in the agent's `Ledger`, as sleep, test or warm; `amortised_cost` and `break_even` are the paper's formulas.
`split` makes a stateful problem of an ordinary one, `grade` judges numbers exactly, `evaluate` does all of it for a data set;
`variant="as_released"` of them, and of the prompts, is what the released scripts do. `Gate` (ours) sleeps only where the questions are
predictable enough.

Recalled from the paper, not re-read, and to be set: t = 10, ten questions a context. The five budgets, the tools and the limit of 5,000
characters are those of the released code; the words of the prompts are ours.
When NOT to use it: for contexts that are asked about once; for questions that nobody can foresee; where a memory that is wrong is worse
than an answer that is slow, for the answerer believes it; and where what a context says must not be kept (a memory repeats it: `Store` has
an expiry, and `forget`). A prefix cache alone saves reading, not thinking, and loses nothing: use it first.
"""

from __future__ import annotations

from assay.methods.serving.sleep_time_compute.agent import Answer, SleepError, SleepTimeAgent
from assay.methods.serving.sleep_time_compute.chat import Call, Chat, HttpChat, Message, Reply, reply_of
from assay.methods.serving.sleep_time_compute.evaluate import Problem, Score, evaluate
from assay.methods.serving.sleep_time_compute.gate import Gate, log_probability, predictability, worth_sleeping
from assay.methods.serving.sleep_time_compute.idle import IdleSleeper, server_idle
from assay.methods.serving.sleep_time_compute.ledger import (
    PAPER_T,
    PHASES,
    Entry,
    Ledger,
    Prices,
    Tokens,
    amortised_cost,
    break_even,
)
from assay.methods.serving.sleep_time_compute.prompts import (
    BUDGETS,
    FINISH,
    MEMORY_LIMIT,
    PLAIN_SLEEPER,
    RETHINK,
    TOOLS,
    Prompts,
    Words,
)
from assay.methods.serving.sleep_time_compute.stateful import Split, grade, number_in, pass_at_k, split
from assay.methods.serving.sleep_time_compute.store import Memory, Store, memory_key

__all__ = [
    "Answer",
    "BUDGETS",
    "Call",
    "Chat",
    "Entry",
    "FINISH",
    "Gate",
    "HttpChat",
    "IdleSleeper",
    "Ledger",
    "MEMORY_LIMIT",
    "Memory",
    "Message",
    "PAPER_T",
    "PHASES",
    "PLAIN_SLEEPER",
    "Prices",
    "Problem",
    "Prompts",
    "RETHINK",
    "Reply",
    "Score",
    "SleepError",
    "SleepTimeAgent",
    "Split",
    "Store",
    "TOOLS",
    "Tokens",
    "Words",
    "amortised_cost",
    "break_even",
    "evaluate",
    "grade",
    "log_probability",
    "memory_key",
    "number_in",
    "pass_at_k",
    "predictability",
    "reply_of",
    "server_idle",
    "split",
    "worth_sleeping",
]
