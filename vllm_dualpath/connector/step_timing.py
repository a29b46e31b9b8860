"""How long steps of a real engine take, and how long their attention: ``python -m`` this.

One prompt at a time is computed in chunks of random sizes, so that cached and new tokens vary apart
from each other. Every line of ours on standard output starts with ``LINE_TAG`` and is JSON:
progress, then the measurements. Run by ``vllm-dualpath profile``; further arguments are vLLM's own.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
import vllm
from torch import nn
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_dualpath.connector.identity import page_geometry
from vllm_dualpath.messages import GeometrySpec
from vllm_dualpath.profile import LINE_TAG

_MIN_CHUNK = 32
_NUM_REPEATS = 3
"""A step's time is the median of so many runs of the same chunks."""
_MIN_ROUNDS = 4
_CLOCK = "_dualpath_attention_clock"

_FORCED = {
    "enforce_eager": True,  # a captured graph calls no hooks
    "async_scheduling": False,  # a step's time would be another's
    "enable_prefix_caching": False,
    "enable_chunked_prefill": True,
}


class AttentionClock:
    """Lives in a worker, on its model: adds up the time inside attention layers."""

    def __init__(self, model: nn.Module) -> None:
        self._on_gpu = next(model.parameters()).is_cuda
        self._marks: list[Any] = []
        for module in model.modules():
            if isinstance(module, AttentionLayerBase):
                module.register_forward_pre_hook(self._mark)
                module.register_forward_hook(self._mark)

    def take_s(self) -> float:
        """Seconds since the last call."""
        marks, self._marks = self._marks, []
        pairs = zip(marks[::2], marks[1::2], strict=True)
        if not self._on_gpu:
            return float(sum(end - start for start, end in pairs))
        torch.cuda.synchronize()
        return float(sum(start.elapsed_time(end) for start, end in pairs)) / 1e3

    def _mark(self, *_: object) -> None:
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)


def install_clock(model: nn.Module) -> None:
    """Runs in each worker."""
    setattr(model, _CLOCK, AttentionClock(model))


def take_clock(model: nn.Module) -> float:
    """Runs in each worker."""
    return float(getattr(model, _CLOCK).take_s())


class StepRig:
    """One engine inside this process, stepped by hand."""

    def __init__(self, args: EngineArgs) -> None:
        # Our environment keeps the engine core in this process.
        self._engine = cast(Any, LLMEngine.from_engine_args(args))
        self.config = self._engine.vllm_config
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self.kv_cache_config = self._scheduler.kv_cache_config
        self.max_chunk = int(self._scheduler.max_num_scheduled_tokens)
        # One token is sampled.
        self.prompt_tokens = int(self.config.model_config.max_model_len) - 1
        self._vocabulary = int(self.config.model_config.get_vocab_size())
        self._num_prompts = 0
        self._engine.apply_model(install_clock)

    def run(self, chunks: Sequence[int]) -> list[tuple[float, float]]:
        """Compute one prompt, all of ``chunks`` after each other; (step, attention) seconds."""
        self._num_prompts += 1
        rng = random.Random(self._num_prompts)
        tokens = [rng.randrange(self._vocabulary) for _ in range(sum(chunks))]
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        self._engine.add_request(str(self._num_prompts), {"prompt_token_ids": tokens}, params)
        times = []
        for chunk in chunks:
            self._scheduler.max_num_scheduled_tokens = chunk
            start_s = time.perf_counter()
            self._engine.step()
            step_s = time.perf_counter() - start_s
            times.append((step_s, max(self._engine.apply_model(take_clock))))
        while self._engine.has_unfinished_requests():
            self._engine.step()
        self._scheduler.max_num_scheduled_tokens = self.max_chunk
        return times


def random_chunks(rng: random.Random, num_tokens: int, largest: int) -> list[int]:
    """Sizes even in their logarithm that add up to ``num_tokens``."""
    chunks: list[int] = []
    smallest = min(_MIN_CHUNK, largest)
    while (left := num_tokens - sum(chunks)) > 0:
        size = round(smallest * (largest / smallest) ** rng.random())
        chunks.append(min(size, left))
    return chunks


def full_chunks(num_tokens: int, largest: int) -> list[int]:
    """The fewest chunks that ``num_tokens`` can be computed in."""
    whole, rest = divmod(num_tokens, largest)
    return [largest] * whole + ([rest] if rest else [])


def measure(rig: StepRig, seconds: float) -> dict[str, Any]:
    """Samples for ``seconds``, and the rate of tokens in full chunks."""
    rng = random.Random(0)
    full = full_chunks(rig.prompt_tokens, rig.max_chunk)
    rig.run(full)  # first steps allocate and compile
    full_s = _medians([rig.run(full) for _ in range(_NUM_REPEATS)])
    samples: list[tuple[int, int, float, float]] = []
    start_s, num_rounds = time.monotonic(), 0
    while (spent_s := time.monotonic() - start_s) < seconds or num_rounds < _MIN_ROUNDS:
        chunks = random_chunks(rng, rig.prompt_tokens, rig.max_chunk)
        times = _medians([rig.run(chunks) for _ in range(_NUM_REPEATS)])
        cached = 0
        for chunk, (step_s, attention_s) in zip(chunks, times, strict=True):
            samples.append((cached, chunk, step_s, attention_s))
            cached += chunk
        num_rounds += 1
        say({"progress": min(1.0, spent_s / seconds)})
    return {
        "samples": samples,
        "tokens_per_s": rig.prompt_tokens / sum(step_s for step_s, _ in full_s),
    }


def describe(rig: StepRig, block_tokens: int | None) -> dict[str, Any]:
    """The engine, and how its KV lies; no geometry where the connector would refuse the model."""
    model = rig.config.model_config.model
    device = "cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name()
    found: dict[str, Any] = {"model": str(model), "device": device, "vllm": vllm.__version__}
    found["geometry"] = None
    if len(rig.kv_cache_config.kv_cache_groups) == 1:
        geometry, _ = page_geometry(rig.config, rig.kv_cache_config, block_tokens)
        spec = GeometrySpec.of(geometry)
        found["geometry"] = {name: getattr(spec, name) for name in spec.__struct_fields__}
    return found


def say(message: dict[str, Any]) -> None:
    """One line to who started us."""
    print(LINE_TAG + json.dumps(message), flush=True)


def _medians(runs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Of each step over runs of the same chunks."""
    return [
        (statistics.median(step for step, _ in same), statistics.median(a for _, a in same))
        for same in zip(*runs, strict=True)
    ]


def main() -> None:
    """Measure and say it."""
    ours = argparse.ArgumentParser(description=__doc__)
    ours.add_argument("--profile-seconds", type=float, required=True)
    ours.add_argument("--profile-block-tokens", type=int)
    options, rest = ours.parse_known_args()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
    args = EngineArgs.from_cli_args(parser.parse_args(rest))
    for name, value in _FORCED.items():
        setattr(args, name, value)
    rig = StepRig(args)
    say({"progress": 0.0})
    say(measure(rig, options.profile_seconds) | describe(rig, options.profile_block_tokens))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
