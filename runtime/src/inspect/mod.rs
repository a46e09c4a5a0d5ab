//! Reading running engines from another process of the host: `moonrail incidents`, and whoever else asks.
//!
//! ```text
//!  engine ── thread mr-inspect ── FOLDER/PID-N.sock ◀── one line:  moonrail/1 incidents
//!            (same user or root)                    ──▶ one line:  {"protocol":1,"engine":{…},"incidents":[…]}, then the end
//! ```
//!
//! The folder is `/run/moonrail` for root, `$XDG_RUNTIME_DIR/moonrail` for others, `/tmp/moonrail-UID` where that cannot
//! be; `MOONRAIL_INSPECT` names another one, or `off`. It belongs to the engine's user and nobody else may write there, and
//! each end asks the kernel who is at the other one. The protocol only reads. What it may cost is bounded on both sides: clients, bytes and
//! time here, bytes and time in [`ask`]. An engine whose socket cannot be made warns and runs on without.
//!
//! Requests: `engine` (only who it is), `incidents`, `rails`, `all`, `live`. docs/operating.md has the members of the replies;
//! more may be added under the same number, none changes its meaning.

mod desk;
pub(crate) mod http;
mod page;
mod report;
pub(crate) mod server;

use std::ffi::OsStr;
use std::fs::{DirBuilder, Metadata};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use moonrail_datapath::core::Spread;
use moonrail_datapath::nic::shm::Credentials;
use serde_json::Value;

/// Version of the protocol, first word of a request as `moonrail/1`.
pub const PROTOCOL: u32 = 1;
/// Names a folder for the sockets, or is `off`. Read by engines and by those who look for them.
pub const VARIABLE: &str = "MOONRAIL_INSPECT";
/// No reply is larger, in bytes: 256 incidents with long causes are a tenth of it.
pub const REPLY_MAX: usize = 4 << 20;
/// How long [`ask`] waits for a whole reply.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// What can be asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// Who it is: name, pid, incarnation, uptime.
    Engine,
    /// That, and the last 256 incidents.
    Incidents,
    /// That, and the rails.
    Rails,
    /// All of it, and counters of cores.
    All,
    /// That with the NICs, and of each rail what is in flight and how long slices took; of incidents only the open ones. For
    /// [`spread`].
    Live,
}

impl Request {
    const EACH: [Self; 5] = [Self::Engine, Self::Incidents, Self::Rails, Self::All, Self::Live];

    /// The word of the protocol.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Engine => "engine",
            Self::Incidents => "incidents",
            Self::Rails => "rails",
            Self::All => "all",
            Self::Live => "live",
        }
    }

    /// From a request without its line end; the error says what would be right.
    fn parse(line: &[u8]) -> Result<Self, String> {
        let words = std::str::from_utf8(line).unwrap_or_default().trim_end_matches('\r').split_once(' ');
        let known = || Self::EACH.map(Self::as_str).join(", ");
        match words {
            Some(("moonrail/1", what)) => Self::EACH
                .into_iter()
                .find(|request| request.as_str() == what)
                .ok_or_else(|| format!("this version answers: {}", known())),
            Some((protocol, _)) if protocol.starts_with("moonrail/") => {
                Err(format!("only protocol {PROTOCOL} is spoken here: use a `moonrail` of the engine's version"))
            }
            _ => Err(format!("a request is a line `moonrail/{PROTOCOL} WORD`; words: {}", known())),
        }
    }
}

/// Why an engine could not be read.
#[derive(Debug)]
#[non_exhaustive]
pub enum AskError {
    /// Nobody listens: its process has ended without removing the socket. No reason to worry.
    Gone,
    /// Somebody else's process listens there.
    Stranger {
        /// Its user.
        uid: u32,
    },
    /// It does not answer, or not what the protocol says.
    Silent(io::Error),
    /// It refused, in its own words.
    Refused(String),
}

impl std::fmt::Display for AskError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Gone => f.write_str("its process has ended"),
            Self::Stranger { uid } => {
                write!(
                    f,
                    "its socket belongs to user {uid}, who is neither this user nor root: remove it if it should not be there"
                )
            }
            Self::Silent(source) => {
                write!(
                    f,
                    "it does not answer ({source}): its process hangs or is stopped, or another program listens there"
                )
            }
            Self::Refused(why) => write!(f, "it refuses: {why}"),
        }
    }
}

impl std::error::Error for AskError {}

/// Folders where engines of this user put their sockets, the preferred one first; none if that is switched off. `read` looks an
/// environment variable up.
pub fn folders(read: impl Fn(&str) -> Option<String>) -> Vec<PathBuf> {
    match read(VARIABLE).as_deref().map(str::trim) {
        Some("off" | "0") => return Vec::new(),
        Some(folder) if !folder.is_empty() => return vec![folder.into()],
        _ => {}
    }
    let uid = own_uid();
    let first = if uid == 0 {
        Some(PathBuf::from("/run/moonrail"))
    } else {
        read("XDG_RUNTIME_DIR")
            .filter(|folder| folder.starts_with('/'))
            .map(|folder| Path::new(&folder).join("moonrail"))
    };
    first.into_iter().chain([format!("/tmp/moonrail-{uid}").into()]).collect()
}

/// Sockets of engines, those of processes that have ended among them: of this user, and for root, where no folder is
/// named, of all users of the host. Sorted by path.
pub fn sockets(read: impl Fn(&str) -> Option<String>) -> Vec<PathBuf> {
    let named = read(VARIABLE).is_some();
    let mut places = folders(read);
    if own_uid() == 0 && !named {
        let subfolders = |of: &str| std::fs::read_dir(of).into_iter().flatten().flatten().map(|entry| entry.path());
        places.extend(subfolders("/run/user").map(|user| user.join("moonrail")));
        let ours = |path: &PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("moonrail-"));
        places.extend(subfolders("/tmp").filter(ours));
    }
    let mut found: Vec<PathBuf> =
        places.iter().filter(|place| is_guarded(place)).flat_map(|place| in_folder(place)).collect();
    found.sort();
    found.dedup();
    found
}

/// The process and the number of the engine within it that a socket's name stands for.
pub fn owner(socket: &Path) -> Option<(u32, u32)> {
    let (pid, number) = socket.file_stem()?.to_str()?.split_once('-')?;
    Some((pid.parse().ok()?, number.parse().ok()?))
}

/// Asks the engine behind a socket, for at most [`ANSWER_WITHIN`]. Any thread.
///
/// # Errors
/// See [`AskError`].
pub fn ask(socket: &Path, request: Request) -> Result<Value, AskError> {
    let until = Instant::now() + ANSWER_WITHIN;
    let mut stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => AskError::Gone,
        _ => AskError::Silent(error),
    })?;
    let who = Credentials::behind(stream.as_fd()).map_err(AskError::Silent)?;
    // Root reads everybody's; what an ordinary user's engine says is only shown.
    if !who.is_trusted() && own_uid() != 0 {
        return Err(AskError::Stranger { uid: who.uid });
    }
    let bytes = exchange(&mut stream, request, until).map_err(AskError::Silent)?;
    let told = |what: String| AskError::Silent(io::Error::new(io::ErrorKind::InvalidData, what));
    let mut reply: Value = serde_json::from_slice(&bytes).map_err(|error| told(error.to_string()))?;
    if let Some(why) = reply["error"].as_str() {
        return Err(AskError::Refused(why.to_owned()));
    }
    if reply["protocol"] != PROTOCOL || !reply["engine"].is_object() {
        return Err(told(format!("no reply of protocol {PROTOCOL}")));
    }
    if who.pid > 0 {
        // In our pid namespace, and vouched for.
        reply["engine"]["pid"] = who.pid.into();
    }
    Ok(reply)
}

/// The times of a rail in a reply to [`Request::Live`]: `{"sum": NS, "counts": [[LONGEST_NS, N], …]}`. What is not understood
/// counts nothing.
pub fn spread(times: &Value) -> Spread {
    let pair = |pair: &Value| Some((pair.get(0)?.as_u64()?, pair.get(1)?.as_u64()?));
    let counts = times["counts"].as_array().into_iter().flatten().filter_map(pair);
    Spread::new(counts, times["sum"].as_u64().unwrap_or(0))
}

fn exchange(stream: &mut UnixStream, request: Request, until: Instant) -> io::Result<Vec<u8>> {
    stream.set_write_timeout(Some(ANSWER_WITHIN))?;
    stream.write_all(format!("moonrail/{PROTOCOL} {}\n", request.as_str()).as_bytes())?;
    let (mut reply, mut piece) = (Vec::new(), [0; 16 << 10]);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut piece) {
            Ok(0) => return Ok(reply),
            Ok(count) => reply.extend_from_slice(&piece[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error),
        }
        if reply.len() > REPLY_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a reply of more than {REPLY_MAX} bytes")));
        }
    }
}

fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Makes a folder that only this user can write to, or finds it so.
fn make_folder(folder: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = std::fs::symlink_metadata(folder)?;
    if found.uid() == own_uid() && guards(&found) {
        return Ok(());
    }
    let why = format!("it must be a folder of user {} where nobody else may write", own_uid());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
}

/// Whether nobody but its owner can put anything into it; a link to somewhere else is not followed.
fn guards(found: &Metadata) -> bool {
    found.is_dir() && found.mode() & 0o022 == 0
}

/// Whether what lies in a folder can be looked at: it is ours, or we are root.
fn is_guarded(folder: &Path) -> bool {
    let uid = own_uid();
    std::fs::symlink_metadata(folder).is_ok_and(|found| guards(&found) && (uid == 0 || found.uid() == uid))
}

/// What looks like an engine's socket in a folder.
fn in_folder(folder: &Path) -> Vec<PathBuf> {
    let paths = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    paths.filter(|path| path.extension() == Some(OsStr::new("sock")) && owner(path).is_some()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_names_a_folder_or_switches_off() {
        let with = |value: &'static str| folders(move |name| (name == VARIABLE).then(|| value.to_owned()));
        assert!(with("off").is_empty() && with("0").is_empty());
        assert_eq!(with("/x/y"), [PathBuf::from("/x/y")]);
        let by_default = folders(|_| None);
        assert_eq!(by_default.last(), Some(&PathBuf::from(format!("/tmp/moonrail-{}", own_uid()))));
        assert_eq!(with(""), by_default);
    }

    #[test]
    fn requests_are_lines_of_this_protocol() {
        for request in Request::EACH {
            assert_eq!(Request::parse(format!("moonrail/1 {}", request.as_str()).as_bytes()), Ok(request));
        }
        assert!(Request::parse(b"moonrail/2 incidents").unwrap_err().contains("only protocol 1"));
        assert!(Request::parse(b"moonrail/1 shutdown").unwrap_err().contains("engine, incidents, rails, all, live"));
        for garbage in [&b""[..], b"GET / HTTP/1.1", b"\xff\xfe\0", b"incidents"] {
            assert!(Request::parse(garbage).unwrap_err().starts_with("a request is a line"));
        }
    }

    #[test]
    fn a_folder_of_somebody_else_or_open_to_others_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = std::env::temp_dir().join(format!("moonrail-folder-{}", std::process::id()));
        make_folder(&folder).unwrap();
        make_folder(&folder).unwrap();
        assert_eq!(std::fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(make_folder(&folder).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert!(!is_guarded(&folder));
        let link = folder.with_extension("link");
        std::os::unix::fs::symlink("/run", &link).unwrap();
        assert!(make_folder(&link).is_err(), "a link may lead anywhere");
        std::fs::remove_file(&link).unwrap();
        std::fs::remove_dir(&folder).unwrap();
    }

    #[test]
    fn a_socket_tells_whose_it_is() {
        assert_eq!(owner(Path::new("/run/moonrail/12-0.sock")), Some((12, 0)));
        assert_eq!(owner(Path::new("/run/moonrail/x-0.sock")), None);
    }
}
