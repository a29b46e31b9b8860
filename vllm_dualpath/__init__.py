"""vLLM plugin that loads stored KV over both the prefill and the decode nodes' storage NICs."""

__all__ = ["__version__"]

__version__ = "0.1.0"
