"""What programs cost and whether a change made them cheaper: the library behind `assay code`.

report = measure(Path("mine.py"), read_cases(Path("cases.jsonl")))
found = compare(Path("before.py"), Path("after.py"), read_cases(Path("cases.jsonl")))
"""

from __future__ import annotations

from assay.codebench.cases import Input, read_cases
from assay.codebench.costs import Comparison, Measured, compare, compare_suites, measure

__all__ = ["Comparison", "Input", "Measured", "compare", "compare_suites", "measure", "read_cases"]
