#!/bin/sh
# Draws the pictures of docs/benchmarks.md, docs/bench-save.svg and docs/bench-waits.svg, and writes
# tables of figures, the README's and that page's. What `make bench-save`, `make bench-semaphore` and
# `make bench-slow` have left in bench/results is first copied to docs/bench, so that a picture is committed together with the
# figures that it shows; of a run that left out parts or sizes ($BENCH_PARTS, $BENCH_SIZES), or was not
# judged ($BENCH_JUDGE), it is not.
set -eu

cd "$(dirname "$0")/.."

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo "$@"
    fi
}

if ! command -v gnuplot >/dev/null; then
    if ! command -v apt-get >/dev/null; then
        echo "plots: missing: gnuplot, which your package manager has" >&2
        exit 1
    fi
    echo "plots: installing by apt: gnuplot-nox"
    as_root apt-get -q update
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -q -y --no-install-recommends install gnuplot-nox
fi

mkdir -p docs/bench
for result in save semaphore slow; do
    measured=bench/results/$result.json
    if [ -e "$measured" ] && python3 bench/plots.py --is-whole "$result" "$measured"; then
        cp "$measured" "docs/bench/$result.json"
    fi
done
python3 bench/plots.py
