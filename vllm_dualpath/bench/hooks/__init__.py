"""``vllm-dualpath bench hooks``: what the connector costs vLLM's own thread.

``timing`` has the time of each hook by the number of pages of a step, ``idle`` what a server with
nothing to load or to store loses, ``report`` both for people and for programs.
"""
