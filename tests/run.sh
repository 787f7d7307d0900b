#!/usr/bin/env bash
# Makes .venv if it is not there, and runs the tests. Arguments go to pytest: `bash tests/run.sh -m "not slow"`.
set -euo pipefail
cd "$(dirname "$0")/.."
bash .ci/venv test
exec .venv/bin/python -m pytest -n 2 --dist loadgroup "$@"
