//! How much host memory there is, so that a benchmark says "too big" instead of being killed by the system.

use crate::error::{Error, Result};

/// Bytes that this process can still take, as far as the system says: Linux only, and within its control group.
pub fn available() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let free = parse_meminfo(&meminfo)?;
    Some(match control_group_rest() {
        Some(rest) => free.min(rest),
        None => free,
    })
}

/// An error that names both numbers, if `required` bytes are more than there are.
pub fn check(what: &str, required: u64) -> Result<()> {
    match available() {
        Some(available) if required > available => Err(Error::LimitExceeded {
            what: format!("host memory in bytes for {what}"),
            required,
            available,
            hint: "choose smaller sizes, fewer experts or fewer tokens",
        }),
        // Where the system does not say, only what cannot be addressed is refused.
        None if required > isize::MAX as u64 => Err(Error::LimitExceeded {
            what: format!("host memory in bytes for {what}"),
            required,
            available: isize::MAX as u64,
            hint: "choose smaller sizes, fewer experts or fewer tokens",
        }),
        _ => Ok(()),
    }
}

fn parse_meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Containers often have less than the machine.
fn control_group_rest() -> Option<u64> {
    let read = |name: &str| -> Option<u64> {
        std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse().ok()
    };
    Some(read("memory.max")?.saturating_sub(read("memory.current")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_linux_writes() {
        let text = "MemTotal:       24689764 kB\nMemFree:         100 kB\nMemAvailable:   23000000 kB\n";
        assert_eq!(parse_meminfo(text), Some(23_000_000 * 1024));
        assert_eq!(parse_meminfo("MemTotal: 5 kB\n"), None);
    }

    #[test]
    fn refuses_more_than_any_machine_has() {
        assert!(matches!(check("weights", u64::MAX), Err(Error::LimitExceeded { required: u64::MAX, .. })));
        assert!(check("weights", 1).is_ok());
    }
}
