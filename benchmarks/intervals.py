"""Measures the coverage of the intervals in orchestration/compare/paired.py, and the false claims of its test. Writes to results/.

    python benchmarks/intervals.py          (one CPU core, two minutes)

It simulates paired differences with a known true mean. A claim is false if the two runs do not differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from orchestration.compare import paired

Samples = NDArray[np.float64]
OUT = Path(__file__).parent / "results" / "intervals.md"
REPETITIONS = 2000
SEEDS = (6, 8, 10, 20)
COMPARISONS = 5

DIFFERENCES: dict[str, tuple[Callable[[np.random.Generator, tuple[int, ...]], Samples], float]] = {
    "normal": (lambda g, size: g.standard_normal(size), 0.0),
    "uniform": (lambda g, size: g.uniform(-1, 1, size), 0.0),
    "skewness 0.8 (log-normal)": (lambda g, size: g.lognormal(0, 0.25, size), float(np.exp(0.25**2 / 2))),
    "skewness 1 (gamma)": (lambda g, size: g.gamma(4, 1, size), 4.0),
    "skewness 2 (exponential)": (lambda g, size: g.exponential(1, size), 1.0),
    "heavy tails (t, 3 degrees of freedom)": (lambda g, size: g.standard_t(3, size), 0.0),
}
RUNS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Samples]] = {
    "normal": lambda g, size: g.standard_normal(size),
    "skewed (log-normal)": lambda g, size: g.lognormal(0, 1, size),
    "heavy tails (t, 2 degrees of freedom)": lambda g, size: g.standard_t(2, size),
}


def main() -> None:
    """Simulate and write the report."""
    OUT.write_text("\n".join([*_intervals(), *_claims()]) + "\n")


def _intervals() -> Iterator[str]:
    yield "# What intervals cover, and how often the test is wrong\n"
    yield "`python benchmarks/intervals.py`\n"
    what = "95 % interval holds the true mean difference"
    yield f"Share of {REPETITIONS} simulated comparisons whose {what}, in %: ours / plain BCa.\n"
    yield f"| differences | {' | '.join(f'{n} seeds' for n in SEEDS)} |"
    yield "|---" * (1 + len(SEEDS)) + "|"
    for name, (draw, mean) in DIFFERENCES.items():
        samples = [draw(np.random.default_rng(n), (REPETITIONS, n)) for n in SEEDS]
        cells = [f"{_covered(paired.interval, s, mean):.1f} / {_covered(_plain, s, mean):.1f}" for s in samples]
        yield f"| {name} | {' | '.join(cells)} |"


def _claims() -> Iterator[str]:
    yield f"\nFalse claims at 5 % where no setting matters, in % of {REPETITIONS}: of one comparison /"
    yield f"at least one in a table of {COMPARISONS} comparisons with the same baseline, after Holm's correction.\n"
    exact = [n for n in SEEDS if n <= paired.EXACT_UP_TO]
    yield f"| runs | {' | '.join(f'{n} seeds' for n in exact)} |"
    yield "|---" * (1 + len(exact)) + "|"
    for name, draw in RUNS.items():
        tables = [draw(np.random.default_rng(n), (REPETITIONS, 1 + COMPARISONS, n)) for n in exact]
        ps = [np.array([[paired.sign_flip(cell - table[0]) for cell in table[1:]] for table in of_n]) for of_n in tables]
        cells = [f"{_wrong(p[:, 0]):.1f} / {_wrong(np.array([min(paired.holm(list(row))) for row in p])):.1f}" for p in ps]
        yield f"| {name} | {' | '.join(cells)} |"


def _covered(interval: Callable[[Samples], tuple[float, float]], samples: Samples, mean: float) -> float:
    return 100 * float(np.mean([low <= mean <= high for low, high in map(interval, samples)]))


def _plain(values: Samples) -> tuple[float, float]:
    found = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=paired.RESAMPLES, rng=np.random.default_rng(0))
    return found.confidence_interval


def _wrong(ps: Samples) -> float:
    return 100 * float((ps <= paired.ALPHA).mean())


if __name__ == "__main__":
    main()
