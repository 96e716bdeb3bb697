"""What the papers do: pure library code, one module per paper, by family.

A method module may define `transform`, an object of the protocol in `assay.methods.transform`; the tuner finds it by that name.
"""
