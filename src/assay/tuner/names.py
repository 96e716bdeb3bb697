"""What the files of an artefact are called, of a language model's and an image model's."""

RECIPE, CALIBRATION, REPORT, EVIDENCE = "recipe.toml", "calibration.safetensors", "report.html", "evidence.jsonl"
