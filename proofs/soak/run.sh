#!/bin/sh
# Uses a bounded store in every way at once, for an hour, and shows that nothing is lost on the way:
#
#   who    savers, savers in the background that cancel or die, savers behind their callers, more than
#          may be pending, loaders, holders of slots, one who deletes, one who changes limits all the
#          time; somebody is killed every 20 ms, and one whose save goes on behind its caller; writer
#          and store are stopped or killed every 5 s and start again
#   what   each load, and at the end each file, is compared with what was saved under its key; a save
#          is refused room, its key or its reservation only where a ledger of all of them says why. What
#          is pending is loaded from memory; after a flush it is not pending, and has ended well or was
#          dropped, which is logged and counted, with a cause
#   after  when all is at rest, nothing is pending, and file descriptors, threads, processes, ports, ETS
#          tables and resource objects are as many as after the warm-up; atoms and memory are within a
#          bound (the module says why), the store is within its own, its books and those of the pending
#          set balance; deleted, it leaves an empty directory
#
#   SOAK      seconds (3600)
#   SOAK_DIR  where the store is (TMPDIR, else /tmp)
#
# It ends with a table and with curves over time, whose figures are in _build/soak/soak.csv, and with
# a status that is not 0 if anything is not back.
set -eu

here=$(cd "$(dirname "$0")/../.." && pwd)
. "$here/proofs/lib.sh"
out="$here/_build/soak"
: "${SOAK:=3600}"

temp_dir "${SOAK_DIR:-}"
SOAK_ROOT=$work
SOAK_CSV="$out/soak.csv"
export SOAK SOAK_ROOT SOAK_CSV

beams "$out" soak
# Memory goes back to the system at once (+MMmcs 0). Without +fnu the curves would be escapes where the
# locale is not set.
erl +MMmcs 0 +fnu +pc unicode -noinput -pa "$lib/ebin" "$out" -eval 'io:setopts([{encoding, unicode}])' \
    -run erllama_cache_soak main
