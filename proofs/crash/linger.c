/* Preloaded into the VM of a guest: after each call that changes a name it lingers, for up to 8 ms.
 *
 * Between such a call and the sync that has to follow lie some microseconds, and no cut hits them.
 * With this the journal is often committed in between, by a sync of somebody else, and what is done
 * in the wrong order stands on the disk in the wrong order. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static void linger(void)
{
    int kept = errno;
    usleep((useconds_t)(rand() % 8000));
    errno = kept;
}

int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags)
{
    int (*real)(int, const char *, int, const char *, int) = dlsym(RTLD_NEXT, "linkat");
    int result = real(from_dir, from, to_dir, to, flags);
    linger();
    return result;
}

int renameat(int from_dir, const char *from, int to_dir, const char *to)
{
    int (*real)(int, const char *, int, const char *) = dlsym(RTLD_NEXT, "renameat");
    int result = real(from_dir, from, to_dir, to);
    linger();
    return result;
}

int unlinkat(int dir, const char *name, int flags)
{
    int (*real)(int, const char *, int) = dlsym(RTLD_NEXT, "unlinkat");
    int result = real(dir, name, flags);
    linger();
    return result;
}
