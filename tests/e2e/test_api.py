"""What clients see: OpenAI's client, vLLM's load generator, bad input, no engines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from vllm_dualpath.bench.processes import ManagedProcess, ProcessGuard
from vllm_dualpath.bench.servers import healthy
from vllm_dualpath.bench.vllm_command import HOST, free_ports

from .client import MODEL_NAME, HttpError, complete, greedy, stream
from .deployment import Deployment, wait_until
from .prompts import token_ids
from .reference import Reference

_QUESTION = "Which of the two nodes should read the blocks? " * 5


def _chat(url: str) -> tuple[list[int], str, Any]:
    """A streamed chat through OpenAI's own client: token ids, text and usage."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[
            {"role": "system", "content": "Answer with one word."},
            {"role": "user", "content": _QUESTION},
        ],
        max_completion_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    tokens: list[int] = []
    text, usage = "", None
    for chunk in answer:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            tokens += (choice.model_extra or {}).get("token_ids") or []
    return tokens, text, usage


def test_streamed_chat_through_openai_client(llama: Deployment, llama_reference: Reference) -> None:
    """Cold and warm, the chunks and the usage are plain vLLM's; the warm one was a hit."""
    expected = _chat(llama_reference.url)
    assert len(expected[0]) == 24
    for _ in range(2):
        before = llama.drained()
        tokens, text, usage = _chat(llama.url)
        assert (tokens, text) == expected[:2]
        assert usage.prompt_tokens == expected[2].prompt_tokens
        assert usage.completion_tokens == 24
    hit = (llama.drained()[0] - before[0]).external
    assert hit == (usage.prompt_tokens - 1) // 64 * 64 > 0


def test_streamed_completion(llama: Deployment, llama_reference: Reference) -> None:
    """The stream's tokens are those of the whole answer."""
    prompt = token_ids("streamed", 180)
    with stream(llama.url, greedy(prompt, 20)) as chunks:
        tokens = [token for chunk in chunks for token in chunk]
    assert tuple(tokens) == llama_reference.tokens(prompt, 20)


@pytest.mark.parametrize(
    "params",
    [
        {"dualpath": {"version": 1, "boot_id": "00" * 16, "transfer": "11" * 16}},
        {"dualpath": "not a dictionary", "do_remote_prefill": True},
        {"do_remote_prefill": True, "remote_block_ids": [1, 2, 3], "prompt_token_ids": [0]},
    ],
)
def test_transfer_parameters_of_a_client_are_dropped(
    llama: Deployment, llama_reference: Reference, params: dict[str, object]
) -> None:
    """They reach neither engine: the answer is the prompt's own."""
    prompt = token_ids("client params", 150)
    answer = llama.ask(prompt, 8, kv_transfer_params=params)
    assert answer.tokens == llama_reference.tokens(prompt, 8)


def test_bad_requests_are_answered_as_vllm_does(
    llama: Deployment, llama_reference: Reference
) -> None:
    """Too long, wrong types, another model: vLLM's status, no transfer left behind."""
    bodies = [
        greedy(token_ids("too long", 1100), 4),
        greedy(token_ids("negative", 80), 4, temperature=-1),
        greedy(["a", 1], 4),
        {**greedy([1, 2], 4), "model": "another"},
        greedy([1 << 40], 4),
    ]
    for body in bodies:
        with pytest.raises(HttpError) as expected:
            complete(llama_reference.url, body)
        with pytest.raises(HttpError) as found:
            complete(llama.url, body)
        assert found.value.status == expected.value.status


def test_vllm_bench_serve(llama: Deployment, llama_dir: Path) -> None:
    """VLLM's own load generator finishes all its requests."""
    code = (
        "import argparse; from vllm.benchmarks import serve; parser = argparse.ArgumentParser();"
        " serve.add_cli_args(parser); serve.main(parser.parse_args())"
    )
    arguments = ["--backend", "openai", "--base-url", llama.url, "--model", str(llama_dir)]
    arguments += ["--served-model-name", MODEL_NAME, "--dataset-name", "random"]
    arguments += ["--random-input-len", "200", "--random-output-len", "16", "--num-prompts", "8"]
    arguments += ["--random-prefix-len", "128", "--seed", "3", "--ignore-eos"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = dict(line.split(":", 1) for line in done.stdout.splitlines() if line.count(":") == 1)
    assert counts["Successful requests"].strip() == "8"
    assert counts["Failed requests"].strip() == "0"
    assert int(counts["Total generated tokens"]) == 8 * 16


def test_no_engines(tmp_path: Path) -> None:
    """A router without engines says 503, and why."""
    http, control = free_ports(2)
    command = [sys.executable, "-m", "vllm_dualpath.cli", "router", "--engine-wait-s", "0.2"]
    command += ["--listen", f"{HOST}:{http}", "--control", f"tcp://{HOST}:{control}"]
    guard = ProcessGuard()
    router = ManagedProcess("router", command, tmp_path / "router.log", guard)
    router.start()
    try:
        url = f"http://{HOST}:{http}"
        wait_until(lambda: _status(url) == 503, "503 of a router without engines", 30)
        assert not healthy(url)
    finally:
        router.stop()
        guard.close()


def _status(url: str) -> int | None:
    try:
        complete(url, greedy([1, 2, 3], 4))
    except HttpError as exc:
        assert "engine" in exc.text
        return exc.status
    except OSError:
        return None
    return 200
