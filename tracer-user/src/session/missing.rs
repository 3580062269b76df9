//! What the kernel side said and nobody heard, as there was no room for it: instances that it opened and
//! that are no targets yet, and targets that are not what they were.

use tracer_common::missed::Missed;

use super::Session;
use crate::{bpf::instances::Opened, target::End};

impl Session {
    /// Finds out whom process events concerned that were missed since the last call. What seems so is
    /// taken for it if it still seems so at the next: it may be about to be said.
    pub(super) fn find_missing(&mut self) -> anyhow::Result<()> {
        let missed = self.tracer.missed_of(Missed::LifecycleDropped)?;
        if missed == self.missed_before && self.suspects.is_empty() {
            return Ok(());
        }
        // First what there is, then what was said of it by then.
        let open: Vec<Opened> = self.tracer.open_instances().collect();
        self.take_events();
        if self.has_more {
            // At the next call.
            return Ok(());
        }
        self.missed_before = missed;
        let before = std::mem::take(&mut self.suspects);
        for opened in open {
            let Opened { instance, pid, .. } = opened;
            let is_current = self.tracer.instance_of(pid)? == Some(instance);
            let target = self.targets.get(&instance);
            let is_known = match target {
                Some(target) => target.end.is_some() || is_current,
                None => self.unwanted.contains_key(&instance),
            };
            if is_known {
                continue;
            }
            if !before.contains(&opened) {
                self.suspects.insert(opened);
                continue;
            }
            if target.is_none() {
                log::info!("PID {pid}: found though nobody said so");
                self.take_started(pid, instance, None);
            }
            if let Some(target) = self.targets.get_mut(&instance)
                && !is_current
            {
                target.ended(End::Gone);
            }
        }
        Ok(())
    }
}
