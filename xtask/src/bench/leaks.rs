//! Whether a leak is found in programs that call their allocator too often for all of it to be recorded: its rank, its
//! rate, and whether anybody else is accused.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{
    expect_known, fixture,
    load::{Lines, Period, Running},
    median,
    programs::{nginx, redis},
    read_json,
    table::{Claim, Limit, Report, Table, figure},
    tracer::Tracer,
    way::Way,
};

/// Of so many blocks of the site that leaks, one does.
const LEAK_ONE_IN: &str = "1000";
/// The function that allocates what leaks, in all programs.
const LEAKING_SITE: &str = "leaking_site";

/// How long a session takes.
const SESSION: Duration = Duration::from_secs(115);
/// How long the program is measured without, before and after.
const ALONE: Duration = Duration::from_secs(10);

/// How far the estimate of a rate may be from the truth, as a share of it.
const TOLERANCE: f64 = 0.3;

/// A program that leaks, and the budget it is traced in.
struct Case {
    name: &'static str,
    program: Program,
    /// What unfreed is told.
    options: &'static [&'static str],
    /// Whether nine tenths of its throughput are promised.
    keeps_throughput: bool,
}

#[derive(Clone, Copy)]
enum Program {
    Server,
    Redis,
    Nginx,
}

impl Program {
    const ALL: [Self; 3] = [Self::Server, Self::Redis, Self::Nginx];

    const fn name(self) -> &'static str {
        match self {
            Self::Server => "server-cpp",
            Self::Redis => "redis",
            Self::Nginx => "nginx",
        }
    }
}

const CASES: [Case; 4] = [
    Case {
        name: "server-cpp, 3 %",
        program: Program::Server,
        options: &["--max-overhead", "3%"],
        keeps_throughput: false,
    },
    Case {
        name: "redis, 3 %",
        program: Program::Redis,
        options: &["--max-overhead", "3%"],
        keeps_throughput: false,
    },
    Case {
        name: "redis, default budget",
        program: Program::Redis,
        options: &[],
        keeps_throughput: true,
    },
    Case {
        name: "nginx, default budget",
        program: Program::Nginx,
        options: &[],
        keeps_throughput: true,
    },
];

/// Runs the benchmark.
pub(super) fn run(
    directory: &Path,
    rounds: usize,
    only: &[String],
    report: &mut Report,
) -> Result<()> {
    if let Some(why) = Way::Default.missing() {
        report.say(&format!("Not measured: {why}."));
        return Ok(());
    }
    expect_known(only, &Program::ALL.map(Program::name))?;
    let chosen =
        |case: &Case| only.is_empty() || only.iter().any(|name| name == case.program.name());
    report.say(&format!(
        "One in {LEAK_ONE_IN} blocks of a function leaks, and everything else is freed. unfreed is attached for \
         {} s; *rank* is the place of that function in its report, *leaks* what it really leaks, *reported* the rate \
         that the report gives, with its interval, *others accused* the other sites whose interval does not contain \
         zero, and *throughput* what the program does meanwhile, of what it does untraced.",
        SESSION.as_secs()
    ));
    let mut table = Table::new(&[
        "leak",
        "mode",
        "rank",
        "leaks",
        "reported",
        "others accused",
        "throughput",
    ]);
    let mut claims = Vec::new();
    for case in CASES.iter().filter(|case| chosen(case)) {
        for round in 1..=rounds {
            eprintln!("leaks: {}, {round} of {rounds}", case.name);
            let found = case.find(directory)?;
            table.row(found.cells(case.name));
            claims.extend(found.claims(case));
        }
    }
    report.table(&table);
    report.claims(&claims);
    Ok(())
}

impl Case {
    fn find(&self, directory: &Path) -> Result<Found> {
        let mut leaking = Leaking::start(self.program, directory)?;
        // Caches are filled, and tables have grown.
        leaking.work(ALONE)?;
        let before = leaking.work(ALONE)?;
        let file = directory.join("leaks.json");
        let mut command = Way::Native.unfreed_attach(leaking.running().pid())?;
        command.args(self.options).args(["--format", "json", "-o"]);
        command.arg(&file).stdout(Stdio::null());
        let tracer = Tracer::start(command, Way::Default, leaking.running().pid())?;
        let (since, leaked) = (Instant::now(), leaking.leaked_blocks()?);
        let during = leaking.work(SESSION)?;
        let leaked = leaking.leaked_blocks()? - leaked;
        let seconds = since.elapsed().as_secs_f64();
        tracer.stop()?;
        let after = leaking.work(ALONE)?;
        Ok(Found {
            truth: leaked / seconds,
            throughput: 2.0 * during.per_s / (before.per_s + after.per_s),
            said: Said::of(&read_json(&file)?)?,
        })
    }
}

/// What a session found, and what there was to find.
struct Found {
    /// Blocks a second that leaked.
    truth: f64,
    /// Of what the program does untraced.
    throughput: f64,
    said: Said,
}

/// What a report says.
#[derive(Debug, PartialEq)]
struct Said {
    mode: String,
    /// Of the site that leaks, from 1 on.
    rank: Option<usize>,
    /// Blocks a second: low, estimate, high.
    rate: Option<[f64; 3]>,
    accused: Vec<String>,
}

impl Said {
    fn of(report: &serde_json::Value) -> Result<Self> {
        let process = &report["processes"][0];
        let sites = process["sites"].as_array().context("no sites")?;
        let functions = |site: &serde_json::Value| -> Vec<String> {
            let frames = site["stack"].as_array().into_iter().flatten();
            let names = frames.filter_map(|frame| frame["function"].as_str());
            names.map(str::to_owned).collect()
        };
        let leaks =
            |site: &&serde_json::Value| functions(site).iter().any(|name| name == LEAKING_SITE);
        let blocks =
            |site: &serde_json::Value, of: &str| site["leak_rate"]["blocks_per_s"][of].as_f64();
        let [low, estimate, high] = ["low", "estimate", "high"].map(|of| {
            let ours = sites.iter().filter(leaks);
            ours.filter_map(|site| blocks(site, of))
                .reduce(|sum, more| sum + more)
        });
        let accused = sites
            .iter()
            .filter(|site| !leaks(site) && blocks(site, "low").is_some_and(|low| low > 0.0));
        Ok(Self {
            mode: report["mode"].as_str().unwrap_or_default().to_owned(),
            rank: sites
                .iter()
                .position(|site| leaks(&site))
                .map(|index| index + 1),
            rate: match (low, estimate, high) {
                (Some(low), Some(estimate), Some(high)) => Some([low, estimate, high]),
                _ => None,
            },
            accused: accused.map(|site| functions(site).join(" < ")).collect(),
        })
    }
}

impl Found {
    fn cells(&self, name: &str) -> Vec<String> {
        let said = &self.said;
        for stack in &said.accused {
            eprintln!("leaks: accused: {stack}");
        }
        vec![
            name.to_owned(),
            said.mode.clone(),
            figure(said.rank.map(|rank| rank as f64), 0, ""),
            format!("{:.1}/s", self.truth),
            said.rate.map_or_else(
                || "–".to_owned(),
                |[low, estimate, high]| format!("{estimate:.1}/s ({low:.1} to {high:.1})"),
            ),
            said.accused.len().to_string(),
            format!("{:.0} %", self.throughput * 100.0),
        ]
    }

    fn claims(&self, case: &Case) -> Vec<Claim> {
        let claim = |what: &str, measured: Option<f64>, limit: Limit| {
            let measured = measured.unwrap_or(f64::NAN);
            Claim::ratio(format!("{}: {what}", case.name), measured, limit)
        };
        let rank = self.said.rank.map(|rank| rank as f64);
        let ratio = self.said.rate.map(|[_, estimate, _]| estimate / self.truth);
        let mut claims = vec![
            claim("rank of the leak", rank, Limit::AtMost(1.0)),
            claim(
                "reported rate, of the true one",
                ratio,
                Limit::Between(1.0 - TOLERANCE, 1.0 + TOLERANCE),
            ),
            claim(
                "others accused",
                Some(self.said.accused.len() as f64),
                Limit::AtMost(0.0),
            ),
        ];
        if let Some([low, _, high]) = self.said.rate {
            let limit = Limit::Between(low / self.truth, high / self.truth);
            claims.push(claim("the truth, in the interval", Some(1.0), limit));
        }
        if case.keeps_throughput {
            claims.push(claim(
                "throughput, of native's",
                Some(self.throughput),
                Limit::AtLeast(0.9),
            ));
        }
        claims
    }
}

/// A program that leaks, and tells how much.
enum Leaking {
    /// It counts itself.
    Server(Lines),
    /// What it preloads counts.
    Preloaded(Box<dyn Running>, Preloaded),
}

impl Leaking {
    fn start(program: Program, directory: &Path) -> Result<Self> {
        let start = match program {
            Program::Server => {
                let server = fixture::compile(directory, "server.cc", &fixture::RELEASED, &[])?;
                let words = [server, "2".into(), LEAK_ONE_IN.into()];
                return Ok(Self::Server(Lines::start(Way::Native, &words, directory)?));
            }
            Program::Redis => redis::leaking,
            Program::Nginx => nginx::leaking,
        };
        let preloaded = Preloaded::new(directory)?;
        Ok(Self::Preloaded(start(&preloaded)?, preloaded))
    }

    fn running(&mut self) -> &mut dyn Running {
        match self {
            Self::Server(lines) => lines,
            Self::Preloaded(running, _) => &mut **running,
        }
    }

    /// Has it work for so long, in as many pieces as its client needs.
    fn work(&mut self, time: Duration) -> Result<Period> {
        let start = Instant::now();
        let mut pieces = Vec::new();
        while pieces.is_empty() || start.elapsed() < time {
            let rest = time.saturating_sub(start.elapsed());
            pieces.push(self.running().work(rest)?);
        }
        let of = |of: fn(&Period) -> f64| median(pieces.iter().map(of).collect());
        Ok(Period {
            per_s: of(|piece| piece.per_s),
            cpu_ns: of(|piece| piece.cpu_ns),
            p99_ns: None,
        })
    }

    /// How much it has leaked by now.
    fn leaked_blocks(&mut self) -> Result<f64> {
        match self {
            Self::Server(lines) => Ok(lines.leaked_blocks),
            Self::Preloaded(_, preloaded) => preloaded.leaked_blocks(),
        }
    }
}

/// A library that has a program leak.
pub(super) struct Preloaded {
    library: OsString,
    count: PathBuf,
}

impl Preloaded {
    fn new(directory: &Path) -> Result<Self> {
        let name = "leaky_input.c";
        Ok(Self {
            library: fixture::compile(directory, name, &fixture::PRELOADED, &[])?,
            count: directory.join("leaked-blocks"),
        })
    }

    /// Has a command begin with it.
    pub(super) fn give_to(&self, command: &mut Command) {
        command
            .env("LD_PRELOAD", &self.library)
            .env("LEAK_ONE_IN", LEAK_ONE_IN)
            .env("LEAK_COUNT", &self.count);
    }

    fn leaked_blocks(&self) -> Result<f64> {
        let bytes = fs::read(&self.count).context("failed to read what has leaked")?;
        let bytes = bytes
            .try_into()
            .ok()
            .context("no count of what has leaked")?;
        Ok(u64::from_le_bytes(bytes) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_a_report_is_read() {
        let site = |function: &str, low: f64| {
            serde_json::json!({
                "stack": [{"function": function}],
                "leak_rate": {"blocks_per_s": {"low": low, "estimate": low + 1.0, "high": low + 2.0}},
            })
        };
        let sites = [
            site("cache", 0.0),
            site("leaking_site", 3.0),
            site("other", 0.5),
        ];
        let report = serde_json::json!({"mode": "windows", "processes": [{"sites": sites}]});
        let expected = Said {
            mode: "windows".to_owned(),
            rank: Some(2),
            rate: Some([3.0, 4.0, 5.0]),
            accused: vec!["other".to_owned()],
        };
        assert_eq!(Said::of(&report).unwrap(), expected);
    }
}
