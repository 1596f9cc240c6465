#!/bin/sh
# Proves that nodes may share a root on a distributed file system: a GlusterFS volume of three replicas,
# two mounts of it, and two Erlang nodes with a store on each.
#
#     proofs/cluster/run.sh [tokens|text...]
#
# Both nodes save, the same keys and their own, while
#
#   start    a store is started on the other mount again and again: it sweeps nothing that is written
#   replica  one replica's server is killed, then started again and healed
#   client   the file system's process of one mount is killed, and the volume mounted again
#   node     one node is killed and started again
#   full     the volume fills up, and gets room again
#
# After each, both load every key that was acknowledged, and each byte is compared; what was cut off is
# there as a whole or not at all. At the end all replicas have the same names and no others, and
# proofs/oracle/kvc_oracle.py, which shares no code with the library, checks each replica's files. Then
# saves are timed beside a bare write with the same durability, and dd (CLUSTER_SPEED=no: not).
#
# Without an argument: both kinds of keys. CLUSTER_KEYS says how many keys each node saves at a time
# (40). It takes root and FUSE. All runs in namespaces of its own (mounts, processes, network): nothing
# outside is seen, mounted or ended, however this ends. The replicas are in memory: no power is cut here.
# Packages that are missing are installed by tools/setup.sh.
set -eu

here=$(cd "$(dirname "$0")/../.." && pwd)
. "$here/proofs/lib.sh"

address=10.77.0.1
volume=kv
# Percent of a replica's disk: GlusterFS looks every five seconds whether more is in use.
reserve=30

start_volume() {
    ip link set lo up
    # GlusterFS takes no loopback address.
    ip address add "$address/32" dev lo
    for dir in /var/lib/glusterd /var/log/glusterfs /run; do
        mkdir -p "$dir"
        mount -t tmpfs none "$dir"
    done
    mkdir -p /run/gluster /run/lock
    mount -t tmpfs -o size=6g none "$work/disks"
    set --
    for replica in 1 2 3; do
        truncate -s 1G "$work/disks/$replica.image"
        mkfs.ext4 -q -m 0 "$work/disks/$replica.image"
        mkdir "$work/disks/$replica"
        mount -o loop "$work/disks/$replica.image" "$work/disks/$replica"
        mkdir "$work/disks/$replica/root"
        set -- "$@" "$address:$work/disks/$replica/root"
    done
    glusterd
    until_true gluster --mode=script volume list
    gluster --mode=script volume create $volume replica 3 "$@" force
    # What is kept back lets a full replica note what it has missed, and write its health check:
    # without, GlusterFS leaves files behind that only one replica has, and ends replicas.
    gluster --mode=script volume set $volume storage.reserve $reserve
    gluster --mode=script volume start $volume
    for mount in a b; do
        mkdir "$work/$mount"
        mount_volume "$mount"
    done
}

mount_volume() { # a|b
    glusterfs --volfile-server=$address --volfile-id=$volume --pid-file="$work/$1.pid" "$work/$1"
    until_true mountpoint -q "$work/$1"
    # As soon as a replica answers.
    until_true stat "$work/$1/."
}

until_true() { # COMMAND...
    tries=0
    until "$@" >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ "$tries" -lt 300 ] || fail "never true: $*"
        sleep 0.2
    done
}

replicas_up() {
    [ "$(gluster --mode=script volume status $volume --xml | grep -c '<status>1</status>')" -ge 4 ]
}

# By all replicas: each finds by itself, after some seconds, that it has room again.
takes_data() { # a|b
    dd if=/dev/zero of="$work/$1/probe" bs=1M count=4 conv=fsync status=none &&
        [ "$(cat "$work"/disks/?/root/probe | wc -c)" -eq $((3 * 4 << 20)) ]
    status=$?
    rm -f "$work/$1/probe"
    return $status
}

# Asked for again each time: what cannot be healed yet, the daemon that heals leaves for ten minutes.
healed() {
    replicas_up || return 1
    gluster --mode=script volume heal $volume || return 1
    gluster --mode=script volume heal $volume info >"$work/heal" 2>&1 || return 1
    [ "$(grep -c '^Number of entries: 0$' "$work/heal")" = 3 ]
}

# What the Erlang program asks for.
act() {
    case $1 in
        kill_replica)
            kill -9 "$(cat /run/gluster/vols/$volume/*disks-"$2"-root.pid)"
            ;;
        start_replica)
            gluster --mode=script volume start $volume force
            until_true replicas_up
            ;;
        heal)
            (until_true healed) || { cat "$work/heal"; exit 1; }
            ;;
        kill_client) kill -9 "$(cat "$work/$2.pid")" ;;
        mount_again)
            umount -l "$work/$2"
            mount_volume "$2"
            ;;
        fill)
            # Into what is kept back: at its next look, GlusterFS takes nothing more.
            size=$(df --output=size -m "$work/disks/1" | tail -n 1)
            free=$(df --output=avail -m "$work/disks/1" | tail -n 1)
            fallocate -l "$((free - size * reserve / 100 + 32))M" "$work/a/filler"
            ;;
        make_room)
            rm "$work/a/filler"
            until_true takes_data a
            until_true takes_data b
            ;;
        judge) judge ;;
        *) fail "cannot: $*" ;;
    esac
}

# All replicas have the same files, byte for byte, and the oracle finds those good. Prints how many.
judge() {
    for replica in 1 2 3; do
        (
            cd "$work/disks/$replica/root"
            find . -maxdepth 1 -type f -printf '%f\n' | sort | xargs sha256sum >"$work/files.$replica"
        )
        diff "$work/files.1" "$work/files.$replica"
    done
    sed 's/^[0-9a-f]*  //' "$work/files.1" >"$work/names"
    if grep -vE '^[0-9a-f]{64}[.]kvc$' "$work/names"; then
        fail "this was left"
    fi
    cd "$work/disks/1/root"
    xargs python3 "$here/proofs/oracle/kvc_oracle.py" check <"$work/names" >"$work/oracle" 2>&1 ||
        { cat "$work/oracle"; return 1; }
    wc -l <"$work/names"
}

if [ "${CLUSTER_INSIDE:-}" ]; then
    work=$CLUSTER_INSIDE
    if [ $# -gt 1 ] && [ "$1" = act ]; then
        shift
        # Whoever waits for this hears that it goes on.
        (while sleep 2; do printf .; done) &
        # shellcheck disable=SC2064  # that process
        trap "kill $!" EXIT
        act "$@"
        exit
    fi
    quietly "$work/volume.log" start_volume
    HOME=$work erl -noinput -sname "cluster$$" -setcookie cluster -pa "$lib/ebin" "$work/beam" \
        -s erllama_cache_cluster main -extra "$here/proofs/cluster/run.sh" "$work" "$1"
    exit
fi

need_compiled
is_root || fail "has to run as root, for mounts"
[ -e /dev/fuse ] || fail "there is no /dev/fuse"
need glusterd ip
[ $# -gt 0 ] || set -- tokens text
for keyed_by in "$@"; do
    (
        temp_dir
        mkdir "$work/disks"
        beams "$work/beam" test_util nodes_util cluster
        echo "==== two nodes, one root on GlusterFS, keys of $keyed_by ===="
        CLUSTER_INSIDE=$work unshare --mount --net --pid --fork --kill-child --mount-proc \
            "$here/proofs/cluster/run.sh" "$keyed_by"
    )
done
echo "cluster: nothing was lost, nothing was left"
