#!/usr/bin/env bash
# Every part on a GPU, in one command; results go to benchmarks/results/curvature/*.cuda.md.
# Another device or other parts: DEVICE=cuda:1 PARTS="product_cost memory" benchmarks/curvature/gpu.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

PARTS=${PARTS:-product_cost top_eigenvalue slq_cost memory report_cost tracking scaling compiled_products}
for part in $PARTS; do
  echo "== $part"
  "${PYTHON:-python}" "$part.py" --device "${DEVICE:-cuda}"
done
