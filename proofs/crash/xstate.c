/* Preloaded into User Mode Linux, for processors with more registers than it knows.
 *
 * It keeps 2696 bytes of a process's registers, all up to those of AVX-512. Where there are more, as with
 * AMX, the host gives it that many and takes none back: it wants all of them or nothing. So those that
 * are missing are asked for and added. They are unused, for a process has to ask for AMX first. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

/* All that are known of take 11 KiB. */
static _Alignas(64) __thread char all[65536];

long ptrace(enum __ptrace_request request, ...)
{
    long (*real)(enum __ptrace_request, ...) = dlsym(RTLD_NEXT, "ptrace");
    va_list args;
    va_start(args, request);
    pid_t pid = va_arg(args, pid_t);
    void *addr = va_arg(args, void *);
    void *data = va_arg(args, void *);
    va_end(args);

    const struct iovec *some = data;
    long result = real(request, pid, addr, data);
    if (result == 0 || errno != EFAULT || request != PTRACE_SETREGSET ||
        addr != (void *)NT_X86_XSTATE || some->iov_len > sizeof all)
        return result;
    struct iovec iov = { all, sizeof all };
    result = real(PTRACE_GETREGSET, pid, addr, &iov);
    if (result != 0)
        return result;
    memcpy(all, some->iov_base, some->iov_len);
    return real(PTRACE_SETREGSET, pid, addr, &iov);
}
