"""The schema of the evidence store, step by step. `assay.evidence.store` runs the steps; never run them by hand."""
