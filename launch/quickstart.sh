#!/usr/bin/env bash
# Makes .venv, installs ringattn, and trains a long-context language model on 4 ranks with TokenRing: about two minutes of steps on 2 cores.
# Run it again at any time: what is installed stays installed. Arguments go to launch/train.py, e.g. `bash launch/quickstart.sh --steps 100`.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh train

export OMP_NUM_THREADS=1
exec torchrun --standalone --nproc-per-node 4 launch/train.py "$@"
