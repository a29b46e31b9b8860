"""What the connector costs an engine that loads and stores nothing: ``python -m`` this, JSON comes
out.

One engine in this process runs batches in turn with its connector and with that taken out of it.
Two engines would not do: two processes of the same plain vLLM differ by far more than what is
looked for, in how their memory happens to lie. No prompt repeats, and there are no slots to store
anything from. Run by ``vllm-dualpath bench hooks``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NUM_WARM_ROUNDS = 5
_COLLECT_ROUNDS = 50
_ENGINE_ID = "idle-timing"


class IdleRig:
    """An engine with the connector, and batches for it."""

    def __init__(self, model: Path, directory: Path) -> None:
        # Before vllm is imported: the engine shall run here, where its connector can be reached.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        from vllm import LLM, SamplingParams
        from vllm.config import KVTransferConfig
        from vllm.distributed.kv_transfer import kv_transfer_state

        (directory / "store").mkdir()
        transfer = KVTransferConfig(
            kv_connector="DualPathConnector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            engine_id=_ENGINE_ID,
            kv_connector_extra_config={
                "role": "both",
                "store": f"file://{directory}/store",
                "runtime_dir": str(directory),
                "persist_slots": 0,
                "staging_bytes": 64 << 20,
            },
        )
        self._llm: Any = LLM(
            model=str(model),
            max_model_len=1024,
            max_num_seqs=16,
            kv_transfer_config=transfer,
            disable_log_stats=True,
        )
        self._params = SamplingParams
        self._worker_state: Any = kv_transfer_state
        client: Any = self._llm.llm_engine.engine_core
        self._scheduler: Any = client.engine_core.scheduler
        self._vocab: int = self._llm.llm_engine.model_config.get_vocab_size()

    def batch(self, seed: int, num_requests: int, prompt_tokens: int, num_tokens: int) -> float:
        """CPU and wall seconds of one batch of prompts nobody saw before."""
        rng = random.Random(seed)
        prompts = [
            {"prompt_token_ids": [rng.randrange(3, self._vocab) for _ in range(prompt_tokens)]}
            for _ in range(num_requests)
        ]
        params = self._params(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        started = time.perf_counter()
        self._llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - started

    @contextmanager
    def without_connector(self) -> Iterator[None]:
        """As plain vLLM is: neither the scheduler nor the worker knows of a connector."""
        scheduler, state = self._scheduler, self._worker_state
        connector, agent = scheduler.connector, state._KV_CONNECTOR_AGENT
        assert connector is not None
        assert agent is not None
        scheduler.connector = state._KV_CONNECTOR_AGENT = None
        try:
            yield
        finally:
            scheduler.connector, state._KV_CONNECTOR_AGENT = connector, agent

    def close(self) -> None:
        """End the engine and its mover."""
        self._worker_state._KV_CONNECTOR_AGENT.shutdown()
        self._scheduler.connector.shutdown()


def measure(rig: IdleRig, num_rounds: int, batch: tuple[int, int, int]) -> dict[str, list[Any]]:
    """``num_rounds`` batches with and without, in the order A B B A; each its wall and CPU time."""
    costs: dict[str, list[Any]] = {"plain": [], "connector": []}
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would fall into one batch or the other
    for round_idx in range(_NUM_WARM_ROUNDS + num_rounds):
        order = ("plain", "connector") if round_idx % 2 else ("connector", "plain")
        for turn, which in enumerate(order):
            seed = 2 * round_idx + turn
            cpu_s = time.process_time()
            if which == "plain":
                with rig.without_connector():
                    seconds = rig.batch(seed, *batch)
            else:
                seconds = rig.batch(seed, *batch)
            cost = {"seconds": seconds, "cpu_s": time.process_time() - cpu_s}
            if round_idx >= _NUM_WARM_ROUNDS:
                costs[which].append(cost)
        if round_idx % _COLLECT_ROUNDS == 0:
            gc.collect()
    return costs


def main() -> None:
    """Print the measurements as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--batch", type=int, nargs=3, required=True)
    parser.add_argument("--core", type=int)
    arguments = parser.parse_args()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    stdout, sys.stdout = sys.stdout, sys.stderr  # vllm writes to it as well
    with tempfile.TemporaryDirectory(prefix="dualpath-idle-") as name:
        rig = IdleRig(arguments.model, Path(name))
        try:
            result = measure(rig, arguments.rounds, tuple(arguments.batch))
        finally:
            rig.close()
    stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
