"""What the papers on test-time compute share: samples and what they cost, who writes them, who judges them, how answers are chosen.

One file a noun:

- `budget`: `Spent` (tokens, calls, seconds) and the `Budget` that every call is booked in, planning, judging and failures too.
- `generator`: a `Generator` continues prompts by `Sample`s; here by a transformers model or an OpenAI-compatible server.
- `samples`: a `SampleCache` on disk, so that many sizes of one experiment are evaluated from one set of samples.
- `trace`: a prompt and the steps behind it; `verifier`: a `Verifier` scores them.
- `selectors`: which answer to give, of several; `estimates`: coverage and accuracy at every N, from N or more samples.
- `search`: step by step: expanding traces, and beam search over them.
- `logs`: samples that somebody has already, and tasks, in the layouts of the LM Evaluation Harness.

`answers` says when two answers are the same.
"""
