"""Programs as a workload: tasks with right, fast, slow and wrong programs, generators of inputs by size, contracts and comparators."""
