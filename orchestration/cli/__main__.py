"""`python -m orchestration.cli` is `rrn-sweep`."""

from orchestration.cli.main import main

main()
