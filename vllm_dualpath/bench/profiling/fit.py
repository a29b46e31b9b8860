"""A curve through measured steps: least squares of relative errors, no coefficient negative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from vllm_dualpath.errors import LaunchError
from vllm_dualpath.native import PrefillCurve
from vllm_dualpath.profile import FittedCurve

_MIN_SAMPLES = 6
# The features are the curve's own terms: what a curve is stays said once, in the compiled core.
_TOKENS = PrefillCurve(tokens_per_s=1.0, s_per_token_pair=0.0)
_PAIRS = PrefillCurve(tokens_per_s=float("inf"), s_per_token_pair=1.0)

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sample:
    """One step with one request."""

    cached_tokens: int
    new_tokens: int
    step_s: float
    attention_s: float


def fit_curve(samples: Sequence[Sample], seconds: Sequence[float]) -> FittedCurve:
    """Fit ``seconds``, one for each sample. Raises ``LaunchError`` for too few samples."""
    if len(samples) < _MIN_SAMPLES or min(seconds) <= 0:
        raise LaunchError(
            f"profile: expected at least {_MIN_SAMPLES} timed steps, found {len(samples)}, the"
            f" shortest of {min(seconds, default=0):.3g} s; give more --seconds, or a larger"
            " --max-model-len"
        )
    measured = np.asarray(seconds, dtype=float)
    features = np.array(
        [(1.0, _TOKENS.seconds(s.cached_tokens, s.new_tokens), _pairs(s)) for s in samples]
    )
    # Divided by what was measured, a long step counts no more than a short one.
    coefficients = _non_negative(features / measured[:, None], np.ones(len(samples)))
    predicted = features @ coefficients
    spread = float(np.sum((measured - measured.mean()) ** 2))
    r2 = 1.0 - float(np.sum((measured - predicted) ** 2)) / spread if spread > 0 else 0.0
    error = float(np.median(np.abs(predicted - measured) / measured))
    step_s, token_s, token_pair_s = map(float, coefficients)
    return FittedCurve(step_s, token_s, token_pair_s, r2, error, len(samples))


def _pairs(sample: Sample) -> float:
    return _PAIRS.seconds(sample.cached_tokens, sample.new_tokens)


def _non_negative(features: _Floats, target: _Floats) -> _Floats:
    """Exact: the best of all sets of columns whose free solution has no negative coefficient."""
    num_columns = features.shape[1]
    scale = np.linalg.norm(features, axis=0)
    best, best_error = np.zeros(num_columns), np.inf
    for size in range(1, num_columns + 1):
        for columns in map(list, combinations(range(num_columns), size)):
            found = np.linalg.lstsq(features[:, columns] / scale[columns], target, rcond=None)[0]
            if found.min() < 0:
                continue
            candidate = np.zeros(num_columns)
            candidate[columns] = found / scale[columns]
            error = float(np.sum((features @ candidate - target) ** 2))
            if error < best_error:
                best, best_error = candidate, error
    return best
