#!/bin/sh
# Runs the tests under sanitizers, which see what a test that passes does not:
#
#   ThreadSanitizer   the core's semaphore, shared by threads: data races
#   AddressSanitizer  the core's tests: memory errors and leaks
#   AddressSanitizer  the NIF library inside the VM: memory errors
#
# One line for each that finds nothing; the first that finds something ends this with its report
# and a status that is not 0. The sanitizers need Rust's nightly toolchain, which is installed when
# there is rustup, and the runtime library that gcc brings along.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
PATH="$PATH:${CARGO_HOME:-${HOME:-/}/.cargo}/bin"

# Of the Erlang tests, those that drive the semaphore and the files.
eunit="prop_semaphore_tests prop_kvc_tests erllama_cache_store_tests"
suites="erllama_cache_semaphore_SUITE"
# Enough sequences to see every step in every state.
: "${PROPER_SEQUENCES:=300}"
export PROPER_SEQUENCES

out="$here/native/target/sanitize"
lib="$out/lib/erllama_cache_nif"
reports="$out/reports"

has() {
    command -v "$1" >/dev/null 2>&1
}

fail() {
    echo "sanitize: $*" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo "$@"
    fi
}

# What is missing and how to get it, or nothing.
need_nightly() {
    if ! cargo +nightly --version >/dev/null 2>&1 || ! [ -d "$(rust_src)" ]; then
        has rustup || fail "missing: Rust's nightly toolchain and its source (rust-src). \
rustup installs them: https://rustup.rs"
        echo "sanitize: installing by rustup: nightly, rust-src"
        rustup toolchain install nightly --profile minimal --component rust-src ||
            fail "missing: rustup toolchain install nightly --component rust-src"
    fi
}

# ThreadSanitizer needs a standard library that is instrumented too: it does not know the locks of
# one that is not, and takes what they guard for races.
rust_src() {
    echo "$(rustc +nightly --print sysroot 2>/dev/null)/lib/rustlib/src/rust/library/std"
}

need_libasan() {
    libasan=$(find_libasan)
    if [ -z "$libasan" ] && has apt-get && has gcc; then
        package="libgcc-$(gcc -dumpversion)-dev"
        echo "sanitize: installing by apt: $package"
        as_root apt-get -q update
        as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get -q -y --no-install-recommends install "$package"
        libasan=$(find_libasan)
    fi
    [ -n "$libasan" ] || fail "missing: libasan.so, the runtime of gcc's AddressSanitizer"
}

# A name that is not found is printed as it is.
find_libasan() {
    path=$(gcc -print-file-name=libasan.so 2>/dev/null || true)
    case $path in
        /*) readlink -f "$path" ;;
    esac
}

# run NAME COMMAND...: quiet unless it fails.
run() {
    log="$out/$1.log"
    shift
    # Not as a condition: `set -e` would not hold in there.
    set +e
    (set -e; "$@") >"$log" 2>&1
    status=$?
    set -e
    if [ "$status" -ne 0 ]; then
        cat "$log" >&2
        fail "failed: $*"
    fi
}

core_tests() {
    sanitizer=$1
    shift
    (
        cd "$here/native"
        CARGO_TARGET_DIR="$out/$sanitizer" RUSTFLAGS="-Zsanitizer=$sanitizer" \
            cargo +nightly test --locked --target "$host" -p erllama_cache_core "$@"
    )
}

threads() {
    core_tests thread -Zbuild-std --test semaphore
}

core() {
    core_tests address --lib --tests
}

# The application with an instrumented library, apart from the one that is in use.
build_nif() {
    (
        cd "$here/native"
        CARGO_TARGET_DIR="$out/address" RUSTFLAGS="-Zsanitizer=address" \
            cargo +nightly build --locked --target "$host" -p erllama_cache_nif
    )
    rm -rf "$lib"
    mkdir -p "$lib/ebin" "$lib/priv" "$lib/test"
    cp "$out/address/$host/debug/liberllama_cache_nif.so" "$lib/priv/erllama_cache_nif.so"
    cp "$here/src/erllama_cache_nif.app.src" "$lib/ebin/erllama_cache_nif.app"
    erlc +debug_info -o "$lib/ebin" "$here"/src/*.erl
    erlc +debug_info +nowarn_export_all -pa "$lib/ebin" -o "$lib/test" \
        "$here"/test/standin/*.erl "$here"/test/*.erl
}

# The VM is not instrumented: its own allocators are not looked into, and what it still refers to
# when it halts would all be called a leak.
nif_in_vm() {
    rm -rf "$reports" "$out/ct"
    mkdir -p "$reports" "$out/ct"
    cd "$out"
    export ERL_CRASH_DUMP_SECONDS=0
    export ASAN_OPTIONS="detect_leaks=0:log_path=$reports/report"
    ended=0
    # shellcheck disable=SC2086  # lists of words are split on purpose
    LD_PRELOAD="$libasan" erl -noshell -pa "$lib/ebin" "$lib/test" -eval '
        {EUnit, ["and" | Suites]} =
            lists:splitwith(fun(Word) -> Word =/= "and" end, init:get_plain_arguments()),
        ok = eunit:test([list_to_atom(Module) || Module <- EUnit]),
        {_Passed, 0, {_Skipped, 0}} = ct:run_test([
            {suite, Suites}, {dir, filename:dirname(code:which(list_to_atom(hd(Suites))))},
            {auto_compile, false}, {logdir, "ct"}, {multiply_timetraps, 5}
        ]),
        halt(0).' -extra $eunit and $suites || ended=$?
    # Of a VM that a test has started, too.
    if [ -n "$(ls "$reports")" ]; then
        cat "$reports"/*
        return 1
    fi
    return "$ended"
}

need_nightly
need_libasan
host=$(rustc +nightly -vV | sed -n 's/^host: //p')
mkdir -p "$out"

run thread threads
echo "sanitize: ThreadSanitizer finds nothing in the core's semaphore"
run address core
echo "sanitize: AddressSanitizer finds nothing in the core"
run build build_nif
run nif nif_in_vm
echo "sanitize: AddressSanitizer finds nothing in the NIF library inside the VM"
