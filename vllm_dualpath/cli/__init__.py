"""The ``vllm-dualpath`` command: one module a command group, nothing but flags and messages."""
