#!/usr/bin/env bash
# Everything that is measured, and the tests that need a GPU where there is one. Prints Markdown.
#   bash benchmarks/all.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
  "$python" -m pytest -q -m gpu tests
fi
"$python" benchmarks/start.py
"$python" benchmarks/merge.py --large
"$python" benchmarks/convert.py
"$python" benchmarks/combine.py --full
"$python" benchmarks/extract.py
"$python" benchmarks/live.py
"$python" benchmarks/export_onnx.py --layers 32 --dtype --quantize --swappable
if command -v nvidia-smi >/dev/null; then
  "$python" benchmarks/live.py --device cuda --layers 16 --hidden 2048
fi
