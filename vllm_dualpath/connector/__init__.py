"""The vLLM connector: the only part of the package that imports vllm.

``plugin`` registers it, ``facade`` is the class that vLLM sees; ``scheduler`` and ``worker`` are
its two sides. Nothing is imported here, so that vLLM's plugin loading stays cheap.
"""
