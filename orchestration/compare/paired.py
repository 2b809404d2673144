"""Two settings compared on the same seeds: paired differences, their interval, an exact test, and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ALPHA = 0.05
"""Accepted share of false claims; intervals have the level 1 - ALPHA."""
FEWEST = 6
"""Seeds below which there is no interval: resamples stay within the range of the n values, and that covers 1 - 2 ** (1 - n) at best."""
EXACT_UP_TO = 16
"""Most seeds for which the test tries every flip of signs; for more, it tries FLIPS random ones."""
FLIPS = 2**16 - 1
RESAMPLES = 9999
_ROUNDING = 1e-9
"""Relative difference below which two sums count as equal."""


@dataclass(frozen=True)
class Difference:
    """A cell against its group's baseline, paired by seed; in the metric's own unit times 100 where it is a share (points)."""

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    """One difference for each seed."""
    mean: float
    low: float | None
    """Ends of the 95 % interval of the mean; None with too few seeds, or without any spread."""
    high: float | None
    p: float
    """Exact sign-flip test, two-sided."""
    p_holm: float
    """The same after Holm's correction over all comparisons of the table."""
    better: float
    """Share of the seeds in which the cell is better; a tie counts half."""


def compare(cell: Mapping[int, float], baseline: Mapping[int, float], *, higher: bool = True) -> Difference | None:
    """`cell` minus `baseline` on the seeds that both have; None where they share none. `p_holm` is that of a single comparison.

    Args:
        higher: whether more of it is better.
    """
    seeds = tuple(sorted(cell.keys() & baseline.keys()))
    if not seeds:
        return None
    values = tuple(cell[seed] - baseline[seed] for seed in seeds)
    low, high = interval(values) or (None, None)
    p = sign_flip(values)
    better = mean(0.5 if value == 0 else float((value > 0) == higher) for value in values)
    return Difference(seeds, values, mean(values), low, high, p, p, better)


def corrected(differences: Sequence[Difference | None]) -> list[Difference | None]:
    """The comparisons of one table with `p_holm`: the chance of even one false claim among them all stays below ALPHA."""
    adjusted = iter(holm([difference.p for difference in differences if difference]))
    return [replace(difference, p_holm=next(adjusted)) if difference else None for difference in differences]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """BCa bootstrap interval of the mean, at a level that corrects for small samples; None below FEWEST values, or where all are equal.

    BCa at its nominal level covers far too seldom with few values. Hesterberg ("What Teachers Should Know About the Bootstrap", 2015)
    widens it to the level of a t interval; as BCa estimates three numbers from the sample (bias, scale, acceleration), three degrees of
    freedom are taken off here, not one. What that covers, measured: benchmarks/results/intervals.md.
    """
    import numpy as np
    from scipy import stats

    if len(values) < FEWEST or max(values) - min(values) <= _ROUNDING * max(map(abs, values)):
        return None
    found = stats.bootstrap(
        (np.asarray(values),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=1 - 2 * _expanded(len(values)),
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def sign_flip(values: Sequence[float], *, exact_up_to: int = EXACT_UP_TO) -> float:
    """Two-sided p of a mean this far from 0, had every difference been as likely with the other sign.

    That is so where the setting makes no difference at all, whatever the distribution: two runs that could be swapped differ symmetrically.
    """
    import numpy as np

    differences = np.asarray(values, dtype=float)
    exact = len(values) <= exact_up_to
    sums = (_all_signs(len(values)) if exact else _random_signs(len(values))) @ differences
    as_far = int((np.abs(sums) >= abs(differences.sum()) - _ROUNDING * np.abs(differences).sum()).sum())
    return as_far / len(sums) if exact else (as_far + 1) / (len(sums) + 1)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given."""
    adjusted = [0.0] * len(ps)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


def smallest_p(seeds: int) -> float:
    """The smallest p that the test can give, when all differences have the same sign."""
    return max(2.0 ** (1 - seeds), 1 / (FLIPS + 1))


def seeds_needed(comparisons: int) -> int:
    """The fewest seeds with which one of this number of comparisons can be significant after Holm's correction."""
    return math.ceil(math.log2(max(comparisons, 1) / ALPHA)) + 1


def can_show(counts: Sequence[int]) -> list[str]:
    """What comparisons with these numbers of seeds can and cannot show: at most one line for too few seeds, and one for enough.

    `with 3 seeds no difference can be significant at 5 % (the smallest possible p is 0.25); 6 are needed`
    """
    # corrected ps only rise with the ps, so these are the smallest that the table can hold
    smallest = dict(zip(counts, holm([smallest_p(count) for count in counts]), strict=True))
    short = [count for count, p in smallest.items() if p > ALPHA]
    enough = [count for count, p in smallest.items() if p <= ALPHA]
    lines = []
    if short:
        needed = f"; {seeds_needed(len(counts))} are needed" if seeds_needed(len(counts)) > max(short) else ""
        possible = _possible(max(short), smallest[max(short)], len(counts))
        lines.append(f"with {_seeds(max(short))} no difference can be significant at {100 * ALPHA:.0f} % ({possible}){needed}")
    if enough:
        lines.append(f"with {_seeds(min(enough))} {_possible(min(enough), smallest[min(enough)], len(counts))}")
    return lines


def _possible(seeds: int, corrected: float, comparisons: int) -> str:
    after = f", {corrected:.2g} after Holm's correction over {comparisons} comparisons" if comparisons > 1 else ""
    return f"the smallest possible p is {smallest_p(seeds):.2g}{after}"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def _expanded(n: int) -> float:
    """The probability on each side of the interval."""
    from scipy import stats

    free = n - 3
    return float(stats.norm.cdf(-math.sqrt(n / free) * stats.t.ppf(1 - ALPHA / 2, free)))


def _all_signs(n: int) -> NDArray[np.float64]:
    """(2 ** (n - 1), n) of 1 and -1; the other half mirrors these, which makes no difference to a two-sided test."""
    import numpy as np

    numbers = np.arange(2 ** (n - 1))[:, None]
    return _signs(numbers >> np.arange(n) & 1)


def _random_signs(n: int) -> NDArray[np.float64]:
    import numpy as np

    return _signs(np.random.default_rng(0).integers(0, 2, (FLIPS, n), dtype=np.int8))


def _signs(bits: NDArray[Any]) -> NDArray[np.float64]:
    return 1.0 - 2.0 * bits.astype(float)
