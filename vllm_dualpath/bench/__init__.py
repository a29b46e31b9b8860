"""Tiny models, trace replay and a local cluster: drives the other parts as processes."""
