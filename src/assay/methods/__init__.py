"""What the papers do, as plain library code: one module per paper, by family.

A method's module may define `transform`, an object that follows the protocol in `assay.methods.transform`; the tuner finds it by
that name.
"""
