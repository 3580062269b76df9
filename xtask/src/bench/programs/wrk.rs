//! wrk, which asks a server for its small page.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result};

use crate::{
    bench::{load::Period, process},
    cmd,
};

/// Asks the server of that PID and port for so long, which is counted in seconds.
pub(super) fn ask(pid: u32, port: u16, time: Duration) -> Result<Period> {
    let seconds = time.as_secs_f64().ceil();
    let before = process::cpu_ns(pid)?;
    let said = cmd::capture(
        Command::new("wrk")
            .args(["-t1", "-c8", "--latency", &format!("-d{seconds}s")])
            .arg(format!("http://127.0.0.1:{port}/")),
    )?;
    let cpu_ns = process::cpu_ns(pid)? - before;
    let result = Said::parse(&said).with_context(|| format!("wrk said: {said}"))?;
    Ok(Period {
        per_s: result.per_s,
        cpu_ns: cpu_ns / result.requests,
        p99_ns: Some(result.p99_ns),
    })
}

/// What wrk says.
#[derive(Debug, PartialEq)]
struct Said {
    requests: f64,
    per_s: f64,
    p99_ns: f64,
}

impl Said {
    fn parse(text: &str) -> Option<Self> {
        let lines = || text.lines().map(str::trim);
        Some(Self {
            requests: lines().find_map(|line| line.split_once(" requests in ")?.0.parse().ok())?,
            per_s: lines()
                .find_map(|line| line.strip_prefix("Requests/sec:")?.trim().parse().ok())?,
            p99_ns: lines().find_map(|line| nanoseconds(line.strip_prefix("99%")?.trim()))?,
        })
    }
}

/// `1.23ms`
fn nanoseconds(text: &str) -> Option<f64> {
    let unit = text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
    let number: f64 = text.strip_suffix(unit)?.parse().ok()?;
    let scale = match unit {
        "us" => 1e3,
        "ms" => 1e6,
        "s" => 1e9,
        _ => return None,
    };
    Some(number * scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_what_wrk_says_is_read() {
        let text = "  Latency Distribution\n     50%  120.00us\n     99%    1.50ms\n  \
                    61234 requests in 3.00s, 20.00MB read\nRequests/sec:  20411.33\n";
        let expected = Said {
            requests: 61234.0,
            per_s: 20411.33,
            p99_ns: 1.5e6,
        };
        assert_eq!(Said::parse(text), Some(expected));
    }
}
