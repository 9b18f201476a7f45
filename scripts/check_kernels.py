#!/usr/bin/env python3
"""Checks that the kernels' loops call nothing, whatever the profile: make check-kernels.

A kernel is fast where all that its loops use is compiled into them. Which small functions a compiler inlines hangs on its
user's profile, so this builds the benchmark `kernels` under three of them, disassembles it with objdump, and fails when a
loop of a kernel calls anything but a panic:

  release   as in Cargo.toml
  lto-off   release without link-time optimisation, not even within the crate, in 16 codegen units
  dev       as in Cargo.toml

A loop is what lies between a jump backwards within a function and where it leads to: code that is moved out of a loop's way
may lie between them without being part of it, never the other way round.

  --speed   measures the core cases, too, with the three builds in turns, and fails when lto-off is more than 10 %, or dev more
            than half as much, slower than release
"""

import argparse
import collections
import json
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

PROFILES = {
    "release": ["--release", "--config", "profile.release.strip=false"],
    "lto-off": [
        "--profile",
        "lto-off",
        "--config",
        'profile.lto-off.inherits="release"',
        "--config",
        'profile.lto-off.lto="off"',
        "--config",
        "profile.lto-off.codegen-units=16",
        "--config",
        "profile.lto-off.strip=false",
    ],
    "dev": [],
}

# Functions that hold loops, and how many of each there are at least: one that is not found was not checked.
KERNELS = {
    r"kernels::avx512::compiled$": 15,
    r"kernels::avx2::compiled$": 15,
    r"kernels::portable::Portable as .*>::compiled$": 15,
    r"kernels::rows::avx2::dots$": 3,
    r"kernels::rows::avx2::accumulate$": 3,
    r"kernels::rows::avx2::widen$": 2,
    r"kernels::rows::avx2::lines_of$": 3,
    r"kernels::rows::avx2::sum_lines$": 1,
    r"kernels::inputs::lay_floats_avx2$": 1,
    r"kernels::inputs::lay_bytes_avx2$": 1,
}

# What a loop may call: nothing that returns to it.
ALLOWED = re.compile(r"^core::(panicking|slice::index|option|result)::|^core::str::slice_error_fail")

# How much slower than release a build may be.
SLOWER = {"lto-off": 1.1, "dev": 1.5}


def build(profile, target):
    """Builds the benchmark, and returns where it is."""
    command = [os.environ.get("CARGO", "cargo"), "build", "-p", "layerstore-core", "--bench", "kernels"]
    command += ["--target-dir", target, "--message-format", "json-render-diagnostics", *PROFILES[profile]]
    found = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    messages = [json.loads(line) for line in found.splitlines() if line.startswith("{")]
    programs = [m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == "kernels"]
    if len(programs) != 1:
        sys.exit(f"{profile}: {len(programs)} programs were built, expected 1")
    return programs[0]


def output(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def functions(program):
    """Yields each kernel: its pattern, name, and instructions as (address, operation, arguments)."""
    pattern, name, code = None, None, []
    for line in output("objdump", "-d", "-C", "--no-show-raw-insn", program).splitlines():
        if head := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
            if pattern:
                yield pattern, name, code
            name, code = head.group(1), []
            pattern = next((p for p in KERNELS if re.search(p, name)), None)
        elif pattern and (found := re.match(r"^\s+([0-9a-f]+):\s+(\S+)\s*(.*)$", line)):
            code.append((int(found.group(1), 16), found.group(2), found.group(3)))
    if pattern:
        yield pattern, name, code


class Names:
    """Names of what is called through the table of addresses that the loader fills in."""

    def __init__(self, program):
        symbols = {}
        for line in output("nm", "-C", program).splitlines():
            if found := re.match(r"^([0-9a-f]+) \w (.*)$", line):
                symbols[int(found.group(1), 16)] = found.group(2)
        self.slots = {}
        for line in output("objdump", "-R", "-C", program).splitlines():
            if found := re.match(r"^([0-9a-f]+) \S+\s+(.*)$", line):
                slot, target = int(found.group(1), 16), found.group(2)
                if known := re.match(r"^\*ABS\*\+0x([0-9a-f]+)$", target):
                    target = symbols.get(int(known.group(1), 16), target)
                self.slots[slot] = target

    def of(self, arguments):
        if direct := re.match(r"^[0-9a-f]+ <(.*?)(\+0x[0-9a-f]+)?>$", arguments):
            return direct.group(1)
        if indirect := re.search(r"# ([0-9a-f]+) <", arguments):
            return self.slots.get(int(indirect.group(1), 16), arguments)
        return arguments


def inside_loops(code):
    """Returns the instructions that lie in loops."""
    addresses = {address for address, _, _ in code}
    loops = []
    for address, operation, arguments in code:
        target = re.match(r"^([0-9a-f]+) <", arguments) if operation.startswith("j") else None
        if target and (first := int(target.group(1), 16)) <= address and first in addresses:
            loops.append((first, address))
    return [one for one in code if any(first <= one[0] <= last for first, last in loops)]


def check(profile, program):
    """Prints what the kernels' loops call, and returns whether that is nothing."""
    names, counts, fine = Names(program), collections.Counter(), True
    instructions = moves = 0
    for pattern, name, code in functions(program):
        counts[pattern] += 1
        looped = inside_loops(code)
        instructions += len(looped)
        moves += sum(
            1 for _, op, args in looped if op.startswith("vmov") and re.search(r"%[yz]mm", args) and "(%rsp)" in args
        )
        called = collections.Counter(names.of(args) for _, op, args in looped if op.startswith("call"))
        for target, count in called.items():
            if not ALLOWED.match(target):
                print(f"{profile}: {name} at {code[0][0]:#x} calls {target} in a loop, {count} times")
                fine = False
    for pattern, least in KERNELS.items():
        if counts[pattern] < least:
            print(f"{profile}: found {counts[pattern]} functions {pattern}, expected at least {least}")
            fine = False
    print(
        f"{profile}: {sum(counts.values())} kernels, {instructions} instructions in loops, "
        f"{moves} of them moves of whole registers to and from the stack: {'no calls' if fine else 'FAILED'}"
    )
    return fine


def speed(programs, rounds):
    """Prints each case's time under each profile, and returns whether they are near enough."""
    times = collections.defaultdict(lambda: collections.defaultdict(list))
    for _ in range(rounds):
        for profile, program in programs.items():
            for line in output(program, "--bench", "--speed").splitlines():
                case, micros = line.rsplit("\t", 1)
                times[case][profile].append(float(micros))
    fine = True
    print(f"{'µs, the least of ' + str(rounds):<44}" + "".join(f"{p:>10}" for p in programs), *(f"{p + ' /':>10}" for p in SLOWER))
    for case, found in times.items():
        least = {profile: min(all_of) for profile, all_of in found.items()}
        ratios = {profile: least[profile] / least["release"] for profile in SLOWER}
        slow = [profile for profile, ratio in ratios.items() if ratio > SLOWER[profile]]
        fine = fine and not slow
        columns = "".join(f"{least[p]:>10.1f}" for p in programs), *(f"{r:>10.2f}" for r in ratios.values())
        print(f"{case:<44}" + " ".join(columns) + ("  FAILED: " + ", ".join(slow) if slow else ""))
    return fine


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true", help="measure, too")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each build takes")
    default = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target")), "kernels-check")
    parser.add_argument("--target-dir", default=default, help="where to build")
    args = parser.parse_args()
    if os.uname().machine != "x86_64":
        sys.exit("the kernels of x86-64 are checked on such a machine")
    programs = {profile: build(profile, args.target_dir) for profile in PROFILES}
    fine = all([check(profile, program) for profile, program in programs.items()])
    if args.speed:
        fine = speed(programs, args.rounds) and fine
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
