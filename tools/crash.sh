#!/bin/sh
# Proves that what was saved survives a power cut, and that nothing is ever there in part:
#
#     tools/crash.sh
#
# A guest kernel of User Mode Linux, which boots in two seconds as a plain process, runs stores on
# an ext4 of its own and saves without pause: new payloads, two saves of one key at a time, deletes,
# files that are damaged for a save to replace, evictions; somebody else beside them syncs a file of
# his own. What a save has acknowledged leaves the guest at once. Then
#
#   - its power is cut at a random moment, by SIGKILL. In the next guest, which replays the journal,
#     test/kvc_oracle.py checks each file before a store starts, and then the stores load all that
#     was acknowledged, byte for byte. It goes on with the same disk until it is cut again;
#   - in another run dm-log-writes logs each write and flush. What a disk may hold at each point of
#     the log is made, and checked in the same way: after each flush, and before it with all, none
#     and some of the writes that it was to make safe, whole or torn.
#
# Both in each mode of ext4's journal, and as if the library did not know which file system it is on.
# MODES=none shows what the first comes to without a journal, where e2fsck goes before the mount and what
# was deleted may be back in front of other content: nothing is promised there. It needs x86-64 Linux with Debian's or Ubuntu's packages, and
# installs what is missing as root or by sudo. Nothing is mounted here, and no device is used: that
# is all in the guests.
#
#   CUTS=100      power cuts in all; 0 for none
#   SAVES=25      saves in each run that is logged; 0 for none
#   SAMPLES=4     disks that are tried before each flush
#   MODES=...     "ordered writeback journal unknown"
#   JOBS=...      guests at a time: as many as there are processors
#   SEED=...      the one that a run has printed, for the same choices. What the machine does in the
#                 meantime is never the same
#   CRASH_EBIN=.. the application's ebin, to try this on another build
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
uml=/usr/lib/uml/modules

fail() {
    echo "crash: $*" >&2
    exit 2
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo "$@"
    fi
}

[ "$(uname -s) $(uname -m)" = "Linux x86_64" ] || fail "needs Linux on x86-64, for User Mode Linux"
case $here/ in
    /dev/* | /proc/* | /run/* | /sys/*) fail "a guest does not see $here: it has its own there" ;;
esac

# mkfs.ext4 and dmsetup are in directories that are not on everybody's PATH.
PATH="$PATH:/usr/sbin:/sbin"
wanted=
command -v linux.uml >/dev/null && [ -d "$uml" ] || wanted="$wanted user-mode-linux"
command -v mkfs.ext4 >/dev/null || wanted="$wanted e2fsprogs"
command -v dmsetup >/dev/null || wanted="$wanted dmsetup"
if [ -n "$wanted" ]; then
    command -v apt-get >/dev/null || fail "missing:$wanted"
    [ "$(id -u)" = 0 ] || command -v sudo >/dev/null || fail "not root, and missing:$wanted"
    echo "crash: installing by apt:$wanted"
    # shellcheck disable=SC2086  # a list of words
    { as_root apt-get -qq update &&
        as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get -qq -y --no-install-recommends install $wanted >/dev/null; } ||
        fail "apt could not install$wanted"
fi

ebin=$here/_build/crash/ebin
mkdir -p "$ebin"
erlc -Werror -o "$ebin" "$here/test/erllama_cache_crash.erl"
for preload in linger xstate; do
    cc -Wall -Wextra -Werror -O1 -shared -fPIC \
        -o "$here/_build/crash/$preload.so" "$here/test/crash/$preload.c" -ldl
done
work=$(mktemp -d "$here/_build/crash/run.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# In the background, for a shell hears of a signal only between two commands.
PYTHONDONTWRITEBYTECODE=1 python3 "$here/test/crash/crash.py" \
    --ebin "${CRASH_EBIN:-$here/_build/default/lib/erllama_cache_nif/ebin}" \
    --ebin "$ebin" \
    --linger "$here/_build/crash/linger.so" --xstate "$here/_build/crash/xstate.so" \
    --modules "$uml" --work "$work" --modes "${MODES:-ordered writeback journal unknown}" \
    --cuts "${CUTS:-100}" --saves "${SAVES:-25}" --samples "${SAMPLES:-4}" \
    --jobs "${JOBS:-$(nproc)}" ${SEED:+--seed "$SEED"} &
pid=$!
trap 'kill $pid; wait $pid || true; exit 1' HUP INT TERM
wait $pid
