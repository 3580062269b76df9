//! What the kernel side says, as it happens.

use std::{collections::hash_map::Entry, mem::offset_of};

use anyhow::Context as _;
use tracer_common::event::{
    EventHeader, EventKind, RangeEvent, RangeStep, STACK_EVENT_PREFIX_BYTES, StackEnd, StartedEvent,
};

use super::Session;
use crate::{
    discover::{labels::Labels, process::Process},
    ranges::Step,
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
            self.take_events();
            self.know_code();
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
        for target in &self.targets {
            if target.end.is_none()
                && target.is_unpublished
                && let Err(error) = self.library.want(&target.space)
            {
                log::info!("PID {}: no unwind tables: {error:#}", target.process.pid);
            }
        }
        self.publish(false);
    }

    fn take_events(&mut self) {
        const MOST: usize = 1 << 14;
        for _ in 0..MOST {
            let Some(record) = self.events.get_mut().next().map(|record| record.to_vec()) else {
                return;
            };
            if let Some(header) = header(&record) {
                self.take_event(header, &record);
            }
        }
        self.has_more = true;
    }

    fn take_event(&mut self, header: EventHeader, record: &[u8]) {
        let is = |kind: EventKind| header.kind == kind as u32;
        if is(EventKind::Forked) {
            self.take_child(header);
            return;
        }
        if is(EventKind::Started) {
            self.take_started(header, record);
            return;
        }
        let Some(index) = self.by_instance.get(&header.instance).copied() else {
            return;
        };
        let Self {
            tracer,
            targets,
            files,
            stacks,
            stack_check,
            ..
        } = self;
        let target = &mut targets[index];
        if is(EventKind::Stack) {
            if let Some((addresses, end)) = walk(record) {
                target.look_for(&addresses, tracer, files);
                let stack = Stack::new(&addresses, end, &mut target.space);
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
                target.ranges.take(&step);
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
        for index in 0..self.targets.len() {
            if self.targets[index].has_new_code() {
                self.probe_late(index);
            }
        }
    }

    /// Probes what a process has mapped that is recorded already.
    fn probe_late(&mut self, index: usize) {
        let standing = self.attachments.standing();
        if let Err(error) = self.probe(index) {
            let pid = self.targets[index].process.pid;
            match Process::is_alive(pid) {
                true => log::warn!("PID {pid}: {error:#}"),
                // Not worth a word: it has nothing to be probed any more.
                false => log::debug!("PID {pid}: {error:#}"),
            }
        }
        if self.attachments.standing() != standing {
            self.targets[index].from_start = false;
        }
    }

    /// A traced process forked.
    fn take_child(&mut self, header: EventHeader) {
        let Some(parent) = self.by_instance.get(&header.detail).copied() else {
            self.leave_out(header);
            return;
        };
        let is_meant = self.follows || {
            let process = self.targets[parent].process.forked(header.tgid);
            self.selection.names(&process)
        };
        if !is_meant {
            self.targets[parent].untraced_children += 1;
            self.leave_out(header);
            return;
        }
        let parent = &self.targets[parent];
        let child = Target::forked(&mut self.tracer, parent, header.tgid, header.instance);
        self.add(child);
    }

    /// A process executed a program.
    fn take_started(&mut self, header: EventHeader, record: &[u8]) {
        let process = match Process::inspect(header.tgid) {
            Ok(mut process) => {
                process.labels = Labels::of(header.tgid, &mut self.container_names);
                process
            }
            Err(_) if Process::is_unfreed(header.tgid) => {
                self.leave_out(header);
                return;
            }
            // Over already, or about to be.
            Err(_) => Process::gone(header.tgid, &comm(record)),
        };
        // What a followed process has executed is traced, whatever it is.
        let is_followed = self.follows && header.detail != 0 && !self.selection.excludes(&process);
        if !is_followed && !self.selection.contains(&process, &process.labels) {
            self.leave_out(header);
            return;
        }
        let mut target = Target::of_instance(process, header.instance);
        target.from_start = true;
        let index = self.add(target);
        self.probe_late(index);
        if let Err(error) = self.hook_loader(index) {
            log::info!("PID {}: {error:#}", header.tgid);
        }
    }

    /// A process that the kernel side records is not meant.
    fn leave_out(&mut self, header: EventHeader) {
        match self.tracer.forget_process(header.tgid, header.instance) {
            Ok(()) => {
                self.unwanted.insert(header.instance);
            }
            Err(error) => log::info!("PID {}: {error:#}", header.tgid),
        }
    }

    /// Unwinds a stack that was copied.
    fn take_copy(&mut self, record: &[u8]) {
        let (Some(header), Some(copy)) = (header(record), Copy::parse(record)) else {
            return;
        };
        let index = self.by_instance.get(&header.instance).copied();
        let target = index.map(|index| &mut self.targets[index]);
        let (Some(target), Some(stack)) = (target, self.stacks.get_mut(&header.detail)) else {
            return;
        };
        let sampled = target.unwind(&copy, self.max_depth, &mut self.codes);
        stack.complete_by(&sampled, &mut target.space);
        if let Some(check) = &mut self.stack_check {
            check.compare(header.detail, &sampled);
        }
    }
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

/// The name in a [`StartedEvent`].
fn comm(record: &[u8]) -> String {
    const AT: usize = std::mem::offset_of!(StartedEvent, comm);
    let bytes = record.get(AT..).unwrap_or_default();
    let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
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
