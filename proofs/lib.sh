# shellcheck shell=sh
# What the scripts of proofs/, bench/ and tools/ share. Each sets $here, the project's directory, and
# then sources this:
#
#     here=$(cd "$(dirname "$0")/../.." && pwd)
#     . "$here/proofs/lib.sh"

: "${here:?}"

# What a message begins with: the proof's folder, or the script's name.
me=$(basename "$0" .sh)
[ "$me" != run ] || me=$(basename "$(cd "$(dirname "$0")" && pwd)")

# The application, as `make` compiles it.
# shellcheck disable=SC2034  # for the scripts
lib=$here/_build/default/lib/erllama_cache_nif

# cargo, and what makes file systems, are in directories that are not on every PATH.
PATH="$PATH:${CARGO_HOME:-${HOME:-/}/.cargo}/bin:/usr/sbin:/sbin"
# Where tools/setup.sh installs what comes by pip.
tools=$here/native/target/tools
PATH="$PATH:$tools/bin"

fail() {
    echo "$me: $*" >&2
    exit 1
}

has() {
    command -v "$1" >/dev/null 2>&1
}

is_root() {
    [ "$(id -u)" = 0 ]
}

as_root() {
    if is_root; then
        "$@"
    else
        sudo "$@"
    fi
}

# need WORD...: ends the script unless these are there; tools/setup.sh, which knows the words, installs
# what it can.
need() {
    "$here/tools/setup.sh" "$@" || fail "missing: $*"
}

need_compiled() {
    [ -d "$lib/ebin" ] || fail "not compiled: run make first"
}

# Sets $work to a new directory, below the given one if there is one, and removes it at the end.
temp_dir() { # [PARENT]
    work=$(mktemp -d "${1:-${TMPDIR:-/tmp}}/$me.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT TERM
}

# quietly LOG COMMAND...: what the command prints goes to the log, and is shown only if it fails.
quietly() {
    log=$1
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

# beams DIRECTORY MODULE...: compiles modules of proofs/ and test/, named without `erllama_cache_`.
beams() {
    beams=$1
    shift
    mkdir -p "$beams"
    for module in "$@"; do
        erlc +debug_info -Werror -I "$here/src" -pa "$lib/ebin" -o "$beams" \
            "$(find "$here/proofs" "$here/test" -name "erllama_cache_$module.erl")"
    done
}

# Compiles a library that is preloaded, from proofs/*/NAME.c to _build/NAME.so.
shim() { # NAME
    make -s -C "$here" "_build/$1.so"
}

# What git knows, as it is here now.
copy_project() { # DIRECTORY
    mkdir -p "$1"
    (cd "$here" && git ls-files -z | xargs -0 cp --parents -t "$1")
}

# So that a copy does not build anew what the library depends on.
copy_cargo_cache() { # DIRECTORY
    if [ -d "$here/native/target/release" ]; then
        mkdir -p "$1/native/target"
        cp -a "$here/native/target/release" "$1/native/target/"
    fi
}
