"""``vllm-dualpath profile``: what an engine of one model does on this machine.

``steps`` times a real engine, ``fit`` makes curves of that, ``reading`` reads from the store,
``run`` puts a profile together, ``report`` is for people.
"""
