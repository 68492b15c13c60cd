"""What the workers share: their options, the protocol with compare.py, and use from a shell.

With --runs N a worker times each of its devices, prints a JSON line for each, and the largest relative difference
between the results of two. Without, it takes one device, loads once, prints a line that says what it has loaded, and
answers each line "run N" on standard input with the seconds of N runs. A failure is a line {"error": ...}.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time

VULKAN_DRIVERS = ["libvulkan_lvp", "libvk_swiftshader", "libvulkan_intel", "libvulkan_radeon", "libGLX_nvidia"]


def options(description, **defaults):
    """An argument parser with the options that all workers have."""
    parser = argparse.ArgumentParser(description=description)
    sizes = dict(tokens=128, hidden=1024, intermediate=512, experts=32, top_k=4)
    for name, default in {**sizes, "threads": len(os.sched_getaffinity(0)), "runs": 0, **defaults}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    return parser


def drivers():
    """The Vulkan drivers that this process has loaded: what a peer says about its device can be checked against them."""
    with open("/proc/self/maps") as maps:
        text = maps.read()
    return [name for name in VULKAN_DRIVERS if name in text]


def seconds(run, runs):
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def say(**line):
    print(json.dumps(line), flush=True)


def work(args, load):
    """load(device) gives (facts, run, output): what was loaded, what to time, and a function for its last result."""
    os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.gettempdir())
    try:
        devices = args.device.split(",")
        if args.runs:
            alone(args, devices, load)
            return
        facts, run, _ = load(devices[0])
        seconds(run, 1)  # compiles and allocates
        say(ready=True, drivers=drivers(), **facts)
        for line in sys.stdin:
            say(seconds=seconds(run, int(line.split()[1])))
    except Exception as error:
        say(error=f"{type(error).__name__}: {error}")
        sys.exit(1)


def alone(args, devices, load):
    outputs = []
    for device in devices:
        facts, run, output = load(device)
        seconds(run, 1)
        median = statistics.median(seconds(run, args.runs))
        sizes = {name: getattr(args, name) for name in ("tokens", "hidden", "intermediate", "experts", "top_k")}
        flops = 2 * args.tokens * args.top_k * 3 * args.hidden * args.intermediate
        say(**facts, drivers=drivers(), **sizes, median_s=median, gflops=flops / median / 1e9)
        outputs.append(output())
    if len(outputs) == 2:
        say(max_rel_diff=float(abs(outputs[0] - outputs[1]).max() / abs(outputs[1]).max()))
