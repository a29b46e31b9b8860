"""A client's JSON body: cut into its fields once, each decoded only if somebody looks at it.

Both legs carry nearly all of it on, and most of that is a prompt of up to megabytes: its bytes are
passed on as they came. What they say is still checked: a body is one JSON object of valid UTF-8.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from vllm_dualpath.errors import DualPathError

JsonBody = dict[str, Any]

_ENCODER = msgspec.json.Encoder()
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ANY = msgspec.json.Decoder(Any)
_INTS = msgspec.json.Decoder(list[int])


class BadBody(DualPathError):
    """A client's body that cannot be decoded: its mistake, and answered as one."""


class Ints(list[int]):
    """A list that was decoded as integers: nobody needs to look at each of them again."""


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A prompt's ids, and the JSON that they were decoded from."""

    ids: list[int]
    raw: msgspec.Raw

    @classmethod
    def decode(cls, raw: msgspec.Raw) -> TokenIds | None:
        """``None`` unless it is a list of one or more integers."""
        ids = _ints(raw)
        return cls(ids, raw) if ids else None

    def __len__(self) -> int:
        return len(self.ids)


class Body(Mapping[str, Any]):
    """The object. What Python's ``json`` takes and others do not (NaN, halves of surrogate pairs)
    is taken too, as vLLM takes it, and decoded at once.
    """

    def __init__(self, data: bytes) -> None:
        """Raises ``ValueError`` for what is no JSON object."""
        self._data = data
        self._values: JsonBody = {}
        self._raw: dict[str, msgspec.Raw] | None
        try:
            str(data, "utf-8")
            self._raw = _FIELDS.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self._decode_all()

    def __getitem__(self, name: str) -> Any:
        if self._raw is None or name in self._values:
            return self._values[name]
        raw = self._raw[name]
        try:
            self._values[name] = value = _value(raw)
        except (msgspec.MsgspecError, ValueError):
            try:
                self._decode_all()
            except ValueError as exc:
                raise BadBody(f"{name}: expected JSON that can be decoded, found {exc}") from exc
            return self._values[name]
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or ``default``; asked for many fields that a body rarely has."""
        return self[name] if name in self else default  # noqa: SIM401 # no recursion, no exception

    def __contains__(self, name: object) -> bool:
        return name in (self._values if self._raw is None else self._raw)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values if self._raw is None else self._raw)

    def __len__(self) -> int:
        return len(self._values if self._raw is None else self._raw)

    def fields(self) -> JsonBody:
        """A new dictionary for ``encode``: values as bytes that nobody needs to look into."""
        return dict(self._values if self._raw is None else self._raw)

    def token_ids(self) -> TokenIds:
        """Of a prompt that is a list of integers."""
        ids = self["prompt"]
        raw = msgspec.Raw(_ENCODER.encode(ids)) if self._raw is None else self._raw["prompt"]
        return TokenIds(ids, raw)

    def encode(self, fields: Mapping[str, Any]) -> bytes:
        """JSON of this body's fields and values, changed or not."""
        if self._raw is not None:
            return _ENCODER.encode(fields)
        # msgspec would write null for what is no number.
        return json.dumps(fields, separators=(",", ":"), default=_decoded).encode()

    def _decode_all(self) -> None:
        values = json.loads(self._data)
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, found {type(values).__name__}")
        self._values, self._raw = values, None


def parse_body(data: bytes) -> Body | None:
    """``None`` for what is no JSON object."""
    try:
        return Body(data)
    except ValueError:
        return None


def _value(raw: msgspec.Raw) -> Any:
    ints = _ints(raw)
    return _ANY.decode(raw) if ints is None else Ints(ints)


def _ints(raw: msgspec.Raw) -> list[int] | None:
    if bytes(memoryview(raw)[:1]) != b"[":
        return None
    try:
        return _INTS.decode(raw)
    except (msgspec.MsgspecError, ValueError):
        return None


def _decoded(value: object) -> object:
    if isinstance(value, msgspec.Raw):
        return json.loads(bytes(memoryview(value)))
    raise TypeError(f"no JSON: {type(value).__name__}")
