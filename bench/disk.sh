#!/bin/sh
# Runs a command with $BENCH_DISK on an ext4 as mkfs.ext4 makes it, which is with a journal:
#
#     bench/disk.sh [--others] COMMAND ...
#
# Where BENCH_DISK is set that is what is used, whatever it is. Otherwise it is /tmp, if that is on such
# a file system. If not, as in many virtual machines, root makes one in a file there, with direct I/O
# beneath it, and removes it afterwards; it takes 14 GiB for some minutes, or 2 with BENCH_QUICK=yes.
# Without root, or without room, /tmp is measured as it is.
#
# With --others, root also makes an ext4 without a journal, an xfs and a btrfs, of 5 GiB each, and names
# them in $BENCH_FILE_SYSTEMS. One that cannot be made is left out.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/proofs/lib.sh"

others=
if [ "${1:-}" = --others ]; then
    others=yes
    shift
fi
work=/tmp
gib=14
gib_other=5
if [ "${BENCH_QUICK:-}" = yes ]; then
    gib=2
    gib_other=1
fi

# The device's name in /sys, which is that of its entries in /proc.
has_journal() {
    number=$(stat -c '%Hd:%Ld' "$1")
    device=$(basename "$(readlink "/sys/dev/block/$number" || echo none)")
    [ -e "/proc/fs/ext4/$device" ] && [ -e "/proc/fs/jbd2/$device-8" ]
}

on() {
    echo "The disk is $1: $2."
}

dir=
leave() {
    for image in "$dir"/*.image; do
        [ -e "$image" ] || continue
        mounted=${image%.image}
        umount "$mounted" 2>/dev/null || umount -l "$mounted" 2>/dev/null || true
        [ ! -s "$mounted.loop" ] || losetup -d "$(cat "$mounted.loop")" || true
    done
    rm -rf --one-file-system "$dir"
}
make_dir() {
    [ -z "$dir" ] || return 0
    dir=$(mktemp -d "$work/erllama_cache_disk.XXXXXX")
    trap leave EXIT
    trap 'exit 1' HUP INT TERM
}

# Every block of it, which mkfs then is not to give back: the first write of one takes nearly twice as
# long as the next, and two sides that take turns would not meet the same disk.
write_image() {
    fallocate -l "${2}G" "$1" &&
        dd if=/dev/zero of="$1" bs=8M count=$(($2 * 128)) oflag=direct conv=notrunc status=none
}

# make_disk NAME GIB MKFS...: mounts it as $dir/NAME, or says why not.
make_disk() {
    name=$1
    size=$2
    shift 2
    room=$(df -Pk "$work" | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$(stat -f -c '%T' "$work")" != tmpfs ] || { echo "is in memory"; return 1; }
    is_root || { echo "has none, and to make one takes root"; return 1; }
    [ "$room" -ge $((size + 2)) ] || { echo "has none, and no $((size + 2)) GiB for one"; return 1; }
    mkdir "$dir/$name" &&
        write_image "$dir/$name.image" "$size" &&
        "$@" "$dir/$name.image" >/dev/null &&
        losetup --direct-io=on --show -f "$dir/$name.image" >"$dir/$name.loop" &&
        mount "$(cat "$dir/$name.loop")" "$dir/$name" ||
        { echo "has none, and none could be made"; return 1; }
}

make_others() {
    make_dir
    nothing_lazy=nodiscard,lazy_itable_init=0
    for name in no_journal xfs btrfs; do
        case $name in
            no_journal) set -- mkfs.ext4 -q -F -O ^has_journal -E "$nothing_lazy" ;;
            xfs) set -- mkfs.xfs -q -f -K ;;
            btrfs) set -- mkfs.btrfs -q -f -K ;;
        esac
        if why=$(make_disk "$name" "$gib_other" "$@"); then
            BENCH_FILE_SYSTEMS="${BENCH_FILE_SYSTEMS:-} $name=$dir/$name"
        else
            echo "Not measured on $name: $work $why."
        fi
    done
    export BENCH_FILE_SYSTEMS="${BENCH_FILE_SYSTEMS:-}"
}

if [ -n "${BENCH_DISK:-}" ]; then
    on "$BENCH_DISK" "$(has_journal "$BENCH_DISK" && echo ext4 with a journal ||
        stat -f -c '%T, without a journal that is known of' "$BENCH_DISK")"
elif has_journal "$work"; then
    BENCH_DISK=$work
    on "$work" "ext4 with a journal"
else
    make_dir
    nothing_lazy=nodiscard,lazy_itable_init=0,lazy_journal_init=0
    if why=$(make_disk journal "$gib" mkfs.ext4 -q -F -E "$nothing_lazy"); then
        BENCH_DISK=$dir/journal
        on "$BENCH_DISK" "ext4 with a journal, in a file of $work"
    else
        BENCH_DISK=$work
        on "$work" "without a journal: it $why"
    fi
fi
export BENCH_DISK
[ -z "$others" ] || make_others "$@"
"$@"
