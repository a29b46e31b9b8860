"""What the connector costs an engine that loads and stores nothing: ``python -m`` this, JSON comes
out.

One engine in this process runs batches in turn with its connector and without.
Two engines would not do: two processes of the same plain vLLM differ by far more than what is
looked for, in how their memory happens to lie. A third way, with a connector that does nothing,
shows what vLLM itself does for any of them. No prompt repeats, and there are no slots to store
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
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
                "staging_bytes": 256 << 20,
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
        self._empty = _empty_connector()
        self._vocab: int = self._llm.llm_engine.model_config.get_vocab_size()

    def batch(self, seed: int, num_requests: int, prompt_tokens: int, num_tokens: int) -> float:
        """Wall seconds of one batch of prompts nobody saw before."""
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
    def connector_replaced(self, scheduler_side: Any, worker_side: Any) -> Iterator[None]:
        """Another connector, or ``None`` as in plain vLLM, which must not be told apart later."""
        scheduler, state = self._scheduler, self._worker_state
        mine = scheduler.connector, state._KV_CONNECTOR_AGENT
        scheduler.connector, state._KV_CONNECTOR_AGENT = scheduler_side, worker_side
        try:
            yield
        finally:
            scheduler.connector, state._KV_CONNECTOR_AGENT = mine

    def arms(self) -> dict[str, AbstractContextManager[None]]:
        """Ways to run a batch, each usable once."""
        return {
            "plain": self.connector_replaced(None, None),
            "empty": self.connector_replaced(self._empty, self._empty),
            "connector": nullcontext(),
        }

    def close(self) -> None:
        """End the engine and its mover."""
        self._worker_state._KV_CONNECTOR_AGENT.shutdown()
        self._scheduler.connector.shutdown()


def _empty_connector() -> Any:
    """A connector that does nothing: what remains is vLLM's own work for any connector."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
    )

    class Empty(KVConnectorBase_V1):
        def __init__(self) -> None:
            self._connector_metadata = None

        def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...

        def wait_for_layer_load(self, layer_name: str) -> None: ...

        def save_kv_layer(
            self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
        ) -> None: ...

        def wait_for_save(self) -> None: ...

        def get_num_new_matched_tokens(self, request: Any, num_computed: int) -> tuple[int, bool]:  # noqa: ARG002
            return 0, False

        def update_state_after_alloc(
            self, request: Any, blocks: Any, num_external: int
        ) -> None: ...

        def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:  # noqa: ARG002
            return KVConnectorMetadata()

    return Empty()


def measure(rig: IdleRig, num_rounds: int, batch: tuple[int, int, int]) -> dict[str, list[Any]]:
    """``num_rounds`` batches in each way, in an order that is turned round each time; each its wall
    and CPU time.
    """
    costs: dict[str, list[Any]] = {which: [] for which in rig.arms()}
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would fall into one batch or the other
    for round_idx in range(_NUM_WARM_ROUNDS + num_rounds):
        arms = list(rig.arms().items())
        for turn, (which, arm) in enumerate(arms[:: 1 if round_idx % 2 else -1]):
            cpu_s = time.process_time()
            with arm:
                seconds = rig.batch(len(arms) * round_idx + turn, *batch)
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
