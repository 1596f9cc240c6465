#!/bin/sh
# Runs the tests under sanitizers, which see what a test that passes does not:
#
#   ThreadSanitizer   what the core's threads share: semaphore, pool, shared syncs, digests: data races
#   AddressSanitizer  the core's tests: memory errors and leaks
#   AddressSanitizer  the NIF library inside the VM, under all of the Erlang tests: memory errors
#   valgrind          the same with the library as it is shipped, on request: it takes long
#
#   proofs/sanitize/run.sh [thread] [address] [nif] [valgrind]    the first three if none is named
#
#   MODULES, SUITES   which of the Erlang tests (all)
#   PROPER_SEQUENCES  how long its state machines run (300; 20 under valgrind)
#
# One line for each that finds nothing; the first that finds something ends this with its report
# and a status that is not 0. The sanitizers need Rust's nightly toolchain, which is installed when
# there is rustup, and the runtime library that gcc brings along.
set -eu

here=$(cd "$(dirname "$0")/../.." && pwd)
. "$here/proofs/lib.sh"

modules() {
    (cd "$here/test" && for file in "$@"; do basename "$file" .erl; done)
}

# Not those that watch how long schedulers are held: a library that is looked over holds them longer. Nor
# those that install the library: the programs that they start would be looked over, too.
eunit=${MODULES-$(cd "$here/test" && modules ./*_tests.erl | grep -vE 'schedulers|prebuilt')}
suites=${SUITES-$(cd "$here/test" && modules ./*_SUITE.erl)}

out="$here/native/target/sanitize"
lib="$out/lib/erllama_cache_nif"
reports="$out/reports"

# A name that is not found is printed as it is.
find_libasan() {
    path=$(gcc -print-file-name=libasan.so 2>/dev/null || true)
    case $path in
        /*) readlink -f "$path" ;;
    esac
}

run() { # NAME COMMAND...
    log=$out/$1.log
    shift
    quietly "$log" "$@"
}

# Optimised a little, as the sanitizers' authors advise: what they insert is slow enough.
export CARGO_PROFILE_DEV_OPT_LEVEL=1

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
    core_tests thread -Zbuild-std --lib -- pool:: group:: digest:: root::
}

core() {
    core_tests address --lib --tests
}

build_nif() {
    (
        cd "$here/native"
        CARGO_TARGET_DIR="$out/address" RUSTFLAGS="-Zsanitizer=address" \
            cargo +nightly build --locked --target "$host" -p erllama_cache_nif
    )
    lay_out "$out/address/$host/debug/liberllama_cache_nif.so"
}

build_shipped_nif() {
    make -C "$here/c_src"
    lay_out "$here/priv/erllama_cache_nif.so"
}

# lay_out LIBRARY: the application with this library, apart from the one that is in use.
lay_out() {
    built=$1
    rm -rf "$lib"
    mkdir -p "$lib/ebin" "$lib/priv" "$lib/test"
    cp "$built" "$lib/priv/erllama_cache_nif.so"
    cp "$here/src/erllama_cache_nif.app.src" "$lib/ebin/erllama_cache_nif.app"
    # The vectors.
    cp -R "$here/test/." "$lib/test"
    erlc +debug_info -o "$lib/ebin" "$here"/src/*.erl
    # Apart, as rebar3 has them: some tests want a node without them.
    erlc +debug_info +nowarn_export_all -I "$here/src" -pa "$lib/ebin" -o "$lib/test/fakes" \
        "$here"/test/fakes/*.erl
    erlc +debug_info +nowarn_export_all -I "$here/src" -pa "$lib/ebin" -pa "$lib/test/fakes" \
        -o "$lib/test" "$here"/test/*.erl
}

# What runs the tests inside a VM, and ends with a status. Time has another pace there.
write_runner() {
    cat >"$out/sanitize_runner.erl" <<'END'
-module(sanitize_runner).
-export([main/0]).

main() ->
    {Modules, ["and" | Suites]} =
        lists:splitwith(fun(Word) -> Word =/= "and" end, init:get_plain_arguments()),
    EUnit = [list_to_atom(Module) || Module <- Modules] -- [''],
    Passed = EUnit =:= [] orelse eunit:test(EUnit, [verbose]) =:= ok,
    Failed = Suites =/= [] andalso suites(Suites),
    io:format("EUnit passed: ~p, failed of Common Test: ~p~n", [Passed, Failed]),
    halt(case Passed andalso Failed =:= false of true -> 0; false -> 1 end).

suites([First | _] = Suites) ->
    Dir = filename:dirname(code:which(list_to_atom(First))),
    Result = ct:run_test([
        {suite, Suites}, {dir, Dir}, {auto_compile, false}, {logdir, "ct"},
        {multiply_timetraps, 20}
    ]),
    io:format("Common Test: ~p~n", [Result]),
    case Result of
        {Passed, 0, {_SkippedByUser, 0}} when Passed > 0 -> false;
        _ -> Result
    end.
END
    erlc -o "$out" "$out/sanitize_runner.erl"
}

# The VM is not instrumented: what it still refers to when it halts would all be called a leak.
# With its own allocators off, each binary is a block of malloc's, and a step beyond it is seen.
nif_under_asan() {
    fresh_reports
    export ASAN_OPTIONS="detect_leaks=0:log_path=$reports/report"
    ended=0
    # shellcheck disable=SC2086  # lists of words are split on purpose
    LD_PRELOAD="$libasan" erl -noinput -pa "$lib/ebin" "$lib/test" "$lib/test/fakes" "$out" \
        -run sanitize_runner main -extra $eunit and $suites || ended=$?
    # Of a VM that a test has started, too.
    if [ -n "$(ls "$reports")" ]; then
        cat "$reports"/*
        return 1
    fi
    return "$ended"
}

fresh_reports() {
    rm -rf "$reports" "$out/ct"
    mkdir -p "$reports" "$out/ct"
    cd "$out"
    export ERL_CRASH_DUMP_SECONDS=0
    export ERL_FLAGS="+Mea min"
}

# memcheck on the library as it is shipped. The JIT writes code that valgrind has translated already,
# and into a file of its own, hence --smc-check=all; without it the VM crashes.
#
# Whether a value is initialised is not asked: what the JIT keeps in memory looks to valgrind as if
# nobody had set it, and so does every term that the library gets. Invalid reads and writes, also of
# freed memory, and wrong frees are what is looked for. Compiled Erlang has its stack in a process's
# heap, where valgrind takes what is below it for forbidden: an address inside a block that is there is
# no error. The VMs that tests start run without valgrind: they would not answer in time.
#
# Each process begins with a heap of 200,000 words: where it has to collect garbage early, the VM itself
# crashes under valgrind, before it has loaded the library.
nif_under_valgrind() {
    fresh_reports
    ROOTDIR=$(erl -noinput -eval 'io:format("~s", [code:root_dir()]), halt().')
    BINDIR="$ROOTDIR/erts-$(erl -noinput -eval \
        'io:format("~s", [erlang:system_info(version)]), halt().')/bin"
    export ROOTDIR BINDIR EMU=beam PROGNAME=erl
    # A VM for each: the longer one runs like that, the likelier its own code stumbles over what
    # valgrind makes of the stack.
    ended=0
    for module in $eunit; do
        vm_under_valgrind "$module" and || ended=$?
    done
    for suite in $suites; do
        vm_under_valgrind and "$suite" || ended=$?
    done
    # What has no frame of the library is the VM's own. A frame whose line is known names a source of
    # Rust and not the library.
    ours=$(awk -v RS='==[0-9]+== \n' '
        / (at|by) 0x/ && /erllama_cache_nif\.so|\.rs:[0-9]+\)/ && !/ inside a block of size [0-9,]+ alloc/
    ' "$reports"/report.*)
    if [ -n "$ours" ]; then
        echo "$ours"
        return 1
    fi
    return "$ended"
}

vm_under_valgrind() {
    valgrind --smc-check=all --undef-value-errors=no --error-limit=no --num-callers=40 \
        --fair-sched=try --redzone-size=128 --max-stackframe=1000000 \
        --suppressions="$here/proofs/sanitize/valgrind.supp" \
        --log-file="$reports/report.%p" \
        "$BINDIR/beam.smp" -Mea min -h 200000 -- -root "$ROOTDIR" -bindir "$BINDIR" -progname erl -- \
        -home "${HOME:-/}" -- -noshell -noinput -pa "$lib/ebin" "$lib/test" "$lib/test/fakes" "$out" \
        -run sanitize_runner main -extra "$@"
}

sequences() {
    PROPER_SEQUENCES="${PROPER_SEQUENCES:-$1}"
    export PROPER_SEQUENCES
}

thread() {
    # It needs a standard library that is instrumented too: it does not know the locks of one that is
    # not, and takes what they guard for races.
    need component:rust-src
    run thread threads
    echo "sanitize: ThreadSanitizer finds nothing in what the core's threads share"
}

address() {
    run address core
    echo "sanitize: AddressSanitizer finds nothing in the core"
}

nif() {
    need libasan.so
    libasan=$(find_libasan)
    # Enough to see every step in every state.
    sequences 300
    run build build_nif
    run runner write_runner
    run nif nif_under_asan
    echo "sanitize: AddressSanitizer finds nothing in the NIF library inside the VM"
}

valgrind_nif() {
    need valgrind
    sequences 20
    run build build_shipped_nif
    run runner write_runner
    run valgrind nif_under_valgrind
    echo "sanitize: valgrind finds nothing in the NIF library inside the VM"
}

mkdir -p "$out"
[ $# -gt 0 ] || set -- thread address nif
case "$*" in
    valgrind) ;;
    *) need toolchain:nightly; host=$(rustc +nightly -vV | sed -n 's/^host: //p') ;;
esac
for part in "$@"; do
    case $part in
        thread | address | nif) "$part" ;;
        valgrind) valgrind_nif ;;
        *) fail "no such part: $part" ;;
    esac
done
