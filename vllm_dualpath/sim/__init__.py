"""Discrete-event simulator of a cluster, running the same policy code as the router."""
