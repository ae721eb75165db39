#!/usr/bin/env bash
# Makes .venv, installs ringattn with its test extras, and runs everything CI runs: lint, types, tests.
# Run it again at any time: what is installed stays installed.
#
#     bash launch/test.sh                    everything, about 17 minutes on 2 cores
#     bash launch/test.sh --quick            without the tests marked `slow`, under 4 minutes: for every change
#     bash launch/test.sh -k token_ring      other arguments go to pytest, also after --quick
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh test

selected=()
if [ "${1-}" = --quick ]; then
    shift
    selected=(-m "not slow")
fi

export OMP_NUM_THREADS=1
ruff check .
ruff format --check .
mypy
# Two at a time: a test with ranks waits for processes to start as long as it computes.
python -m pytest -n 2 --dist worksteal ${selected[@]+"${selected[@]}"} "$@"
