//! Makes system calls fail in one thread, and in those that it starts, by a seccomp filter.

use std::io;
use std::thread;

/// A call, with certain bits in one of its arguments if it matters which, and its error.
#[derive(Clone, Copy)]
pub(crate) struct Call {
    pub(crate) number: libc::c_long,
    pub(crate) bits: Option<(u32, libc::c_int)>,
    pub(crate) errno: libc::c_int,
}

pub(crate) fn call(number: libc::c_long, errno: libc::c_int) -> Call {
    Call {
        number,
        bits: None,
        errno,
    }
}

/// Creating files without a name, on a file system that does not know them.
pub(crate) const UNNAMED: Call = unnamed(libc::EOPNOTSUPP);

pub(crate) const fn unnamed(errno: libc::c_int) -> Call {
    Call {
        number: libc::SYS_openat,
        bits: Some((2, libc::O_TMPFILE & !libc::O_DIRECTORY)),
        errno,
    }
}

/// Does `work` in a thread of its own in which these calls fail. No other thread is affected,
/// and there is no way back, so that thread ends with it.
pub(crate) fn with<T: Send>(calls: &[Call], work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            install(calls);
            work()
        });
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn install(calls: &[Call]) {
    let mut filter = Vec::new();
    for call in calls {
        let fail = statement(
            libc::BPF_RET | libc::BPF_K,
            libc::SECCOMP_RET_ERRNO | call.errno as u32,
        );
        let mut rest = vec![fail];
        if let Some((argument, bits)) = call.bits {
            // Of 64 bits of an argument, the flags are in the lower half.
            let low = 16 + 8 * argument + if cfg!(target_endian = "big") { 4 } else { 0 };
            rest.insert(0, jump_unless(libc::BPF_JSET, bits as u32, rest.len()));
            rest.insert(0, load(low));
        }
        filter.push(load(0));
        filter.push(jump_unless(libc::BPF_JEQ, call.number as u32, rest.len()));
        filter.append(&mut rest);
    }
    filter.push(statement(
        libc::BPF_RET | libc::BPF_K,
        libc::SECCOMP_RET_ALLOW,
    ));
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the calls change nothing but what this thread may call; `program` and the filter
    // that it points to live through the second one, and the kernel copies them.
    let installed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ) == 0
    };
    assert!(installed, "seccomp: {}", io::Error::last_os_error());
}

/// Loads 32 bits of the call's description: its number is at 0, its arguments are from 16 on.
fn load(offset: u32) -> libc::sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}

/// Goes on if the test holds for what was loaded, else skips the next `skip` instructions.
fn jump_unless(test: u32, k: u32, skip: usize) -> libc::sock_filter {
    libc::sock_filter {
        jf: skip as u8,
        ..statement(libc::BPF_JMP | test | libc::BPF_K, k)
    }
}
