//! A browser without a window, and what is wrong with a page in it: driven by the DevTools protocol through a pipe, so that
//! no port is opened and nothing but Chromium is needed.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;
use tempfile::TempDir;

/// Names of Chromium on different systems.
const NAMES: [&str; 4] = ["chromium", "chromium-browser", "google-chrome-stable", "google-chrome"];
/// An answer that takes longer does not come. Machines that are busy take seconds to start a browser.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is wrong with the page that is open, as lines of text: what is wider than the screen, and words of a visible chart
/// that are not within it.
const LOOK: &str = "
(() => {
    const wrong = [];
    document.querySelectorAll('details').forEach(details => details.open = true);
    const width = document.scrollingElement.scrollWidth;
    if (width > innerWidth) wrong.push(`${width} pixels wide on a screen of ${innerWidth}`);
    for (const svg of document.querySelectorAll('figure > svg')) {
        const frame = svg.getBoundingClientRect();
        if (frame.width === 0) continue;
        for (const text of svg.querySelectorAll('text')) {
            const box = text.getBoundingClientRect();
            const beyond = Math.max(frame.left - box.left, box.right - frame.right, frame.top - box.top,
                box.bottom - frame.bottom);
            if (beyond > 1) wrong.push(`${text.textContent.trim()} is ${beyond.toFixed(1)} pixels out of its chart`);
        }
    }
    return wrong;
})()";

/// How a page is looked at.
#[derive(Clone, Copy, Debug)]
pub struct View {
    pub width: u32,
    /// light or dark
    pub scheme: &'static str,
}

/// A browser with one tab.
pub struct Browser {
    process: Child,
    /// Its end of the pipe; closing it ends the browser.
    commands: Option<ChildStdin>,
    messages: Receiver<Value>,
    /// The tab.
    session: String,
    next_id: u64,
    _profile: TempDir,
}

impl Browser {
    /// `None`, with a line on standard error, where there is no browser; a failure there if `WGMOE_REQUIRE_BROWSER` is 1.
    pub fn open() -> Option<Browser> {
        let Some(name) = NAMES.into_iter().find(|name| Command::new(name).arg("--version").output().is_ok()) else {
            let is_required = std::env::var("WGMOE_REQUIRE_BROWSER").is_ok_and(|value| value == "1");
            assert!(!is_required, "no browser (WGMOE_REQUIRE_BROWSER is 1): none of {NAMES:?} can be started");
            eprintln!("SKIPPED: no browser here: none of {NAMES:?} can be started, so no page is looked at");
            return None;
        };
        let profile = tempfile::tempdir().expect("a folder");
        // The protocol is read from descriptor 3 and written to 4.
        let mut process = Command::new("sh")
            .args(["-c", "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1", "sh", name])
            .args(["--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
            .args(["--no-first-run", "--hide-scrollbars", "--disable-extensions", "--disable-background-networking"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell");
        let mut output = BufReader::new(process.stdout.take().expect("piped"));
        let (sender, messages) = channel();
        std::thread::spawn(move || {
            let mut message = Vec::new();
            while output.read_until(0, &mut message).is_ok_and(|length| length > 0) {
                message.pop();
                let Ok(value) = serde_json::from_slice(&message) else { break };
                if sender.send(value).is_err() {
                    break;
                }
                message.clear();
            }
        });
        let commands = process.stdin.take();
        let mut browser =
            Browser { process, commands, messages, session: String::new(), next_id: 0, _profile: profile };
        let (target, _) = browser.ask("Target.createTarget", json!({"url": "about:blank"}));
        let (session, _) =
            browser.ask("Target.attachToTarget", json!({"targetId": target["targetId"], "flatten": true}));
        browser.session = session["sessionId"].as_str().expect("a session").to_owned();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.ask(&format!("{domain}.enable"), json!({}));
        }
        Some(browser)
    }

    /// The answer, and what happened until it came.
    fn ask(&mut self, method: &str, params: Value) -> (Value, Vec<Value>) {
        self.next_id += 1;
        let mut command = json!({"id": self.next_id, "method": method, "params": params});
        if !self.session.is_empty() {
            command["sessionId"] = json!(self.session);
        }
        let commands = self.commands.as_mut().expect("open");
        commands.write_all(format!("{command}\0").as_bytes()).expect("the browser reads");
        let id = self.next_id;
        let (answer, events) = self.wait(method, |message| message["id"] == id);
        assert!(answer.get("error").is_none(), "{method}: {answer}");
        (answer["result"].clone(), events)
    }

    /// The first message that `is_it`, and those before it.
    fn wait(&mut self, what: &str, is_it: impl Fn(&Value) -> bool) -> (Value, Vec<Value>) {
        let mut before = Vec::new();
        loop {
            let message = self.messages.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("{what}: {error}"));
            if is_it(&message) {
                return (message, before);
            }
            before.push(message);
        }
    }

    /// Opens the page and lists what is wrong with it.
    pub fn look_at(&mut self, page: &Path, view: View) -> Vec<String> {
        let View { width, scheme } = view;
        // Not as a mobile device, which would zoom out until everything fits.
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            json!({"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": false}),
        );
        self.ask(
            "Emulation.setEmulatedMedia",
            json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]}),
        );
        let address = format!("file://{}", page.display());
        let (_, mut events) = self.ask("Page.navigate", json!({"url": address}));
        let is_loaded = |event: &Value| event["method"] == "Page.loadEventFired";
        if !events.iter().any(is_loaded) {
            events.extend(self.wait("loading the page", is_loaded).1);
        }
        let found = self.evaluate(LOOK, &mut events);
        let mut wrong: Vec<String> = events.iter().filter_map(|event| problem(event, &address)).collect();
        let found = found.as_array().unwrap_or_else(|| panic!("the page cannot be looked at: {found}"));
        wrong.extend(found.iter().map(|line| line.as_str().unwrap_or_default().to_owned()));
        wrong
    }

    /// What an expression is in the page that is open.
    pub fn value_of(&mut self, expression: &str) -> Value {
        self.evaluate(expression, &mut Vec::new())
    }

    fn evaluate(&mut self, expression: &str, events: &mut Vec<Value>) -> Value {
        let (answer, more) = self.ask("Runtime.evaluate", json!({"expression": expression, "returnByValue": true}));
        events.extend(more);
        answer["result"]["value"].clone()
    }

    /// The beginning of the page that is open, as PNG in base64: all of it is too much for the browser.
    pub fn picture(&mut self) -> String {
        let size = self.value_of("[innerWidth, Math.min(8000, document.scrollingElement.scrollHeight)]");
        let clip = json!({"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1});
        let (answer, _) = self.ask("Page.captureScreenshot", json!({"captureBeyondViewport": true, "clip": clip}));
        answer["data"].as_str().expect("a picture").to_owned()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        drop(self.commands.take());
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What an event says that should not have happened.
fn problem(event: &Value, address: &str) -> Option<String> {
    let params = &event["params"];
    match event["method"].as_str()? {
        "Runtime.exceptionThrown" => Some(format!("exception: {}", params["exceptionDetails"])),
        "Runtime.consoleAPICalled" => Some(format!("console: {}", params["args"])),
        "Log.entryAdded" => Some(format!("log: {}", params["entry"]["text"])),
        "Network.requestWillBeSent" => {
            let url = params["request"]["url"].as_str().unwrap_or_default();
            (url != address && !url.starts_with("data:")).then(|| format!("request: {url}"))
        }
        _ => None,
    }
}
