"""``bench mover``: how near storage, transport, checksums and copies come to this machine's limit.

One file a concern. ``pairing`` knows how things are compared, ``channel`` and ``child`` run what
needs a process of its own; each measurement stands beside what a user would take instead.
"""
