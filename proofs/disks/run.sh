#!/bin/sh
# Proves what saves do on real disks that are full, of somebody else's size, without O_TMPFILE, or taken
# away: the error is returned, nothing is left of what failed, nothing that was saved is lost, and with the
# trouble gone it goes on in the same VM. And what all of it does on file systems other than ext4.
#
#     proofs/disks/run.sh [SCENARIO...]
#
#   ext4       ext4 of 64 MiB: saves until ENOSPC, then deletion and eviction make room
#   tmpfs      the same on a tmpfs of 32 MiB, for tier disk
#   memory     the same for tier ram_file, which has a way of its own there
#   spare      a tmpfs of 64 MiB of which 16 are to stay free
#   inodes     ext4 with 64 inodes: saves until there is none left
#   quota      ext4 with user quota, saves as `nobody` until EDQUOT
#   named      bindfs (FUSE), where temporary files have names: all ways of a save, the sweep, a root
#              that is moved away and replaced by a link in the middle of a save
#   named-full bindfs over an ext4 that fills up
#   readonly   remounted read-only and back between saves
#   broken     made read-only by the kernel in the middle of saves (ext4, errors=remount-ro), repaired
#   xfs, btrfs, overlay-ext4, overlay-tmpfs, nfs
#              all ways of a save, loads, a scan, eviction; whether temporary files have names there, and
#              which syncs a save makes. An overlay is named by what its upper layer is on; NFS is 4.2,
#              with the server on the same machine
#   lower      loads from the lower layer of an overlay, whose upper layer has no room for the files
#   frozen-ext4, frozen-xfs
#              frozen by fsfreeze: loads go on, nothing else of the node is held up, a save waits
#
# Without an argument: all of them. Each is one VM in erllama_cache_disks.erl. It takes root. All
# mounts are in a namespace of its own: nothing stays mounted, nor frozen, however this ends. Packages that are
# missing are installed by tools/setup.sh.
#
# A scenario that this machine cannot run makes this fail, and says why, unless DISKS_MAY_MISS (names,
# separated by spaces) has it. NFS runs in Debian's user-mode-linux, a kernel that is a program, and so does
# the quota where this kernel has none for ext4 (CONFIG_QFMT_V2).
set -eu

here=$(cd "$(dirname "$0")/../.." && pwd)
. "$here/proofs/lib.sh"
all="ext4 tmpfs memory spare inodes quota named named-full readonly broken \
xfs btrfs overlay-ext4 overlay-tmpfs nfs lower frozen-ext4 frozen-xfs"

need_or_skip() { # COMMAND...
    "$here/tools/setup.sh" "$@" >/dev/null 2>&1 || skip "$* is not there, and is not to be had"
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

# The same with a count of the I/O calls that the library makes, in a file that the VM finds by IOFAULT.
counting() {
    IOFAULT=$count LD_PRELOAD=$work/iofault.so erlang "$@"
}

build_counter() {
    count=$work/count
    shim iofault
    cp "$here/_build/iofault.so" "$work"
}

# made KIND SIZE MKFS_ARGS...: a file system of that kind in a file
made() {
    kind=$1
    need_or_skip "mkfs.$kind"
    truncate -s "$2" "$work/image"
    shift 2
    "mkfs.$kind" -q "$@" "$work/image" >/dev/null
}

# known KIND: the kernel knows such file systems; their module may be there, and not loaded yet.
known() {
    grep -qw "$1" /proc/filesystems || modprobe "$1" 2>/dev/null || skip "this kernel has no $1"
}

# mounted KIND OPTIONS: on $mnt, with a directory for the root
mounted() {
    known "$1"
    mount -t "$1" -o "loop,$2" "$work/image" "$mnt" || skip "no loop mounts here"
    mkdir "$mnt/root"
}

# ext4 MOUNT_OPTIONS MKFS_ARGS...
ext4() {
    options=$1
    shift
    made ext4 64M -F -m 0 "$@"
    mounted ext4 "$options"
}

# The least that mkfs makes of it.
xfs() {
    made xfs 300M
    mounted xfs rw
}

# overlay DIRECTORY: with its layers in there, on $merged
overlay() {
    known overlay
    merged=$work/merged
    mkdir "$merged" "$1/lower" "$1/upper" "$1/work"
    mount -t overlay -o "lowerdir=$1/lower,upperdir=$1/upper,workdir=$1/work" overlay "$merged"
    mkdir "$merged/root"
}

bind() { # FROM TO
    [ -e /dev/fuse ] || skip "there is no /dev/fuse"
    need_or_skip bindfs
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
        spare)
            mount -t tmpfs -o size=64m tmpfs "$mnt"
            mkdir "$mnt/root"
            erlang spare "$mnt/root"
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
        xfs)
            build_counter
            xfs
            counting usual "$mnt/root" unnamed one_link
            ;;
        btrfs)
            build_counter
            made btrfs 256M
            mounted btrfs rw
            counting usual "$mnt/root" unnamed everything
            ;;
        overlay-*)
            build_counter
            case $1 in
                overlay-ext4) ext4 rw ;;
                overlay-tmpfs) mount -t tmpfs -o size=64m tmpfs "$mnt" ;;
            esac
            overlay "$mnt"
            counting usual "$merged/root" unnamed everything
            ;;
        nfs)
            build_counter
            made ext4 64M -F -m 0
            in_uml nfs
            ;;
        lower)
            mount -t tmpfs tmpfs "$mnt"
            mkdir "$mnt/lower" "$mnt/elsewhere" "$mnt/merged" "$mnt/small"
            mount -t tmpfs -o size=2m tmpfs "$mnt/small"
            mkdir "$mnt/small/upper" "$mnt/small/work"
            known overlay
            erlang lower "$mnt/lower" "$mnt/small/upper" "$mnt/small/work" "$mnt/merged" "$mnt/elsewhere"
            ;;
        frozen-*)
            case $1 in
                frozen-ext4) ext4 rw ;;
                frozen-xfs) xfs ;;
            esac
            mkdir "$work/elsewhere"
            mount -t tmpfs tmpfs "$work/elsewhere"
            # Should the VM hang, all of it: what waits for a frozen disk cannot even be killed.
            { sleep 60; echo "the VM hangs, and is thawed from outside"; thaw; } &
            erlang frozen "$mnt/root" "$mnt" "$work/elsewhere"
            ;;
        *) fail "no such scenario: $1" ;;
    esac
}

# No harm where nothing is frozen.
thaw() {
    fsfreeze -u "$mnt" 2>/dev/null || true
}

quota() {
    need_or_skip setquota
    made ext4 64M -F -m 0 -O quota -E quotatype=usrquota
    if mount -o loop,usrquota "$work/image" "$mnt" 2>/dev/null; then
        with_quota
    else
        in_uml quota
    fi
}

with_quota() {
    as_user="setpriv --reuid=nobody --regid=nogroup --clear-groups"
    # 16 MiB of quota.
    mkdir "$mnt/root"
    chown nobody "$mnt/root"
    setquota -u nobody 0 16384 0 0 "$mnt"
    erlang full "$mnt/root" disk edquot
}

# in_uml NAME: guest_NAME on another kernel, whose root is this machine's and whose disk is the image. Its
# first process is this script.
in_uml() {
    need_or_skip linux.uml modprobe
    printf '#!/bin/sh\nexport DISKS_GUEST=%s DISKS_WORK=%s PATH=%s\nexec "%s"\n' "$1" "$work" "$PATH" \
        "$here/proofs/disks/run.sh" >"$work/init"
    chmod +x "$work/init"
    # As modprobe wants it.
    mkdir -p "$work/uml/lib"
    ln -s /usr/lib/uml/modules "$work/uml/lib/modules"
    # For processors with more registers than it knows.
    shim xstate
    LD_PRELOAD="$here/_build/xstate.so" timeout 300 linux.uml mem=1G root=/dev/root rootfstype=hostfs rootflags=/ rw \
        ubd0="$work/image" con=null con0=null,fd:2 init="$work/init" \
        </dev/null >"$work/uml.log" 2>&1 || true
    [ -e "$work/status" ] || { tail -n 20 "$work/uml.log"; exit 1; }
    cat "$work/said"
    return "$(cat "$work/status")"
}

load() {
    modprobe -d "$work/uml" "$@"
}

guest_quota() {
    load -a quota_tree quota_v2
    mount -o usrquota /dev/ubda "$mnt"
    with_quota
}

# The server is told by hand what rpc.mountd and others would tell it: who the client is, and that the
# directory with the number 0, which is what version 4 begins with, is this one. Nothing below version 4, which
# would want rpcbind. It serves nobody for its first seconds, in case that a client from before comes back.
guest_nfs() {
    mount -t tmpfs tmpfs /run
    count=/run/count
    served=/run/served
    mkdir "$served"
    mount /dev/ubda "$served"
    ip link set lo up
    load nfsd || skip "the guest has no NFS server"
    load nfsv4 || skip "the guest has no NFS client"
    mount -t nfsd nfsd /proc/fs/nfsd
    echo "-2 -3 +4.2" >/proc/fs/nfsd/versions
    echo 10 >/proc/fs/nfsd/nfsv4leasetime
    echo 10 >/proc/fs/nfsd/nfsv4gracetime
    echo "tcp 2049" >/proc/fs/nfsd/portlist
    echo 4 >/proc/fs/nfsd/threads
    # Until a time that does not come; insecure, no_subtree_check, fsid=0.
    never=2147483647
    echo "nfsd 127.0.0.1 $never here" >/proc/net/rpc/auth.unix.ip/channel
    printf 'here 1 \\x00000000 %s %s\n' "$never" "$served" >/proc/net/rpc/nfsd.fh/channel
    echo "here $served $never $((0x2 | 0x400 | 0x2000)) 65534 65534 0" >/proc/net/rpc/nfsd.export/channel
    mount -i -t nfs4 -o vers=4.2,proto=tcp,sec=sys,addr=127.0.0.1,clientaddr=127.0.0.1 127.0.0.1:/ "$mnt"
    mkdir "$mnt/root"
    counting usual "$mnt/root" named everything
}

# The guest's first process: what is said and how it ended is found in the host's files.
guest() {
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    # Not as a condition: `set -e` would not hold in there.
    set +e
    (set -e; "guest_$1") >"$work/said" 2>&1
    echo $? >"$work/status"
    sync
    poweroff -f
}

# One scenario, in namespaces of its own: what it started and mounted ends with it.
if [ "${DISKS_GUEST:-}" ]; then
    work=$DISKS_WORK
    mnt=$work/mnt
    guest "$DISKS_GUEST"
    exit
fi
if [ "${DISKS_INSIDE:-}" ]; then
    work=$DISKS_WORK
    mnt=$work/mnt
    trap thaw EXIT
    trap 'exit 1' HUP INT TERM
    # In the background, for a shell hears of a signal only between two commands.
    scenario "$DISKS_INSIDE" &
    status=0
    wait $! || status=$?
    exit $status
fi

is_root || fail "has to run as root, for the mounts"
need_compiled
[ $# -gt 0 ] || eval "set -- $all"

temp_dir
top=$work
# Another user has to get there.
chmod 755 "$top"
mkdir "$top/lib"
cp -RL "$lib/ebin" "$lib/priv" "$top/lib"
beams "$top/beam" test_util hooked_host disks
failed=
missed=
table=
for name in "$@"; do
    DISKS_WORK=$top/$name
    mkdir -p "$DISKS_WORK/mnt"
    ln -s ../lib ../beam "$DISKS_WORK"
    status=0
    said=$(DISKS_INSIDE=$name DISKS_WORK=$DISKS_WORK \
        unshare --mount --pid --fork --kill-child=TERM --mount-proc "$0" 2>&1) || status=$?
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
    table=$table$(printf '%-13s  %-7s  %s' "$name" "$outcome" "$said")"
"
    echo "disks: $name: $outcome"
done
printf '\n%s\n' "$table"
[ -z "$failed" ] || fail "failed, or missing and not in DISKS_MAY_MISS:$failed"
[ -z "$missed" ] || echo "disks: not run, as was allowed:$missed"
