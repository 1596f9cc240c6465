#!/bin/sh
# Adds to what examples/llm/fetch.sh has fetched into $LLM the Python packages that `make bench-peers`
# measures beside this writer, and runs a command:
#
#     examples/llm/fetch.sh bench/peers/setup.sh COMMAND ...
#
#   safetensors PyPI: the file format in which vLLM's example connector keeps KV caches
#   numpy       whose arrays SGLang's file back end writes
#
# Versions are pinned. Nothing of it is installed anywhere else, or committed.
set -eu

here=$(cd "$(dirname "$0")/../.." && pwd)
. "$here/proofs/lib.sh"

python=${LLM:?}/python/bin
if ! "$python/python" -c 'import numpy, safetensors' 2>/dev/null; then
    echo "peers: fetching safetensors and numpy"
    quietly "$LLM/peers.log" "$python/pip" install --quiet numpy==2.2.6 safetensors==0.6.2
fi
"$@"
