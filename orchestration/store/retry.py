"""x"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator


def pauses() -> Iterator[float]:
    """Seconds between tries: 0.1, 0.2, 0.4 .. 5, each cut by up to half so that writers don't return in step."""
    jitter = random.Random()  # its own: the global generator belongs to the training
    return (min(5.0, 0.1 * 2 ** min(n, 6)) * jitter.uniform(0.5, 1.0) for n in itertools.count())
