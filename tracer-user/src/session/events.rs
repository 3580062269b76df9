//! What the kernel side says, as it happens.

use std::{collections::hash_map::Entry, mem::offset_of, rc::Rc, time::Instant};

use anyhow::Context as _;
use tracer_common::event::{
    EventHeader, EventKind, RangeEvent, RangeStep, STACK_EVENT_PREFIX_BYTES, StackEnd, StartedEvent,
};

use super::Session;
use crate::{
    attachments::Attachments,
    bpf::tracer::Tracer,
    discover::{
        labels::{Labels, namespace_pid},
        process::{Process, is_unfreed},
    },
    files::AddressSpace,
    ranges::{Origin, Step},
    report::Exit,
    stacks::Stack,
    target::{End, Target},
    unwind::copies::Copy,
};

impl Session {
    /// Waits until there is something to [drain](Self::drain).
    pub async fn event(&self) -> anyhow::Result<()> {
        if self.has_more {
            // The descriptors tell of what is new only. Others, signals before all, get their turn.
            tokio::task::yield_now().await;
            return Ok(());
        }
        tokio::select! {
            ready = self.events.readable() => {
                ready.context("failed to wait for events")?.clear_ready();
            }
            ready = self.copies.readable() => {
                ready.context("failed to wait for stacks")?.clear_ready();
            }
            () = self.tables_finished.notified() => {}
        }
        Ok(())
    }

    /// Takes in what the kernel side has said, as much as can be taken at a time, and the unwind tables
    /// that were finished.
    pub fn drain(&mut self) {
        /// A process can say something faster than it is heard.
        const MOST_COPIES: usize = 1024;
        self.tracer.flush_log();
        self.has_more = false;
        self.take_events();
        self.probe_new_code();
        self.know_code();
        let mut copies = 0;
        while let Some(record) = self.copies.get_mut().next().map(|record| record.to_vec()) {
            copies += 1;
            self.has_more |= copies == MOST_COPIES;
            // The stack that it belongs to may have come since. Copies take time, and until the kernel
            // side knows the code that is mapped now, stacks are doubtful.
            if self.take_events() {
                self.know_code();
            }
            self.take_copy(&record);
            if copies == MOST_COPIES {
                break;
            }
        }
        self.close_many();
    }

    /// Takes in all that the kernel side has said by now.
    pub fn drain_all(&mut self) {
        loop {
            self.drain();
            if !self.has_more {
                return;
            }
        }
    }

    /// Has tables built for new code, and the kernel side know what code there is.
    fn know_code(&mut self) {
        for target in self.targets.values() {
            if target.end.is_none()
                && target.is_unpublished
                && let Err(error) = self.library.want(&target.space)
            {
                log::info!("PID {}: no unwind tables: {error:#}", target.process.pid);
            }
        }
        self.publish(false);
    }

    /// Gives whether there were any.
    pub(super) fn take_events(&mut self) -> bool {
        const MOST: usize = 1 << 14;
        for count in 0..MOST {
            let Some(record) = self.events.get_mut().next().map(|record| record.to_vec()) else {
                return count > 0;
            };
            if let Some(header) = header(&record) {
                self.take_event(header, &record);
            }
        }
        self.has_more = true;
        true
    }

    fn take_event(&mut self, header: EventHeader, record: &[u8]) {
        let is = |kind: EventKind| header.kind == kind as u32;
        if is(EventKind::Forked) {
            self.take_child(header);
            return;
        }
        if is(EventKind::Started) {
            let start = Start::read(header, record);
            self.take_started(header.tgid, header.instance, start);
            return;
        }
        let Self {
            tracer,
            targets,
            files,
            stacks,
            stack_check,
            ..
        } = self;
        let Some(target) = targets.get_mut(&header.instance) else {
            return;
        };
        if is(EventKind::Stack) {
            if let Some((addresses, end)) = walk(record) {
                target.look_for(&addresses, tracer, files);
                let stack = Rc::new(Stack::new(&addresses, end, &mut target.space));
                match stacks.entry(header.detail) {
                    Entry::Occupied(known) if !known.get().may_be_replaced() => {}
                    Entry::Occupied(mut known) => {
                        known.insert(stack);
                    }
                    Entry::Vacant(new) => {
                        new.insert(stack);
                    }
                }
                if let Some(check) = stack_check {
                    check.expect(header.detail, addresses, end);
                }
            }
        } else if is(EventKind::Range) {
            if let Some(step) = range_step(header, record) {
                let origin = Origin {
                    armed_ns: tracer.instance(header.instance).armed_at_ns,
                    since_ns: tracer.recording().since_ns,
                };
                target.ranges.take(&step, origin);
            }
        } else if is(EventKind::Mapped) {
            target.look_at_code(tracer, files);
        } else if is(EventKind::UnknownCode) {
            target.look_for_unknown_code(tracer, files);
        } else if is(EventKind::Exec) {
            target.ended(End::Replaced);
        } else if is(EventKind::Exit) {
            target.ended(End::Exited(Exit::from_wait_status(header.detail)));
        } else if is(EventKind::MainThreadExit) {
            target.main_thread_exited = true;
        }
    }

    /// Probes what targets have mapped since they were probed.
    fn probe_new_code(&mut self) {
        let changed: Vec<u32> = self
            .targets
            .iter()
            .filter(|(_, target)| target.has_new_code())
            .map(|(instance, _)| *instance)
            .collect();
        for instance in changed {
            self.probe_late(instance);
        }
    }

    /// Probes what a process has mapped that is recorded already.
    fn probe_late(&mut self, instance: u32) {
        let result = self.probe(instance);
        let Some(target) = self.targets.get_mut(&instance) else {
            return;
        };
        let pid = target.process.pid;
        match result {
            Ok(_) => {}
            Err(error) if target.process.is_alive() => log::warn!("PID {pid}: {error:#}"),
            // Not worth a word: it has nothing to be probed any more.
            Err(error) => log::debug!("PID {pid}: {error:#}"),
        }
        target.from_start &= saw_all(&self.tracer, &self.attachments, instance, &target.space);
    }

    /// A traced process forked.
    fn take_child(&mut self, header: EventHeader) {
        if self.targets.contains_key(&header.instance) {
            // Found before it was said.
            return;
        }
        let Some(parent) = self.targets.get(&header.detail) else {
            if self.unwanted.contains_key(&header.detail) {
                self.forget(header.tgid, header.instance);
            } else {
                // Nobody heard of the parent.
                self.take_started(header.tgid, header.instance, None);
            }
            return;
        };
        let mut process = parent.process.forked(header.tgid);
        if !self.follows && !self.selection.names(&process) {
            if let Some(parent) = self.targets.get_mut(&header.detail) {
                parent.untraced_children += 1;
            }
            self.forget(header.tgid, header.instance);
            return;
        }
        // It may be in another PID namespace than its parent.
        process.labels.namespace_pid = namespace_pid(header.tgid);
        let mut child = Target::forked(&mut self.tracer, parent, process, header.instance);
        let (tracer, attachments) = (&self.tracer, &self.attachments);
        child.from_start = saw_all(tracer, attachments, header.instance, &child.space);
        self.add(child);
    }

    /// A process executed a program, and is an instance that the kernel side opened. `start` is what it said
    /// of that, if anybody heard.
    pub(super) fn take_started(&mut self, pid: u32, instance: u32, start: Option<Start>) {
        if self.targets.contains_key(&instance) {
            // Found before it was said.
            return;
        }
        let inspected = Process::inspect(pid);
        // It may have executed another program since, or the PID be another's.
        let is_current = matches!(self.tracer.instance_of(pid), Ok(Some(now)) if now == instance);
        let (process, is_meant) = match inspected {
            Ok(mut process) if is_current => {
                process.labels = Labels::of(pid, &mut self.container_names);
                let is_meant = self.selection.contains(&process, &process.labels);
                (process, Some(is_meant))
            }
            Err(_) if is_current && is_unfreed(pid) => {
                self.forget(pid, instance);
                return;
            }
            // Over already, or about to be.
            _ => {
                let comm = start.as_ref().map_or("", |start| &start.comm);
                let mut process = Process::gone(pid, comm);
                if let Some(start) = &start {
                    let names = &mut self.container_names;
                    process.labels = Labels::of_gone(start.uid, start.cgroup, names);
                }
                let is_meant = self.selection.contains_unseen(&process);
                (process, is_meant)
            }
        };
        // What a followed process has executed is traced, whatever it is.
        let was_followed = start.is_none_or(|start| start.was_followed);
        let is_followed = self.follows && was_followed && !self.selection.excludes(&process);
        if !is_followed && is_meant != Some(true) {
            self.unidentified += u64::from(is_meant.is_none());
            self.forget(pid, instance);
            return;
        }
        // A child that was forked has its parent's segments until its own are published.
        self.tracer.inherit_code(instance);
        let mut target = Target::of_instance(process, instance);
        target.from_start = self.traces_all_the_time();
        self.add(target);
        self.probe_late(instance);
        if let Err(error) = self.hook_loader(instance) {
            log::info!("PID {pid}: {error:#}");
        }
        // What was mapped before the hook stood.
        self.probe_late(instance);
    }

    /// A process that the kernel side records is not meant.
    pub(super) fn forget(&mut self, pid: u32, instance: u32) {
        self.unwanted.insert(instance, Instant::now());
        if let Err(error) = self.tracer.forget_process(pid, instance) {
            log::info!("PID {pid}: {error:#}");
        }
    }

    /// Unwinds a stack that was copied.
    fn take_copy(&mut self, record: &[u8]) {
        let (Some(header), Some(copy)) = (header(record), Copy::parse(record)) else {
            return;
        };
        let target = self.targets.get_mut(&header.instance);
        let (Some(target), Some(stack)) = (target, self.stacks.get_mut(&header.detail)) else {
            return;
        };
        let sampled = target.unwind(&copy, self.max_depth, &mut self.codes);
        Rc::make_mut(stack).complete_by(&sampled, &mut target.space);
        if let Some(check) = &mut self.stack_check {
            check.compare(header.detail, &sampled);
        }
    }
}

/// Whether the probes that are for all processes stood when an instance was armed: later ones have not seen
/// its first calls.
fn saw_all(
    tracer: &Tracer,
    attachments: &Attachments,
    instance: u32,
    space: &AddressSpace,
) -> bool {
    attachments.stood_at_ns(space) <= tracer.instance(instance).armed_at_ns
}

fn header(record: &[u8]) -> Option<EventHeader> {
    let word = |at: usize| Some(u32::from_ne_bytes(record.get(at..at + 4)?.try_into().ok()?));
    Some(EventHeader {
        kind: word(0)?,
        tgid: word(4)?,
        instance: word(8)?,
        detail: word(12)?,
    })
}

/// A [`RangeEvent`].
fn range_step(header: EventHeader, record: &[u8]) -> Option<Step> {
    let long = |at: usize| Some(u64::from_ne_bytes(record.get(at..at + 8)?.try_into().ok()?));
    let word = |at: usize| Some(u32::from_ne_bytes(record.get(at..at + 4)?.try_into().ok()?));
    Some(Step {
        step: RangeStep::from_number(word(offset_of!(RangeEvent, step))?)?,
        tid: word(offset_of!(RangeEvent, tid))?,
        address: long(offset_of!(RangeEvent, address))?,
        length_bytes: long(offset_of!(RangeEvent, length_bytes))?,
        site: header.detail,
        at_ns: long(offset_of!(RangeEvent, at_ns))?,
    })
}

/// What a [`StartedEvent`] says.
pub(super) struct Start {
    /// The kernel's short name of the process.
    comm: String,
    /// Number of its control group.
    cgroup: u64,
    /// Its user.
    uid: u32,
    /// Whether what it was before is followed.
    was_followed: bool,
}

impl Start {
    /// None if it is too short.
    fn read(header: EventHeader, record: &[u8]) -> Option<Self> {
        let bytes = |from: usize, count: usize| record.get(from..from + count);
        let comm = bytes(offset_of!(StartedEvent, comm), 16)?;
        let comm = comm.split(|byte| *byte == 0).next().unwrap_or_default();
        let cgroup = bytes(offset_of!(StartedEvent, cgroup), 8)?;
        let uid = bytes(offset_of!(StartedEvent, uid), 4)?;
        Some(Self {
            comm: String::from_utf8_lossy(comm).into_owned(),
            cgroup: u64::from_ne_bytes(cgroup.try_into().ok()?),
            uid: u32::from_ne_bytes(uid.try_into().ok()?),
            was_followed: header.detail != 0,
        })
    }
}

/// Return addresses of a [`tracer_common::event::StackEvent`], and why there are no more.
fn walk(record: &[u8]) -> Option<(Vec<u64>, StackEnd)> {
    let end = u32::from_ne_bytes(record.get(28..32)?.try_into().ok()?);
    let addresses = record
        .get(STACK_EVENT_PREFIX_BYTES..)?
        .as_chunks()
        .0
        .iter()
        .map(|bytes| u64::from_ne_bytes(*bytes))
        .collect();
    Some((addresses, StackEnd::from_number(end)?))
}
