"""Trains a byte-level language model on long contexts, the sequence cut over ranks; the same as `ringattn train`:

    torchrun --nproc-per-node 4 launch/train.py

The job itself is `ringattn.cli.train`.
"""

from ringattn.cli.train import main

if __name__ == "__main__":
    main()
