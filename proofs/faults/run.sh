#!/bin/sh
# Every I/O call fails once, and the VM ends at every I/O call.
#
#   faults   Each call of the NIF library that does I/O, in each operation (save in line or behind
#            its caller, load, eviction, a store's start and others), fails once with each of six
#            errors, or moves half of what it should, or other bytes; and every call from the n-th on
#            fails. After each, the promises of docs/durability.md are looked for from outside.
#   crashes  A VM ends before and after each I/O call of a save, an eviction, a deletion and a scan.
#            Another VM then looks at what is left.
#
# iofault.c is preloaded into the VMs to make that happen, erllama_cache_faults.erl says
# when, and judges. A table for each; the status is 1 when a promise has been broken, with what is
# needed to see it again.
#
# Which syncs a save makes depends on the file system (docs/design/save.md): both are done in memory, and, by
# root, the faults also on an ext4 with a journal and on one without, as FAULTS=quick does them.
#
#   proofs/faults/run.sh [faults|crashes [CASE [CALL N WHAT]]]
#   proofs/faults/run.sh faults save_small/adopt/disk linkat 1 eio      that one again
#   proofs/faults/run.sh faults save_small/adopt/disk/behind linkat 1 eio
#   proofs/faults/run.sh crashes save_small/adopt/disk 7 exit_after
#
# FAULTS=quick tries less: three errors (two for large files), of the calls of a kind the first and
# the last four, the cases that differ most; crashes of four cases, after each call only.
set -eu

here=$(cd "$(dirname "$0")/../.." && pwd)
. "$here/proofs/lib.sh"
out="$here/_build/faults"
shim="$here/_build/iofault.so"
: "${FAULTS:=full}"

case $FAULTS in
    quick | full) ;;
    *) fail "FAULTS is quick or full, not '$FAULTS'" ;;
esac
[ "$(uname -s)" = Linux ] || fail "the shim is for Linux"

# A call that the shim does not know would be one that never fails: each is either known to it or
# listed here, as no I/O or as what Rust needs to print a panic.
check_symbols() {
    nm -D --defined-only "$shim" | awk '{ print $3 }' | sort >"$out/known"
    nm -D --undefined-only "$lib/priv/erllama_cache_nif.so" |
        awk '{ sub(/@.*/, "", $2); print $2 }' |
        grep -Ev '^(_|enif_|pthread_|mem|bcmp$|strlen$|abort$)' |
        grep -Ev '^(calloc|free|malloc|posix_memalign|realloc|mmap64|munmap)$' |
        grep -Ev '^(clock_gettime|clock_nanosleep|dl_iterate_phdr|dlsym|getenv|geteuid)$' |
        grep -Ev '^(getrandom|gettid|pause|sched_getaffinity|sched_yield|syscall|sysconf)$' |
        grep -Ev '^(getcwd|getrlimit|lseek64|lstat64|readlink|realpath|stat64|statx)$' |
        sort | comm -13 "$out/known" - >"$out/unknown"
    [ ! -s "$out/unknown" ] ||
        fail "the library calls what proofs/faults/iofault.c does not know: $(tr '\n' ' ' <"$out/unknown")"
}

beams "$out/ebin" test_util faults
shim iofault
check_symbols

# In memory if there is room (KiB): nothing here is about a disk, and there are thousands of syncs.
if [ -w /dev/shm ] && [ "$(df -Pk /dev/shm | awk 'NR == 2 { print $4 }')" -ge 786432 ]; then
    base=$(mktemp -d /dev/shm/erllama_faults.XXXXXX)
else
    base=$(mktemp -d)
fi
trap 'umount "$base/disk" 2>/dev/null || umount -l "$base/disk" 2>/dev/null || true
rm -rf --one-file-system "$base"' EXIT
trap 'exit 1' INT TERM

# Few schedulers are enough for one operation, and such a VM starts faster.
cat >"$out/victim" <<END
#!/bin/sh
export LD_PRELOAD="$shim" ERL_CRASH_DUMP_SECONDS=0
exec erl -noinput -boot no_dot_erlang +S 1:1 +SDcpu 1:1 +SDio 3 +A 1 \\
    -pa "$lib/ebin" "$out/ebin" -run erllama_cache_faults main -extra "\$@"
END
chmod +x "$out/victim"
export FAULTS_VICTIM="$out/victim" FAULTS_ORACLE="$here/proofs/oracle/kvc_oracle.py"

# run PART [ONLY...]
run() {
    part=$1
    shift
    mkdir "$base/$part"
    echo "== $part, on $where"
    status=0
    IOFAULT="$base/control" LD_PRELOAD="$shim" ERL_CRASH_DUMP_SECONDS=0 \
        erl -noinput -boot no_dot_erlang -pa "$lib/ebin" "$out/ebin" \
        -run erllama_cache_faults main -extra "$part" "$base/$part" "$FAULTS" "$@" || status=$?
    if [ "$status" -ne 0 ]; then
        [ "$status" -eq 1 ] || [ ! -f "$base/control.last" ] ||
            echo "faults: the VM ended at: $(cat "$base/control.last")" >&2
        fail "$part: a promise has been broken"
    fi
    rm -rf "${base:?}/$part"
    echo
}

# on_ext4 WHERE MKFS_OPTION...: once more, and shorter, for which syncs a save makes depends on that.
on_ext4() {
    where=$1
    shift
    truncate -s 512M "$base/image"
    mkfs.ext4 -q -F "$@" "$base/image"
    mkdir -p "$base/disk"
    if ! mount -o loop "$base/image" "$base/disk"; then
        echo "faults: not tried on $where, which takes a loop device"
        return
    fi
    (
        base=$base/disk
        FAULTS=quick
        run faults
    )
    # The last VM that was ended may not have gone yet.
    umount "$base/disk" 2>/dev/null || umount -l "$base/disk"
    rm "$base/image"
}

where=$(stat -f -c '%T' "$base")
if [ $# -gt 0 ]; then
    run "$@"
else
    run faults
    run crashes
    if is_root && has mkfs.ext4; then
        on_ext4 "ext4 with a journal"
        on_ext4 "ext4 without a journal" -O '^has_journal'
    else
        echo "faults: not tried on ext4 with and without a journal, which takes root and mkfs.ext4"
    fi
fi
