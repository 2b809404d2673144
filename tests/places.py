"""Where the tests find the repository and the reference data beside it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
"""Reference numbers and images that are no part of the repository; tests that need them skip where it is absent."""
