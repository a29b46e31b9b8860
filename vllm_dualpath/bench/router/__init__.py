"""What a router adds to a request: ours beside vllm-router, between the same do-nothing engines."""
