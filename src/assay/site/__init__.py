"""The web pages: what assay knows, to look at, to compare, to link to and to export; `assay site` serves them."""
