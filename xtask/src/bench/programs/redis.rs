//! redis, asked by redis-benchmark.

use std::{
    ffi::OsString,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use super::server::{Directory, Server, free_port};
use crate::{
    bench::{
        leaks::Preloaded,
        load::{Attachable, Load, Period, Running},
        median, process,
        way::Way,
    },
    cmd,
};

/// How it is set, and what it is asked.
struct Use {
    settings: &'static [&'static str],
    tests: &'static str,
    /// Of `tests`.
    count: f64,
    /// Different keys, at random.
    keys: &'static str,
}

/// A few keys, over and over.
const STORE: Use = Use {
    settings: &[],
    tests: "set,get,lpush,lpop,hset",
    count: 5.0,
    keys: "1000",
};

/// More keys than it may keep: it fills, and then evicts those that were not used for long.
const CACHE: Use = Use {
    settings: &["--maxmemory", "128mb", "--maxmemory-policy", "allkeys-lru"],
    tests: "set,get",
    count: 2.0,
    keys: "10000000",
};

/// redis as a load.
pub(super) fn load(directory: &Path) -> Result<Box<dyn Load>> {
    let start =
        |way: Way| -> Result<Box<dyn Running>> { Ok(Box::new(Redis::start(way, &STORE, None)?)) };
    Ok(Box::new(Attachable::new(
        "redis",
        "commands of redis-benchmark",
        directory,
        Box::new(start),
    )))
}

/// redis as a cache of limited size.
pub(super) fn cache() -> Result<Box<dyn Running>> {
    Ok(Box::new(Redis::start(Way::Native, &CACHE, None)?))
}

/// redis, which leaks.
pub(in crate::bench) fn leaking(leak: &Preloaded) -> Result<Box<dyn Running>> {
    Ok(Box::new(Redis::start(Way::Native, &STORE, Some(leak))?))
}

struct Redis {
    server: Server,
    port: u16,
    used: &'static Use,
    /// Commands a second, as of late.
    rate: f64,
}

impl Redis {
    fn start(way: Way, used: &'static Use, leak: Option<&Preloaded>) -> Result<Self> {
        let program = cmd::find_program("redis-server").context("failed to find redis-server")?;
        let directory = Directory::new("redis")?;
        let port = free_port()?;
        let mut words: Vec<OsString> = vec![program.clone().into()];
        words.extend(["--port", &port.to_string(), "--bind", "127.0.0.1"].map(OsString::from));
        words.extend(["--save", "", "--appendonly", "no", "--daemonize", "no"].map(OsString::from));
        words.extend(["--dir".into(), directory.0.clone().into()]);
        words.extend(used.settings.iter().map(OsString::from));
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
            b"PING\r\n",
            b"+PONG",
        )?;
        Ok(Self {
            server,
            port,
            used,
            rate: 10_000.0,
        })
    }
}

impl Running for Redis {
    fn pid(&self) -> u32 {
        self.server.pid
    }

    fn root(&self) -> u32 {
        self.server.root()
    }

    fn work(&mut self, time: Duration) -> Result<Period> {
        // Of each test.
        let requests = (self.rate * time.as_secs_f64() / self.used.count)
            .clamp(200.0, 200_000.0)
            .round();
        let before = process::cpu_ns(self.server.pid)?;
        let mut command = Command::new("redis-benchmark");
        command
            .args(["-p", &self.port.to_string(), "-t", self.used.tests, "--csv"])
            .args([
                "-n",
                &requests.to_string(),
                "-r",
                self.used.keys,
                "-d",
                "200",
            ])
            .args(["-c", "10"])
            .stderr(Stdio::null());
        let said = cmd::capture(&mut command)?;
        let cpu_ns = process::cpu_ns(self.server.pid)? - before;
        let results = results(&said);
        ensure!(
            results.len() as f64 >= self.used.count,
            "redis-benchmark said: {said}"
        );
        let seconds: f64 = results.iter().map(|(rate, _)| requests / rate).sum();
        let all = requests * results.len() as f64;
        self.rate = all / seconds;
        Ok(Period {
            per_s: self.rate,
            cpu_ns: cpu_ns / all,
            p99_ns: Some(median(
                results.iter().map(|(_, p99_ms)| p99_ms * 1e6).collect(),
            )),
        })
    }
}

/// Requests a second and 99th percentiles in milliseconds, of a table that has the test, the rate, and then the
/// average, the least, and the percentiles 50, 95 and 99.
fn results(csv: &str) -> Vec<(f64, f64)> {
    let parse = |line: &str| {
        let fields: Vec<&str> = line
            .split(',')
            .map(|field| field.trim_matches('"'))
            .collect();
        Some((fields.get(1)?.parse().ok()?, fields.get(6)?.parse().ok()?))
    };
    csv.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_the_results_of_redis_benchmark_are_read() {
        let csv = "\"test\",\"rps\",\"avg_latency_ms\",\"min_latency_ms\",\"p50_latency_ms\",\"p95_latency_ms\",\
                   \"p99_latency_ms\",\"max_latency_ms\"\n\
                   \"SET\",\"26143.79\",\"0.285\",\"0.032\",\"0.095\",\"0.407\",\"5.047\",\"14.047\"\n";
        assert_eq!(results(csv), [(26143.79, 5.047)]);
    }
}
