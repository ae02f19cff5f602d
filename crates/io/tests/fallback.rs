//! Where io_uring is forbidden, worker threads do the work and say why.

#![expect(unsafe_code, reason = "installs a system call filter")]

use zbdkit_io::{Backend, File, FileKind, IoBuf, Runtime, RuntimeOptions};

/// Makes `io_uring_setup` fail with EPERM on this thread, as container runtimes do.
fn forbid_io_uring() {
    let instruction = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let mut program = [
        // The number of the system call is at the start of the filter's data.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            libc::SYS_io_uring_setup as u32,
        ),
        instruction(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
        ),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: takes no pointers.
    let quiet = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    // SAFETY: the filter points to a program that lives until the call returns; the kernel copies it.
    let done = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) };
    assert_eq!((quiet, done), (0, 0), "{}", std::io::Error::last_os_error());
}

#[test]
fn a_forbidden_io_uring_is_replaced_and_named() {
    forbid_io_uring();
    let error = Runtime::new(RuntimeOptions {
        backend: Backend::IoUring,
        ..RuntimeOptions::default()
    });
    let error = error.err().expect("it is forbidden");
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);

    if std::env::var_os("ZBDKIT_IO").is_some() {
        return;
    }
    let runtime = Runtime::new(RuntimeOptions::default()).expect("worker threads");
    assert_eq!(
        runtime.backend().to_string(),
        "worker threads (io_uring: Operation not permitted)"
    );
    let std = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).expect("a file");
    let file = File::from_fd(std.into(), FileKind::default());
    runtime.block_on(async {
        file.write(IoBuf::from_vec(vec![3; 5000]), 0)
            .await
            .expect("a write");
        let buf = IoBuf::alloc(5000);
        file.read(buf.clone(), 0).await.expect("a read");
        assert_eq!(buf.to_vec(), [3; 5000]);
    });
}

#[test]
fn a_thread_has_one_runtime_at_a_time() {
    let first = Runtime::new(RuntimeOptions::default()).expect("a runtime");
    let second = Runtime::new(RuntimeOptions::default());
    assert_eq!(
        second.err().expect("there is one").kind(),
        std::io::ErrorKind::AlreadyExists
    );
    drop(first);
    Runtime::new(RuntimeOptions::default()).expect("the first is gone");
}
