//! What tracing costs real programs under load.

mod gcc;
pub(super) mod nginx;
mod node;
mod postgres;
pub(super) mod redis;
mod reporting;
mod server;
mod wrk;

use std::path::Path;

use anyhow::Result;

use super::{
    expect_known,
    load::{Load, Starts},
    rounds::{self, Rounds, cpu, p99, throughput},
    table::{Claim, Limit, Report, Table, figure, times},
    way::Way,
};

const WAYS: [Way; 7] = [
    Way::Native,
    Way::Exact,
    Way::Sampled,
    Way::Default,
    Way::Bpftrace,
    Way::Heaptrack,
    Way::Valgrind,
];

/// Those that a user is promised nine tenths of the throughput of, without any option.
const PROMISED: [&str; 2] = ["redis", "nginx"];

/// Makes a load, in a directory of its own.
type Make = fn(&Path) -> Result<Box<dyn Load>>;

const PROGRAMS: [(&str, Make); 8] = [
    ("redis", redis::load),
    ("nginx", nginx::load),
    ("postgres", postgres::load),
    ("python", reporting::python),
    ("gcc", gcc::load),
    ("sqlite", reporting::sqlite),
    ("server-rust", reporting::rust),
    ("server-cpp", reporting::cpp),
];

/// Programs that do not leak, each for one job.
pub(super) const SOUND: [(&str, Starts); 5] = [
    ("redis", |_| redis::cache()),
    ("nginx", |_| nginx::sound()),
    ("postgres", |_| postgres::sound()),
    ("python", reporting::sound_python),
    ("node", |_| node::sound()),
];

/// One of the programs.
///
/// # Errors
///
/// There is none of that name, or it cannot be made.
pub(super) fn load(name: &str, directory: &Path) -> Result<Box<dyn Load>> {
    let known = PROGRAMS.iter().find(|(known, _)| *known == name);
    let Some((_, make)) = known else {
        let names = PROGRAMS.map(|(name, _)| name).join(", ");
        anyhow::bail!("no program {name}; there are {names}");
    };
    make(directory)
}

/// Runs the benchmark.
pub(super) fn run(
    directory: &Path,
    rounds: usize,
    only: &[String],
    report: &mut Report,
) -> Result<()> {
    expect_known(only, &PROGRAMS.map(|(name, _)| name))?;
    let ways = Way::available(&WAYS);
    report.say(&format!(
        "As multiples of the program's own figures untraced, medians of {rounds} rounds; CPU is the program's own for \
         one operation, p99 what 99 of 100 operations take at most. Beside that, what the tool took itself: share of \
         a core, resident memory at most, and the kernel's memory for its maps."
    ));
    for (name, make) in PROGRAMS {
        if !only.is_empty() && !only.iter().any(|known| known == name) {
            continue;
        }
        let mut load = make(directory)?;
        let measured = rounds::interleave(&mut *load, &ways, rounds)?;
        table(&*load, &measured, report);
        let unfit: Vec<String> = ways
            .iter()
            .filter_map(|way| Some(format!("{}: {}.", way.name(), load.unfit(*way)?)))
            .collect();
        if !unfit.is_empty() {
            report.say(&unfit.join(" "));
        }
        report.claims(&claims(name, &measured));
    }
    Ok(())
}

fn table(load: &dyn Load, measured: &Rounds, report: &mut Report) {
    let title = format!("{}: {}", load.name(), load.operations());
    let mut table = Table::new(&[
        &title,
        "throughput",
        "CPU",
        "p99",
        "tool's CPU",
        "memory",
        "in the kernel",
    ]);
    for way in measured.ways() {
        let ratio = |of| times(measured.ratio(way, Way::Native, of));
        let own = |of| measured.median(way, of);
        let cpu_share = own(|m| m.own.map(|own| own.cpu * 100.0));
        table.row(vec![
            way.name().to_owned(),
            ratio(throughput),
            ratio(cpu),
            ratio(p99),
            figure(cpu_share, 2, " %"),
            figure(own(|m| m.own.map(|own| own.memory_mib)), 0, " MiB"),
            figure(own(|m| m.own.and_then(|own| own.kernel_mib)), 0, " MiB"),
        ]);
    }
    report.table(&table);
    // Not for docs/: what the ratios are of.
    let native = |of| measured.median(Way::Native, of);
    println!(
        "({} a second natively, {} of CPU time each)\n",
        figure(native(throughput), 1, ""),
        figure(native(cpu).map(|ns| ns / 1000.0), 2, " µs")
    );
}

fn claims(name: &str, measured: &Rounds) -> Vec<Claim> {
    // Less than the noise cannot be compared.
    const NOISE: f64 = 0.03;
    let mut claims = Vec::new();
    let added = |way: Way| measured.ratio(way, Way::Native, cpu) - 1.0;
    if measured.ways().any(|way| way == Way::Bpftrace) {
        claims.push(if added(Way::Bpftrace) < 3.0 * NOISE {
            Claim::figure(
                format!("{name}, exact: added CPU time, where bpftrace adds little too"),
                added(Way::Exact) * 100.0,
                Limit::AtMost(NOISE * 100.0),
                " %",
                1,
            )
        } else {
            Claim::ratio(
                format!("{name}, exact: added CPU time, of what bpftrace adds"),
                added(Way::Exact) / added(Way::Bpftrace),
                Limit::AtMost(1.0 / 3.0),
            )
        });
    }
    let has_default = measured.ways().any(|way| way == Way::Default);
    if PROMISED.contains(&name) && has_default {
        claims.push(Claim::ratio(
            format!("{name}, default budget: throughput, of native's"),
            measured.ratio(Way::Default, Way::Native, throughput),
            Limit::AtLeast(0.9),
        ));
    }
    claims
}
