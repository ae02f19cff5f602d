//! The limit: the same workloads by io_uring on the file itself, with nothing between.

#![expect(unsafe_code, reason = "io_uring takes buffers by address")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use io_uring::{IoUring, opcode, types};
use rustix::fs::{FallocateFlags, fallocate};

use crate::vhost::MAX_BLOCK;
use crate::workload::{
    Geometry, Kind, PAGE, RandomOffsets, Sample, Workload, WriteOffsets, background, check, sample_positions,
    stamp,
};

/// Looks at the completion ring before sleeping after all.
const SPINS: u32 = 100_000;

/// A file, read and written without a server. One thread, whatever the servers have.
pub struct DirectTarget {
    file: File,
    geometry: Geometry,
    punch: bool,
}

impl DirectTarget {
    pub fn new(file: File, geometry: Geometry) -> Self {
        DirectTarget {
            file,
            geometry,
            punch: false,
        }
    }

    pub fn set_punch(&mut self, punch: bool) {
        self.punch = punch;
    }

    /// Writes the whole file with pass 0.
    pub fn fill(&mut self) -> Result<()> {
        let workload = Workload {
            kind: Kind::SequentialWrite,
            block: MAX_BLOCK,
            depth: 8,
        };
        let mut ring = Ring::new(&self.file, workload)?;
        let mut offsets = WriteOffsets::new(self.geometry, workload, 0, 1);
        ring.pump(Duration::MAX, |buffer| write_next(&mut offsets, buffer, 0))?;
        Ok(())
    }

    /// Measures `workload` for `duration`; appends are sequential writes.
    pub fn measure(&mut self, workload: Workload, mut seed: u64, duration: Duration) -> Result<Sample> {
        let mut ring = Ring::new(&self.file, workload)?;
        if workload.kind == Kind::RandomRead {
            let mut offsets = RandomOffsets::new(self.geometry, workload.block, seed);
            let (ops, time) = ring.pump(duration, |_| Some(offsets.next()))?;
            return Ok(Sample {
                iops: ops as f64 / time.as_secs_f64(),
            });
        }
        let (mut ops, mut elapsed) = (0, Duration::ZERO);
        while elapsed < duration {
            if self.punch {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&self.file, flags, 0, self.geometry.size)?;
            }
            let mut offsets = WriteOffsets::new(self.geometry, workload, 0, 1);
            let (pass_ops, pass_time) = ring.pump(duration - elapsed, |buffer| {
                write_next(&mut offsets, buffer, seed)
            })?;
            self.verify_writes(workload, seed, pass_ops)?;
            ops += pass_ops;
            elapsed += pass_time;
            seed += 1;
        }
        Ok(Sample {
            iops: ops as f64 / elapsed.as_secs_f64(),
        })
    }

    fn verify_writes(&self, workload: Workload, seed: u64, written: u64) -> Result<()> {
        let mut data = vec![0; workload.block as usize];
        for i in sample_positions(written, 128) {
            let at = i * u64::from(workload.block);
            rustix::io::pread(&self.file, &mut data, at)?;
            ensure!(
                check(&data, seed, at / PAGE as u64),
                "wrong data at byte {at} of the file"
            );
        }
        Ok(())
    }
}

fn write_next(offsets: &mut WriteOffsets, buffer: &mut [u8], seed: u64) -> Option<u64> {
    let (_, at) = offsets.next()?;
    for (page, number) in buffer.chunks_mut(PAGE).zip(at / PAGE as u64..) {
        page[..16].copy_from_slice(&stamp(seed, number));
    }
    Some(at)
}

struct Ring {
    ring: IoUring,
    workload: Workload,
    /// One buffer for each request in flight.
    buffers: Vec<Box<[u8]>>,
    in_flight: usize,
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel may write the buffers until the last completion; closing a ring does not wait.
        while self.in_flight > 0 {
            if self.ring.submit_and_wait(1).is_err() {
                std::mem::take(&mut self.buffers).into_iter().for_each(|buffer| {
                    let _ = Box::leak(buffer);
                });
                return;
            }
            self.in_flight -= self.ring.completion().count();
        }
    }
}

impl Ring {
    fn new(file: &File, workload: Workload) -> Result<Self> {
        // Cheapest of the modes tried (also DEFER_TASKRUN, or none) for one who looks all the time.
        let ring: IoUring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .build(workload.depth.next_power_of_two())?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let buffers = (0..workload.depth)
            .map(|_| background(MAX_BLOCK as usize).into_boxed_slice())
            .collect();
        Ok(Ring {
            ring,
            workload,
            buffers,
            in_flight: 0,
        })
    }

    /// Looks at the ring until it has a completion. tmpfs hands requests to a kernel thread, and to
    /// sleep meanwhile costs tens of microseconds; the client of the servers does not sleep either.
    fn wait(&mut self) -> Result<()> {
        for _ in 0..SPINS {
            if !self.ring.completion().is_empty() {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        self.ring.submit_and_wait(1)?;
        Ok(())
    }

    /// Keeps all buffers in flight until `time` is over or `next` has no more offsets, then drains.
    fn pump(
        &mut self,
        time: Duration,
        mut next: impl FnMut(&mut [u8]) -> Option<u64>,
    ) -> Result<(u64, Duration)> {
        let len = self.workload.block;
        let mut idle: Vec<usize> = (0..self.buffers.len()).collect();
        let (mut ops, mut more) = (0, true);
        let start = Instant::now();
        loop {
            while more && let Some(&i) = idle.last() {
                let buffer = &mut self.buffers[i][..len as usize];
                let Some(at) = next(buffer) else {
                    more = false;
                    break;
                };
                let fd = types::Fixed(0);
                let entry = match self.workload.kind {
                    Kind::RandomRead => opcode::Read::new(fd, buffer.as_mut_ptr(), len).offset(at).build(),
                    _ => opcode::Write::new(fd, buffer.as_ptr(), len).offset(at).build(),
                };
                // SAFETY: the buffer lives in `self` and is not in `idle` until its completion is seen;
                // after an error that leaves early, `drop` waits for it before it frees the buffer.
                if unsafe { self.ring.submission().push(&entry.user_data(i as u64)) }.is_err() {
                    break;
                }
                idle.pop();
                self.in_flight += 1;
            }
            if self.in_flight == 0 {
                return Ok((ops, start.elapsed()));
            }
            self.ring.submit()?;
            self.wait()?;
            let mut wrong = None;
            for done in self.ring.completion() {
                self.in_flight -= 1;
                if done.result() != len as i32 {
                    wrong = Some(done.result());
                }
                idle.push(done.user_data() as usize);
                ops += 1;
            }
            if let Some(result) = wrong {
                bail!("a request on the file gave {result}");
            }
            if start.elapsed() >= time {
                more = false;
            }
        }
    }
}
