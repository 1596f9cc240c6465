#!/bin/sh
# Builds the archives of a release, with the NIF library and kvc, and their checksums:
#
#     tools/prebuilt.sh [TARGET...]
#
# Without a target: this machine's, and aarch64-unknown-linux-gnu where its linker is or can be had. They
# are in _build/prebuilt, with checksums.txt, which belongs to c_src/ of the sources that are released. A
# library needs a C library as new as that of the machine which has built it: build on the oldest system
# that is supported, Debian 12.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/proofs/lib.sh"

out=$here/_build/prebuilt
version=$(sed -n 's/.*{vsn, "\([^"]*\)"}.*/\1/p' "$here/src/erllama_cache_nif.app.src")
host=$(rustc -vV | sed -n 's/^host: //p')
other=aarch64-unknown-linux-gnu
targets=$*
if [ -z "$targets" ]; then
    targets=$host
    if [ "$host" != "$other" ]; then
        if "$here/tools/setup.sh" aarch64-linux-gnu-gcc "target:$other"; then
            targets="$targets $other"
        else
            echo "prebuilt: left out: $other"
        fi
    fi
fi

build() { # TARGET
    (
        cd "$here/native"
        # What is not needed to run it is left out; a panic still names its place.
        export CARGO_PROFILE_RELEASE_STRIP=symbols
        export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
        export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
        cargo build --locked --release -p erllama_cache_nif -p kvc --target "$1" \
            --target-dir target/prebuilt
    )
}

temp_dir
rm -rf "$out"
mkdir -p "$out"
for target in $targets; do
    build "$target"
    built=$here/native/target/prebuilt/$target/release
    mkdir "$work/$target"
    cp "$built/liberllama_cache_nif.so" "$work/$target/erllama_cache_nif.so"
    cp "$built/kvc" "$here/LICENSE" "$work/$target/"
    "$here/tools/archive.sh" "$work/$target" "$out/erllama_cache_nif-$version-$target.tar.gz"
done
(cd "$out" && sha256sum -- *.tar.gz >checksums.txt && cat checksums.txt)

# As somebody who has the sources of the release, and no Rust.
install_host() {
    mkdir -p "$work/project/src"
    cp -R "$here/c_src" "$work/project/"
    cp "$here/src/erllama_cache_nif.app.src" "$work/project/src/"
    cp "$out/checksums.txt" "$work/project/c_src/"
    ERLLAMA_CACHE_NIF_PREBUILT=$out make -C "$work/project/c_src"
    cmp "$work/$host/erllama_cache_nif.so" "$work/project/priv/erllama_cache_nif.so"
}
case " $targets " in
    *" $host "*) install_host || fail "the hook does not install what was built" ;;
esac
echo "prebuilt: in $out"
