"""Serving the result: an OpenAI-compatible server for a tuned model, or any other."""
