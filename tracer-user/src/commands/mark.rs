//! `unfreed mark`: a generation begins in a running session.

use std::{future, process::ExitCode};

use super::say;
use crate::{
    args::Mark,
    control::{self, Answer, Asked, Control, Request},
    session::Session,
};

/// Has a session tell apart what is allocated from now on.
pub fn mark(args: &Mark) -> anyhow::Result<ExitCode> {
    say(control::ask(
        args.session,
        &Request::Mark(args.name.clone()),
    )?);
    Ok(ExitCode::SUCCESS)
}

/// How a running session is asked. Without a socket it goes on, and takes marks by signal only.
pub(super) struct Requests(Option<Control>);

impl Requests {
    pub(super) fn open() -> Self {
        let control = Control::open();
        Self(control.inspect_err(|error| log::info!("{error:#}")).ok())
    }

    /// Waits for the next one. Nothing is lost if it is not waited for to the end.
    pub(super) async fn next(&mut self) -> Asked {
        while let Some(control) = &mut self.0 {
            match control.next().await {
                Ok(asked) => return asked,
                Err(error) => {
                    log::warn!("{error:#}; nothing more is asked of this session");
                    self.0 = None;
                }
            }
        }
        future::pending().await
    }
}

/// Does what is asked.
pub(super) fn answer(session: &mut Session, asked: Asked) {
    let Request::Mark(name) = asked.request.clone();
    let answer = begin_generation(session, name);
    asked.answer(&answer);
}

/// Begins a generation, and says so.
pub(super) fn begin_generation(session: &mut Session, name: Option<String>) -> Answer {
    match session.mark(name) {
        Ok(name) => {
            let done = format!("mark {name}: what is allocated from now on is told apart");
            say(&done);
            Answer::Done(done)
        }
        Err(error) => {
            say(format_args!("no mark: {error:#}"));
            Answer::Failed(format!("{error:#}"))
        }
    }
}
