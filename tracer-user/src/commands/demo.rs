//! `unfreed demo`: a leaking server, traced before your eyes.

use std::{
    alloc::{GlobalAlloc as _, Layout, System, handle_alloc_error},
    hint::black_box,
    io,
    ops::Deref,
    process::{Child, Command, ExitCode, Stdio},
    ptr::NonNull,
    thread,
    time::Duration,
};

use anyhow::Context as _;

use super::{
    attach::{Plan, hold_signals, trace},
    block_on, say,
};
use crate::{
    args::{Demo, ReportFormat, TraceOptions},
    discover::{process::Process, selection::Selection},
    host::Host,
    output,
};

/// Starts the server, traces it for some seconds, and explains what was found.
pub fn demo(args: &Demo) -> anyhow::Result<ExitCode> {
    Host::read().check()?;
    output::check(args.report.output.as_deref())?;
    let server = Server::start()?;
    let pid = server.0.id();
    if args.report.format == ReportFormat::Text {
        say(format_args!(
            "A small server was started as PID {pid}. It answers some 2,000 requests a second and \
             forgets one session in ten.\nThis is what `unfreed attach {pid} --exact --duration {}` makes \
             of it:\n",
            args.duration.as_secs_f64()
        ));
    }
    let plan = Plan {
        interval: args.duration.mul_f64(0.45).max(Duration::from_millis(200)),
        count: None,
        duration: Some(args.duration),
        report: &args.report,
        trace: &TraceOptions {
            exact: true,
            ..TraceOptions::default()
        },
        waits: false,
    };
    let selection = Selection::of_pids(&[pid]);
    let server = vec![Process::look(pid)?];
    let traced =
        block_on(async { trace("demo", selection, server, &plan, None, hold_signals()?).await })?;
    traced.report.give(&args.report, &mut io::stdout())?;
    if args.report.format == ReportFormat::Text {
        say("
Both sites are the leak: `open_session` in commands/demo.rs allocates a session and its \
             cart, and a
tenth of them is never freed. The requests' own buffers were freed and do \
             not appear. Now try it on
a process of yours:
  unfreed doctor PID
  unfreed attach \
             PID");
    }
    traced.trouble.map_or(Ok(ExitCode::SUCCESS), Err)
}

/// The server; ended when dropped.
struct Server(Child);

impl Server {
    fn start() -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("failed to find our own program")?;
        let child = Command::new(program)
            .arg("demo-server")
            .stdin(Stdio::piped())
            .spawn()
            .context("failed to start the demo's server")?;
        Ok(Self(child))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The leaking server itself. Ends with the one who started it.
pub fn server() -> anyhow::Result<ExitCode> {
    thread::spawn(|| {
        // The other end is closed when the starter is gone, however it went.
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        std::process::exit(0);
    });
    for number in 0_u64.. {
        handle_request(number);
        thread::sleep(Duration::from_micros(450));
    }
    Ok(ExitCode::SUCCESS)
}

/// A value on the heap of the C library, as that of most programs is: unfreed's own heap is another (see
/// `main.rs`), which nobody traces.
struct OnHeap<T>(NonNull<T>);

impl<T> OnHeap<T> {
    #[inline(always)]
    fn new(value: T) -> Self {
        let layout = Layout::new::<T>();
        assert_ne!(layout.size(), 0, "there is nothing to put there");
        // SAFETY: the layout has a size.
        let Some(place) = NonNull::new(unsafe { System.alloc(layout) }.cast::<T>()) else {
            handle_alloc_error(layout);
        };
        // SAFETY: room for a value, which nobody else has.
        unsafe { place.write(value) };
        Self(place)
    }
}

impl<T> Deref for OnHeap<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the value that was put there.
        unsafe { self.0.as_ref() }
    }
}

impl<T> Drop for OnHeap<T> {
    fn drop(&mut self) {
        // SAFETY: allocated above, with this layout, and not used from here on.
        unsafe {
            self.0.drop_in_place();
            System.dealloc(self.0.as_ptr().cast(), Layout::new::<T>());
        }
    }
}

/// What a user of the server has open.
struct Session {
    user: u64,
    cart: OnHeap<[u64; 64]>,
}

#[inline(never)]
fn handle_request(number: u64) {
    let query = parse_query(number);
    let session = open_session(query[0] ^ number);
    if number.is_multiple_of(10) {
        // The bug: a session that ended in an error is forgotten instead of closed.
        std::mem::forget(black_box(session));
    } else {
        close_session(session);
    }
}

#[inline(never)]
fn parse_query(number: u64) -> OnHeap<[u64; 4]> {
    black_box(OnHeap::new([number; 4]))
}

#[inline(never)]
fn open_session(user: u64) -> OnHeap<Session> {
    black_box(OnHeap::new(Session {
        user,
        cart: OnHeap::new([user; 64]),
    }))
}

#[inline(never)]
fn close_session(session: OnHeap<Session>) {
    black_box(session.user + session.cart.len() as u64);
}
