"""Makes `python -m ringattn` and `torchrun -m ringattn` the console script."""

from ringattn.cli import main

main()
