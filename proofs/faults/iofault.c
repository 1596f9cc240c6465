/*
 * Makes the n-th I/O call of the NIF library fail, or ends the VM at it, or makes all syncs and reads
 * slow. For tests only, preloaded into a VM by `make faults`, `make disks` and `make bench-slow` and never
 * installed:
 *
 *     IOFAULT=control LD_PRELOAD=iofault.so erl ...
 *     IOFAULT_SYNC_MS=30 IOFAULT_READ_MS=20 LD_PRELOAD=iofault.so erl ...
 *
 * Only calls that come from the library itself are counted and touched; the VM's own are not. The
 * file `control` is mapped by this and written by the test, erllama_cache_faults.erl: one VM
 * goes through thousands of settings. It is an array of 64-bit words, see `struct control`. To set
 * a fault, everything else is written first and `kind` last; to end it, 0 to `kind`.
 *
 * A failing call does nothing, as far as that can be: a descriptor that does not close well is
 * closed all the same, which is Linux's way.
 */
#define _GNU_SOURCE
/* The plain names, not those that a macro may turn them into. */
#undef _FILE_OFFSET_BITS
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define LIBRARY "/erllama_cache_nif.so"
/* The status of a VM that was ended here. */
#define CRASHED 111

/* Each kind's name goes into the control file, so that only this list says which there are. The two
 * uses of sync_file_range are two kinds: one is a hint, the other waits and tells. */
#define KINDS(X) \
    X(open) X(openat) X(read) X(pread) X(write) X(writev) X(pwrite) X(pwritev) X(fallocate) \
    X(ftruncate) X(sync_file_range_start) X(sync_file_range_wait) X(fdatasync) X(fsync) X(link) \
    X(linkat) X(rename) X(renameat) X(renameat2) X(unlink) X(unlinkat) X(fstat) X(fstatat) \
    X(fstatfs) X(fstatvfs) X(fchmod) X(flock) X(fcntl) X(posix_fadvise) X(fdopendir) X(readdir) \
    X(closedir) X(close) X(recv)

enum kind {
    NONE,
#define X(name) K_##name,
    KINDS(X)
#undef X
    KIND_COUNT,
    ANY = 255
};

enum action { PASS, FAIL, SHORT, EXIT_BEFORE, EXIT_AFTER, GARBLE };

/* Open for O_TMPFILE says that there is no such thing. */
#define NO_TMPFILE 1

#define MOST_KINDS 48
#define NAME_SIZE 24

struct control {
    uint64_t kind;      /* of which calls, or ANY; NONE: nothing happens */
    uint64_t first;     /* from the first-th of them, counted from 1, ... */
    uint64_t last;      /* ... to the last-th */
    uint64_t action;
    uint64_t error;     /* the errno of FAIL */
    uint64_t mode;
    uint64_t hits;      /* so often did the fault happen */
    uint64_t hit_kind;  /* to a call of this kind, the last time */
    uint64_t total;     /* calls of all kinds */
    uint64_t resyncs;   /* syncs of a file after one that failed while this fault is set */
    uint64_t failed_device, failed_inode;
    uint64_t counts[MOST_KINDS];
    char names[MOST_KINDS][NAME_SIZE];
};

_Static_assert(KIND_COUNT <= MOST_KINDS, "the control file has no room for so many kinds");

static struct control *control;
/* The addresses of the library's code. */
static uintptr_t from, to;
/* What each sync, and each read, of the library takes longer: milliseconds. */
static long sync_delay, read_delay;

static long milliseconds(const char *variable)
{
    const char *value = getenv(variable);

    return value == NULL ? 0 : strtol(value, NULL, 10);
}

__attribute__((constructor)) static void read_delays(void)
{
    sync_delay = milliseconds("IOFAULT_SYNC_MS");
    read_delay = milliseconds("IOFAULT_READ_MS");
}

__attribute__((constructor)) static void map_control(void)
{
    const char *path = getenv("IOFAULT");
    int fd;
    void *map;

    if (path == NULL || (fd = openat(AT_FDCWD, path, O_RDWR | O_CREAT | O_CLOEXEC, 0600)) == -1)
        return;
    /* Of several processes that inherit the setting only the VM will ever use it. */
    if (ftruncate(fd, sizeof(struct control)) == 0) {
        map = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (map != MAP_FAILED) {
            control = map;
#define X(name) strncpy(control->names[K_##name], #name, NAME_SIZE - 1);
            KINDS(X)
#undef X
        }
    }
    close(fd);
}

static int find_library(struct dl_phdr_info *info, size_t size, void *wanted)
{
    uintptr_t address = (uintptr_t)wanted;

    (void)size;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *segment = &info->dlpi_phdr[i];
        uintptr_t start = info->dlpi_addr + segment->p_vaddr;

        if (segment->p_type == PT_LOAD && (segment->p_flags & PF_X) && address >= start &&
            address < start + segment->p_memsz) {
            __atomic_store_n(&to, start + segment->p_memsz, __ATOMIC_RELAXED);
            __atomic_store_n(&from, start, __ATOMIC_RELEASE);
            return 1;
        }
    }
    return 0;
}

/* Whether a call that returns to `caller` is the library's. */
static int is_ours(void *caller)
{
    uintptr_t address = (uintptr_t)caller;
    uintptr_t start = __atomic_load_n(&from, __ATOMIC_ACQUIRE);
    Dl_info info;
    size_t length;

    if (start != 0)
        return address >= start && address < __atomic_load_n(&to, __ATOMIC_RELAXED);
    if (dladdr(caller, &info) == 0 || info.dli_fname == NULL)
        return 0;
    length = strlen(info.dli_fname);
    if (length < strlen(LIBRARY) || strcmp(info.dli_fname + length - strlen(LIBRARY), LIBRARY) != 0)
        return 0;
    return dl_iterate_phdr(find_library, caller);
}

static long delay_of(enum kind kind)
{
    switch (kind) {
    case K_fsync: case K_fdatasync: case K_sync_file_range_wait: return sync_delay;
    case K_read: case K_pread: return read_delay;
    default: return 0;
    }
}

static void wait_for_slow_disk(enum kind kind, void *caller)
{
    int saved = errno;
    long delay = delay_of(kind);

    if (delay > 0 && is_ours(caller)) {
        struct timespec left = {delay / 1000, delay % 1000 * 1000000};

        while (nanosleep(&left, &left) == -1 && errno == EINTR)
            ;
    }
    errno = saved;
}

/* What is to happen to this call. */
static enum action reached(enum kind kind, void *caller)
{
    int saved = errno;
    uint64_t n, total, set;
    enum action action = PASS;

    wait_for_slow_disk(kind, caller);
    if (control != NULL && is_ours(caller)) {
        n = __atomic_add_fetch(&control->counts[kind], 1, __ATOMIC_SEQ_CST);
        total = __atomic_add_fetch(&control->total, 1, __ATOMIC_SEQ_CST);
        set = __atomic_load_n(&control->kind, __ATOMIC_SEQ_CST);
        if (set == ANY)
            n = total;
        if ((set == ANY || set == kind) && n >= control->first && n <= control->last) {
            control->hit_kind = kind;
            __atomic_add_fetch(&control->hits, 1, __ATOMIC_SEQ_CST);
            action = (enum action)control->action;
        }
    }
    errno = saved;
    if (action == EXIT_BEFORE)
        _exit(CRASHED);
    return action;
}

static void after(enum action action)
{
    if (action == EXIT_AFTER)
        _exit(CRASHED);
}

/* The next definition of a symbol, looked up once. */
#define NEXT(pointer, symbol)                                                    \
    do {                                                                         \
        if (__atomic_load_n(&(pointer), __ATOMIC_RELAXED) == NULL) {             \
            void *next_ = dlsym(RTLD_NEXT, symbol);                              \
            if (next_ == NULL)                                                   \
                abort();                                                         \
            __atomic_store_n((void **)(void *)&(pointer), next_, __ATOMIC_RELAXED); \
        }                                                                        \
    } while (0)

/* Runs `call` as the action says; `failed` is what a failing call returns. */
#define DECIDED(type, action, failed, call)  \
    do {                                     \
        type result_;                        \
        if ((action) == FAIL) {              \
            errno = (int)control->error;     \
            return (failed);                 \
        }                                    \
        result_ = (call);                    \
        after(action);                       \
        return result_;                      \
    } while (0)

/* Stands for `symbol`, whose calls are of that kind. */
#define INSTEAD_AS(kind, type, failed, symbol, parameters, arguments)      \
    type symbol parameters                                                 \
    {                                                                      \
        static type(*next) parameters;                                     \
        enum action action = reached(K_##kind, __builtin_return_address(0)); \
        NEXT(next, #symbol);                                               \
        DECIDED(type, action, failed, next arguments);                     \
    }
#define INSTEAD(type, failed, symbol, parameters, arguments) \
    INSTEAD_AS(symbol, type, failed, symbol, parameters, arguments)

/* A short one moves half. */
static size_t part_of(size_t length)
{
    return length > 1 ? length / 2 : length;
}

/* In a garbled one the first byte is another. */
static void garble(void *bytes)
{
    *(unsigned char *)bytes ^= 1;
}

static void *garbled(const void *bytes, size_t length)
{
    void *copy = malloc(length);

    if (copy == NULL)
        abort();
    memcpy(copy, bytes, length);
    garble(copy);
    return copy;
}

#define INSTEAD_READING(kind, symbol, parameters, arguments)                \
    ssize_t symbol parameters                                               \
    {                                                                       \
        static ssize_t(*next) parameters;                                   \
        enum action action = reached(K_##kind, __builtin_return_address(0)); \
        ssize_t result;                                                     \
        NEXT(next, #symbol);                                                \
        if (action == SHORT)                                                \
            n = part_of(n);                                                 \
        if (action != GARBLE)                                               \
            DECIDED(ssize_t, action, -1, next arguments);                   \
        result = next arguments;                                            \
        if (result > 0)                                                     \
            garble(buf);                                                    \
        return result;                                                      \
    }

#define INSTEAD_WRITING(kind, symbol, parameters, arguments)                \
    ssize_t symbol parameters                                               \
    {                                                                       \
        static ssize_t(*next) parameters;                                   \
        enum action action = reached(K_##kind, __builtin_return_address(0)); \
        void *copy;                                                         \
        ssize_t result;                                                     \
        NEXT(next, #symbol);                                                \
        if (action == SHORT)                                                \
            n = part_of(n);                                                 \
        if (action != GARBLE || n == 0)                                     \
            DECIDED(ssize_t, action, -1, next arguments);                   \
        buf = copy = garbled(buf, n);                                       \
        result = next arguments;                                            \
        free(copy);                                                         \
        return result;                                                      \
    }

INSTEAD_READING(read, read, (int fd, void *buf, size_t n), (fd, buf, n))
INSTEAD_READING(pread, pread, (int fd, void *buf, size_t n, off_t at), (fd, buf, n, at))
INSTEAD_READING(pread, pread64, (int fd, void *buf, size_t n, off64_t at), (fd, buf, n, at))
INSTEAD_READING(recv, recv, (int fd, void *buf, size_t n, int flags), (fd, buf, n, flags))
INSTEAD_WRITING(write, write, (int fd, const void *buf, size_t n), (fd, buf, n))
INSTEAD_WRITING(pwrite, pwrite, (int fd, const void *buf, size_t n, off_t at), (fd, buf, n, at))
INSTEAD_WRITING(pwrite, pwrite64, (int fd, const void *buf, size_t n, off64_t at), (fd, buf, n, at))

#define MOST_PARTS 16

/* The first half of what `parts` hold, in `half`; how many parts that takes. */
static int half_of(const struct iovec *parts, int count, struct iovec *half)
{
    size_t length = 0;
    int used = 0;

    if (count > MOST_PARTS)
        abort();
    for (int i = 0; i < count; i++)
        length += parts[i].iov_len;
    length = part_of(length);
    while (used < count && length > 0) {
        half[used] = parts[used];
        if (half[used].iov_len > length)
            half[used].iov_len = length;
        length -= half[used].iov_len;
        used++;
    }
    return used;
}

#define INSTEAD_GATHERING(kind, symbol, parameters, arguments)              \
    ssize_t symbol parameters                                               \
    {                                                                       \
        static ssize_t(*next) parameters;                                   \
        struct iovec other[MOST_PARTS];                                     \
        enum action action = reached(K_##kind, __builtin_return_address(0)); \
        ssize_t result;                                                     \
        NEXT(next, #symbol);                                                \
        if (action == SHORT) {                                              \
            count = half_of(parts, count, other);                           \
            parts = other;                                                  \
        }                                                                   \
        if (action != GARBLE || count == 0 || parts[0].iov_len == 0)        \
            DECIDED(ssize_t, action, -1, next arguments);                   \
        if (count > MOST_PARTS)                                             \
            abort();                                                        \
        memcpy(other, parts, sizeof(*parts) * (size_t)count);               \
        other[0].iov_base = garbled(parts[0].iov_base, parts[0].iov_len);   \
        parts = other;                                                      \
        result = next arguments;                                            \
        free(other[0].iov_base);                                            \
        return result;                                                      \
    }

INSTEAD_GATHERING(writev, writev, (int fd, const struct iovec *parts, int count),
                  (fd, parts, count))
INSTEAD_GATHERING(pwritev, pwritev, (int fd, const struct iovec *parts, int count, off_t at),
                  (fd, parts, count, at))
INSTEAD_GATHERING(pwritev, pwritev64, (int fd, const struct iovec *parts, int count, off64_t at),
                  (fd, parts, count, at))

/* The mode of a file that an open may create. */
#define OPEN_MODE(flags, mode)                            \
    do {                                                  \
        if (((flags) & O_CREAT) ||                        \
            ((flags) & O_TMPFILE) == O_TMPFILE) {         \
            va_list rest_;                                \
            va_start(rest_, flags);                       \
            mode = va_arg(rest_, mode_t);                 \
            va_end(rest_);                                \
        }                                                 \
    } while (0)

#define INSTEAD_OPEN(symbol)                                            \
    int symbol(const char *path, int flags, ...)                        \
    {                                                                   \
        static int (*next)(const char *, int, ...);                     \
        mode_t mode = 0;                                                \
        enum action action = reached(K_open, __builtin_return_address(0)); \
        NEXT(next, #symbol);                                            \
        OPEN_MODE(flags, mode);                                         \
        DECIDED(int, action, -1, next(path, flags, mode));              \
    }
INSTEAD_OPEN(open)
INSTEAD_OPEN(open64)

#define INSTEAD_OPENAT(symbol)                                            \
    int symbol(int dir, const char *path, int flags, ...)                 \
    {                                                                     \
        static int (*next)(int, const char *, int, ...);                  \
        mode_t mode = 0;                                                  \
        void *caller = __builtin_return_address(0);                       \
        enum action action = reached(K_openat, caller);                   \
        NEXT(next, #symbol);                                              \
        OPEN_MODE(flags, mode);                                           \
        if (action == PASS && (flags & O_TMPFILE) == O_TMPFILE &&         \
            control != NULL && (control->mode & NO_TMPFILE) && is_ours(caller)) { \
            errno = EOPNOTSUPP;                                           \
            return -1;                                                    \
        }                                                                 \
        DECIDED(int, action, -1, next(dir, path, flags, mode));           \
    }
INSTEAD_OPENAT(openat)
INSTEAD_OPENAT(openat64)

/* Remembers which file's sync has failed, and counts those that follow on the same. */
static void watch_sync(enum action action, void *caller, int fd)
{
    static int (*next)(int, struct stat *);
    struct stat stat;

    if (control == NULL || control->kind == NONE || !is_ours(caller))
        return;
    NEXT(next, "fstat");
    if (next(fd, &stat) != 0)
        return;
    if (control->failed_inode != 0 && control->failed_inode == stat.st_ino &&
        control->failed_device == stat.st_dev)
        __atomic_add_fetch(&control->resyncs, 1, __ATOMIC_SEQ_CST);
    /* One that a signal has interrupted has told nothing. */
    if (action == FAIL && control->error != EINTR) {
        control->failed_device = stat.st_dev;
        control->failed_inode = stat.st_ino;
    }
}

#define INSTEAD_SYNC(symbol)                                                \
    int symbol(int fd)                                                      \
    {                                                                       \
        static int (*next)(int);                                            \
        void *caller = __builtin_return_address(0);                         \
        enum action action = reached(K_##symbol, caller);                   \
        NEXT(next, #symbol);                                                \
        watch_sync(action, caller, fd);                                     \
        DECIDED(int, action, -1, next(fd));                                 \
    }
INSTEAD_SYNC(fdatasync)
INSTEAD_SYNC(fsync)

int sync_file_range(int fd, off64_t at, off64_t length, unsigned int flags)
{
    static int (*next)(int, off64_t, off64_t, unsigned int);
    void *caller = __builtin_return_address(0);
    int waits = (flags & SYNC_FILE_RANGE_WAIT_AFTER) != 0;
    enum action action = reached(waits ? K_sync_file_range_wait : K_sync_file_range_start, caller);

    NEXT(next, "sync_file_range");
    if (waits)
        watch_sync(action, caller, fd);
    DECIDED(int, action, -1, next(fd, at, length, flags));
}

INSTEAD(int, -1, fallocate, (int fd, int mode, off_t at, off_t length), (fd, mode, at, length))
INSTEAD_AS(fallocate, int, -1, fallocate64, (int fd, int mode, off64_t at, off64_t length),
           (fd, mode, at, length))
INSTEAD(int, -1, ftruncate, (int fd, off_t length), (fd, length))
INSTEAD_AS(ftruncate, int, -1, ftruncate64, (int fd, off64_t length), (fd, length))
INSTEAD(int, -1, link, (const char *old, const char *new), (old, new))
INSTEAD(int, -1, linkat, (int old_dir, const char *old, int new_dir, const char *new, int flags),
        (old_dir, old, new_dir, new, flags))
INSTEAD(int, -1, rename, (const char *old, const char *new), (old, new))
INSTEAD(int, -1, renameat, (int old_dir, const char *old, int new_dir, const char *new),
        (old_dir, old, new_dir, new))
INSTEAD(int, -1, renameat2,
        (int old_dir, const char *old, int new_dir, const char *new, unsigned int flags),
        (old_dir, old, new_dir, new, flags))
INSTEAD(int, -1, unlink, (const char *path), (path))
INSTEAD(int, -1, unlinkat, (int dir, const char *path, int flags), (dir, path, flags))
INSTEAD(int, -1, fstat, (int fd, struct stat *stat), (fd, stat))
INSTEAD_AS(fstat, int, -1, fstat64, (int fd, struct stat64 *stat), (fd, stat))
INSTEAD(int, -1, fstatat, (int dir, const char *path, struct stat *stat, int flags),
        (dir, path, stat, flags))
INSTEAD_AS(fstatat, int, -1, fstatat64,
           (int dir, const char *path, struct stat64 *stat, int flags), (dir, path, stat, flags))
INSTEAD(int, -1, fstatfs, (int fd, struct statfs *stat), (fd, stat))
INSTEAD_AS(fstatfs, int, -1, fstatfs64, (int fd, struct statfs64 *stat), (fd, stat))
INSTEAD(int, -1, fstatvfs, (int fd, struct statvfs *stat), (fd, stat))
INSTEAD_AS(fstatvfs, int, -1, fstatvfs64, (int fd, struct statvfs64 *stat), (fd, stat))
INSTEAD(int, -1, fchmod, (int fd, mode_t mode), (fd, mode))
INSTEAD(int, -1, flock, (int fd, int operation), (fd, operation))
INSTEAD(DIR *, NULL, fdopendir, (int fd), (fd))
INSTEAD(struct dirent *, NULL, readdir, (DIR *stream), (stream))
INSTEAD_AS(readdir, struct dirent64 *, NULL, readdir64, (DIR *stream), (stream))

/* Whatever the third argument is, it is passed on as a pointer would be. */
#define INSTEAD_FCNTL(symbol)                                            \
    int symbol(int fd, int command, ...)                                 \
    {                                                                    \
        static int (*next)(int, int, ...);                               \
        enum action action = reached(K_fcntl, __builtin_return_address(0)); \
        va_list rest;                                                    \
        void *argument;                                                  \
        NEXT(next, #symbol);                                             \
        va_start(rest, command);                                         \
        argument = va_arg(rest, void *);                                 \
        va_end(rest);                                                    \
        DECIDED(int, action, -1, next(fd, command, argument));           \
    }
INSTEAD_FCNTL(fcntl)
INSTEAD_FCNTL(fcntl64)

/* It returns its error. */
#define INSTEAD_ADVISE(symbol, offset)                                            \
    int symbol(int fd, offset at, offset length, int advice)                      \
    {                                                                             \
        static int (*next)(int, offset, offset, int);                             \
        enum action action = reached(K_posix_fadvise, __builtin_return_address(0)); \
        NEXT(next, #symbol);                                                      \
        DECIDED(int, action, (int)control->error, next(fd, at, length, advice));  \
    }
INSTEAD_ADVISE(posix_fadvise, off_t)
INSTEAD_ADVISE(posix_fadvise64, off64_t)

/* Closed it is in any case. */
#define INSTEAD_CLOSE(symbol, parameter)                                      \
    int symbol(parameter what)                                                \
    {                                                                         \
        static int (*next)(parameter);                                        \
        enum action action = reached(K_##symbol, __builtin_return_address(0)); \
        int result;                                                           \
        NEXT(next, #symbol);                                                  \
        result = next(what);                                                  \
        after(action);                                                        \
        if (action == FAIL) {                                                 \
            errno = (int)control->error;                                      \
            return -1;                                                        \
        }                                                                     \
        return result;                                                        \
    }
INSTEAD_CLOSE(close, int)
INSTEAD_CLOSE(closedir, DIR *)
