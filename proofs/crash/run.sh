#!/bin/sh
# Proves that what was saved survives a power cut, and that nothing is ever there in part:
#
#     proofs/crash/run.sh
#
# A guest kernel of User Mode Linux, which boots in two seconds as a plain process, runs stores on
# an ext4 of its own and saves without pause: new payloads, two saves of one key at a time, deletes,
# files that are damaged for a save to replace, evictions; somebody else beside them syncs a file of
# his own. Half of the saves go on behind their callers. What a save has acknowledged leaves the guest
# at once; for one behind its caller that is its answer, which promises nothing yet, and then the flush.
# Then
#
#   - its power is cut at a random moment, by SIGKILL. In the next guest, which replays the journal,
#     proofs/oracle/kvc_oracle.py checks each file before a store starts, and then the stores load all that
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

here=$(cd "$(dirname "$0")/../.." && pwd)
. "$here/proofs/lib.sh"
uml=/usr/lib/uml/modules

[ "$(uname -s) $(uname -m)" = "Linux x86_64" ] || fail "needs Linux on x86-64, for User Mode Linux"
case $here/ in
    /dev/* | /proc/* | /run/* | /sys/*) fail "a guest does not see $here: it has its own there" ;;
esac

need linux.uml mkfs.ext4 dmsetup python3

ebin=$here/_build/crash/ebin
beams "$ebin" crash
shim linger
shim xstate
temp_dir "$here/_build/crash"

# In the background, for a shell hears of a signal only between two commands.
PYTHONDONTWRITEBYTECODE=1 python3 "$here/proofs/crash/crash.py" \
    --ebin "${CRASH_EBIN:-$lib/ebin}" \
    --ebin "$ebin" \
    --linger "$here/_build/linger.so" --xstate "$here/_build/xstate.so" \
    --modules "$uml" --work "$work" --modes "${MODES:-ordered writeback journal unknown}" \
    --cuts "${CUTS:-100}" --saves "${SAVES:-25}" --samples "${SAMPLES:-4}" \
    --jobs "${JOBS:-$(nproc)}" ${SEED:+--seed "$SEED"} &
pid=$!
trap 'kill $pid; wait $pid || true; exit 1' HUP INT TERM
wait $pid
