#!/bin/sh
# Runs a command with $BENCH_DISK on an ext4 as mkfs.ext4 makes it, which is with a journal:
#
#     bench/disk.sh COMMAND ...
#
# Where BENCH_DISK is set that is what is used, whatever it is. Otherwise it is /tmp, if that is on such
# a file system. If not, as in many virtual machines, root makes one in a file there, with direct I/O
# beneath it, and removes it afterwards; it takes 14 GiB for some minutes, or 2 with BENCH_QUICK=yes.
# Without root, or without room, /tmp is measured as it is.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/proofs/lib.sh"

work=/tmp
gib=14
[ "${BENCH_QUICK:-}" != yes ] || gib=2

# The device's name in /sys, which is that of its entries in /proc.
has_journal() {
    number=$(stat -c '%Hd:%Ld' "$1")
    device=$(basename "$(readlink "/sys/dev/block/$number" || echo none)")
    [ -e "/proc/fs/ext4/$device" ] && [ -e "/proc/fs/jbd2/$device-8" ]
}

on() {
    echo "The disk is $1: $2."
}

if [ -n "${BENCH_DISK:-}" ]; then
    on "$BENCH_DISK" "$(has_journal "$BENCH_DISK" && echo ext4 with a journal ||
        stat -f -c '%T, without a journal that is known of' "$BENCH_DISK")"
    exec "$@"
fi
export BENCH_DISK=$work
if has_journal "$work"; then
    on "$work" "ext4 with a journal"
    exec "$@"
fi

dir=$(mktemp -d "$work/erllama_cache_disk.XXXXXX")
loop=
leave() {
    umount "$dir/disk" 2>/dev/null || umount -l "$dir/disk" 2>/dev/null || true
    [ -z "$loop" ] || losetup -d "$loop" || true
    rm -rf --one-file-system "$dir"
}
trap leave EXIT
trap 'exit 1' HUP INT TERM

# Every block of it, which mkfs.ext4 then is not to give back: the first write of one takes nearly twice
# as long as the next, and two sides that take turns would not meet the same disk.
write_image() {
    fallocate -l "${gib}G" "$dir/image" &&
        dd if=/dev/zero of="$dir/image" bs=8M count=$((gib * 128)) oflag=direct conv=notrunc status=none
}

# Says why not.
make_disk() {
    room=$(df -Pk "$work" | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$(stat -f -c '%T' "$work")" != tmpfs ] || { echo "is in memory"; return 1; }
    is_root || { echo "has none, and to make one takes root"; return 1; }
    [ "$room" -ge $((gib + 2)) ] || { echo "has none, and no $((gib + 2)) GiB for one"; return 1; }
    mkdir "$dir/disk" &&
        write_image &&
        mkfs.ext4 -q -F -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 "$dir/image" &&
        losetup --direct-io=on --show -f "$dir/image" >"$dir/loop" &&
        mount "$(cat "$dir/loop")" "$dir/disk" ||
        { echo "has none, and none could be made"; return 1; }
}

if why=$(make_disk); then
    BENCH_DISK=$dir/disk
    on "$BENCH_DISK" "ext4 with a journal, in a file of $work"
else
    on "$work" "without a journal: it $why"
fi
[ ! -s "$dir/loop" ] || loop=$(cat "$dir/loop")
"$@"
