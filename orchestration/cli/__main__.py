"""`python -m orchestration.cli` is `rrn-sweep`."""

from orchestration.cli.entry import main

main()
