//! Where a process's memory comes in: samples of its page faults, with the stacks that they were
//! made from.
//!
//! One perf software event a thread counts the faults that were served without reading from disk, as
//! those of new memory are, and every so many of them is sampled. Only the threads that are watched
//! pay for it, and a process that grows slowly is not drowned by others: of few faults every one is
//! taken. The period is ours to choose: the kernel's own, which it adapts to a frequency, says
//! nothing about how many faults a sample stands for where they come in bursts.

use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
};

use perf_event::{
    Builder, SampleFlag, Sampler,
    data::{Record, Sample},
    events::Software,
};

use crate::unwind::sampled::Registers;

/// Bytes of a stack that are copied: some dozens of frames. A multiple of 8.
const STACK_BYTES: u32 = 8 << 10;
/// Room for samples between two looks, in bytes; of every thread.
const RING_BYTES: usize = 64 << 10;
/// Threads of a process that are watched at most.
const MAX_THREADS: usize = 64;

/// `PERF_REG_X86_…` of `asm/perf_regs.h`; registers come in the order of these.
const FRAME_POINTER: u64 = 6;
const STACK_POINTER: u64 = 7;
const INSTRUCTION_POINTER: u64 = 8;
const REGISTERS: u64 = 1 << FRAME_POINTER | 1 << STACK_POINTER | 1 << INSTRUCTION_POINTER;

const PAGE_BYTES: u64 = 4096;

/// A page fault.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The address that was touched.
    pub address: u64,
    /// Bytes that came in with this fault and those that it stands for.
    pub bytes: u64,
    /// What touched it, or made the system call that did.
    pub registers: Registers,
    /// The stack, from the stack pointer on.
    pub stack: Vec<u8>,
}

/// What was sampled, and what was not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Samples taken.
    pub samples: u64,
    /// Samples that found no room, or could not be read.
    pub lost: u64,
    /// Threads that are not watched, as there are too many of them.
    pub unwatched_threads: u64,
}

/// The threads of a process, being watched.
pub struct Watch {
    pid: u32,
    threads: HashMap<i32, Sampler>,
    /// Faults of a thread of which one is sampled.
    period: u64,
    tally: Tally,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Watch")
            .field("pid", &self.pid)
            .field("threads", &self.threads.len())
            .finish_non_exhaustive()
    }
}

impl Watch {
    /// Of a process; no thread is watched before the first [`Watch::refresh`].
    #[must_use]
    pub fn new(pid: u32) -> Self {
        Self {
            pid,
            threads: HashMap::new(),
            period: 1,
            tally: Tally::default(),
        }
    }

    /// Watches the threads that there are now. `faults_per_s` is what all of them make at present, and
    /// `samples_per_s` how many of these are wanted.
    ///
    /// It is an error if the kernel does not let us; that a thread has ended is none.
    pub fn refresh(&mut self, faults_per_s: f64, samples_per_s: f64) -> io::Result<()> {
        let listed: BTreeSet<i32> = match fs::read_dir(format!("/proc/{}/task", self.pid)) {
            Ok(entries) => entries
                .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
                .collect(),
            // The process has ended.
            Err(_) => BTreeSet::new(),
        };
        self.threads.retain(|thread, _| listed.contains(thread));
        self.tally.unwatched_threads = listed.len().saturating_sub(MAX_THREADS) as u64;
        let period = period(faults_per_s, samples_per_s);
        // A little more or less is not worth opening all events anew.
        if period > self.period * 2 || self.period > period * 4 {
            self.threads.clear();
            self.period = period;
        }
        for thread in listed {
            if self.threads.len() >= MAX_THREADS {
                break;
            }
            if self.threads.contains_key(&thread) {
                continue;
            }
            match open(thread, self.period) {
                Ok(sampler) => {
                    self.threads.insert(thread, sampler);
                }
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes what was sampled since the last time.
    pub fn drain(&mut self, mut take: impl FnMut(Fault)) {
        let period = self.period;
        for sampler in self.threads.values_mut() {
            while let Some(record) = sampler.next_record() {
                match record.parse_record() {
                    Ok(Record::Sample(sample)) => match fault(&sample, period) {
                        Some(fault) => {
                            self.tally.samples += 1;
                            take(fault);
                        }
                        None => self.tally.lost += 1,
                    },
                    Ok(Record::Lost(lost)) => self.tally.lost += lost.lost,
                    Ok(Record::LostSamples(lost)) => self.tally.lost += lost.lost,
                    Ok(_) => {}
                    Err(_) => self.tally.lost += 1,
                }
            }
        }
    }

    /// What was sampled so far.
    #[must_use]
    pub const fn tally(&self) -> Tally {
        self.tally
    }
}

/// Of how many faults one is sampled. Odd, as programs do things in powers of two.
fn period(faults_per_s: f64, samples_per_s: f64) -> u64 {
    // Of few faults all.
    let period = (faults_per_s / samples_per_s / 2.0) as u64;
    match period {
        0 | 1 => 1,
        _ => period | 1,
    }
}

/// Has the kernel sample every so many of a thread's faults.
fn open(thread: i32, period: u64) -> io::Result<Sampler> {
    // Counted when the page is there, so that its size can be told.
    Builder::new(Software::PAGE_FAULTS_MIN)
        .observe_pid(thread)
        .any_cpu()
        // System calls fault in memory as well.
        .include_kernel()
        .sample_period(period)
        .sample(
            SampleFlag::ADDR
                | SampleFlag::REGS_USER
                | SampleFlag::STACK_USER
                | SampleFlag::DATA_PAGE_SIZE,
        )
        .sample_regs_user(REGISTERS)
        .sample_stack_user(STACK_BYTES)
        // Nobody waits for it.
        .wakeup_watermark(RING_BYTES)
        .enabled(true)
        .build()?
        .sampled(RING_BYTES)
}

fn fault(sample: &Sample<'_>, period: u64) -> Option<Fault> {
    let registers = sample.regs_user()?;
    let &[frame_pointer, stack_pointer, instruction_pointer] = &registers.regs[..] else {
        return None;
    };
    let page_bytes = match sample.data_page_size()? {
        // It is gone again.
        0 => PAGE_BYTES,
        bytes => bytes,
    };
    Some(Fault {
        address: sample.addr()?,
        bytes: period.saturating_mul(page_bytes),
        registers: Registers {
            // As of a function that was interrupted: it has not done this instruction.
            instruction_pointer: instruction_pointer.checked_add(1)?,
            stack_pointer,
            frame_pointer,
        },
        stack: sample.stack_user()?.to_vec(),
    })
}

/// Why the kernel does not let us sample, as a clause.
#[must_use]
pub fn refusal(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => {
            let paranoid = fs::read_to_string("/proc/sys/kernel/perf_event_paranoid");
            let paranoid = paranoid.unwrap_or_default();
            format!(
                "the kernel permits no perf events (kernel.perf_event_paranoid is {}; CAP_PERFMON is \
                 needed)",
                paranoid.trim()
            )
        }
        Some(libc::EMFILE | libc::ENFILE) => "too many files are open (ulimit -n)".to_owned(),
        Some(libc::ENOENT | libc::ENOSYS | libc::EOPNOTSUPP | libc::EINVAL) => {
            format!("this kernel cannot sample page faults with their stacks ({error})")
        }
        _ => format!("page faults cannot be sampled: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_faults_are_seen_where_they_are_made() {
        let mut watch = Watch::new(std::process::id());
        if let Err(error) = watch.refresh(0.0, 10.0) {
            // Not permitted.
            assert!(refusal(&error).contains("perf"), "{error}");
            return;
        }
        const BYTES: usize = 32 << 20;
        let mut memory = vec![0_u8; BYTES];
        for page in memory.chunks_mut(4096) {
            page[0] = 1;
        }
        let range = memory.as_ptr_range();
        let range = range.start as u64..range.end as u64;
        let mut bytes = 0;
        watch.drain(|fault| {
            if range.contains(&fault.address) {
                bytes += fault.bytes;
                assert!(!fault.stack.is_empty());
            }
        });
        assert!(bytes > 0);
        assert!(watch.tally().samples > 0);
    }

    #[test]
    fn of_few_faults_all_are_taken() {
        assert_eq!(period(0.0, 3.0), 1);
        assert_eq!(period(6.0, 3.0), 1);
        assert_eq!(period(60_000.0, 3.0), 10_001);
    }

    #[test]
    fn refusals_say_what_to_do() {
        let error = io::Error::from_raw_os_error(libc::EACCES);
        assert!(refusal(&error).contains("perf_event_paranoid"));
    }
}
