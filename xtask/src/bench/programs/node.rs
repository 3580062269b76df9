//! Node, asked by wrk for a small page.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result};

use super::{
    server::{Directory, Server, free_port},
    wrk,
};
use crate::{
    bench::{
        fixture,
        load::{Period, Running},
        way::Way,
    },
    cmd,
};

/// Node, which does not leak.
pub(super) fn sound() -> Result<Box<dyn Running>> {
    let program = Path::new("/usr/bin/node");
    let program = program
        .exists()
        .then(|| program.to_owned())
        .or_else(|| cmd::find_program("node"))
        .context("failed to find node")?;
    let port = free_port()?;
    let mut command = Command::new(&program);
    command
        .arg(fixture::source("http_server.js"))
        .arg(port.to_string());
    let server = Server::start(
        command,
        Way::Native,
        &program,
        Directory::new("node")?,
        port,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"HTTP/1.1 200",
    )?;
    Ok(Box::new(Node { server, port }))
}

struct Node {
    server: Server,
    port: u16,
}

impl Running for Node {
    fn pid(&self) -> u32 {
        self.server.pid
    }

    fn root(&self) -> u32 {
        self.server.root()
    }

    fn work(&mut self, time: Duration) -> Result<Period> {
        wrk::ask(self.server.pid, self.port, time)
    }
}
