#!/bin/sh
# Installs the NIF library of a release into priv/, instead of building it:
#
#     ERLLAMA_CACHE_NIF_PREBUILT=DIRECTORY-OR-ADDRESS sh prebuilt.sh
#
# c_src/Makefile runs it where that variable is set. The archive is taken from there by the name that it
# has for this version and this machine, and installed if its SHA-256 is the one that checksums.txt has,
# which comes with the sources. Anything else is an error: nothing is built, and priv/ stays as it is.
set -eu

cd "$(dirname "$0")"
name=erllama_cache_nif
from=${ERLLAMA_CACHE_NIF_PREBUILT:?}
priv=../priv

fail() {
    echo "$name: $*" >&2
    echo "  ERLLAMA_CACHE_NIF_PREBUILT is $from; without it the NIF is built, which needs Rust." >&2
    exit 1
}

target() {
    machine=$(uname -m)
    [ "$machine" != arm64 ] || machine=aarch64
    case $(uname -s) in
        Linux)
            if ldd --version 2>&1 | grep -qi musl; then
                echo "$machine-unknown-linux-musl"
            else
                echo "$machine-unknown-linux-gnu"
            fi
            ;;
        Darwin) echo "$machine-apple-darwin" ;;
        FreeBSD) echo "$machine-unknown-freebsd" | sed 's/^amd64/x86_64/' ;;
        *) fail "no release has a library for $(uname -s)" ;;
    esac
}

sha256() {
    { sha256sum "$1" 2>/dev/null || shasum -a 256 "$1" 2>/dev/null || sha256 -r "$1"; } |
        awk '{ print $1 }'
}

version=$(sed -n 's/.*{vsn, "\([^"]*\)"}.*/\1/p' "../src/$name.app.src")
target=$(target)
archive=$name-$version-$target.tar.gz
wanted=$(awk -v name="$archive" '$2 == name { print $1 }' checksums.txt)
[ -n "$wanted" ] || fail "checksums.txt, which comes with the sources, has no $archive"

# What is installed already is that of this archive.
[ "$(cat "$priv/.prebuilt" 2>/dev/null || true)" != "$wanted" ] || [ ! -f "$priv/$name.so" ] || exit 0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
case $from in
    http://* | https://*)
        address=${from%/}/$archive
        if command -v curl >/dev/null 2>&1; then
            curl -fsSL -o "$work/archive" "$address" || fail "cannot get $address"
        elif command -v wget >/dev/null 2>&1; then
            wget -q -O "$work/archive" "$address" || fail "cannot get $address"
        else
            fail "there is neither curl nor wget to get $address with"
        fi
        ;;
    *)
        [ -f "$from/$archive" ] || fail "there is no $from/$archive"
        cp "$from/$archive" "$work/archive"
        ;;
esac
got=$(sha256 "$work/archive")
[ "$got" = "$wanted" ] || fail "$archive is not the one of this release: its SHA-256 is $got, not $wanted"
tar -xzf "$work/archive" -C "$work" "$name.so" || fail "$archive has no $name.so"

# Under a new name that is then renamed: a running VM may have the old one mapped.
mkdir -p "$priv"
rm -f "$priv/.prebuilt"
cp "$work/$name.so" "$priv/.$name.so.$$"
mv -f "$priv/.$name.so.$$" "$priv/$name.so"
echo "$wanted" >"$priv/.prebuilt"
echo "$name: installed $archive"
