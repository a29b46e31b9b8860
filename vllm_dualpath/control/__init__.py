"""Sockets between processes: the control network, the local engine socket, shared tables,
liveness.
"""
