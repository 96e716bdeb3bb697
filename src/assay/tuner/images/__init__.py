"""`assay tune` for image classifiers: the same promises as for language models, on the user's own pictures.

kind.py      is a folder a classifier?
models.py    a classifier of transformers, or of this package's registry, with how pictures become its inputs
recipe.py    what was done to a model: steps from `options.py`, as a TOML file
options.py   what can be done: free (another dtype, channels last, folding, compilation) and lossy (8 bits, merged tokens)
work.py      one run of the work, and what a model says of pictures
child.py     what runs in child processes
tune.py      survey, search, proof, artefact
artefact.py  the folder that is written, and how it is loaded
replay.py    a recipe replayed on another model, for `assay apply`
report.py    the page in it
profile.py   where a picture's time goes, for `assay profile`
"""
