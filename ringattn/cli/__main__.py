"""`python -m ringattn.cli`, for torchrun."""

from ringattn.cli import main

main()
