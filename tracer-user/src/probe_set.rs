//! The probes in a file, which can be taken away and put back.

use std::{
    fs::File,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use crate::bpf::{
    links::{Link, Point, ProbeProgram, Scope},
    tracer::Tracer,
};

/// Probes in a file, for one process or for all.
#[derive(Debug)]
pub struct ProbeSet {
    /// Open, so that it is the same file when probes are put back, whatever has become of its name.
    file: File,
    scope: Scope,
    /// What can be put back.
    points: Vec<(ProbeProgram, Vec<Point>)>,
    links: Vec<Link>,
    /// Those that stay.
    lasting: Vec<Link>,
}

impl ProbeSet {
    /// Attaches programs at their points, in this order.
    pub fn attach(
        tracer: &mut Tracer,
        path: &Path,
        programs: &[(ProbeProgram, Vec<Point>)],
        scope: Scope,
    ) -> anyhow::Result<Self> {
        let context = || format!("failed to open {}", path.display());
        let mut set = Self {
            file: File::open(path).with_context(context)?,
            scope,
            points: Vec::new(),
            links: Vec::new(),
            lasting: Vec::new(),
        };
        for (program, points) in programs {
            let links = tracer.attach(*program, path, points, scope)?;
            if program.lasts() {
                set.lasting.extend(links);
            } else {
                set.links.extend(links);
                set.points.push((*program, points.clone()));
            }
        }
        Ok(set)
    }

    /// Gives the links of the probes that do not stay, to be taken away.
    pub fn take_away(&mut self) -> Vec<Link> {
        std::mem::take(&mut self.links)
    }

    /// Whether probes were taken away and are not back.
    #[must_use]
    pub const fn is_away(&self) -> bool {
        self.links.is_empty() && !self.points.is_empty()
    }

    /// Attaches those again that were taken away.
    pub fn put_back(&mut self, tracer: &mut Tracer) -> anyhow::Result<()> {
        if !self.links.is_empty() {
            return Ok(());
        }
        let path = PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        // All or none: half of them would be taken for all.
        let mut all = Vec::new();
        for (program, points) in &self.points {
            all.extend(tracer.attach(*program, &path, points, self.scope)?);
        }
        self.links = all;
        Ok(())
    }

    /// Gives all links.
    #[must_use]
    pub fn detach(self) -> Vec<Link> {
        let Self {
            mut links, lasting, ..
        } = self;
        links.extend(lasting);
        links
    }
}
