"""Plain vLLM's answers, computed in the same run; each prompt is asked once."""

from __future__ import annotations

from collections.abc import Sequence

from .client import Answer, complete, greedy


class Reference:
    """Answers of a server without our connector."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}

    def tokens(self, prompt: Sequence[int], num_tokens: int) -> tuple[int, ...]:
        """The greedy continuation."""
        key = tuple(prompt)
        if len(self._known.get(key, ())) < num_tokens:
            self._known[key] = self.ask(prompt, num_tokens).tokens
        return self._known[key][:num_tokens]

    def ask(self, prompt: Sequence[object], num_tokens: int, **options: object) -> Answer:
        """Any completion."""
        return complete(self.url, greedy(prompt, num_tokens, **options))
