#!/bin/sh
# Proves that `kill -9` of a node costs nothing but the saves that it cuts off:
#
#     proofs/kill/run.sh [plain|text|behind|named...]
#
# Two VMs with 8 savers each save the same keys into one root. At random moments one of them, or both,
# is killed, also while it starts; the other goes on, one of its saves stopped in the middle, and the
# killed one starts again on the root. After each kill both load every new key and some old ones, and
# every byte is compared: a key that anybody was told is stored is there, is the same for both and
# stays the same; a save that was cut off left a whole file or nothing; there is one file for each key,
# no temporary file, slot, reservation or open file. After each 25 kills, and at the end,
# proofs/oracle/kvc_oracle.py, which shares no code with the library, checks 16 MiB of files, first those
# whose saves were cut off.
#
#   plain   on the file system of $TMPDIR, where temporary files have no names
#   text    the same with keys of text, whose files are of version 2
#   behind  on the same with saves behind their callers, and with keys that one node alone saves. What was
#           answered before a flush began that returned ok is there; what was only answered is there as a
#           whole file, or nowhere, and then the next node saves it
#   named   on bindfs (FUSE), where they have names and locks, and a start sweeps what the killed left
#
# Without an argument: all. KILLS sets how many kills for each (300), KILL_SEED repeats a storm's
# choices (the moments of the machine differ). `named` has to be root for the mount, in a namespace of
# its own: nothing stays mounted, however it ends. Where it cannot run this fails, unless
# KILL_MAY_MISS=named says that it may. On a failure the root is kept.
set -eu

here=$(cd "$(dirname "$0")/../.." && pwd)
. "$here/proofs/lib.sh"

# On the root it is given; $work has what else it needs.
storm() { # ROOT tokens|text
    KILL_ROOT=$1 KILL_KEYED_BY=$2 KILL_NOISE=$work/noise KILL_STDERR=$work/stderr \
        KILL_ORACLE=$here/proofs/oracle/kvc_oracle.py \
        erl -noinput -boot start_clean -pa "$lib/ebin" "$work/beam" -s erllama_cache_kill main
}

run() { # NAME
    temp_dir
    mkdir "$work/root" "$work/mnt"
    head -c 8388608 /dev/urandom >"$work/noise"
    beams "$work/beam" test_util hooked_host kill
    echo "==== kill -9: $1 ===="
    status=0
    case $1 in
        plain) storm "$work/root" tokens || status=$? ;;
        text) storm "$work/root" text || status=$? ;;
        behind) KILL_BEHIND=1 storm "$work/root" tokens || status=$? ;;
        # In namespaces of its own: the file system's process ends with them too.
        named)
            KILL_INSIDE=$work unshare --mount --pid --fork --kill-child --mount-proc "$0" ||
                status=$?
            ;;
    esac
    if [ "$status" -ne 0 ]; then
        trap - EXIT
        cat "$work/stderr" >&2 || true
        fail "$1 failed; its root is $work/root"
    fi
}

# Why `named` cannot run here, or nothing.
missing() {
    is_root || { echo "it takes root"; return; }
    [ -e /dev/fuse ] || { echo "there is no /dev/fuse"; return; }
    "$here/tools/setup.sh" bindfs >/dev/null 2>&1 ||
        { echo "bindfs is not there, and apt does not install it"; return; }
    unshare --mount --pid --fork true 2>/dev/null || echo "namespaces are not allowed"
}

if [ "${KILL_INSIDE:-}" ]; then
    work=$KILL_INSIDE
    bindfs "$work/root" "$work/mnt"
    KILL_NAMED=1 storm "$work/mnt" tokens
    exit
fi

need_compiled
[ -e /proc/locks ] || fail "needs Linux with /proc"
missed=""
[ $# -gt 0 ] || set -- plain text behind named
for storm in "$@"; do
    case $storm in
        plain | text | behind) (run "$storm") ;;
        named)
            why=$(missing)
            if [ -z "$why" ]; then
                (run named)
            elif [ "${KILL_MAY_MISS:-}" = named ]; then
                echo "kill: named was not run: $why"
                missed=" (not run: named)"
            else
                fail "named cannot run: $why. KILL_MAY_MISS=named allows that"
            fi
            ;;
        *) fail "no such storm: $storm" ;;
    esac
done
echo "kill: nothing was lost, nothing was left$missed"
