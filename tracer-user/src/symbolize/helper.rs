//! The process that reads symbols.
//!
//! unfreed runs as root and reads files that anybody may have made. Symbol tables and DWARF are
//! small languages: they can ask for more memory than there is, for hours of work, or for a stack
//! that is too deep, and a file that is cut short while it is mapped ends the process that reads it.
//! None of that can be caught within a process. So another one does it, without privileges, with
//! bounds on its memory and its time; when it fails, it is started again, and only the file that it
//! failed on has fewer names.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, IoSlice, IoSliceMut, Read as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::{net::UnixStream, process::CommandExt as _},
    },
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::{
        prctl,
        resource::{Resource, setrlimit},
        signal::Signal,
        socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
    },
    unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid},
};
use serde::{Deserialize, Serialize};

use super::{
    debug_files::DebugFile,
    symbols::{Depth, Function, Segment, Symbols},
};

/// The verb that starts it.
pub const VERB: &str = "symbolizer";

/// Memory that it may take, in bytes, beside the files that it maps.
const MAX_MEMORY_BYTES: u64 = 2 << 30;
/// Who it is, where nobody else may be.
const NOBODY: u32 = 65534;
/// Files that come with a request at most: a module, its debug files and their supplements.
const MAX_FILES: usize = 16;
/// Text of a request or an answer, in bytes.
const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// Places that are asked for at once.
pub const MAX_PLACES: usize = 32;

/// What is asked.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    /// Number of the module.
    module: u32,
    /// The first time: what the files are that come with the request, the module being the first.
    opened: Option<Opened>,
    /// Places in the module, as offsets in its file.
    places: Vec<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Opened {
    depth: Depth,
    code: Option<Vec<Segment>>,
    debug_files: Vec<OpenedDebugFile>,
}

#[derive(Debug, Serialize, Deserialize)]
struct OpenedDebugFile {
    required_crc: Option<u32>,
    has_supplement: bool,
}

/// What is answered.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Answer {
    /// For every place the functions there, innermost first.
    pub functions: Vec<Vec<Function>>,
    /// What could not be read of the module, told once.
    pub troubles: Vec<String>,
}

/// A module as the helper gets it.
#[derive(Clone, Copy, Debug)]
pub struct Module<'a> {
    /// The same in every request.
    pub number: u32,
    /// The file.
    pub program: &'a File,
    /// Where its code is, if the file only describes it.
    pub code: Option<&'a [Segment]>,
    /// What describes it.
    pub debug_files: &'a [DebugFile],
    /// How much of it to read.
    pub depth: Depth,
}

/// The process, from outside. It ends when this is dropped.
#[derive(Debug)]
pub struct Helper {
    socket: UnixStream,
    child: Option<Child>,
    opened: Vec<u32>,
}

impl Helper {
    /// Starts it.
    pub fn start() -> io::Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        let child = Command::new("/proc/self/exe")
            .arg0("unfreed")
            .arg(VERB)
            .env_clear()
            .current_dir("/")
            // Ctrl-C is for unfreed, which then makes its report.
            .process_group(0)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self {
            socket,
            child: Some(child),
            opened: Vec::new(),
        })
    }

    /// Its PID, until it has been waited for.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Whether no other module than this one can have harmed it.
    #[must_use]
    pub fn has_only_opened(&self, module: u32) -> bool {
        self.opened.iter().all(|opened| *opened == module)
    }

    /// The functions at places of a module, as offsets in its file: at most [`MAX_PLACES`].
    ///
    /// After an error the helper is good for nothing.
    pub fn ask(
        &mut self,
        module: &Module<'_>,
        places: &[u64],
        limit: Duration,
    ) -> io::Result<Answer> {
        let deadline = Instant::now() + limit;
        let mut files: Vec<RawFd> = Vec::new();
        let opened = if self.opened.contains(&module.number) {
            None
        } else {
            self.opened.push(module.number);
            files.push(module.program.as_raw_fd());
            let mut debug_files = Vec::new();
            for file in module.debug_files {
                files.push(file.handle.as_raw_fd());
                files.extend(file.supplement.iter().map(|file| file.as_raw_fd()));
                debug_files.push(OpenedDebugFile {
                    required_crc: file.required_crc,
                    has_supplement: file.supplement.is_some(),
                });
            }
            Some(Opened {
                depth: module.depth,
                code: module.code.map(<[_]>::to_vec),
                debug_files,
            })
        };
        let request = Request {
            module: module.number,
            opened,
            places: places.to_vec(),
        };
        self.send(&request, &files, deadline)?;
        let answer: Answer = serde_json::from_slice(&self.receive(deadline)?)?;
        if answer.functions.len() != places.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(answer)
    }

    fn send(&mut self, request: &Request, files: &[RawFd], deadline: Instant) -> io::Result<()> {
        let message = message(request)?;
        self.socket.set_write_timeout(Some(left(deadline)?))?;
        let control = [ControlMessage::ScmRights(files)];
        let control = if files.is_empty() { &[][..] } else { &control };
        let sent = sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(&message)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        self.socket.write_all(&message[sent..])
    }

    fn receive(&mut self, deadline: Instant) -> io::Result<Vec<u8>> {
        let mut length = [0; 4];
        self.fill(&mut length, deadline)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_MESSAGE_BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut text = vec![0; length];
        self.fill(&mut text, deadline)?;
        Ok(text)
    }

    fn fill(&mut self, mut buffer: &mut [u8], deadline: Instant) -> io::Result<()> {
        while !buffer.is_empty() {
            self.socket.set_read_timeout(Some(left(deadline)?))?;
            match self.socket.read(buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => buffer = &mut buffer[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Time that is left; an error if none is.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(left)
}

/// A message as it goes over the socket: its length, and JSON.
fn message(content: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut message = vec![0; 4];
    serde_json::to_writer(&mut message, content)?;
    let length = u32::try_from(message.len() - 4).map_err(io::Error::other)?;
    message[..4].copy_from_slice(&length.to_le_bytes());
    Ok(message)
}

/// The process, from inside: answers requests that come by its standard input until that is closed.
pub fn serve_standard_input() -> io::Result<()> {
    confine();
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    serve(UnixStream::from(socket))
}

/// Gives up what is not needed to read open files. What cannot be given up here is kept.
fn confine() {
    // Where memory runs out nevertheless, this is what there is too much of.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    let _ = setrlimit(Resource::RLIMIT_DATA, MAX_MEMORY_BYTES, MAX_MEMORY_BYTES);
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    if geteuid().is_root() {
        let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        let _ = setgroups(&[]);
        let _ = setresgid(group, group, group);
        let _ = setresuid(user, user, user);
    }
    let _ = prctl::set_no_new_privs();
    let _ = prctl::set_pdeathsig(Signal::SIGKILL);
}

/// Answers requests until the other side is closed.
fn serve(mut socket: UnixStream) -> io::Result<()> {
    // The error is told once.
    let mut modules: HashMap<u32, Option<Symbols>> = HashMap::new();
    while let Some((request, files)) = next_request(&mut socket)? {
        let mut answer = Answer::default();
        if let Some(opened) = &request.opened {
            let module = match load(opened, files) {
                Ok((symbols, troubles)) => {
                    answer.troubles = troubles;
                    Some(symbols)
                }
                Err(error) => {
                    answer.troubles.push(format!("{error:#}"));
                    None
                }
            };
            modules.insert(request.module, module);
        }
        let symbols = modules.get(&request.module).and_then(Option::as_ref);
        answer.functions = request
            .places
            .iter()
            .map(|place| symbols.map_or_else(Vec::new, |symbols| symbols.at(*place)))
            .collect();
        socket.write_all(&message(&answer)?)?;
    }
    Ok(())
}

/// The next request and the files that came with it; none if there will not be another.
fn next_request(socket: &mut UnixStream) -> io::Result<Option<(Request, Vec<OwnedFd>)>> {
    let mut start = [0; 4096];
    let mut control = nix::cmsg_space!([RawFd; MAX_FILES]);
    let (count, files) = loop {
        let mut buffers = [IoSliceMut::new(&mut start)];
        let received = recvmsg::<()>(
            socket.as_raw_fd(),
            &mut buffers,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        );
        match received {
            Ok(received) => {
                let mut files = Vec::new();
                for message in received.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(descriptors) = message {
                        // SAFETY: the kernel has just made them for us.
                        files.extend(
                            descriptors
                                .into_iter()
                                .map(|descriptor| unsafe { OwnedFd::from_raw_fd(descriptor) }),
                        );
                    }
                }
                break (received.bytes, files);
            }
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    if count == 0 {
        return Ok(None);
    }
    // Requests are answered one by one: what has come is the start of one and of no other.
    let mut message = start[..count].to_vec();
    let mut read_up_to = |message: &mut Vec<u8>, length: usize| -> io::Result<()> {
        let have = message.len();
        if have < length {
            message.resize(length, 0);
            socket.read_exact(&mut message[have..])?;
        }
        Ok(())
    };
    read_up_to(&mut message, 4)?;
    let length = u32::from_le_bytes([message[0], message[1], message[2], message[3]]) as usize;
    if length > MAX_MESSAGE_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    read_up_to(&mut message, 4 + length)?;
    Ok(Some((serde_json::from_slice(&message[4..])?, files)))
}

fn load(opened: &Opened, files: Vec<OwnedFd>) -> anyhow::Result<(Symbols, Vec<String>)> {
    let mut files = files.into_iter().map(File::from);
    let mut next = || {
        files
            .next()
            .ok_or_else(|| anyhow::anyhow!("a file did not arrive"))
    };
    let program = next()?;
    let debug_files = opened
        .debug_files
        .iter()
        .map(|file| {
            Ok(DebugFile {
                handle: next()?,
                supplement: file.has_supplement.then(&mut next).transpose()?,
                required_crc: file.required_crc,
            })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    Symbols::load(&program, opened.code.as_deref(), &debug_files, opened.depth)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// A helper that is a thread of ours.
    fn helper() -> Helper {
        let (socket, theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || serve(theirs));
        Helper {
            socket,
            child: None,
            opened: Vec::new(),
        }
    }

    #[inline(never)]
    fn named_by_this_test() -> usize {
        std::hint::black_box(7)
    }

    /// Offset in our program's file of an address in it.
    fn file_offset(address: usize) -> u64 {
        let mappings = crate::discover::maps::read(std::process::id()).unwrap();
        let address = address as u64;
        let mapping = mappings
            .iter()
            .find(|mapping| (mapping.start..mapping.end).contains(&address))
            .unwrap();
        address - mapping.start + mapping.file().unwrap().offset
    }

    #[test]
    fn our_own_functions_are_found_with_their_lines() {
        assert_eq!(named_by_this_test(), 7);
        let program = File::open("/proc/self/exe").unwrap();
        let mut helper = helper();
        let place = file_offset(named_by_this_test as *const () as usize) + 1;
        let mut ask = |number, depth| {
            let module = Module {
                number,
                program: &program,
                code: None,
                debug_files: &[],
                depth,
            };
            helper
                .ask(&module, &[place, 0], Duration::from_secs(60))
                .unwrap()
                .functions
        };
        let functions = ask(0, Depth::Full);
        let outer = functions[0].last().unwrap();
        assert!(outer.name.ends_with("named_by_this_test"), "{functions:?}");
        assert!(
            outer
                .file
                .as_ref()
                .is_some_and(|file| file.ends_with("helper.rs"))
        );
        assert!(outer.line.is_some() && !outer.inlined);
        assert_eq!(functions[1], []);
        assert_eq!(ask(0, Depth::Full), functions);
        let tables = ask(1, Depth::Tables);
        assert!(tables[0][0].name.ends_with("named_by_this_test"));
        assert_eq!(tables[0][0].line, None);
    }

    #[test]
    fn a_file_that_is_none_is_told_and_does_no_harm() {
        let mut helper = helper();
        for (number, path) in ["/etc/passwd", "/proc/self/exe"].iter().enumerate() {
            let program = File::open(path).unwrap();
            let module = Module {
                number: number as u32,
                program: &program,
                code: None,
                debug_files: &[],
                depth: Depth::Tables,
            };
            let answer = helper.ask(&module, &[1], Duration::from_secs(60)).unwrap();
            assert_eq!(answer.troubles.is_empty(), number == 1, "{answer:?}");
        }
        assert!(!helper.has_only_opened(0));
    }

    #[test]
    fn one_that_does_not_answer_is_not_waited_for() {
        let (socket, silent) = UnixStream::pair().unwrap();
        let mut helper = Helper {
            socket,
            child: None,
            opened: Vec::new(),
        };
        let program = File::open("/proc/self/exe").unwrap();
        let module = Module {
            number: 0,
            program: &program,
            code: None,
            debug_files: &[],
            depth: Depth::Full,
        };
        let error = helper
            .ask(&module, &[1], Duration::from_millis(20))
            .unwrap_err();
        assert!(
            matches!(
                error.kind(),
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
            ),
            "{error}"
        );
        drop(silent);
    }
}
