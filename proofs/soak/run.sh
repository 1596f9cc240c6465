#!/bin/sh
# Uses a bounded store in every way at once, for an hour, and shows that nothing is lost on the way:
#
#   who    savers, savers in the background that cancel or die, loaders, holders of slots, one who
#          deletes, one who changes limits all the time; somebody is killed every 20 ms; writer and
#          store are stopped or killed every 5 s and start again
#   what   each load, and at the end each file, is compared with what was saved under its key; a save
#          is refused room, its key or its reservation only where a ledger of all of them says why
#   after  when all is at rest, file descriptors, threads, processes, ports, ETS tables and resource
#          objects are as many as after the warm-up, atoms and memory within a bound (the module says
#          why), the store within its own, and its books balance; deleted, it leaves an empty directory
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
