"""Schema of the evidence store, step by step; run by `assay.evidence.store`, never by hand."""
