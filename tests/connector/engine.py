"""vLLM's own schedulers and our connector's both sides, around a model that is a checksum.

The "KV" of a token is a rolling hash of the whole prefix, written into real tensors. Before a step
"computes" a token it checks the KV of every token before it, as attention would read it: a page
that is stale, foreign or not there yet fails the test at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    LoadConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.connector.mover import ScriptedMover
from vllm_dualpath.connector.copies import HostCopies
from vllm_dualpath.connector.facade import DualPathConnector
from vllm_dualpath.connector.reports import Reports
from vllm_dualpath.connector.setup import EngineSetup
from vllm_dualpath.messages import TransferKey

PAGE_TOKENS = 4
BLOCK_TOKENS = 8
NUM_LAYERS = 2
HEADS, HEAD_DIM = 2, 4
WORDS = HEADS * 2 * HEAD_DIM * 4 // 8
"""64-bit words of KV a token and layer."""
VOCABULARY = 90
NUM_SLOTS = 48
PERSIST_SLOTS = 4
_MASK = (1 << 62) - 1


def write_model(directory: Path) -> Path:
    """A llama's config, without weights."""
    directory.mkdir(exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def make_vllm_config(
    model: Path, runtime_dir: Path, extra: dict[str, Any], **options: Any
) -> VllmConfig:
    """A small engine's config. ``options`` go to vLLM's scheduler config."""
    transfer = {
        "kv_connector": "DualPathConnector",
        "kv_connector_module_path": "vllm_dualpath.connector.facade",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        **extra.pop("transfer", {}),
    }
    settings = {
        "store": f"file://{runtime_dir}/store",
        "runtime_dir": str(runtime_dir),
        "block_tokens": BLOCK_TOKENS,
        "staging_bytes": NUM_SLOTS * 4096,
        "persist_slots": PERSIST_SLOTS,
        "model_id": "tiny",
        "deadlines": {"attach_s": 5, "stage_s": 0.5},
        **extra,
    }
    model_config = ModelConfig(
        model=str(model), skip_tokenizer_init=True, dtype="float32", max_model_len=256
    )
    config = VllmConfig(
        model_config=model_config,
        cache_config=CacheConfig(block_size=PAGE_TOKENS, enable_prefix_caching=True),
        scheduler_config=SchedulerConfig(
            max_num_seqs=options.pop("max_num_seqs", 8),
            max_num_batched_tokens=options.pop("max_num_batched_tokens", 512),
            max_model_len=256,
            is_encoder_decoder=False,
            watermark=0.0,
            **options,
        ),
        kv_transfer_config=KVTransferConfig(**transfer, kv_connector_extra_config=settings),
        device_config=DeviceConfig("cpu"),
        load_config=LoadConfig(load_format="dummy"),
    )
    config.scheduler_config.async_scheduling = False
    return config


def make_cache_config(num_blocks: int) -> KVCacheConfig:
    spec = FullAttentionSpec(
        block_size=PAGE_TOKENS, num_kv_heads=HEADS, head_size=HEAD_DIM, dtype=torch.float32
    )
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(NUM_LAYERS)]
    return KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(names, spec)],
        kv_cache_layout="LBHNC",
    )


def make_scheduler(config: VllmConfig, cache_config: KVCacheConfig) -> Scheduler:
    """The scheduler that the config names, with its connector's scheduler side."""
    scheduler_class: Any = config.scheduler_config.get_scheduler_cls()
    return scheduler_class(
        vllm_config=config,
        kv_cache_config=cache_config,
        structured_output_manager=StructuredOutputManager(config),
        block_size=PAGE_TOKENS,
        log_stats=True,
    )


def make_request(request_id: str, prompt: list[int], max_tokens: int, **options: Any) -> Request:
    """One that samples so many tokens. ``options`` go to the request."""
    sampling = SamplingParams(
        max_tokens=max_tokens, ignore_eos=True, extra_args=options.pop("extra_args", None)
    )
    sampling.update_from_generation_config({}, eos_token_id=None)
    return Request(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling_params=sampling,
        pooling_params=None,
        block_hasher=get_request_block_hasher(PAGE_TOKENS, sha256),
        **options,
    )


def rolling(tokens: list[int]) -> list[int]:
    """The KV of each token: a hash of the prefix that ends with it."""
    value, values = 1, []
    for token in tokens:
        value = (value * 1_000_003 + token + 7) & _MASK
        values.append(value)
    return values


def generated(tokens: list[int], count: int) -> list[int]:
    """The tokens that the model samples after ``tokens``."""
    tokens = list(tokens)
    start = len(tokens)
    while len(tokens) < start + count:
        tokens.append(rolling(tokens)[-1] % VOCABULARY)
    return tokens[start:]


def page_words(tokens: list[int], layer: int, page: int) -> list[int]:
    """One page as it lies in cache and staging; the unwritten rest of a partial page is 0."""
    values = rolling(tokens)[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS]
    values = [value + layer for value in values] + [0] * (PAGE_TOKENS - len(values))
    return [value for _ in range(HEADS) for value in values for _ in range(WORDS // HEADS)]


@dataclass
class Scheduled:
    """One request of a step, as the model runner would know it."""

    request_id: str
    start: int
    end: int
    block_ids: list[int]
    samples: bool


@dataclass
class Step:
    output: SchedulerOutput
    scheduled: list[Scheduled] = field(default_factory=list)
    garbage: dict[int, str] = field(default_factory=dict)
    """Of each block that was read and had the wrong KV, where."""


class Engine:
    """One engine with a scripted mover beside it."""

    def __init__(
        self,
        tmp_path: Path,
        role: str,
        *,
        num_blocks: int = 64,
        is_async: bool = False,
        persist: bool = True,
        extra: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        model = write_model(tmp_path / "model")
        runtime = tmp_path / "run"
        runtime.mkdir(mode=0o700, exist_ok=True)
        settings: dict[str, Any] = {"role": role, **(extra or {})}
        if role != "both":
            settings |= {"router": "tcp://127.0.0.1:9100", "url": "http://127.0.0.1:1"}
        self.config = make_vllm_config(model, runtime, settings, **options)
        self.config.scheduler_config.async_scheduling = is_async
        self.config.cache_config.num_gpu_blocks = num_blocks
        self.cache_config = make_cache_config(num_blocks)
        self.setup = EngineSetup.make(self.config, self.cache_config)
        self.root = self.setup.identity.root
        # Whoever holds this lock starts the engine's movers: here it is the test.
        lock_path = self.setup.socket_path.with_suffix(".lock")
        self._lock_fd = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.mover = self.new_mover()
        self.names = list(self.setup.identity.layer_names)
        shape = (num_blocks, HEADS, PAGE_TOKENS, 2 * HEAD_DIM)
        self.caches = {name: torch.zeros(shape) for name in self.names}
        self.words = [self.caches[n].view(torch.int64) for n in self.names]
        self.worker = DualPathConnector(self.config, KVConnectorRole.WORKER, self.cache_config)
        self.worker.register_kv_caches(self.caches)
        init_none_hash(sha256)
        self.scheduler: Scheduler = self._make_scheduler()
        self.connector: DualPathConnector = self.scheduler.connector  # type: ignore[assignment]
        self._closed = False
        self.is_async = is_async
        self.outputs: dict[str, list[int]] = {}
        self.prompts: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self._queue: deque[tuple[Step, ModelRunnerOutput | None]] = deque()
        self.wait(lambda: self.side._mover.view is not None)
        if persist:
            self.grant_persist_slots()

    def _make_scheduler(self) -> Scheduler:
        try:
            return make_scheduler(self.config, self.cache_config)
        except Exception:  # refused: nobody will close what has been started
            self.worker.shutdown()
            self.mover.die()
            os.close(self._lock_fd)
            raise

    @property
    def side(self) -> Any:
        return self.connector._scheduler.side

    @property
    def num_free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def new_mover(self) -> ScriptedMover:
        return ScriptedMover(
            self.setup.socket_path,
            self.setup.identity.geometry,
            NUM_SLOTS,
            index=self.setup.config.role == "both",
        )

    def grant_persist_slots(self) -> None:
        from vllm_dualpath.messages import PersistSlots

        slots = tuple(range(NUM_SLOTS - PERSIST_SLOTS, NUM_SLOTS))
        self.mover.send("scheduler", PersistSlots(slots))
        self.wait(lambda: len(self.side._mover.view.persist_slots) >= PERSIST_SLOTS)

    def wait(self, condition, timeout_s: float = 5.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "timed out"
            time.sleep(0.005)

    def add(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int = 4,
        params: Any = None,
        **options: Any,
    ) -> Request:
        extra_args = None if params is None else {"kv_transfer_params": params}
        request = make_request(request_id, prompt, max_tokens, extra_args=extra_args, **options)
        self.prompts[request_id] = list(prompt)
        self.outputs[request_id] = []
        self.scheduler.add_request(request)
        return request

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self.finished.add(request_id)

    def preempt(self, request_id: str) -> None:
        """Preempt as the scheduler does when it runs out of blocks."""
        request = self.scheduler.requests[request_id]
        self.scheduler.running.remove(request)
        self.scheduler._preempt_request(
            request, time.monotonic(), self.scheduler.requires_kv_delivery
        )

    def schedule(self) -> Step:
        """One call of vLLM's scheduler, with what the model runner would know."""
        output = self.scheduler.schedule()
        step = Step(output)
        starts = {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[request_id]
            (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(request_id)
            start = starts[request_id]
            step.scheduled.append(
                Scheduled(
                    request_id, start, start + count, list(blocks), not request.is_prefill_chunk
                )
            )
        return step

    def execute(self, step: Step) -> ModelRunnerOutput:
        """What vLLM's model runner does with a connector, around the checksum model."""
        output, worker = step.output, self.worker
        worker.handle_preemptions(output.kv_connector_metadata)
        worker.bind_connector_metadata(output.kv_connector_metadata)
        if output.has_sync_kv_loads:
            worker.start_load_kv(None)
        if step.scheduled:
            for layer, name in enumerate(self.names):
                worker.wait_for_layer_load(name)
                self._attention(step, layer)
                worker.save_kv_layer(name, self.caches[name], None)
        if not output.has_sync_kv_loads:
            worker.start_load_kv(None)
        worker.wait_for_save()
        results = worker.get_transfer_results(output.finished_req_ids)
        invalid = worker.get_block_ids_with_load_errors()
        # vLLM throws away what a request computed from blocks that are reported as invalid.
        unreported = [where for block, where in step.garbage.items() if block not in invalid]
        assert not unreported, unreported
        connector_output = KVConnectorOutput(
            finished_sending=results.finished_sending or None,
            finished_recving=results.finished_recving or None,
            failed_recving=results.failed_recving,
            invalid_block_ids=invalid,
            kv_connector_stats=worker.get_kv_connector_stats(),
        )
        worker.clear_connector_metadata()
        ids = [each.request_id for each in step.scheduled]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: at for at, request_id in enumerate(ids)},
            sampled_token_ids=[self._sample(each) for each in step.scheduled],
            kv_connector_output=connector_output,
        )

    def update(self, step: Step, output: ModelRunnerOutput) -> None:
        for outputs in self.scheduler.update_from_output(step.output, output).values():
            for each in outputs.outputs:
                self.outputs[each.request_id] += each.new_token_ids
                if each.finish_reason is not None:
                    self.finished.add(each.request_id)

    def step(self) -> None:
        """One turn of the engine's loop. Async: schedule the next step before this one's output."""
        if not self.is_async:
            step = self.schedule()
            self.update(step, self.execute(step))
            return
        self._queue.append((self.schedule(), None))
        if len(self._queue) > 1:
            self._process_oldest()

    def settle(self) -> None:
        """Async: process what is in flight."""
        while self._queue:
            self._process_oldest()

    def run(self, max_steps: int = 400) -> None:
        """Step until the engine has nothing to do."""
        for _ in range(max_steps):
            if not (
                self.scheduler.get_num_unfinished_requests()
                or self.scheduler.has_finished_requests()
            ):
                self.settle()
                if not self.scheduler.has_finished_requests():
                    break
            busy = bool(self.scheduler.running)
            self.step()
            if not busy:
                time.sleep(0.002)
        else:
            raise AssertionError("the engine does not come to an end")
        self.step()
        self.settle()
        self.wait(self._all_released)

    def check_ended(self) -> None:
        """No request, block, claim or tracking is left over."""
        assert not self.scheduler.requests, f"left over: {list(self.scheduler.requests)}"
        assert self.num_free_blocks == self.cache_config.num_blocks - 1
        assert not self.side._tracked
        worker = self.worker._worker.side
        assert not worker._owed and not worker._delayed
        self.wait(self._all_released)

    def _all_released(self) -> bool:
        """As many releases as claims, which come after other messages; the dead hear of none."""
        mover = self.mover
        return not mover.alive or all(
            mover.releases[key] == mover.num_claims(key) for key in mover.entries
        )

    def check_output(self, request_id: str, max_tokens: int) -> None:
        """Exactly what plain vLLM would have generated."""
        assert self.outputs[request_id] == generated(self.prompts[request_id], max_tokens)

    def stage(self, tokens: list[int], slots: list[int], num_tokens: int) -> None:
        """Fill staging with the right KV of the first ``num_tokens`` tokens."""
        for layer in range(NUM_LAYERS):
            for page in range(-(-num_tokens // PAGE_TOKENS)):
                words = self.mover.page(slots, layer, page)
                words[:] = page_words(tokens[:num_tokens], layer, page)

    def check_staged(self, tokens: list[int], slots: list[int], first_page: int) -> None:
        """The pages from ``first_page`` on lie in staging, in every layer."""
        for layer in range(NUM_LAYERS):
            for page in range(first_page, -(-len(tokens) // PAGE_TOKENS)):
                known = len(tokens) - page * PAGE_TOKENS
                got = self.mover.page(slots, layer, page).reshape(HEADS, PAGE_TOKENS, -1)
                want = torch.tensor(page_words(tokens, layer, page)).reshape(HEADS, PAGE_TOKENS, -1)
                assert (got[:, :known] == want.numpy()[:, :known]).all(), (
                    f"layer {layer} page {page}"
                )

    def close(self) -> None:
        """End both sides and the mover; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self.worker.shutdown()
            self.scheduler.shutdown()
            self.mover.die()
            os.close(self._lock_fd)

    def _process_oldest(self) -> None:
        step, _ = self._queue.popleft()
        self.update(step, self.execute(step))

    def _tokens(self, request_id: str, count: int) -> list[int]:
        prompt = self.prompts[request_id]
        return (prompt + generated(prompt, max(0, count - len(prompt))))[:count]

    def _attention(self, step: Step, layer: int) -> None:
        """Write the KV of the step's tokens, all requests first, then read what attention reads."""
        values = {
            each.request_id: rolling(self._tokens(each.request_id, each.end))
            for each in step.scheduled
        }
        for each in step.scheduled:
            for position in range(each.start, each.end):
                block = each.block_ids[position // PAGE_TOKENS]
                value = values[each.request_id][position] + layer
                self.words[layer][block, :, position % PAGE_TOKENS] = value
        for each in step.scheduled:
            for position in range(each.end):
                block = each.block_ids[position // PAGE_TOKENS]
                got = self.words[layer][block, :, position % PAGE_TOKENS]
                want = values[each.request_id][position] + layer
                if not bool((got == want).all()):
                    where = f"{each.request_id}: garbage at token {position}, layer {layer}"
                    step.garbage.setdefault(block, where)

    def _sample(self, each: Scheduled) -> list[int]:
        if not each.samples:
            return []
        return [rolling(self._tokens(each.request_id, each.end))[-1] % VOCABULARY]


def key_of(params: dict[str, Any]) -> TransferKey:
    leg = params["dualpath"]
    return TransferKey(bytes.fromhex(leg["transfer"]), leg["attempt"])


def use_copies(engine: Engine, copies: HostCopies) -> None:
    """Let an engine that has not copied anything yet copy with ``copies`` from now on."""
    side = engine.worker._worker.side
    side._reports.close()
    side._engine.close()
    side._engine = side._loads._engine = copies
    side._mover._engine = side._mover._staging._engine = copies
    side._reports = side._batches._reports = Reports(copies)
