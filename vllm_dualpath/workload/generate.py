"""Trajectories drawn so that a trace has given statistics.

What the paper's Table 2 leaves open is decided here, before any run:

- Turns are log-uniform between a least and a largest number. Their ratio follows from the table:
  turns x (append + generated) / total is mean(n) x mean(1/n) when length and turns are independent.
  Log-uniform, not log-normal, because agents have a limit of turns; with a log-normal's tail the
  longest of 500 trajectories would have seven times the mean, and alone decide the makespan.
- Total tokens are ``max_len * u ** a``: most trajectories end near the limit.
- The share of generated tokens is one number for a trace.
- The first append (system prompt, task) is larger than the others, by as much as the mean context
  asks for; the others are exponentially distributed, answers gamma with shape 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vllm_dualpath.errors import ConfigError
from vllm_dualpath.workload.statistics import TraceStatistics
from vllm_dualpath.workload.trajectories import TrajectorySet

_APPEND_SHAPE = 1.0
_ANSWER_SHAPE = 2.0


def generate_trajectories(
    target: TraceStatistics, num_trajectories: int, seed: int
) -> TrajectorySet:
    """A trace with the columns of ``target``; the same seed gives the same trace.

    Raises ConfigError where no such trace exists.
    """
    if num_trajectories < 1:
        raise ConfigError(f"trajectories: expected at least 1, found {num_trajectories}")
    random = np.random.default_rng(seed)
    turns = _turns(target, _strata(random, num_trajectories))
    totals = _totals(target, _strata(random, num_trajectories), turns)
    weights = _Weights(random, turns)
    share = target.generated_tokens / (target.generated_tokens + target.append_tokens)
    first = _first_share(target, turns, totals, share)
    return _assemble(turns, totals, share, first, weights)


def _strata(random: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
    """One number of (0, 1) in each of ``count`` equal strata, shuffled: means vary little."""
    return random.permutation((np.arange(count) + random.random(count)) / count)


def _turns(target: TraceStatistics, u: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    spread = target.turns * (target.append_tokens + target.generated_tokens) / target.total_tokens
    if spread < 1:
        raise ConfigError(
            f"trace: {target.turns} turns of {target.append_tokens} + {target.generated_tokens} "
            f"tokens cannot have {target.total_tokens} in total: expected at most their product"
        )
    log_ratio = _solve(lambda x: _mean_times_mean_inverse(x) - spread, 1e-6, 20.0)
    least = target.turns * log_ratio / math.expm1(log_ratio)
    turns: npt.NDArray[np.float64] = np.rint(least * np.exp(u * log_ratio))
    return np.maximum(1, turns).astype(np.int64)


def _mean_times_mean_inverse(log_ratio: float) -> float:
    """E[n] E[1/n] of a log-uniform n whose largest is ``exp(log_ratio)`` times its least."""
    return (2.0 * math.sinh(log_ratio / 2.0) / log_ratio) ** 2


def _totals(
    target: TraceStatistics, u: npt.NDArray[np.float64], turns: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    if not 0 < target.total_tokens < target.max_len:
        raise ConfigError(
            f"trace: total tokens: expected 0 to max_len {target.max_len}, "
            f"found {target.total_tokens}"
        )
    exponent = target.max_len / target.total_tokens - 1.0
    totals = np.rint(target.max_len * u**exponent).astype(np.int64)
    return np.maximum(totals, 2 * turns)


class _Weights:
    """How a trajectory's tokens are spread over its turns; each part sums to 1."""

    def __init__(self, random: np.random.Generator, turns: npt.NDArray[np.int64]) -> None:
        self.appends = [_normal(random.standard_gamma(_APPEND_SHAPE, int(n))) for n in turns]
        self.answers = [_normal(random.standard_gamma(_ANSWER_SHAPE, int(n))) for n in turns]


def _normal(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    normal: npt.NDArray[np.float64] = weights / weights.sum()
    return normal


def _first_share(
    target: TraceStatistics,
    turns: npt.NDArray[np.int64],
    totals: npt.NDArray[np.int64],
    share: float,
) -> float:
    """The first append's part of a trajectory's tokens, from the mean context.

    With even turns behind a first append of F tokens the mean prompt is F + (T - F)/2 less half
    a turn's answer more or less; solved for the expectation, so one draw of weights is off a bit.
    """
    fixed = float(np.mean(totals / 2.0 - share * totals / (2.0 * turns)))
    slope = float(np.mean(totals / 2.0 * (1.0 + 1.0 / turns)))
    first = (target.mean_context - fixed) / slope
    if not 0.0 <= first < 1.0 - share:
        raise ConfigError(
            f"trace: mean context {target.mean_context} cannot be met with total tokens "
            f"{target.total_tokens}: the first append would be {first:.2f} of them"
        )
    return first


def _assemble(
    turns: npt.NDArray[np.int64],
    totals: npt.NDArray[np.int64],
    share: float,
    first: float,
    weights: _Weights,
) -> TrajectorySet:
    appends, answers = [], []
    for i, total in enumerate(totals):
        generated = max(int(turns[i]), round(share * float(total)))
        appended = max(int(turns[i]), int(total) - generated)
        later = max(0.0, 1.0 - first * float(total) / appended)
        spread = weights.appends[i] * later
        spread[0] += 1.0 - later
        appends.append(_whole(spread, appended))
        answers.append(_whole(weights.answers[i], generated))
    offsets = np.concatenate([[0], np.cumsum(turns)]).astype(np.int64)
    return TrajectorySet(offsets, np.concatenate(appends), np.concatenate(answers))


def _whole(weights: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.int32]:
    """``total`` (at least one a part) divided by ``weights`` into whole parts of at least 1."""
    edges = np.rint(np.cumsum(weights) * (total - len(weights))).astype(np.int64)
    return (np.diff(edges, prepend=0) + 1).astype(np.int32)


def _solve(function: Callable[[float], float], low: float, high: float) -> float:
    """The root of an increasing function, by bisection."""
    for _ in range(80):
        middle = (low + high) / 2.0
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return (low + high) / 2.0
