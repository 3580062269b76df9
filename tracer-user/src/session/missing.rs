//! What the kernel side said and nobody heard, as there was no room for it: instances that it opened and
//! that are no targets yet, and targets that are not what they were.

use tracer_common::missed::Missed;

use super::Session;
use crate::target::End;

impl Session {
    /// Finds out whom process events concerned that were missed since the last call.
    pub(super) fn find_missing(&mut self) -> anyhow::Result<()> {
        let missed = self.tracer.missed_of(Missed::LifecycleDropped)?;
        if missed == self.missed_before {
            return Ok(());
        }
        self.missed_before = missed;
        // First what there is, then what was said of it by then: what is still unknown was not said.
        let open: Vec<(u32, u32)> = self.tracer.open_instances().collect();
        self.drain_all();
        for (instance, pid) in open {
            let is_current = self.tracer.instance_of(pid)? == Some(instance);
            if let Some(target) = self.targets.get_mut(&instance) {
                if target.end.is_none() && !is_current {
                    target.ended(End::Gone);
                }
            } else if !self.unwanted.contains(&instance) {
                log::info!("PID {pid}: found though nobody said so");
                self.take_started(pid, instance, None);
                if let Some(target) = self.targets.get_mut(&instance)
                    && !is_current
                {
                    target.ended(End::Gone);
                }
            }
        }
        Ok(())
    }
}
