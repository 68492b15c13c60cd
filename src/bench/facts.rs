//! What a result depends on besides device and layer, as far as the system says.

use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// The machine and the moment. What the system does not say is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// When the run began, UTC, as 2026-01-31T12:00:00Z.
    pub began: String,
    /// The processor's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// Logical processors that this process may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cores: Option<usize>,
    /// System, architecture and, on Linux, distribution and kernel.
    pub os: String,
    /// How clocks are chosen: Linux's scaling governor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub governor: Option<String>,
    /// Where power comes from: mains or battery.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power: Option<String>,
    /// Runnable processes, averaged over the minute before the run: others that want the processors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_before: Option<String>,
    /// The commit that this crate was built from, where `WGMOE_GIT_COMMIT` said so while it was compiled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub git_commit: Option<String>,
}

impl Facts {
    /// Now and here.
    pub fn now() -> Facts {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let cpuinfo = line_of("/proc/cpuinfo", |text| value_of(text, "model name").or_else(|| value_of(text, "Model")));
        Facts {
            began: instant(since),
            cpu: cpuinfo.or_else(|| std::env::var("PROCESSOR_IDENTIFIER").ok()),
            cores: std::thread::available_parallelism().ok().map(usize::from),
            os: os(),
            governor: line_of("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", first_line),
            power: power(Path::new("/sys/class/power_supply")),
            load_before: line_of("/proc/loadavg", |text| text.split_whitespace().next().map(str::to_owned)),
            git_commit: option_env!("WGMOE_GIT_COMMIT").map(str::to_owned),
        }
    }
}

fn os() -> String {
    let mut os = format!("{} {}", std::env::consts::OS, std::env::consts::ARCH);
    let distribution = line_of("/etc/os-release", |text| {
        text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).map(|name| name.trim_matches('"').to_owned())
    });
    for part in [distribution, line_of("/proc/sys/kernel/osrelease", first_line)].into_iter().flatten() {
        os.push_str(", ");
        os.push_str(&part);
    }
    os
}

/// What `find` finds in a file of the system's; nothing where there is no such file.
fn line_of(path: &str, find: impl Fn(&str) -> Option<String>) -> Option<String> {
    find(&std::fs::read_to_string(path).ok()?).filter(|found| !found.is_empty())
}

fn first_line(text: &str) -> Option<String> {
    text.lines().next().map(|line| line.trim().to_owned())
}

/// The value of the first `key : value`.
fn value_of(text: &str, key: &str) -> Option<String> {
    let mut pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.find(|(found, _)| found.trim() == key).map(|(_, value)| value.trim().to_owned())
}

/// Mains if a supply of that kind is online, battery if there are supplies and none is.
fn power(folder: &Path) -> Option<String> {
    let supplies = std::fs::read_dir(folder).ok()?.flatten();
    let online: Vec<bool> = supplies
        .filter_map(|supply| std::fs::read_to_string(supply.path().join("online")).ok())
        .map(|text| text.trim() != "0")
        .collect();
    let name = if online.contains(&true) { "mains" } else { "battery" };
    (!online.is_empty()).then(|| name.to_owned())
}

/// Seconds since 1970 as an instant of ISO 8601.
fn instant(seconds: u64) -> String {
    let (hours, minutes) = (seconds / 3600 % 24, seconds / 60 % 60);
    format!("{}T{hours:02}:{minutes:02}:{:02}Z", crate::tune::date_of(seconds / 86_400), seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_are_those_of_the_calendar() {
        assert_eq!(instant(0), "1970-01-01T00:00:00Z");
        assert_eq!(instant(1_000_000_000), "2001-09-09T01:46:40Z");
    }

    #[test]
    fn what_is_there_is_read() {
        let text = "processor : 0\nmodel name\t: A CPU @ 2:1\nmodel name : another\n";
        assert_eq!(value_of(text, "model name").as_deref(), Some("A CPU @ 2:1"));
        assert_eq!(value_of(text, "governor"), None);
        assert_eq!(line_of("/no/such/file", first_line), None);
        let facts = Facts::now();
        assert!(facts.began.as_str() > "2026" && facts.os.contains(std::env::consts::ARCH), "{facts:?}");
    }

    #[test]
    fn power_is_what_the_supplies_say() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(power(folder.path()), None);
        let supply = folder.path().join("AC");
        std::fs::create_dir(&supply).expect("writable");
        for (online, expected) in [("1\n", "mains"), ("0\n", "battery")] {
            std::fs::write(supply.join("online"), online).expect("writable");
            assert_eq!(power(folder.path()).as_deref(), Some(expected));
        }
    }
}
