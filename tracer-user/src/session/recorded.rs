//! What a session writes down as it goes on.

use super::Session;
use crate::{
    bpf::tracer::monotonic_ns,
    recording::{Created, Recorder},
};

impl Session {
    /// Records to a file from now on.
    pub fn record(&mut self, file: Created) -> anyhow::Result<()> {
        self.recorder = Some(Recorder::begin(file)?);
        Ok(())
    }

    /// Has what is new written, if it is time. What goes wrong ends the recording, not the session.
    pub(super) fn keep_recording(&mut self) {
        let Some(recorder) = &mut self.recorder else {
            return;
        };
        // Where nothing is written any more, nothing is due.
        if let Some(trouble) = recorder.trouble() {
            log::warn!("{trouble:#}");
        }
        if recorder.became_full() {
            log::warn!(
                "the recording is full (--record-max): what its sites count from now on finds no room"
            );
        }
        if recorder.is_due() {
            self.write_recording();
        }
    }

    fn write_recording(&mut self) {
        let now_ns = self.stopped_ns.unwrap_or_else(monotonic_ns);
        let overview = self.overview(now_ns);
        if let Some(recorder) = &mut self.recorder {
            match overview {
                Ok(overview) => recorder.send(&overview, &self.definitions, &self.judging),
                Err(error) => log::warn!("{error:#}"),
            }
        }
    }

    /// Has written down what the last report knew. What is recorded is in the file once the recorder has finished.
    pub fn end_recording(&mut self) -> Option<Recorder> {
        if let Some(recorder) = &mut self.recorder {
            recorder.name(&self.names);
        }
        self.write_recording();
        self.recorder.take()
    }
}
