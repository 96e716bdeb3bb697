"""Running the result: an OpenAI-compatible server over a tuned (or any) model."""
