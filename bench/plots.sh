#!/bin/sh
# Draws the pictures of docs/benchmarks.md, docs/bench-*.svg, and writes the tables of figures of that
# page and of the README. What the
# benchmarks have left in bench/results is first taken into bench/figures, so that a picture is
# committed together with the figures that it shows; of a run that left out parts or sizes
# ($BENCH_PARTS, $BENCH_SIZES), or was not judged ($BENCH_JUDGE, $BENCH_QUICK), it is not.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/proofs/lib.sh"

need python3 gnuplot
python3 "$here/bench/plots.py"
