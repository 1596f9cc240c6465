#!/bin/sh
# Feeds what reads files with bytes that a fuzzer makes up, under AddressSanitizer and with memory
# bounded:
#
#   prefix  any bytes as a prefix: the parser, and what it took apart put together again
#   whole   any bytes as a file of a key: check and load, as the library does them
#   root    any bytes as a file in a root: check, load and scan, with a secret and without
#
# Each compares the library's verdict with that of a second reader that shares no code with it
# (erllama_cache_core/tests/model). The first input that makes them differ, or anything panic, leak or
# take too much memory, ends this with a report, a status that is not 0, and the input's file.
#
#   FUZZ_RUNS     inputs for each target (4,000,000)
#   FUZZ_SECONDS  no target takes longer, whatever it has done by then (600)
#   FUZZ_TARGETS  which (all)
#
# It needs Rust's nightly toolchain and cargo-fuzz, and installs them by rustup and by cargo. What it
# has learnt is kept in native/target/fuzz/corpus, so that the next run begins there.
set -eu

here=$(cd "$(dirname "$0")/../.." && pwd)
. "$here/proofs/lib.sh"

: "${FUZZ_RUNS:=4000000}"
: "${FUZZ_SECONDS:=600}"
: "${FUZZ_TARGETS:=prefix whole root}"
# Under AddressSanitizer, with what it keeps of freed memory to catch its use.
memory_mb=1024

out="$here/native/target/fuzz"

# The committed files, as each target takes them: a prefix alone, or a file and a byte that says how
# to read it.
seed() {
    for file in "$here"/test/vectors*/*.kvc "$here"/native/fuzz/seeds/*.kvc; do
        name=$(basename "$(dirname "$file")").$(basename "$file" .kvc)
        start=$(od -An -t u8 -j 48 -N 8 "$file" | tr -d ' ')
        head -c "$start" "$file" >"$out/corpus/prefix/$name"
        for how in 0 1 3 5 7 21; do
            for target in whole root; do
                { cat "$file" && printf '%b' "\\0$how"; } >"$out/corpus/$target/$name.$how"
            done
        done
    done
}

# fuzz TARGET: prints how many inputs it was and how fast they were.
fuzz() {
    log="$out/$1.log"
    if ! "$bin/$1" "$out/corpus/$1" -dict="$here/native/fuzz/kvc.dict" -max_len=4096 \
        -runs="$FUZZ_RUNS" -max_total_time="$FUZZ_SECONDS" -rss_limit_mb="$memory_mb" \
        -malloc_limit_mb=256 -timeout=20 -print_final_stats=1 \
        -artifact_prefix="$out/artifacts/$1-" >"$log" 2>&1; then
        tail -n 60 "$log" >&2
        fail "$1: see above; its input is in $out/artifacts"
    fi
    awk -v target="$1" '
        /^stat::number_of_executed_units:/ { runs = $2 }
        /^stat::average_exec_per_sec:/ { rate = $2 }
        /^stat::peak_rss_mb:/ { rss = $2 }
        / cov: / { for (n = 1; n < NF; n++) if ($n == "cov:") cov = $(n + 1) }
        END { printf "%-8s %12d %9d %8d %8d   nothing\n", target, runs, rate, cov, rss }' "$log"
}

# In memory where there is such a place: the files of `root` are made and removed all the time.
if [ -d /dev/shm ]; then
    temp_dir /dev/shm
else
    temp_dir
fi
export TMPDIR="$work"

need toolchain:nightly cargo-fuzz
for target in prefix whole root; do
    mkdir -p "$out/corpus/$target" "$out/artifacts"
done
seed
host=$(rustc +nightly -vV | sed -n 's/^host: //p')
bin="$out/$host/release"
cd "$here/native"
quietly "$out/build.log" cargo +nightly fuzz build --fuzz-dir fuzz --target-dir "$out"

printf '%-8s %12s %9s %8s %8s   %s\n' target runs per_s edges rss_mb found
for target in $FUZZ_TARGETS; do
    fuzz "$target"
done
