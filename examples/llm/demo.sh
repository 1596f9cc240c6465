#!/bin/sh
# `make demo-llm`: what llm_demo.erl shows, in two VMs, one after the other. All is written below
# $TMPDIR and _build/llm.
#
#     TOKENS=2000     the length of the prompt
#     LLM_THREADS=1   how many threads compute; beside other work, fewer than there are processors
#     MAY_SKIP=yes    where llama.cpp or the model cannot be fetched, that is said, and is no failure
set -eu

here=$(cd "$(dirname "$0")/../.." && pwd)
. "$here/proofs/lib.sh"
cd "$here"
need_compiled
temp_dir

status=0
"$here/examples/llm/fetch.sh" true || status=$?
if [ "$status" -eq 75 ] && [ "${MAY_SKIP:-}" = yes ]; then
    echo "$me: SKIPPED: see above"
    exit 0
fi
[ "$status" -eq 0 ] || exit "$status"

mkdir "$work/store"
erlc -Werror -o "$work" examples/llm/llm.erl examples/llm/llm_demo.erl
for part in cold restart; do
    ROOT=$work/store examples/llm/fetch.sh \
        erl -noinput -pa "$lib/ebin" "$work" -run llm_demo main "$part"
done
