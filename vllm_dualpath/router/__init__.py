"""The OpenAI-compatible router: places requests, orchestrates transfers, answers clients."""

from vllm_dualpath.router.app import Router, run_router

__all__ = ["Router", "run_router"]
