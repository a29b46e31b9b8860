"""The file that ``vllm-dualpath profile`` writes: what an engine of a model does on this machine.

The router reads alpha, beta and the curve of whole steps from it, the quota scheduler the curve of
attention. What a curve's seconds are is said once, in ``csrc/policy/cluster_view.hpp``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from vllm_dualpath.errors import ConfigError
from vllm_dualpath.native import PrefillCurve

VERSION = 1
LINE_TAG = "dualpath-profile "
"""Begins each line that the process which times an engine's steps writes for us, among vLLM's."""
ALPHA_S = 3.0
"""Seconds of reading that alpha's tokens take. Source: the paper's section 6."""
BETA_S = 5.0
"""Seconds of computing that beta's tokens take. Source: the paper's section 6."""

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Tokens = Annotated[float, msgspec.Meta(gt=0)]


class FittedCurve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of one step, and how well they fit what was measured."""

    step_s: Seconds
    """However little the step has to do."""
    token_s: Seconds
    """A new token."""
    token_pair_s: Seconds
    """A new token and a token before it."""
    r2: float
    median_error: float
    """Median of |predicted - measured| / measured."""
    num_samples: int

    @property
    def curve(self) -> PrefillCurve:
        """What each request adds to the step."""
        tokens_per_s = 1 / self.token_s if self.token_s > 0 else float("inf")
        return PrefillCurve(tokens_per_s, self.token_pair_s)


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See the module's docstring."""

    version: int
    model: str
    device: str
    vllm: str
    attention: FittedCurve
    """Seconds inside the attention layers, all layers together."""
    step: FittedCurve
    """Seconds of the whole step."""
    beta_tokens: Tokens
    """Tokens that a prefill engine computes in 5 s."""
    alpha_tokens: Tokens | None = None
    """Tokens whose KV is read from the store in 3 s; none if no store was given."""

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.beta_tokens / BETA_S

    @property
    def read_tokens_per_s(self) -> float:
        """0: not known."""
        return 0.0 if self.alpha_tokens is None else self.alpha_tokens / ALPHA_S


def load_profile(path: Path) -> Profile:
    """Read a profile. Raises ``ConfigError`` for a file that is none."""
    remedy = "make one with vllm-dualpath profile"
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
    except OSError as exc:
        raise ConfigError(f"profile {path}: cannot be read: {exc.strerror}; {remedy}") from exc
    except msgspec.DecodeError as exc:
        raise ConfigError(f"profile {path}: {exc}; {remedy}") from exc
    if profile.version != VERSION:
        raise ConfigError(
            f"profile {path}: expected version {VERSION}, found {profile.version}; {remedy}"
        )
    return profile


def save_profile(profile: Profile, path: Path) -> None:
    """Write it in a form that people can read too. Raises ``ConfigError`` if it cannot be."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
    except OSError as exc:
        raise ConfigError(f"profile {path}: cannot be written: {exc.strerror}") from exc
