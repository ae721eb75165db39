#!/usr/bin/env bash
# Makes .venv, installs ringattn with its test extras, and runs everything CI runs: lint, types, tests.
# Run it again at any time: what is installed stays installed. Arguments go to pytest, e.g. `bash launch/test.sh -k token_ring`.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh test

export OMP_NUM_THREADS=1
ruff check .
ruff format --check .
mypy
# Two at a time: a test with ranks waits for processes to start as long as it computes.
python -m pytest -n 2 --dist worksteal "$@"
