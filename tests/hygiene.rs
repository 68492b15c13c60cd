//! What a reader of the code is promised about it: unsafe code is listed with a reason and a test, and nothing talks to
//! a network.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Rust files below `folder`, and where they are in the repository.
fn sources(folder: &str) -> Vec<(String, String)> {
    let mut folders = vec![Path::new(ROOT).join(folder)];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        for path in entries.map(|entry| entry.expect("readable").path()) {
            if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("UTF-8");
                found.push((relative(&path), text));
            }
        }
    }
    assert!(!found.is_empty(), "{folder} has sources");
    found.sort();
    found
}

fn relative(path: &Path) -> String {
    let path: PathBuf = path.strip_prefix(ROOT).expect("below the root").components().collect();
    path.to_string_lossy().replace('\\', "/")
}

/// Lines of code in which `word` stands, without comments. A word ends where no name could go on.
fn lines_with<'t>(text: &'t str, word: &str) -> Vec<&'t str> {
    let is_code = |line: &&str| !line.trim_start().starts_with("//");
    let has_word = |line: &&str| {
        let code = line.split("// ").next().unwrap_or_default();
        code.split(|c: char| !(c.is_alphanumeric() || "_-:".contains(c))).any(|found| found == word)
    };
    text.lines().filter(is_code).filter(has_word).collect()
}

/// File, code, reason and test of a row of docs/unsafe.md.
struct Row {
    file: String,
    code: String,
    test: String,
}

fn rows(table: &str) -> Vec<Row> {
    let cells = |line: &str| -> Vec<String> {
        line.trim_matches('|').split(" | ").map(|cell| cell.trim().trim_matches('`').to_owned()).collect()
    };
    let rows = table.lines().filter(|line| line.starts_with("| `")).map(cells);
    rows.map(|cells| match cells.as_slice() {
        [file, code, reason, test] if reason.len() > 5 => {
            Row { file: file.clone(), code: code.clone(), test: test.clone() }
        }
        other => panic!("not file, code, reason and test: {other:?}"),
    })
    .collect()
}

/// What does not agree, in words.
fn disagreements(rows: &[Row], sources: &[(String, String)]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut used = vec![false; rows.len()];
    for (file, text) in sources {
        // This file speaks of it.
        for line in lines_with(text, "unsafe").into_iter().filter(|_| file != "tests/hygiene.rs") {
            let row = (0..rows.len()).find(|&n| !used[n] && rows[n].file == *file && line.contains(&rows[n].code));
            match row {
                Some(n) => used[n] = true,
                None => wrong.push(format!("{file} has unsafe code that is not listed: {}", line.trim())),
            }
        }
    }
    for (row, _) in rows.iter().zip(used).filter(|(_, used)| !used) {
        wrong.push(format!("{} has no unsafe code with {:?}", row.file, row.code));
    }
    for row in rows {
        let is_there = |(_, text): &(String, String)| text.contains(&format!("fn {}(", row.test));
        if !sources.iter().any(is_there) {
            wrong.push(format!("there is no test {}", row.test));
        }
    }
    wrong
}

#[test]
fn unsafe_code_is_listed_with_a_reason_and_a_test() {
    let table = fs::read_to_string(Path::new(ROOT).join("docs/unsafe.md")).expect("it is there");
    let rows = rows(&table);
    let sources: Vec<_> = ["src", "tests", "benches", "examples", "fuzz"].into_iter().flat_map(sources).collect();
    let wrong = disagreements(&rows, &sources);
    assert!(wrong.is_empty(), "docs/unsafe.md and the code do not agree:\n{}", wrong.join("\n"));
    assert!(rows.iter().all(|row| row.file.starts_with("src/cpu/") || row.file.starts_with("tests/")));

    // It would be noticed.
    let with = |file: &str, text: &str| {
        let mut sources = sources.clone();
        sources.push((file.to_owned(), text.to_owned()));
        disagreements(&rows, &sources).len()
    };
    assert_eq!(with("src/a.rs", "fn f() {\n    unsafe { g() }\n}"), 1);
    assert_eq!(with("src/a.rs", "// unsafe\nlet page = \"style-src 'unsafe-inline'\"; // unsafe"), 0);
    assert_eq!(disagreements(&rows[1..], &sources).len(), 1, "a row less");
    assert!(disagreements(&rows, &sources[..1]).len() > rows.len(), "no code, and no tests");
}

/// Clients of networks, and what they are made of.
const NETWORK: [&str; 22] = [
    "async-std",
    "attohttpc",
    "curl",
    "curl-sys",
    "h2",
    "hyper",
    "isahc",
    "mio",
    "native-tls",
    "openssl",
    "openssl-sys",
    "quinn",
    "reqwest",
    "rustls",
    "socket2",
    "surf",
    "tokio",
    "tungstenite",
    "ureq",
    "hickory-resolver",
    "async-net",
    "smol",
];

#[test]
fn nothing_talks_to_a_network() {
    for (file, text) in sources("src") {
        for word in ["std::net", "TcpStream", "TcpListener", "UdpSocket", "ToSocketAddrs"] {
            let found = lines_with(&text, word);
            let begins = text.lines().find(|line| line.contains(&format!("{word}::")));
            assert!(found.is_empty() && begins.is_none(), "{file} uses {word}: {found:?} {begins:?}");
        }
    }
    assert_eq!(lines_with("use std::net;\n// std::net\n", "std::net").len(), 1, "it would be noticed");

    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let arguments = ["tree", "--offline", "--locked", "--edges", "normal", "--prefix", "none", "--format", "{p}"];
    let output = Command::new(cargo).args(arguments).current_dir(ROOT).output().expect("cargo runs");
    let tree = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let crates: Vec<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(crates.contains(&"wgpu") && crates.contains(&"clap"), "it is the whole tree");
    let found: Vec<&&str> = crates.iter().filter(|name| NETWORK.contains(name)).collect();
    assert!(found.is_empty(), "dependencies that talk to a network: {found:?}");
    // Both lists are about the same crates.
    let deny = fs::read_to_string(Path::new(ROOT).join("deny.toml")).expect("it is there");
    let named = deny.lines().filter_map(|line| line.trim().strip_prefix("{ crate = \"")?.split('"').next());
    let missing: Vec<&str> = named.filter(|name| !name.contains(['@', '-']) && !NETWORK.contains(name)).collect();
    assert!(missing.is_empty(), "deny.toml has more: {missing:?}");
}
