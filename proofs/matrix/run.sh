#!/bin/sh
# Proves that it builds without a warning and passes its tests on the Erlang/OTP and the Elixir of
# other Debian releases, each in a root of its own:
#
#     proofs/matrix/run.sh [--roots] [RELEASE...]
#
# Without a release: trixie (OTP 27) and forky (the newest OTP that Debian has). With --roots it
# makes the roots with all that the tests need, and runs none.
#
# It needs root, and Debian or Ubuntu for debootstrap; packages come from where apt on this machine
# has its own from. Rust is this machine's. Roots are kept in _build/matrix (or $MATRIX_DIR) for the
# next time. $MATRIX_TARGET is the make target that is run, test-beam if it is not set;
# $PROPER_SEQUENCES is passed on.
set -eu

here=$(cd "$(dirname "$0")/../.." && pwd)
. "$here/proofs/lib.sh"
. "$here/proofs/debian.sh"
roots=${MATRIX_DIR:-$here/_build/matrix}
target=${MATRIX_TARGET:-test-beam}
roots_only=
if [ "${1:-}" = --roots ]; then
    roots_only=yes
    shift
fi
releases=${*:-trixie forky}
cargo_home=${CARGO_HOME:-$HOME/.cargo}
rustup_home=${RUSTUP_HOME:-$HOME/.rustup}

is_root || fail "has to run as root, for chroot"

# What runs in namespaces of its own, so that nothing stays mounted or goes on running, however it
# ends: not even an epmd, which has a port of its own here, so that nobody else comes to rely on it.
inside() { # ROOT COMMANDS
    mount_root "$1"
    for dir in "$cargo_home" "$rustup_home"; do
        mkdir -p "$1$dir"
        mount --bind "$dir" "$1$dir"
    done
    chroot "$1" env -i HOME="$HOME" CARGO_HOME="$cargo_home" RUSTUP_HOME="$rustup_home" \
        PATH="$cargo_home/bin:/usr/sbin:/usr/bin:/sbin:/bin" LC_ALL=C.UTF-8 CI=true \
        ERL_EPMD_PORT=14369 ${PROPER_SEQUENCES:+PROPER_SEQUENCES="$PROPER_SEQUENCES"} \
        sh -eu -c "cd /src; $2"
}

if [ "${MATRIX_INSIDE:-}" ]; then
    inside "$MATRIX_INSIDE" "$1"
    exit
fi

run() { # ROOT COMMANDS
    MATRIX_INSIDE=$1 unshare --mount --pid --fork --kill-child "$0" "$2"
}

now() {
    date +%s
}

table=
for release in $releases; do
    root=$roots/$release
    begun=$(now)
    echo "==== $release ===="
    [ -e "$root/.complete" ] || create_root "$release" "$root"
    # What git knows, as it is here now, and nothing that it knew the last time. What was built there
    # stays, for the next time.
    mkdir -p "$root/src"
    find "$root/src" \( -name _build -o -name target -o -name priv -o -name deps \) -prune \
        -o -type f -exec rm -f {} +
    copy_project "$root/src"
    [ -d "$root/src/native/target" ] || copy_cargo_cache "$root/src"
    run "$root" tools/setup.sh
    otp=$(run "$root" 'erl -noinput -eval \
        "io:put_chars(erlang:system_info(otp_release)), halt()."')
    elixir=$(run "$root" 'elixir --short-version')
    made=$(now)
    if [ -z "$roots_only" ]; then
        run "$root" "make $target"
    fi
    table="$table$(printf '%-8s  %3s  %-8s  %4d s  %4d s' \
        "$release" "$otp" "$elixir" $((made - begun)) $(($(now) - made)))
"
done

printf '\n%-8s  %3s  %-8s  %6s  %6s\n' release OTP Elixir root "${roots_only:+no }tests"
printf '%s' "$table"
[ -n "$roots_only" ] || echo "matrix: $target passed on each"
