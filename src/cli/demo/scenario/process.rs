//! What the system says of a process.

/// Memory of a process (bytes): what it holds in RAM.
pub(super) fn rss_bytes(pid: Option<u32>) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid?)).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? * 1024.0)
}

/// CPU time of a process so far (s); 0 when it is gone. Ticks are hundredths of a second on Linux.
pub(super) fn cpu_s(pid: Option<u32>) -> f64 {
    let stat = pid.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/stat")).ok());
    let after = stat.as_deref().and_then(|stat| stat.rsplit_once(") "));
    let fields: Vec<&str> = after.map(|(_, rest)| rest.split(' ').collect()).unwrap_or_default();
    let ticks = |at: usize| fields.get(at).and_then(|text| text.parse::<f64>().ok());
    (ticks(11).unwrap_or(0.0) + ticks(12).unwrap_or(0.0)) / 100.0
}

/// Bytes that the loopback interface has carried so far, headers included, whoever sent them.
pub(super) fn loopback_bytes() -> Option<f64> {
    let interfaces = std::fs::read_to_string("/proc/net/dev").ok()?;
    let counters = interfaces.lines().find_map(|line| line.trim_start().strip_prefix("lo:"))?;
    counters.split_whitespace().next()?.parse().ok()
}
