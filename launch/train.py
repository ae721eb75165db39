"""Trains a byte-level language model on long contexts; the same as `ringattn train`, see `ringattn.cli.train`.

torchrun --nproc-per-node 4 launch/train.py
"""

from ringattn.cli.train import main

if __name__ == "__main__":
    main()
