#!/bin/sh
# Installs what building and testing need, where apt can (Debian, Ubuntu; as root or with sudo).
# Elsewhere it names what is missing and where to get it. With everything there it says so and
# touches nothing, so `make test` and `make demo` run it every time.
#
#     tools/setup.sh [WORD...]
#
# With words it is about these only: commands that some proof needs beside, or `target:NAME`, a target
# of Rust's, which rustup installs. Then it says nothing if all are there.
# shellcheck disable=SC2086  # lists of words are split on purpose
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
# What makes file systems is where not everybody's PATH leads.
PATH="$PATH:${CARGO_HOME:-${HOME:-/}/.cargo}/bin:/usr/sbin:/sbin"

# OTP applications that rebar3 and the tests use, beyond kernel and stdlib.
otp_apps="common_test compiler crypto dialyzer edoc eunit inets parsetools public_key \
runtime_tools ssl syntax_tools tools"

has() {
    command -v "$1" >/dev/null 2>&1
}

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
    if has erl; then
        missing_apps
    else
        printf 'erl '
    fi
}

is_there() {
    case $1 in
        target:*) has_target "${1#target:}" ;;
        *) has "$1" ;;
    esac
}

# Whether Rust has its standard library for this target, from rustup or from elsewhere.
has_target() {
    has rustc && [ -d "$(rustc --print sysroot)/lib/rustlib/$1/lib" ]
}

# Has rustup install those of the words that it can. What is missing then is looked for again.
install_targets() {
    has rustup || return 0
    for word in "$@"; do
        case $word in
            target:*)
                echo "setup: installing by rustup: ${word#target:}"
                rustup target add "${word#target:}" || true
                ;;
        esac
    done
}

# Prints the Debian packages for the words given.
packages() {
    for word in "$@"; do
        case $word in
            target:*) ;;
            mkfs.ext4) echo e2fsprogs ;;
            mkfs.xfs) echo xfsprogs ;;
            mkfs.btrfs) echo btrfs-progs ;;
            setquota) echo quota ;;
            linux.uml) echo user-mode-linux ;;
            modprobe) echo kmod ;;
            musl-gcc) echo musl-tools ;;
            make | python3 | rebar3 | elixir | bindfs) echo "$word" ;;
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

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo "$@"
    fi
}

advise() {
    echo "setup: missing: $*" >&2
    for word in "$@"; do
        case $word in
            make) echo "  make: on macOS \`xcode-select --install\`, else your package manager" ;;
            cc) echo "  cc (gcc or clang), with which Rust links: on macOS \`xcode-select --install\`, else your package manager" ;;
            python3) echo "  python3: https://www.python.org or your package manager" ;;
            erl) echo "  erl, Erlang/OTP 25 or later: brew install erlang, asdf install erlang, https://www.erlang.org" ;;
            rebar3) echo "  rebar3: brew install rebar3, asdf install rebar, https://rebar3.org" ;;
            elixir) echo "  elixir 1.14 or later: brew install elixir, asdf install elixir, https://elixir-lang.org/install.html" ;;
            target:*) echo "  Rust's target ${word#target:}: rustup target add ${word#target:}; https://rustup.rs" ;;
            bindfs | linux.uml | mkfs.* | modprobe | musl-gcc | setquota)
                echo "  $word: Debian and Ubuntu have it in $(packages "$word")"
                ;;
            proper) echo "  proper (PropEr): https://github.com/proper-testing/proper, built, with ERL_LIBS naming the directory it is in" ;;
            *) echo "  $word: an application of Erlang/OTP that this installation was built without" ;;
        esac
    done >&2
}

absent=$(missing "$@")
if [ -n "$absent" ]; then
    echo "setup: missing: $absent"
    install_targets $absent
    wanted=$(packages $absent | tr ' ' '\n' | sort -u | tr '\n' ' ')
    if [ -n "$wanted" ] && has apt-get && { [ "$(id -u)" = 0 ] || has sudo; } &&
        { [ $# -gt 0 ] || erlang_is_from_apt; }; then
        echo "setup: installing by apt: $wanted"
        as_root apt-get -q update
        as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get -q -y --no-install-recommends install $wanted
    fi
    absent=$(missing "$@")
    if [ -n "$absent" ]; then
        advise $absent
        exit 1
    fi
fi
[ $# -eq 0 ] || exit 0

# cargo is never installed from here: its usual installer is a script from the network, and that
# is for you to run. The Makefile that builds with it says what is wrong.
make -s -C "$here/c_src" check-cargo || exit 1
echo "setup: everything is there"
