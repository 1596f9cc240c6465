#!/bin/sh
# Checks the alert rules with promtool. Where there is none, and apt has it, it is unpacked from Debian's
# package and not installed: that would start a server.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/proofs/lib.sh"

promtool=$(command -v promtool || echo "$tools/prometheus/usr/bin/promtool")
if [ ! -x "$promtool" ]; then
    has apt-get || fail "there is no promtool: https://prometheus.io/download"
    temp_dir
    cd "$work"
    apt-get -q download prometheus || { as_root apt-get -q update && apt-get -q download prometheus; }
    mkdir -p "$tools/prometheus"
    dpkg-deb -x prometheus_*.deb "$tools/prometheus"
fi
"$promtool" check rules "$here/dashboards/alerts.yml"
