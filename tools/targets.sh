#!/bin/sh
# Whether the Rust crates, their tests included, compile for other systems than this one, without a
# warning. Nothing is linked or run, so Rust's standard library for a system is all that it takes; rustup
# has it.
#
#     tools/targets.sh [TARGET...]
#
# One that cannot be had is passed over, but not in CI (CI=true).
#
# BLAKE3 brings code in C and assembler, for which each system would want a compiler of its own. Its
# feature `pure` leaves that out and changes nothing that is called from here.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/proofs/lib.sh"
[ $# -gt 0 ] || set -- x86_64-unknown-linux-musl aarch64-unknown-linux-gnu aarch64-unknown-linux-musl \
    x86_64-unknown-freebsd aarch64-apple-darwin

passed_over=
for target in "$@"; do
    if ! "$here/tools/setup.sh" "target:$target"; then
        passed_over="$passed_over $target"
        continue
    fi
    # What the benchmarks measure against is Linux's.
    case $target in
        *-linux-*) all=--workspace ;;
        *) all="--workspace --exclude erllama_cache_bench" ;;
    esac
    # shellcheck disable=SC2086  # a list of words
    (cd "$here/native" && cargo clippy --quiet --locked $all --all-targets --features blake3/pure \
        --target "$target" -- -D warnings)
    echo "targets: $target: compiles"
done
if [ -n "$passed_over" ]; then
    echo "targets: NOT CHECKED, for Rust's standard library is missing:$passed_over" >&2
    [ "${CI:-}" != true ]
fi
