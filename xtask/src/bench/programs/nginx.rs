//! nginx, asked by wrk for a small page.

use std::{ffi::OsString, fs, path::Path, time::Duration};

use anyhow::{Context as _, Result};

use super::{
    server::{Directory, Server, free_port},
    wrk,
};
use crate::{
    bench::{
        leaks::Preloaded,
        load::{Attachable, Load, Period, Running},
        way::Way,
    },
    cmd,
};

/// nginx as a load.
pub(super) fn load(directory: &Path) -> Result<Box<dyn Load>> {
    let start = |way: Way| -> Result<Box<dyn Running>> { Ok(Box::new(Nginx::start(way, None)?)) };
    let mut load = Attachable::new("nginx", "requests of wrk", directory, Box::new(start));
    // wrk counts in seconds.
    load.time = Duration::from_secs(3);
    Ok(Box::new(load))
}

/// nginx, which does not.
pub(super) fn sound() -> Result<Box<dyn Running>> {
    Ok(Box::new(Nginx::start(Way::Native, None)?))
}

/// nginx, which leaks.
pub(in crate::bench) fn leaking(leak: &Preloaded) -> Result<Box<dyn Running>> {
    Ok(Box::new(Nginx::start(Way::Native, Some(leak))?))
}

struct Nginx {
    server: Server,
    port: u16,
}

impl Nginx {
    fn start(way: Way, leak: Option<&Preloaded>) -> Result<Self> {
        let program = ["/usr/sbin/nginx".into()]
            .into_iter()
            .find(|path: &std::path::PathBuf| path.exists())
            .or_else(|| cmd::find_program("nginx"))
            .context("failed to find nginx")?;
        let directory = Directory::new("nginx")?;
        let port = free_port()?;
        let root = directory.0.display();
        // Without a master, as heaptrack does not follow a fork; a worker does the same work.
        let configuration = format!(
            "daemon off; master_process off; user root;
             pid {root}/pid; error_log {root}/error.log;
             events {{ worker_connections 256; }}
             http {{
                 access_log off; keepalive_requests 1000000000;
                 client_body_temp_path {root}/body; proxy_temp_path {root}/proxy;
                 fastcgi_temp_path {root}/fastcgi; uwsgi_temp_path {root}/uwsgi;
                 scgi_temp_path {root}/scgi;
                 server {{ listen 127.0.0.1:{port}; root {root}; }}
             }}\n"
        );
        let write = |name: &str, text: &str| {
            fs::write(directory.0.join(name), text)
                .with_context(|| format!("failed to write {name}"))
        };
        write("nginx.conf", &configuration)?;
        write("index.html", &"hello, this is a page\n".repeat(20))?;
        let words: Vec<OsString> = vec![
            program.clone().into(),
            "-c".into(),
            directory.0.join("nginx.conf").into(),
            "-p".into(),
            directory.0.clone().into(),
            "-e".into(),
            directory.0.join("error.log").into(),
        ];
        let mut command = way.wrap(&words, &directory.0);
        if let Some(leak) = leak {
            leak.give_to(&mut command);
        }
        let server = Server::start(
            command,
            way,
            &program,
            directory,
            port,
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"HTTP/1.1 200",
        )?;
        Ok(Self { server, port })
    }
}

impl Running for Nginx {
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
