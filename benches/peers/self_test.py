"""Tests compare.py with sides that are made up: no peers, no wgmoe, a few seconds."""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import stat
import sys
import tempfile
import time
import unittest
from unittest import mock

import compare

ROW = compare.Row("lavapipe", "ggml", "f16", "f16", (64, 32, 8, 2), 4, bar=5)
CPU_ROW = dataclasses.replace(ROW, device="cpu")
FACTS = {"device": "Vulkan0: fake", "drivers": ["libvulkan_lvp"], "versions": {"fake": "1"}}
OPTIONS = argparse.Namespace(peers="nowhere", wgmoe="nowhere", rounds=5, budget=180, threads=2)

# Speaks the protocol of worker.py, and meanwhile a thread of it writes the time again and again.
WORKER = """
import json, sys, threading, time
def tick():
    while True:
        print(time.monotonic(), file=log, flush=True)
        time.sleep(0.001)
log = open(sys.argv[1], "a")
threading.Thread(target=tick, daemon=True).start()
print("a library says hello")
print(json.dumps(FACTS), flush=True)
for line in sys.stdin:
    time.sleep(0.02)
    print(json.dumps({"seconds": [0.01] * int(line.split()[1])}), flush=True)
""".replace("FACTS", repr(FACTS))

# What `wgmoe bench --json -` prints, with the values put in.
WGMOE = """#!{python}
import json, sys
assert sys.argv[1] == "bench" and sys.argv[-2:] == ["--json", "-"], sys.argv
row = {{"median_s": 0.002, "min_s": 0.001, "max_s": 0.003, "runs": 5, "max_rel_error": 0}}
device = {{"name": {device!r}, "driver": "fake"}}
print(json.dumps({{"wgmoe_version": "0", "device": device, "rows": [row], "failures": {failures!r}}}))
"""


class Side:
    """Either side: each block takes the next of `medians`; `log` has who was asked for how many runs."""

    pid = None

    def __init__(self, name, medians, log, once=0.01):
        self.name, self.medians, self.log = name, iter(medians), log
        self.once, self.facts = once, FACTS
        self.report = {"name": name}

    def block(self, runs):
        self.log.append((self.name, runs))
        if self.name == "wgmoe":
            return {"median_s": next(self.medians), "runs": runs}
        return [self.once] if runs == 1 else [next(self.medians)] * runs

    def close(self):
        self.log.append((self.name, "closed"))


def fake_wgmoe(folder, device="llvmpipe (fake)", failures=()):
    path = os.path.join(folder, "wgmoe")
    with open(path, "w") as file:
        file.write(WGMOE.format(python=sys.executable, device=device, failures=list(failures)))
    os.chmod(path, stat.S_IRWXU)
    return argparse.Namespace(**{**vars(OPTIONS), "wgmoe": path})


def result_of(row, start, wgmoe, options=OPTIONS, predictions=None):
    predictions = predictions or compare.Predictions(options.budget)
    return compare.measure_row(row, options, predictions, lambda text: None, start, wgmoe)[0]


class SelfTest(unittest.TestCase):
    def setUp(self):
        driver = mock.patch.object(compare, "driver_file", return_value="fake.json")
        driver.start()
        self.addCleanup(driver.stop)

    def test_sides_alternate_and_each_begins_in_turn(self):
        log, result = [], {"rounds": []}
        compare.measure(Side("peer", [1] * 5, log), Side("wgmoe", [1] * 5, log), 5, result)
        blocks = [side for side, runs in log if runs != 1]
        self.assertEqual(blocks, ["peer", "wgmoe", "wgmoe", "peer"] * 2 + ["peer", "wgmoe"])
        self.assertEqual([one["first"] for one in result["rounds"]], ["peer", "wgmoe", "peer", "wgmoe", "peer"])

    def test_ratios_are_of_pairs(self):
        log, peer, ours = [], [8, 2, 9, 40, 6], [2, 1, 3, 4, 1]  # ratios 4, 2, 3, 10, 6
        result = result_of(ROW, lambda *_: Side("peer", peer, log), lambda *_: Side("wgmoe", ours, log))
        found = [result[name] for name in ("ratio_median", "ratio_lowest", "ratio_highest")]
        self.assertEqual(found, [4, 2, 10])  # and not 8 / 2, which the medians would give in other cases
        self.assertEqual((result["peer_median_s"], result["wgmoe_median_s"]), (8, 2))
        self.assertEqual(compare.summary(result["rounds"][1:3])["ratio_median"], 2.5)
        self.assertEqual(log[-1], ("peer", "closed"))

    def test_slow_peers_get_fewer_rounds(self):
        self.assertEqual([compare.rounds_for(once, 5) for once in (20, 21, 60, 61)], [5, 3, 3, 1])
        self.assertEqual(compare.rounds_for(21, 2), 2)
        log, result = [], {"rounds": []}
        compare.measure(Side("peer", [], log, once=70), Side("wgmoe", [1], log), 5, result)
        self.assertEqual(log, [("peer", 1), ("wgmoe", 3)])  # and no other run, neither to warm up
        self.assertEqual([one["ratio"] for one in result["rounds"]], [70])

    def test_what_would_exceed_the_budget_is_skipped_with_the_reason(self):
        predictions = compare.Predictions(180)
        predictions.check(ROW)  # nothing is known of the first
        predictions.learn(ROW, 60)
        predictions.check(dataclasses.replace(ROW, tokens=12))
        predictions.check(dataclasses.replace(ROW, tokens=99, peer_weights="q4_0"))
        never = lambda *_: self.fail("the peer was started")
        result = result_of(dataclasses.replace(ROW, tokens=16), never, never, predictions=predictions)
        self.assertEqual(result["reason"], "predicted 240 s for one run of the peer, over the budget of 180 s")

    def test_a_peer_that_does_not_answer_ends_its_larger_batches(self):
        def start(*_):
            raise compare.NoAnswer("no answer within 360 s")

        predictions = compare.Predictions(180)
        result = result_of(ROW, start, lambda *_: None, predictions=predictions)
        self.assertEqual(result["reason"], "no answer within 360 s")
        with self.assertRaisesRegex(compare.Problem, "predicted 720 s"):
            predictions.check(dataclasses.replace(ROW, tokens=8))

    def test_wrong_devices_of_peers_are_refused(self):
        compare.check_peer(ROW, "Vulkan0", FACTS)
        vulkan, lavapipe = FACTS["device"], FACTS["drivers"]
        for device, drivers in (("CPU: fake", lavapipe), (vulkan, []), (vulkan, ["libvk_swiftshader"])):
            with self.assertRaises(compare.Problem):
                compare.check_peer(ROW, "Vulkan0", {"device": device, "drivers": drivers})
        with self.assertRaises(compare.Problem):
            compare.check_peer(CPU_ROW, "CPU", FACTS)

    def test_wrong_devices_of_wgmoe_are_refused(self):
        cases = [
            (ROW, "llvmpipe (LLVM)", None),
            (ROW, "SwiftShader Device", "asked wgmoe for lavapipe, but it took SwiftShader Device"),
            (ROW, "embedded CPU engine, 2 threads", "asked wgmoe for lavapipe"),
            (CPU_ROW, "embedded CPU engine, 2 threads", None),
            (CPU_ROW, "embedded CPU engine, 8 threads", "wgmoe has 8 threads and the peer 2"),
            (CPU_ROW, "llvmpipe (LLVM)", "asked wgmoe for cpu"),
        ]
        for row, device, refusal in cases:
            with self.subTest(device=device, row=row.device), tempfile.TemporaryDirectory() as folder:
                ours = compare.Wgmoe(row, fake_wgmoe(folder, device))
                with self.assertRaisesRegex(compare.Problem, refusal) if refusal else contextlib.nullcontext():
                    self.assertEqual(ours.block(5)["median_s"], 0.002)

    def test_wrong_results_of_wgmoe_are_no_times(self):
        with tempfile.TemporaryDirectory() as folder:
            options = fake_wgmoe(folder, failures=[{"reason": "the result is wrong"}])
            result = result_of(ROW, lambda *_: Side("peer", [1] * 5, []), compare.Wgmoe, options)
        self.assertEqual((result["reason"], result["rounds"]), ("wgmoe: the result is wrong", []))

    def test_a_worker_does_nothing_while_wgmoe_runs(self):
        with tempfile.TemporaryDirectory() as folder:
            log = os.path.join(folder, "log")
            peer = compare.Peer([sys.executable, "-c", WORKER, log], dict(os.environ), 30)
            try:
                self.assertEqual(peer.facts, FACTS)
                while os.path.getsize(log) == 0:
                    peer.block(1)
                self.assertEqual(peer.block(3), [0.01] * 3)
                before = os.path.getsize(log)
                time.sleep(0.2)
                self.assertEqual(os.path.getsize(log), before)
                peer.block(1)
                self.assertGreater(os.path.getsize(log), before)
            finally:
                peer.close()

    def test_workers_that_end_or_hang_give_reasons(self):
        cases = [
            ("import sys; sys.exit('no such thing\\n****')", 30, "ended with exit code 1: no such thing"),
            ("import os; os.kill(os.getpid(), 9)", 30, r"killed by signal 9 \(out of memory\?\)"),
            ("""print('{"error": "no device"}')""", 30, "^no device$"),
            ("import time; time.sleep(60)", -299.8, "no answer within"),
        ]
        for program, patience, reason in cases:
            with self.subTest(reason), self.assertRaisesRegex(compare.Problem, reason):
                compare.Peer([sys.executable, "-c", program], dict(os.environ), patience)
        result = result_of(ROW, compare.start_peer, lambda *_: None)
        self.assertRegex(result["reason"], "^not installed: ")

    def test_an_interrupt_keeps_the_rounds_before_it(self):
        def blocks():
            yield from (6, 6)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)

        log = []
        result = result_of(ROW, lambda *_: Side("peer", blocks(), log), lambda *_: Side("wgmoe", [1] * 5, log))
        self.assertEqual((result["reason"], result["ratio_median"]), ("interrupted after 2 rounds", 6))
        self.assertEqual(log[-1], ("peer", "closed"))

    def test_other_programs_are_noticed_and_the_worker_is_not_one(self):
        spinning = compare.Peer([sys.executable, "-c", "print('{}', flush=True)\nwhile True: pass"], dict(os.environ), 30)
        try:
            spinning.stop(False)
            before = compare.others_seconds()
            time.sleep(0.5)
            self.assertGreater(compare.others_seconds() - before, 0.1)
            self.assertGreater(compare.others_seconds() - compare.others_seconds(spinning.pid), 0.1)
        finally:
            spinning.close()

    def test_the_table_has_every_row(self):
        def sides(peer, ours):
            return lambda *_: Side("peer", peer, []), lambda *_: Side("wgmoe", ours, [])

        met = result_of(ROW, *sides([0.010] * 5, [0.001] * 5))
        missed = result_of(dataclasses.replace(ROW, tokens=16, bar=20), *sides([0.010] * 5, [0.001] * 5))
        skipped = result_of(dataclasses.replace(ROW, tokens=512), compare.start_peer, lambda *_: None)
        rows = [met, missed, skipped]
        report = {"suite": "fake", "date": "", "wgmoe_version": "", "peer_versions": {}, "drivers": {}, "rounds": 5}
        report |= {"machine": compare.machine(), "rows": json.loads(json.dumps(rows))}
        text = compare.markdown(report)
        lines = [line for line in text.splitlines() if re.match(r"\| lavapipe", line)]
        self.assertEqual(len({line.count("|") for line in text.splitlines() if line.startswith("|")}), 1)
        self.assertTrue(lines[0].endswith("| 1 ms | ggml, f16: 10 ms | 10 (10–10) | 5, met |"), lines[0])
        self.assertTrue(lines[1].endswith("| 20, missed |"), lines[1])
        self.assertIn("not measured: not installed", lines[2])
        self.assertNotIn("Not to be trusted", text)
        report["rows"][0]["others_busy_cores"] = 1.5
        self.assertIn("in 1 rows other programs kept 1.5 to 1.5 cores busy", compare.markdown(report))

    def test_suites_have_the_rows_they_should(self):
        bars = compare.suite_rows("bars")
        self.assertEqual(len(bars), 27)
        bar = {(row.device, row.peer, row.weights, row.tokens): row.bar for row in bars}
        self.assertEqual(bar["lavapipe", "ggml", "f16", 128], 20)
        self.assertEqual(bar["lavapipe", "ggml", "int4", 4], 5)
        self.assertEqual(bar["swiftshader", "onnxruntime", "int4", 512], 8)
        self.assertEqual(bar["cpu", "ggml", "f16", 16], 1.2)
        self.assertEqual(len(compare.suite_rows("ggml")), 2 * 5 * 8)
        for suite in ("quick", "bars", "ggml"):
            names = [row.name() for row in compare.suite_rows(suite)]
            self.assertEqual(len(set(names)), len(names))


def main():
    tests = unittest.defaultTestLoader.loadTestsFromTestCase(SelfTest)
    return 0 if unittest.TextTestRunner(stream=sys.stderr).run(tests).wasSuccessful() else 1
