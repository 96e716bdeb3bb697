"""Programs as something to be measured: run, judged, and what they cost, by meters that say what they see.

`workers` runs functions of Python programs in warm sandboxed processes, `processes` whole programs that read stdin and write stdout
(Python, Node, C, C++) and suites of tests, `sql` queries. `judging` compares answers outside of the sandbox and measures in turns,
`estimates` says what follows from counts and costs.
"""
