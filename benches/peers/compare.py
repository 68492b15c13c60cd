#!/usr/bin/env python3
"""Times wgmoe and its peers in turn, on the same layers, drivers and threads, and writes one table.

    compare.py --peers DIR --wgmoe target/release/wgmoe --suite bars --json OUT.json --markdown OUT.md
    compare.py --self-test

DIR is what setup.sh made. README.md beside this file says what the numbers mean.
"""

import argparse
import contextlib
import dataclasses
import datetime
import glob
import json
import os
import platform
import re
import resource
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
# Part of the name of wgmoe's device, Vulkan driver library that a peer must have loaded, and the loader's file for it.
DEVICES = {
    "lavapipe": ("llvmpipe", "libvulkan_lvp", "/usr/share/vulkan/icd.d/lvp_icd*.json"),
    "swiftshader": ("swiftshader", "libvk_swiftshader", "/usr/lib/chromium*/vk_swiftshader_icd.json"),
    "cpu": ("CPU engine", None, None),
}
BUSY_CORES = 0.2  # more than this, taken by other programs, and the table says so
SLOW_S, VERY_SLOW_S = 20, 60  # a peer's run from which fewer rounds, and one round, have to do
BLOCK_S, MOST_RUNS = 0.5, 100  # a block has as many runs as fit, but no more
WARM_UP_BELOW_S = 5  # shorter runs follow one that is not counted


@dataclasses.dataclass
class Row:
    device: str
    peer: str
    peer_weights: str
    weights: str
    shape: tuple  # hidden, intermediate, experts, top_k
    tokens: int
    bar: float | None = None

    def name(self):
        return f"{self.device} {self.weights} {shape_text(self.shape)} {self.tokens} tokens, {self.peer} {self.peer_weights}"


class Problem(Exception):
    """Why a row has no numbers."""


class NoAnswer(Problem):
    """The peer took too long."""


# --- what is measured


def suite_rows(suite):
    small, mixtral = (1024, 512, 32, 4), (1024, 1792, 8, 2)
    if suite == "quick":
        return [
            Row("lavapipe", "ggml", "f16", "f16", small, 1),
            Row("swiftshader", "onnxruntime", "int4", "int4", small, 1),
            Row("cpu", "ggml", "f16", "f16", small, 16),
            Row("cpu", "ggml", "q4_0", "q4_0", small, 1),
            Row("cpu", "onnxruntime", "int4", "int4", small, 16),
            Row("cpu", "pytorch", "f32", "f32", mixtral, 64),
        ]
    if suite == "bars":
        bars = {
            "lavapipe": {1: 5, 4: 5, 16: 20, 128: 20, 512: 15},
            "cpu": {1: 1, 4: 1, 16: 1.2, 128: 1.2, 512: 1.2},
        }
        rows = []
        for device, bar in bars.items():
            rows += [Row(device, "ggml", "f16", "f16", small, tokens, bar[tokens]) for tokens in (1, 4, 16, 128, 512)]
            for weights in ("q4_0", "int4"):
                rows += [Row(device, "ggml", "q4_0", weights, small, tokens, bar[tokens]) for tokens in (1, 4)]
        for device, bar in (("swiftshader", 8), ("cpu", None)):
            rows += [Row(device, "onnxruntime", "int4", "int4", small, tokens, bar) for tokens in (1, 16, 128, 512)]
        return [*rows, Row("cpu", "pytorch", "f32", "f32", mixtral, 512, 1)]
    layers = [
        ((2048, 768, 128, 8), ("f16", "q4_0")),
        ((2048, 1792, 32, 4), ("f16", "q4_0")),
        ((2880, 2880, 32, 4), ("mxfp4",)),
    ]
    return [
        Row(device, "ggml", weights, weights, shape, tokens)
        for device in ("lavapipe", "cpu")
        for shape, formats in layers
        for weights in formats
        for tokens in (1, 4, 8, 32, 64, 128, 256, 512)
    ]


def shape_text(shape):
    return "{} x {}, {} experts, top-{}".format(*shape)


# --- the two sides: each has block(runs), which gives the seconds of that many runs


def driver_file(device):
    pattern = DEVICES[device][2]
    found = sorted(glob.glob(pattern))
    machine = [path for path in found if platform.machine() in path]
    if not found:
        raise Problem(f"no driver: {pattern} does not exist")
    return (machine or found)[0]


def environment(device):
    variables = dict(os.environ)
    if device != "cpu":
        variables["VK_DRIVER_FILES"] = variables["VK_ICD_FILENAMES"] = driver_file(device)
    return variables


class Peer:
    """A worker process. It is stopped whenever it is not timed, so that its threads take nothing from wgmoe."""

    def __init__(self, command, env, patience):
        self.patience = patience
        self.errors = tempfile.TemporaryFile()
        try:
            # A process group of its own: Ctrl-C is for this program alone, and if that dies, the kernel wakes and ends
            # the worker.
            self.process = subprocess.Popen(
                command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, preexec_fn=os.setpgrp
            )
        except OSError as error:
            raise Problem(f"not installed: {error.filename} cannot be run (setup.sh installs it)") from None
        self.pid, self.unread = self.process.pid, b""
        try:
            self.facts = self.answer(patience + 300)
        except BaseException:
            self.close()
            raise
        self.stop(True)

    def stop(self, stop):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGSTOP if stop else signal.SIGCONT)
            if stop and hasattr(os, "waitid"):
                # The signal takes its time: until then the worker would run beside wgmoe.
                os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def block(self, runs):
        self.stop(False)
        try:
            self.process.stdin.write(f"run {runs}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # answer() says how it ended
        seconds = self.answer(self.patience)["seconds"]
        self.stop(True)
        return seconds

    def answer(self, patience):
        """The next JSON line. Others are what libraries print."""
        deadline = time.monotonic() + patience
        while True:
            while b"\n" not in self.unread:
                ready, _, _ = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))
                if not ready:
                    raise NoAnswer(f"no answer within {patience:.0f} s")
                read = os.read(self.process.stdout.fileno(), 1 << 16)
                if not read:
                    raise Problem(self.ending())
                self.unread += read
            line, _, self.unread = self.unread.partition(b"\n")
            if line.startswith(b"{"):
                message = json.loads(line)
                if "error" in message:
                    raise Problem(message["error"])
                return message

    def ending(self):
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").splitlines()
        last = [line.strip() for line in lines if re.search(r"\w", line)][-1:]
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return how + (" (out of memory?)" if code == -signal.SIGKILL else "") + "".join(f": {line}" for line in last)

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()


def start_peer(row, options):
    if not options.peers:
        raise Problem("not installed: --peers says where")
    python = os.path.join(options.peers, "venv", "bin", "python")
    cpu = row.device == "cpu"
    script, more = {
        "ggml": ("ggml_moe.py", ["--lib", os.path.join(options.peers, "ggml"), "--weights", row.peer_weights]),
        "onnxruntime": ("ort_qmoe.py", ["--bits", row.peer_weights.removeprefix("int")]),
        "pytorch": ("torch_mixtral.py", []),
    }[row.peer]
    device = {"ggml": "CPU" if cpu else "Vulkan0", "onnxruntime": "cpu" if cpu else "webgpu", "pytorch": "cpu"}[row.peer]
    command = [python, os.path.join(HERE, script), *more, "--device", device, "--threads", str(options.threads)]
    for name, value in zip(("hidden", "intermediate", "experts", "top-k"), row.shape):
        command += ["--" + name, str(value)]
    peer = Peer([*command, "--tokens", str(row.tokens)], environment(row.device), max(60, 2 * options.budget))
    try:
        check_peer(row, device, peer.facts)
    except Problem:
        peer.close()
        raise
    return peer


def check_peer(row, device, facts):
    """Refuses times of another device than the row's."""
    library = DEVICES[row.device][1]
    if facts["device"].split(":")[0] != device:
        raise Problem(f"asked for {device}, but {row.peer} took {facts['device']}")
    if library and facts["drivers"] != [library]:
        raise Problem(f"{row.peer} should have loaded {library} and no other driver, but has {facts['drivers'] or 'none'}")


class Wgmoe:
    """`wgmoe bench`, started anew for each block; it checks its result before it times anything."""

    def __init__(self, row, options):
        self.row, self.options = row, options
        self.env = environment(row.device)
        self.report = None

    def block(self, runs):
        names = ("--hidden", "--intermediate", "--experts", "--top-k")
        command = [self.options.wgmoe, "bench", "--weights", self.row.weights, "--tokens", str(self.row.tokens)]
        command += [part for name, value in zip(names, self.row.shape) for part in (name, str(value))]
        command += ["--device", "cpu" if self.row.device == "cpu" else DEVICES[self.row.device][0]]
        command += ["--runs", str(runs), "--json", "-"]
        patience = 600 + 4 * self.options.budget
        try:
            done = subprocess.run(
                command, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=patience
            )
        except OSError as error:
            raise Problem(f"wgmoe cannot be run: {error}") from None
        except subprocess.TimeoutExpired:
            raise Problem(f"wgmoe gave no answer within {patience:.0f} s") from None
        try:
            self.report = json.loads(done.stdout)
            failures = self.report["failures"]
        except (ValueError, KeyError):
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise Problem(f"wgmoe: {last[0]}") from None
        if failures:
            raise Problem(f"wgmoe: {failures[0]['reason']}")
        self.check()
        return self.report["rows"][0]

    def check(self):
        """Refuses times of another device, or of another number of threads than the peer has."""
        name = self.report["device"]["name"]
        if DEVICES[self.row.device][0].lower() not in name.lower():
            raise Problem(f"asked wgmoe for {self.row.device}, but it took {name}")
        threads = re.search(r"(\d+) threads?", name)
        if self.row.device == "cpu" and threads and int(threads[1]) != self.options.threads:
            raise Problem(f"wgmoe has {threads[1]} threads and the peer {self.options.threads}; set --threads")


# --- measuring


def runs_within(once):
    return 1 if once >= WARM_UP_BELOW_S else max(3, min(MOST_RUNS, int(BLOCK_S / max(once, 1e-6))))


def rounds_for(once, rounds):
    return 1 if once > VERY_SLOW_S else min(3, rounds) if once > SLOW_S else rounds


def others_seconds(worker=None):
    """CPU time that the machine has spent so far, less what wgmoe and the worker had of it. What the host of a virtual
    machine took away counts too."""
    try:
        ticks = 0
        with open("/proc/stat") as file:
            user, nice, system, _, _, interrupts, soft, steal = map(int, file.readline().split()[1:9])
            ticks += user + nice + system + interrupts + soft + steal
        if worker:
            with open(f"/proc/{worker}/stat") as file:
                ticks -= sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
    except OSError:
        return 0.0
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ticks / os.sysconf("SC_CLK_TCK") - ended.ru_utime - ended.ru_stime


def measure(peer, ours, rounds, result, note=lambda text: None):
    """Fills result["rounds"]. Who begins alternates, and each round gives one ratio of two medians."""
    once = result["peer_once_s"] = peer.block(1)[0]
    known = [once] if once >= WARM_UP_BELOW_S else []  # a long run is the first block already
    wanted = result["rounds_wanted"] = rounds_for(once, rounds)
    runs = {"peer": runs_within(once), "wgmoe": 5 if once < WARM_UP_BELOW_S else 3}

    def peer_block():
        if once < WARM_UP_BELOW_S:
            peer.block(1)
        times = [known.pop()] if known else peer.block(runs["peer"])
        return {"runs_s": times, "median_s": statistics.median(times)}

    def our_block():
        row = ours.block(runs["wgmoe"])
        runs["wgmoe"] = runs_within(row["median_s"])
        return {name: row.get(name) for name in ("median_s", "min_s", "max_s", "runs", "max_rel_error")}

    blocks = {"peer": peer_block, "wgmoe": our_block}
    for number in range(wanted):
        begun, others = time.monotonic(), others_seconds(peer.pid)
        order = ["peer", "wgmoe"] if number % 2 == 0 else ["wgmoe", "peer"]
        found = {side: blocks[side]() for side in order}
        others = (others_seconds(peer.pid) - others) / (time.monotonic() - begun)
        ratio = found["peer"]["median_s"] / found["wgmoe"]["median_s"]
        result["rounds"].append({"first": order[0], **found, "ratio": ratio, "others_busy_cores": others})
        busy = f", while other programs kept {others:.1f} cores busy" if others > BUSY_CORES else ""
        note(f"round {number + 1} of {wanted}: {ratio:.2f}{busy}")


def summary(rounds):
    ratios = [one["ratio"] for one in rounds]
    medians = {side: statistics.median(one[side]["median_s"] for one in rounds) for side in ("peer", "wgmoe")}
    return {
        "peer_median_s": medians["peer"],
        "wgmoe_median_s": medians["wgmoe"],
        "ratio_median": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "others_busy_cores": statistics.median(one["others_busy_cores"] for one in rounds),
    }


class Predictions:
    """A peer's time grows with its tokens; what would take longer than the budget is not begun."""

    def __init__(self, budget):
        self.budget, self.known = budget, {}

    @staticmethod
    def key(row):
        return (row.device, row.peer, row.peer_weights, row.shape)

    def learn(self, row, seconds):
        self.known[self.key(row)] = (row.tokens, seconds)

    def check(self, row):
        tokens, seconds = self.known.get(self.key(row), (row.tokens, 0))
        predicted = seconds * row.tokens / tokens
        if predicted > self.budget:
            raise Problem(f"predicted {predicted:.0f} s for one run of the peer, over the budget of {self.budget:g} s")


def measure_row(row, options, predictions, note, start=start_peer, wgmoe=Wgmoe):
    """The row's entry in the table, and what its sides said of themselves. A failure is an entry as well."""
    result = {**dataclasses.asdict(row), "reason": None, "rounds": []}
    facts = report = peer = None
    try:
        predictions.check(row)
        ours = wgmoe(row, options)
        peer = start(row, options)
        facts = peer.facts
        result |= {name: facts[name] for name in ("layout", "tried_s") if name in facts}
        result["peer_device"] = facts["device"]
        measure(peer, ours, options.rounds, result, note)
        predictions.learn(row, result["peer_once_s"])
    except Problem as problem:
        result["reason"] = str(problem)
        if isinstance(problem, NoAnswer):
            predictions.learn(row, 2 * options.budget)
    except KeyboardInterrupt:
        result["reason"] = f"interrupted after {len(result['rounds'])} rounds"
    finally:
        if peer:
            peer.close()
    if result["rounds"]:
        result |= summary(result["rounds"])
        report = ours.report
    return result, facts, report


# --- the table


def time_text(seconds):
    for unit, scale in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:.0f} {unit}"


def markdown(report):
    machine = report["machine"]
    versions = {**report["peer_versions"], **{f"driver of {k}": v for k, v in report["drivers"].items()}}
    busy = [row["others_busy_cores"] for row in report["rows"] if row.get("others_busy_cores", 0) > BUSY_CORES]
    if busy:
        cores = f"{min(busy):.1f} to {max(busy):.1f} cores"
        busy = ["", f"**Not to be trusted:** in {len(busy)} rows other programs kept {cores} busy."]
    lines = [
        f"Suite `{report['suite']}`, {report['date']}: {machine['cpu']}, {machine['threads']} threads, "
        f"{machine['kernel']}; wgmoe {report['wgmoe_version']}; "
        + "; ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
        f"Medians of {report['rounds']} rounds, each of a block of runs of the peer and one of wgmoe, in turn; a number "
        "in square brackets where there were fewer. The ratio is the peer's time over wgmoe's. wgmoe is the whole layer "
        "with its router and SwiGLU; README.md says what the peers leave out.",
        *busy,
        "",
        "| device | weights | shape | tokens | wgmoe | peer | ratio: median (lowest–highest) | bar |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        begin = f"| {row['device']} | {row['weights']} | {shape_text(row['shape'])} | {row['tokens']} |"
        peer = f"{row['peer']}, {row['peer_weights']}"
        reason = " ".join((row["reason"] or "").split()).replace("|", "/")
        bar = f"{row['bar']:g}" if row["bar"] is not None else ""
        if not row["rounds"]:
            lines.append(f"{begin} | {peer} | not measured: {reason} | {bar} |")
            continue
        ratio = "{ratio_median:.3g} ({ratio_lowest:.3g}–{ratio_highest:.3g})".format(**row)
        if len(row["rounds"]) < report["rounds"]:
            ratio += f" [{len(row['rounds'])}]"
        ratio += f"; {reason}" if reason else ""
        if bar:
            bar += ", met" if row["ratio_median"] >= row["bar"] else ", missed"
        times = f"{time_text(row['wgmoe_median_s'])} | {peer}: {time_text(row['peer_median_s'])}"
        lines.append(f"{begin} {times} | {ratio} | {bar} |")
    return "\n".join(lines) + "\n"


def machine():
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        named = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        cpu = named[0] if named else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": len(os.sched_getaffinity(0)),
        "kernel": f"{platform.system()} {platform.release()}",
    }


def package_of(path):
    """The Debian package of a driver with its version, where there is one."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        ask = lambda *command: subprocess.check_output(["dpkg-query", *command], text=True, stderr=subprocess.DEVNULL)
        package = ask("-S", path).split(":")[0]
        return f"{package} {ask('-W', '-f', '${Version}', package)}"
    return None


def save(path, text):
    if path:
        with open(path + ".part", "w") as file:
            file.write(text)
        os.replace(path + ".part", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="folder that setup.sh made")
    parser.add_argument("--wgmoe", help="the program wgmoe, built with --release")
    parser.add_argument("--suite", default="quick", choices=["quick", "bars", "ggml"])
    parser.add_argument("--device", action="append", choices=DEVICES, help="only these devices")
    parser.add_argument("--only", default="", metavar="REGEX", help="only rows whose name has this, such as 'f16.* 16 tok'")
    parser.add_argument("--rounds", type=int, help="default: 5; 2 for quick")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the peers on the CPU")
    parser.add_argument("--budget", type=float, default=180, help="longest run of a peer to begin, in seconds")
    parser.add_argument("--json")
    parser.add_argument("--markdown")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--self-test", action="store_true", help="test this program, without peers and without wgmoe")
    options = parser.parse_args()
    if options.self_test:
        import self_test

        sys.exit(self_test.main())
    rows = [row for row in suite_rows(options.suite) if row.device in (options.device or DEVICES)]
    rows = [row for row in rows if re.search(options.only, row.name())]
    if options.list:
        print("\n".join(row.name() for row in rows))
        return
    if not options.wgmoe:
        parser.error("--wgmoe says which program to time")
    options.rounds = options.rounds or (2 if options.suite == "quick" else 5)
    options.wgmoe = os.path.abspath(options.wgmoe)
    options.peers = options.peers and os.path.abspath(options.peers)
    with tempfile.TemporaryDirectory() as runtime:
        os.environ.setdefault("XDG_RUNTIME_DIR", runtime)
        report = run(rows, options)
    print(markdown(report), end="")
    if any((row["reason"] or "").startswith("interrupted") for row in report["rows"]):
        sys.exit(130)


def run(rows, options):
    def terminate(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    report = {
        "schema": 1,
        "suite": options.suite,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "wgmoe_version": "unknown",
        "peer_versions": {},
        "drivers": {},
        "rounds": options.rounds,
        "budget_s": options.budget,
        "rows": [],
    }
    predictions = Predictions(options.budget)
    interrupted = False
    for number, row in enumerate(rows, 1):
        if interrupted:
            result = {**dataclasses.asdict(row), "reason": "interrupted before", "rounds": []}
        else:
            head = f"[{number}/{len(rows)}] {row.name()}"
            print(head, file=sys.stderr)
            note = lambda text: print("    " + text, file=sys.stderr)
            result, facts, ours = measure_row(row, options, predictions, note)
            if result["reason"]:
                note(result["reason"])
            interrupted = (result["reason"] or "").startswith("interrupted")
            if facts:
                report["peer_versions"] |= facts["versions"]
            if ours:
                report["wgmoe_version"] = ours["wgmoe_version"]
                driver = ours["device"]["driver"]
                package = row.device != "cpu" and package_of(driver_file(row.device))
                report["drivers"][row.device] = f"{driver} ({package})" if package else driver
        report["rows"].append(result)
        save(options.json, json.dumps(report, indent=2) + "\n")
        save(options.markdown, markdown(report))
    return report


if __name__ == "__main__":
    main()
