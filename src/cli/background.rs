//! How a training in the background leaves the machine to the router: it computes only when nobody
//! else wants to, in bounded memory.

use std::process::{Command, Stdio};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Most memory of a training in the background (bytes of address space): several times what the
/// largest one needs, and far from what would push the router out of a small machine.
const MEMORY_MAX: u64 = 4 << 30;

/// Makes this process, threads and all, give way to every other one for ever. Where every core is
/// always taken it hardly moves, and the node ends it after half an hour: routing comes first.
///
/// # Errors
/// When its memory cannot be bounded. Without the idle class the lowest priority is what is left.
pub(super) fn give_way() -> anyhow::Result<()> {
    let _ = rustix::process::nice(19);
    idle(std::process::id());
    limit_memory()
}

/// Moves a process, with the threads that it has and will have, to Linux's idle class
/// (`SCHED_IDLE`): what a packet wakes takes the core from it at once, whereas a process of low
/// priority may keep the core until its turn is over, some milliseconds. The call is no part of a
/// safe library that we use; `chrt` of util-linux makes it. Where there is no such program, or it
/// refuses, nothing changes.
fn idle(process: u32) {
    let mut chrt = Command::new("chrt");
    chrt.args(["--all-tasks", "--idle", "--pid", "0", &process.to_string()]);
    let _ = chrt.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
}

/// Bounds the memory of this process; a lower limit of the system stays.
fn limit_memory() -> anyhow::Result<()> {
    let before = getrlimit(Resource::As);
    let least = |limit: Option<u64>| Some(limit.map_or(MEMORY_MAX, |limit| limit.min(MEMORY_MAX)));
    let after = Rlimit { current: least(before.current), maximum: least(before.maximum) };
    setrlimit(Resource::As, after).map_err(|error| {
        anyhow::anyhow!(
            "cannot bound the memory of the training: {error}; train without --background"
        )
    })
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// The scheduling class of a process: field 41 of its `stat`, after the name in brackets.
    fn class(process: u32) -> Option<u32> {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        stat.rsplit(") ").next()?.split(' ').nth(38)?.parse().ok()
    }

    #[test]
    fn a_process_becomes_idle_where_chrt_is_there() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let before = class(child.id());
        idle(child.id());
        let after = class(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        let has_chrt = Command::new("chrt").arg("--version").stdout(Stdio::null()).status().is_ok();
        // SCHED_IDLE, in <linux/sched.h>.
        assert_eq!(after, if has_chrt { Some(5) } else { before });
    }
}
