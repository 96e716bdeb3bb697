"""Experiments on spending test-time compute."""
