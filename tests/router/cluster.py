"""A small cluster in one process: the real router, movers that follow a script over real ZeroMQ,
and HTTP servers that speak the part of vLLM's API that the router uses.

Everything that arrives anywhere is written to one journal, so tests can look at the order.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import zmq
import zmq.asyncio
from aiohttp import web
from multidict import CIMultiDict

from vllm_dualpath.blocks import chain_hashes, chain_root
from vllm_dualpath.config import Deadlines, RouterConfig
from vllm_dualpath.messages import (
    PROTOCOL_VERSION,
    Committed,
    Cut,
    CutDone,
    Donate,
    End,
    Ended,
    GeometrySpec,
    Hello,
    Load,
    Message,
    MoverStats,
    Ping,
    Ready,
    Reserve,
    Reserved,
    SegmentDone,
    SnapshotEnd,
    Stage,
    Stored,
    StoredBlock,
    TransferKey,
    Welcome,
    decode_router_message,
    encode,
)
from vllm_dualpath.router import Router

BLOCK_TOKENS = 4
FINGERPRINT = bytes(32)
ROOT = chain_root(FINGERPRINT)
GEOMETRY = GeometrySpec(BLOCK_TOKENS, 2, (64, 64), "LBHNC", 1, "bfloat16")

Journal = list[tuple[str, Any]]
Behaviour = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def stored_blocks(token_ids: list[int], num_blocks: int, root: bytes = ROOT) -> list[StoredBlock]:
    hashes = [root, *chain_hashes(root, token_ids, BLOCK_TOKENS)]
    return [StoredBlock(hashes[i + 1], hashes[i], 8192, 1.0) for i in range(num_blocks)]


def wire_key(params: dict[str, Any]) -> TransferKey:
    return TransferKey(bytes.fromhex(params["transfer"]), params["attempt"])


class EngineServer:
    """The HTTP side of one engine."""

    def __init__(self, name: str, journal: Journal) -> None:
        self.name = name
        self.journal = journal
        self.port = free_port()
        self.cached_tokens = 0
        self.renders = True
        self.behaviour: Behaviour | None = None
        self.disconnected = asyncio.Event()
        self.headers: list[CIMultiDict[str]] = []
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self._generate)
            app.router.add_post(f"{path}/render", self._render)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_route("*", "/{path:.*}", self._other)
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _request: web.Request) -> web.Response:
        models = [{"id": "alias", "parent": None}, {"id": "lora", "parent": "m"}]
        return web.json_response({"object": "list", "data": models})

    async def _other(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.journal.append((f"{self.name}:{request.method} {request.raw_path}", body))
        return web.Response(status=418, body=body[::-1], headers={"X-Engine": self.name})

    async def _render(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.journal.append((f"{self.name}:render", body))
        if not self.renders:
            return web.json_response({"error": {"message": "disabled"}}, status=403)
        text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        if text == "refuse me":
            return web.json_response({"error": {"message": "refused"}}, status=400)
        rendered = {"token_ids": [ord(letter) for letter in text]}
        return web.json_response([rendered] if "prompt" in body else rendered)

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.journal.append((f"{self.name}:tokenize", body))
        text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        return web.json_response({"tokens": [ord(letter) for letter in text]})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.headers.append(request.headers.copy())
        self.journal.append((f"{self.name}:leg", body))
        try:
            if self.behaviour is not None:
                return await self.behaviour(request, body)
            return await self.answer(request, body)
        except asyncio.CancelledError:
            self.disconnected.set()
            raise

    async def answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """A plain answer, or a stream of one text event, one usage event and the end."""
        details = {"cached_tokens": self.cached_tokens}
        usage = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": details}
        text = f'from {self.name} "cached_tokens": 7 ✓'
        if not body.get("stream"):
            return web.json_response({"choices": [{"text": text}], "usage": usage})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in ({"choices": [{"text": text}]}, {"choices": [], "usage": usage}):
            data = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
            await response.write(data[:11])
            await response.write(data[11:])
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


def hello_of(name: str, role: str, url: str, **changes: Any) -> Hello:
    """What the mover of a healthy engine says of itself."""
    fields: dict[str, Any] = {
        "version": PROTOCOL_VERSION,
        "engine_id": name,
        "role": role,
        "boot_id": secrets.token_bytes(16),
        "url": url,
        "model": "m",
        "fingerprint": FINGERPRINT,
        "root": ROOT,
        "geometry": GEOMETRY,
        "max_model_len": 1000,
        "store": "file:///store",
        "store_quota_bytes": None,
        "host_id": "host",
        "pid": os.getpid(),
        "pid_start": 1,
        "address": b"address of " + name.encode(),
        "region": b"region",
        "staging_address": 4096,
        "num_slots": 64,
        "num_donor_slots": 4,
    }
    return Hello(**{**fields, **changes})


class ScriptedMover:
    """A mover that says what a healthy one would; ``script`` may answer first."""

    def __init__(self, harness: Harness, server: EngineServer, role: str, **hello: Any) -> None:
        self.name = server.name
        self.role = role
        self.server = server
        self.harness = harness
        self.boot_id = secrets.token_bytes(16)
        self.hello_changes = hello
        self.blocks: list[StoredBlock] = []
        self.heartbeats = True
        self.script: Callable[[Message], bool] = lambda _message: False
        self.received: list[Message] = []
        self.welcomed = asyncio.Event()
        self.router_boot_ids: list[bytes] = []
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._tasks: list[asyncio.Task[None]] = []
        self._sends: list[asyncio.Future[Any]] = []

    def hello(self) -> Hello:
        changes = {"boot_id": self.boot_id, **self.hello_changes}
        return hello_of(self.name, self.role, changes.pop("url", self.server.url), **changes)

    def start(self) -> None:
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IDENTITY, self.boot_id)
        self._socket.connect(self.harness.config.control)
        self.say(self.hello())
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._beat())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close(0)
        self._context.term()

    def say(self, message: Message) -> None:
        self.say_bytes(encode(message))

    def say_bytes(self, payload: bytes) -> None:
        self._sends.append(asyncio.ensure_future(self._socket.send(payload)))

    def of(self, kind: type[Message]) -> list[Any]:
        return [message for message in self.received if isinstance(message, kind)]

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.harness.config.heartbeat_s)
            if self.heartbeats:
                self.say(Load(MoverStats()))

    async def _listen(self) -> None:
        while True:
            message = decode_router_message(await self._socket.recv())
            self.received.append(message)
            self.harness.journal.append((f"{self.name}:{type(message).__name__}", message))
            if not self.script(message):
                self.respond(message)

    def respond(self, message: Message) -> None:
        """What a healthy mover answers."""
        if isinstance(message, Welcome):
            self.router_boot_ids.append(message.router_boot_id)
            if message.send_snapshot:
                self.say(Stored(tuple(self.blocks)))
                self.say(SnapshotEnd(len(self.blocks)))
            self.welcomed.set()
        elif isinstance(message, Reserve):
            num_slots = -(-message.num_tokens // BLOCK_TOKENS)
            self.say(Reserved(message.key, tuple(range(num_slots))))
        elif isinstance(message, Stage):
            self._stage(message)
        elif isinstance(message, Donate):
            for segment in message.segments:
                first, last = segment.first_block, segment.last_block
                self.say(SegmentDone(message.key, first, last, last, ""))
            self.say(Ended(message.key))
        elif isinstance(message, Cut):
            answer = CutDone if self.role == "decode" else Ready
            self.say(answer(message.key, message.num_hit_blocks))
        elif isinstance(message, End):
            self.say(Ended(message.key))
        elif isinstance(message, Ping):
            self.say(Load(MoverStats(slots_free=64)))

    def _stage(self, stage: Stage) -> None:
        for segment in stage.segments:
            if segment.reader == self.name:
                first, last = segment.first_block, segment.last_block
                self.say(SegmentDone(stage.key, first, last, last, ""))
        if stage.pool == "prefill":
            self.say(Ready(stage.key, stage.num_hit_blocks))


class Harness:
    """The router with any number of engines; ``p`` and ``d`` are the first of each role."""

    def __init__(self, **config: Any) -> None:
        self.journal: Journal = []
        deadlines = config.pop("deadlines", {})
        self.config = RouterConfig(
            listen=f"127.0.0.1:{free_port()}",
            control=f"tcp://127.0.0.1:{free_port()}",
            heartbeat_s=config.pop("heartbeat_s", 0.2),
            engine_wait_s=config.pop("engine_wait_s", 0.3),
            short_prompt_tokens=config.pop("short_prompt_tokens", 0),
            deadlines=Deadlines(**deadlines),
            **config,
        )
        self.router = Router(self.config)
        self.movers: dict[str, ScriptedMover] = {}
        self.client: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return f"http://{self.config.listen}"

    @property
    def p(self) -> ScriptedMover:
        return self.movers["p"]

    @property
    def d(self) -> ScriptedMover:
        return self.movers["d"]

    async def add(
        self,
        name: str,
        role: str,
        blocks: list[StoredBlock] | None = None,
        behaviour: Behaviour | None = None,
        **hello: Any,
    ) -> ScriptedMover:
        """Start an engine; return when the router has welcomed it and found its server."""
        server = EngineServer(name, self.journal)
        server.behaviour = behaviour or (self._prefill if role == "prefill" else None)
        await server.start()
        mover = self.movers[name] = ScriptedMover(self, server, role, **hello)
        mover.blocks = blocks or []
        mover.start()
        await asyncio.wait_for(mover.welcomed.wait(), 5)
        await self.until(lambda: self.serving(name))
        return mover

    def serving(self, name: str) -> bool:
        engine = self.router.cluster.by_id(name)
        return engine is not None and engine.usable

    async def _prefill(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """The prefill leg's answer; with it the decode mover commits."""
        params = body["kv_transfer_params"]["dualpath"]
        self.d.say(Committed(wire_key(params)))
        return await self.p.server.answer(request, body)

    async def until(self, condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
        async def poll() -> None:
            while not condition():  # noqa: ASYNC110 - any condition, not an event
                await asyncio.sleep(0.01)

        await asyncio.wait_for(poll(), timeout_s)

    async def post(
        self, body: Any, path: str = "/v1/completions", headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        async with self.client.post(self.url + path, json=body, headers=headers) as response:
            return response.status, await response.read()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.client.get(self.url + path) as response:
            text = await response.text()
            is_json = response.content_type == "application/json"
            return response.status, json.loads(text) if is_json else text

    def events(self, *kinds: str) -> list[str]:
        """Names in the journal, heartbeats and registration left out."""
        ignored = ("Pong", "Ping", "Welcome")
        names = [name for name, _ in self.journal if name.split(":")[1] not in ignored]
        return [name for name in names if not kinds or name.split(":")[1] in kinds]

    def bodies(self, name: str) -> list[Any]:
        return [body for entry, body in self.journal if entry == name]

    async def idle(self) -> None:
        """Wait until nothing is open, and check that nothing is left in the books."""
        await self.until(lambda: not self.router.cluster.transfers)
        for engine in self.router.cluster.engines:
            load = (engine.num_requests, engine.num_tokens, engine.read_queue_tokens)
            assert load == (0, 0, 0), (engine.engine_id, load)
        assert not self.router.cluster._pinned

    async def __aenter__(self) -> Harness:
        await self.router.start()
        self.client = aiohttp.ClientSession()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.client.close()
        await self.router.stop()
        for mover in self.movers.values():
            await mover.stop()
            await mover.server.stop()


@contextlib.asynccontextmanager
async def pair(blocks: list[StoredBlock] | None = None, **config: Any) -> AsyncIterator[Harness]:
    """One prefill engine ``p`` and one decode engine ``d``; the store holds ``blocks``."""
    async with Harness(**config) as harness:
        await harness.add("p", "prefill", blocks)
        await harness.add("d", "decode", blocks)
        yield harness
