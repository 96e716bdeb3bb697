"""A load generator for OpenAI-compatible servers: what they do under load, with intervals, one server or two in pairs."""
