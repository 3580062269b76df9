//! What tracing a process would take, found out by counting its allocator calls for a fraction of a second.

use std::{
    num::NonZeroU32,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::{time::clock_getcpuclockid, unistd::Pid};
use serde::Serialize;

use crate::{
    bpf::{
        links::{self, Point, ProbeProgram, Scope},
        statistics::Counting,
        tracer::Tracer,
    },
    calibrate::ProbeCost,
    discover::{allocators::Call, module::Module},
    governor::{self, Abilities, Budget, Costs, Gear, Load},
};

/// For how long calls are counted.
const COUNTED: Duration = Duration::from_millis(300);

/// What was counted, and what follows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Forecast {
    /// For how long calls were counted, in seconds.
    pub counted_s: f64,
    /// Allocating calls a second.
    pub allocs_per_s: f64,
    /// Freeing ones.
    pub frees_per_s: f64,
    /// Processor time a second that the process took itself.
    pub processors: f64,
    /// What recording every call would take, in per cent of the processor time that the process takes itself.
    pub exact_percent: f64,
    /// What sampling would.
    pub sampled_percent: f64,
    /// The gear that `attach` would be in with its default budget.
    pub gear: Gear,
    /// The share of the time that it would record, in per cent.
    pub recorded_percent: f64,
    /// The default budget, in per cent.
    pub budget_percent: f64,
    /// What that allows of this process, likewise: more, if it takes little.
    pub allowed_percent: f64,
}

/// Counts the calls of functions in these files by a process. Nothing is recorded. None if the kernel would take
/// seconds to take the probes away.
pub fn forecast(
    tracer: &mut Tracer,
    pid: u32,
    modules: &[(PathBuf, Module)],
    cost: &ProbeCost,
) -> anyhow::Result<Option<Forecast>> {
    // Allocating and freeing calls are told apart by the programs that see them. Neither does anything, as no
    // instance is open.
    const ALLOCATING: ProbeProgram = ProbeProgram::NothingEnter;
    const FREEING: ProbeProgram = ProbeProgram::FreeEnter;
    let abilities = Abilities {
        windows: tracer.attacher().detaches_at_once(),
    };
    if !abilities.windows {
        return Ok(None);
    }
    let scope = Scope::Process(NonZeroU32::new(pid).context("there is no process with PID 0")?);
    let clock = clock_getcpuclockid(Pid::from_raw(pid.cast_signed()))
        .with_context(|| format!("failed to find the processor time of PID {pid}"))?;
    let counting = Counting::begin().context("failed to have the kernel count")?;
    let mut links = Vec::new();
    let mut attach = |tracer: &mut Tracer| -> anyhow::Result<()> {
        for (path, module) in modules {
            let points = |wanted: fn(Call) -> bool| -> Vec<Point> {
                let functions = module.functions.iter();
                functions
                    .filter(|function| wanted(function.call))
                    .map(|function| Point {
                        file_offset: function.probe_file_offset(),
                        cookie: function.spec().to_cookie(),
                    })
                    .collect()
            };
            let allocating = points(|call| matches!(call, Call::Alloc(_)));
            let freeing = points(|call| matches!(call, Call::Free { .. }));
            for (program, points) in [(ALLOCATING, allocating), (FREEING, freeing)] {
                links.extend(tracer.attach(program, path, &points, scope)?);
            }
        }
        Ok(())
    };
    let attached = attach(tracer);
    let counted = attached.and_then(|()| {
        let read = |tracer: &Tracer| {
            let [allocs, frees] =
                [ALLOCATING, FREEING].map(|program| tracer.runs(&[program]).count);
            anyhow::Ok((Instant::now(), Duration::from(clock.now()?), allocs, frees))
        };
        let before = read(tracer)?;
        thread::sleep(COUNTED);
        Ok((before, read(tracer)?))
    });
    links::detach(links);
    drop(counting);
    let ((begin, cpu_before, allocs_before, frees_before), (end, cpu, allocs, frees)) = counted?;
    let counted_s = (end - begin).as_secs_f64();
    let [allocs, frees] = [allocs - allocs_before, frees - frees_before].map(|count| count as f64);
    let costs = Costs::new(cost, tracer.attacher().has_sessions());
    let cpu_s = (cpu - cpu_before).as_secs_f64();
    let own_s = costs.own_s(cpu_s, allocs + frees);
    let load = Load::new(allocs / own_s, frees / own_s);
    let processors = own_s / counted_s;
    let (gear, recorded) = governor::foresee(Budget::DEFAULT, costs, abilities, load, processors);
    Ok(Some(Forecast {
        counted_s,
        allocs_per_s: allocs / counted_s,
        frees_per_s: frees / counted_s,
        processors,
        exact_percent: costs.exact(load) * 100.0,
        sampled_percent: costs.sampled(load) * 100.0,
        gear,
        recorded_percent: match gear {
            Gear::Exact | Gear::Sampled => 100.0,
            Gear::Windows => recorded * 100.0,
            Gear::Paused => 0.0,
        },
        budget_percent: Budget::DEFAULT.share * 100.0,
        allowed_percent: Budget::DEFAULT.allowed(processors) * 100.0,
    }))
}
