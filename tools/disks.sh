#!/bin/sh
# Proves what saves do on real disks that are full, of somebody else's size, without O_TMPFILE, or taken
# away: the error is told, nothing is left of what failed, nothing that was saved is lost, and with the
# trouble gone it goes on in the same VM.
#
#     tools/disks.sh [SCENARIO...]
#
#   ext4       ext4 of 64 MiB: saves until ENOSPC, then deletion and eviction make room
#   tmpfs      the same on a tmpfs of 32 MiB, for tier disk
#   memory     the same for tier ram_file, which has a way of its own there
#   inodes     ext4 with 64 inodes: saves until there is none left
#   quota      ext4 with user quota, saves as `nobody` until EDQUOT
#   named      bindfs (FUSE), where temporary files have names: all ways of a save, the sweep, a root
#              that is moved away and replaced by a link in the middle of a save
#   named-full bindfs over an ext4 that fills up
#   readonly   remounted read-only and back between saves
#   broken     made read-only by the kernel in the middle of saves (ext4, errors=remount-ro), repaired
#
# Without an argument: all of them. Each is one VM in test/erllama_cache_disks.erl. It takes root. All
# mounts are in a namespace of its own: nothing stays mounted, however this ends. Packages that are
# missing (bindfs, quota, e2fsprogs) are installed by apt.
#
# A scenario that this machine cannot run makes this fail, unless DISKS_MAY_MISS (names, separated by
# spaces) has it. Where the kernel has no quota for ext4 (CONFIG_QFMT_V2), that scenario runs in Debian's
# user-mode-linux, a kernel that is a program.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
lib=$here/_build/default/lib/erllama_cache_nif
PATH="$PATH:/usr/sbin:/sbin"
all="ext4 tmpfs memory inodes quota named named-full readonly broken"

fail() {
    echo "disks: $*" >&2
    exit 1
}

# package COMMAND PACKAGE
package() {
    command -v "$1" >/dev/null 2>&1 ||
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$2" \
            >/dev/null 2>&1 ||
        skip "$2 is not there, and apt does not install it"
}

# Ends a scenario that cannot run, with a status that nothing else has.
skip() {
    echo "cannot run: $*"
    exit 77
}

# erlang SCENARIO ROOT ARGS..., in a VM of its own; $as_user is how to become another user
as_user=
erlang() {
    # shellcheck disable=SC2086  # a command and its arguments
    HOME=$work ERL_CRASH_DUMP_SECONDS=0 $as_user erl -noinput -boot start_clean \
        -pa "$work/lib/ebin" "$work/beam" -s erllama_cache_disks main -extra "$@"
}

# ext4 MOUNT_OPTIONS MKFS_ARGS...: mounted on $mnt, with a directory for the root
ext4() {
    options=$1
    shift
    package mkfs.ext4 e2fsprogs
    truncate -s 64M "$work/image"
    mkfs.ext4 -q -F -m 0 "$@" "$work/image"
    mount -o "loop,$options" "$work/image" "$mnt" || skip "no loop mounts here"
    mkdir "$mnt/root"
}

bind() { # FROM TO
    [ -e /dev/fuse ] || skip "there is no /dev/fuse"
    package bindfs bindfs
    bindfs "$1" "$2"
}

scenario() {
    case $1 in
        ext4)
            ext4 rw
            erlang full "$mnt/root" disk enospc
            ;;
        tmpfs | memory)
            mount -t tmpfs -o size=32m tmpfs "$mnt"
            mkdir "$mnt/root"
            case $1 in tmpfs) tier=disk ;; *) tier=ram_file ;; esac
            erlang full "$mnt/root" $tier enospc
            ;;
        inodes)
            ext4 rw -N 64
            erlang no_inodes "$mnt/root"
            ;;
        quota) quota ;;
        named)
            mkdir "$work/under"
            bind "$work/under" "$mnt"
            erlang named "$mnt" "$work/under"
            ;;
        named-full)
            ext4 rw
            mkdir "$work/bound"
            bind "$mnt/root" "$work/bound"
            erlang full "$work/bound" disk enospc
            ;;
        readonly)
            ext4 rw
            erlang read_only "$mnt/root" "$mnt"
            ;;
        broken)
            ext4 errors=remount-ro
            [ -e "/sys/fs/ext4/$(basename "$(findmnt -no SOURCE "$mnt")")/trigger_fs_error" ] ||
                skip "this kernel's ext4 has no trigger_fs_error"
            erlang read_only_amid "$mnt/root" "$work/image" "$mnt"
            ;;
        *) fail "no such scenario: $1" ;;
    esac
}

quota() {
    package setquota quota
    package mkfs.ext4 e2fsprogs
    truncate -s 64M "$work/image"
    mkfs.ext4 -q -F -m 0 -O quota -E quotatype=usrquota "$work/image"
    if mount -o loop,usrquota "$work/image" "$mnt" 2>/dev/null; then
        with_quota
    else
        quota_in_uml
    fi
}

with_quota() {
    as_user="setpriv --reuid=nobody --regid=nogroup --clear-groups"
    # 16 MiB of quota. Chained, for `set -e` does not reach everywhere.
    mkdir "$mnt/root" && chown nobody "$mnt/root" &&
        setquota -u nobody 0 16384 0 0 "$mnt" &&
        erlang full "$mnt/root" disk edquot
}

# The same on another kernel, whose root is this machine's. Its first process is this script.
quota_in_uml() {
    package linux.uml user-mode-linux
    package insmod kmod
    printf '#!/bin/sh\nexport DISKS_UML=%s PATH=%s\nexec "%s"\n' "$work" "$PATH" \
        "$here/tools/disks.sh" >"$work/init"
    chmod +x "$work/init"
    # For processors with more registers than it knows.
    cc -Wall -Wextra -Werror -O1 -shared -fPIC -o "$work/xstate.so" "$here/test/crash/xstate.c" -ldl
    LD_PRELOAD="$work/xstate.so" timeout 300 linux.uml mem=1G root=/dev/root rootfstype=hostfs rootflags=/ rw \
        ubd0="$work/image" con=null con0=null,fd:2 init="$work/init" \
        </dev/null >"$work/uml.log" 2>&1 || true
    [ -e "$work/status" ] || { tail -n 20 "$work/uml.log"; exit 1; }
    cat "$work/said"
    [ "$(cat "$work/status")" = 0 ]
}

inside_uml() {
    mount -t proc proc /proc
    for module in quota_tree quota_v2; do
        insmod "/usr/lib/uml/modules/$(uname -r)/kernel/fs/quota/$module.ko" || true
    done
    status=0
    { mount -o usrquota /dev/ubda "$mnt" && with_quota; } >"$work/said" 2>&1 || status=$?
    echo "$status" >"$work/status"
    sync
    poweroff -f
}

# One scenario, in namespaces of its own: what it started and mounted ends with it.
if [ "${DISKS_INSIDE:-}" ]; then
    work=$DISKS_WORK
    mnt=$work/mnt
    scenario "$DISKS_INSIDE"
    exit
fi
if [ "${DISKS_UML:-}" ]; then
    work=$DISKS_UML
    mnt=$work/mnt
    inside_uml
    exit
fi

[ "$(id -u)" = 0 ] || fail "has to run as root, for the mounts"
[ -d "$lib/ebin" ] || fail "not compiled: run make first"
[ $# -gt 0 ] || eval "set -- $all"

top=$(mktemp -d)
trap 'rm -rf "$top"' EXIT
# Another user has to get there.
chmod 755 "$top"
failed=
missed=
table=
for name in "$@"; do
    DISKS_WORK=$top/$name
    mkdir -p "$DISKS_WORK/lib" "$DISKS_WORK/beam" "$DISKS_WORK/mnt"
    cp -RL "$lib/ebin" "$lib/priv" "$DISKS_WORK/lib"
    for module in test_util hooked_host disks; do
        erlc -o "$DISKS_WORK/beam" -pa "$lib/ebin" "$here/test/erllama_cache_$module.erl"
    done
    status=0
    said=$(DISKS_INSIDE=$name DISKS_WORK=$DISKS_WORK \
        unshare --mount --pid --fork --kill-child --mount-proc "$0" 2>&1) || status=$?
    rm -rf "$DISKS_WORK"
    case $status in
        0) outcome=passed ;;
        77)
            outcome=missing
            case " ${DISKS_MAY_MISS:-} " in
                *" $name "*) missed="$missed $name" ;;
                *) failed="$failed $name" ;;
            esac
            ;;
        *) outcome=FAILED failed="$failed $name" ;;
    esac
    table=$table$(printf '%-10s  %-7s  %s' "$name" "$outcome" "$said")"
"
    echo "disks: $name: $outcome"
done
printf '\n%s\n' "$table"
[ -z "$failed" ] || fail "failed, or missing and not in DISKS_MAY_MISS:$failed"
[ -z "$missed" ] || echo "disks: not run, as was allowed:$missed"
