"""Methods the tuner applies that are nobody's paper: dtype, attention back end, compilation, weight-only quantisation, the decode loop."""
