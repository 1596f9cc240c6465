#!/bin/sh
# Proves that a machine with nothing on it comes from a clone to a demonstration and to tests that pass by
# the commands that the README names:
#
#     proofs/fresh/run.sh [RELEASE...]
#
# Without a release: bookworm, trixie and forky, each in a root that debootstrap has just made, without
# a locale, without Rust and without Erlang. It needs root, and Debian or Ubuntu for debootstrap; packages
# come from where apt on this machine has its own from, crates from where cargo does, and the model from
# where pip and npm do. $FRESH_TARGETS are the make targets, `demo demo-llm test` if it is not set;
# $TOKENS and $MAY_SKIP are for `demo-llm`. What is cloned is what is committed.
set -eu

here=$(cd "$(dirname "$0")/../.." && pwd)
. "$here/proofs/lib.sh"
. "$here/proofs/debian.sh"
releases=${*:-bookworm trixie forky}
targets=${FRESH_TARGETS:-demo demo-llm test}

is_root || fail "has to run as root, for chroot"

# Nothing of this machine's but its network: the addresses of crates, and the certificates by which the
# network is known, if it has some of its own.
inside() { # ROOT COMMANDS
    mount_root "$1"
    certificates=/etc/ssl/certs/ca-certificates.crt
    mount --bind "$certificates" "$1$certificates"
    # Python's and Node's own have lists of their own.
    chroot "$1" env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        PIP_CERT="$certificates" NODE_EXTRA_CA_CERTS="$certificates" \
        TOKENS="${TOKENS:-2000}" MAY_SKIP="${MAY_SKIP:-}" \
        ERL_EPMD_PORT=14370 ${PROPER_SEQUENCES:+PROPER_SEQUENCES="$PROPER_SEQUENCES"} \
        sh -eu -c "$2"
}

if [ "${FRESH_INSIDE:-}" ]; then
    inside "$FRESH_INSIDE" "$1"
    exit
fi

run() { # ROOT COMMANDS
    FRESH_INSIDE=$1 unshare --mount --pid --fork --kill-child "$0" "$2"
}

# Debian 12 has the Rust that is new enough among its security updates, which debootstrap leaves out and
# an installed machine has.
add_updates() { # RELEASE ROOT
    updates=$(archive '$1 ~ /security/')
    [ "$1" != bookworm ] || [ -z "$updates" ] ||
        echo "deb $updates $1-security main" >"$2/etc/apt/sources.list.d/security.list"
}

table=
mkdir -p "$here/_build"
for release in $releases; do
    temp_dir "$here/_build"
    root=$work/$release
    echo "==== $release ===="
    create_root "$release" "$root"
    add_updates "$release" "$root"
    if [ -e "${CARGO_HOME:-$HOME/.cargo}/config.toml" ]; then
        mkdir -p "$root/root/.cargo"
        cp "${CARGO_HOME:-$HOME/.cargo}/config.toml" "$root/root/.cargo/"
    fi
    git clone -q "$here" "$root/root/erllama_cache_nif"
    run "$root" 'apt-get -q update && apt-get -q -y install make'
    for target in $targets; do
        begun=$(date +%s)
        run "$root" "cd /root/erllama_cache_nif && make $target"
        table="$table$(printf '%-10s make %-8s %5d s' "$release" "$target" $(($(date +%s) - begun)))
"
    done
    versions=$(run "$root" 'rustc --version; erl -noinput -eval "io:put_chars([\"OTP \",
        erlang:system_info(otp_release)]), halt()."' | tr '\n' ' ')
    table="$table$(printf '%-10s %s' "$release" "$versions")
"
    rm -rf "$work"
done

printf '\n%s' "$table"
echo "fresh: what the README says first works on a machine with nothing on it"
