"""Shows every kernel to other machines' compilers; called by scripts/check-portability.sh, which says how to use it."""

import argparse
import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
WEBGPU = "0.6.2"  # of the npm package: Tint, DXC and FXC
CORES = os.cpu_count() or 1
# A compiler that hangs must not keep the others from being heard.
MOST_SECONDS = 3600

UNIFORMITY = REPOSITORY / "tests" / "uniformity"
WRONG_TYPE = {
    "wgsl": "@compute @workgroup_size(1) fn wrong() { let x: f32 = 1u; }",
    "hlsl": "struct One { int x; };\n[numthreads(1, 1, 1)] void wrong() { One one; one.y = one; }",
    "metal": "#include <metal_stdlib>\nkernel void wrong(metal::float4 x) { metal::float4 y = metal::no_such_function(x); }",
}


class Missing(Exception):
    """A tool is not here; the text says how to get it."""


def run(command, **options):
    options = {"capture_output": True, "text": True, "timeout": MOST_SECONDS, **options}
    return subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, **options)


# What a leg needs: Debian's packages, each with what is there once it is installed.
NODE = {"nodejs": "/usr/bin/node", "npm": "/usr/bin/npm"}
WINE = {
    "wine": "/usr/bin/wine",
    "wine64": "/usr/lib/wine/wine64",
    "gcc-mingw-w64-x86-64": "/usr/bin/x86_64-w64-mingw32-gcc",
}
PACKAGES = {
    "naga": {},
    "tint": NODE,
    "spirv": {"spirv-tools": "/usr/bin/spirv-val"},
    "msl": {"clang": "/usr/bin/clang++", "libglm-dev": "/usr/include/glm/glm.hpp"},
    "dxc": NODE | WINE,
    "fxc": NODE | WINE,
}


def lacking_packages(wanted):
    is_here = lambda path: pathlib.Path(path).exists() or shutil.which(pathlib.Path(path).name)
    return [name for name, path in wanted.items() if not is_here(path)]


def need(leg):
    if lacking := lacking_packages(PACKAGES[leg]):
        raise Missing(f"something is missing: apt-get install {' '.join(lacking)}, or --install")


def install(work, legs):
    """Whatever does not work here is found missing by the leg that needs it."""
    wanted = {name: path for leg in legs for name, path in PACKAGES[leg].items()}
    lacking = lacking_packages(wanted)
    if lacking and shutil.which("apt-get"):
        sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
        apt = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
        get = [*apt, "install", "-y", "--no-install-recommends", *lacking]
        # Package lists may be too old, or not there at all.
        if run(get).returncode != 0:
            run([*apt, "update"])
            run(get)
    if "nodejs" in wanted and not npm_package(work).is_dir() and shutil.which("npm"):
        run(["npm", "install", "--no-fund", "--no-audit", "--prefix", work / "npm", f"webgpu@{WEBGPU}"])


def npm_package(work):
    return work / "npm" / "node_modules" / "webgpu"


def need_npm_package(work):
    package = npm_package(work)
    if not package.is_dir():
        raise Missing(f"the npm package is missing: npm install --prefix {work / 'npm'} webgpu@{WEBGPU} (132 MB)")
    return package


def batches(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


def in_parallel(function, items):
    """`function` of each item gives a dict; all of them in one."""
    merged = {}
    with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
        for part in pool.map(function, items):
            merged.update(part)
    return merged


class Leg:
    """A compiler. `check` maps each (path, entry point) to None or the compiler's words."""

    language = "wgsl"
    part = 1000  # kernels between two lines of progress

    def __init__(self, work, wgmoe):
        self.work, self.wgmoe = work, wgmoe

    def applies(self, kernel):
        return True

    def controls(self):
        """Faulty sources that have to be refused."""
        return [wrong_type(self.work, self.language)]


def wrong_type(work, language):
    path = work / "controls" / f"wrong_type.{language}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(WRONG_TYPE[language])
    return path, "wrong"


def seeded(work):
    """The kernels of tests/uniformity that naga takes and browsers do not, and one with a wrong type."""
    return [wrong_type(work, "wgsl")] + [(path, path.stem) for path in sorted((UNIFORMITY / "faulty").glob("*.wgsl"))]


class Naga(Leg):
    def prepare(self):
        return hashlib.sha256(pathlib.Path(self.wgmoe).read_bytes()).hexdigest()

    def controls(self):
        return seeded(self.work)

    def check(self, kernels):
        def batch(part):
            done = run([self.wgmoe, "lint", "--json", "-", *[path for path, _ in part]])
            rows = json.loads(done.stdout)["sources"]
            words = [row["error"] or "; ".join(finding["message"] for finding in row["findings"]) for row in rows]
            return {kernel: text or None for kernel, text in zip(part, words, strict=True)}

        return in_parallel(batch, batches(kernels, 200))


class Tint(Leg):
    def applies(self, kernel):
        # No part of WGSL: native wgpu only, and the plan asks for it nowhere else.
        return not kernel["needs_int64"]

    def prepare(self):
        need_npm_package(self.work)
        return WEBGPU

    def controls(self):
        return seeded(self.work)

    def check(self, kernels):
        names = self.work / "tint.list"
        names.write_text("".join(f"{path}\n" for path, _ in kernels))
        done = run(["node", HERE / "tint.mjs", self.work / "npm", names])
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        if len(rows) != len(kernels):
            raise RuntimeError(f"Tint looked at {len(rows)} of {len(kernels)} kernels: {done.stderr[-500:]}")
        return {kernel: row["error"] for kernel, row in zip(kernels, rows)}


class Spirv(Leg):
    language = "spv"

    def prepare(self):
        return run(["spirv-val", "--version"]).stdout

    def controls(self):
        """A module whose last word is cut off."""
        path = self.work / "controls" / "cut.spv"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = next((self.work / "spv").glob("*.spv")).read_bytes()
        path.write_bytes(whole[:-4])
        return [(path, "wrong")]

    def check(self, kernels):
        def one(kernel):
            done = run(["spirv-val", "--target-env", "vulkan1.1", kernel[0]])
            return {kernel: None if done.returncode == 0 else done.stderr or "refused"}

        return in_parallel(one, kernels)


class Msl(Leg):
    language = "metal"
    batch = 50  # in one unit
    part = 2 * batch * CORES

    def prepare(self):
        header = (HERE / "msl" / "metal_stdlib").read_text()
        return run(["clang++", "--version"]).stdout + header

    def check(self, kernels):
        flags = ["-x", "c++", "-std=c++17", "-mavx512fp16", "-fsyntax-only", "-Wno-everything"]
        flags += ["-fno-caret-diagnostics", "-ferror-limit=0"]
        # Metal's literals without a suffix are float.
        flags += ["-Xclang", "-cl-single-precision-constant"]

        def batch(numbered):
            number, part = numbered
            # One translation unit for all of them: most of the time goes into the templates of GLM.
            unit = self.work / f"unit.{number}.metal"
            lines = ["#include <metal_stdlib>", "#include <simd/simd.h>"]
            for n, (path, _) in enumerate(part):
                # GLM's swizzles are functions.
                text = re.sub(r"\.([xyzw]{2,4})\b", r".\1()", path.read_text())
                lines += [f"namespace kernel_{n} {{", f'#line 1 "{path}"', text, "}"]
            unit.write_text("\n".join(lines) + "\n")
            done = run(["clang++", *flags, "-I", HERE / "msl", unit])
            paths, found, error, stray = {str(path) for path, _ in part}, {}, None, None
            for line in done.stderr.splitlines():
                if match := re.match(r"(.+?):\d+:\d+: (?:fatal )?(error|note): ", line):
                    # An error in the header is that of the kernel which a note after it names.
                    if match.group(2) == "error":
                        stray, error = stray or error, line
                    if error and match.group(1) in paths:
                        found.setdefault(match.group(1), error)
                        error = None
            # One that nobody is named for belongs to everyone.
            stray = stray or error
            if done.returncode and not found:
                stray = stray or done.stderr[-500:] or "refused"
            return {kernel: found.get(str(kernel[0]), stray) for kernel in part}

        return in_parallel(batch, list(enumerate(batches(kernels, self.batch))))


class Hlsl(Leg):
    language = "hlsl"
    batch = 10  # in one process
    part = batch * CORES
    compiler = ""

    def prepare(self):
        package = need_npm_package(self.work)
        folder = self.work / "wine"
        folder.mkdir(parents=True, exist_ok=True)
        for library in (package / "dist" / "win32-x64").glob("*.dll"):
            shutil.copy(library, folder)
        source = HERE / "hlsl_compile.c"
        self.program = folder / "hlsl_compile.exe"
        run(["x86_64-w64-mingw32-gcc", "-O1", "-o", self.program, source], check=True)
        self.environment = {
            **os.environ,
            "WINEPREFIX": str(folder / "prefix"),
            "WINEARCH": "win64",
            "WINEDEBUG": "-all",
            "DISPLAY": "",
            "WINEDLLOVERRIDES": "d3dcompiler_47=n",
        }
        # The prefix is made by the first call, which must not have others beside it.
        run(["wine", "cmd", "/c", "exit"], env=self.environment)
        return WEBGPU + source.read_text()

    def check(self, kernels):
        def batch(numbered):
            number, part = numbered
            names = self.work / f"{self.compiler}.{number}.list"
            names.write_text("".join(f"{path}\t{entry}\n" for path, entry in part))
            done = run(["wine", self.program, self.compiler, names], env=self.environment)
            words, verdicts = [], []
            for line in done.stdout.splitlines():
                if line.startswith("| "):
                    words.append(line[2:])
                    continue
                verdicts.append(None if line.startswith("ok\t") else "\n".join(words) or "refused")
                words = []
            # One that brings the compiler down takes those after it along.
            verdicts += ["the compiler ended before this"] * (len(part) - len(verdicts))
            return dict(zip(part, verdicts))

        return in_parallel(batch, list(enumerate(batches(kernels, self.batch))))


class Dxc(Hlsl):
    compiler = "dxc"


class Fxc(Hlsl):
    compiler = "fxc"

    def applies(self, kernel):
        # Shader model 5.1 has neither; wgpu does not offer the features with FXC.
        return not kernel["needs_subgroups"] and not kernel["needs_int64"]


LEGS = {"naga": Naga, "tint": Tint, "spirv": Spirv, "msl": Msl, "dxc": Dxc, "fxc": Fxc}
TO = {"wgsl": "wgsl", "spv": "spirv", "metal": "msl", "hlsl": "hlsl"}


def written(work, wgmoe, language):
    """All kernels in a language, by `wgmoe shader --all`."""
    folder = work / language
    shutil.rmtree(folder, ignore_errors=True)
    run([wgmoe, "shader", "--all", "--to", TO[language], "--output", folder], check=True)
    return folder, json.loads((folder / "kernels.json").read_text())["kernels"]


def spread(items, limit):
    return items if not limit or limit >= len(items) else [items[n * len(items) // limit] for n in range(limit)]


def run_leg(name, work, wgmoe, limit):
    need(name)
    leg = LEGS[name](work, wgmoe)
    version = leg.prepare()
    folder, kernels = written(work, wgmoe, leg.language)
    applicable = spread([kernel for kernel in kernels if leg.applies(kernel)], limit)
    accepted_file = work / "accepted" / name
    accepted = set(accepted_file.read_text().split()) if accepted_file.is_file() else set()

    # Many variants are the same text: each text is looked at once.
    places, num_cached = {}, 0
    for kernel in applicable:
        path = folder / kernel["file"]
        text = path.read_bytes() + kernel["entry_point"].encode() + version.encode()
        key = hashlib.sha256(text).hexdigest()
        num_cached += key in accepted
        if key not in accepted:
            places.setdefault(key, ((path, kernel["entry_point"]), []))[1].append(kernel["kernel"])

    # A part at a time: what a run that is ended has seen, the next one need not see again.
    verdicts, begun = {}, time.monotonic()
    accepted_file.parent.mkdir(parents=True, exist_ok=True)
    for part in batches(list(places.items()), leg.part):
        verdicts.update(leg.check([place for _, (place, _) in part]))
        accepted |= {key for key, (place, _) in part if not verdicts[place]}
        accepted_file.write_text("".join(f"{key}\n" for key in sorted(accepted)))
        print(f"{name}: {len(verdicts)} of {len(places)} texts, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    refused = {label: verdicts[place] for place, labels in places.values() for label in labels if verdicts[place]}

    controls = leg.controls()
    missed = [str(path) for (path, _), words in leg.check(controls).items() if not words]
    return {
        "kernels": len(applicable),
        "not_applicable": len(kernels) - len(applicable) if not limit else None,
        "passed": len(applicable) - len(refused),
        "cached": num_cached,
        "controls": len(controls),
        "controls_missed": missed,
        "refused": refused,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wgmoe", required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--legs", default=",".join(LEGS))
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    names = arguments.legs.split(",")
    if unknown := [name for name in names if name not in LEGS]:
        parser.error(f"no leg {', '.join(unknown)}; there are: {', '.join(LEGS)}")
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if arguments.install:
        install(work, names)

    results = {}
    for name in names:
        begun = time.monotonic()
        try:
            results[name] = run_leg(name, work, arguments.wgmoe, arguments.limit)
        except Missing as missing:
            results[name] = {"not_run": str(missing)}
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            results[name] = {"not_run": f"{type(error).__name__}: {error}"}
        results[name]["seconds"] = round(time.monotonic() - begun, 1)
        tell(name, results[name])

    print(f"\n{'leg':6} {'kernels':>8} {'passed':>7} {'failed':>7} {'cached':>7} {'controls':>9} {'seconds':>8}")
    for name, result in results.items():
        if "not_run" in result:
            print(f"{name:6} NOT RUN: {result['not_run']}")
            continue
        caught = f"{result['controls'] - len(result['controls_missed'])}/{result['controls']}"
        counts = [result["kernels"], result["passed"], len(result["refused"]), result["cached"]]
        print(f"{name:6} {counts[0]:8} {counts[1]:7} {counts[2]:7} {counts[3]:7} {caught:>9} {result['seconds']:8}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))
    good = all("not_run" not in r and not r["refused"] and not r["controls_missed"] for r in results.values())
    print(f"\ncheck-portability.sh: {'PASSED' if good else 'FAILED'}")
    sys.exit(0 if good else 1)


def tell(name, result):
    for label, words in list(result.get("refused", {}).items())[:5]:
        print(f"{name}: {label} is refused:\n    " + "\n    ".join(words.splitlines()[:4]))
    for path in result.get("controls_missed", []):
        print(f"{name}: {path} should have been refused")


if __name__ == "__main__":
    main()
