#!/usr/bin/env python3
"""Draws the pictures of docs/benchmarks.md from the JSON in bench/figures, and writes the tables of that
page and of the README from the same JSON and from bounds.config: plots.sh runs this.

    plots.py            takes the last runs into bench/figures, draws, writes
    plots.py --check    ends with 1 if a table is not what it would be written to

gnuplot draws with one colour for lines and text and one for each side, and knows no style sheet.
What it has drawn then gets one: ink and paper follow the colour scheme of whoever looks.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
DOCS = PROJECT / "docs"
BENCH = PROJECT / "bench"
# So many runs of one kind of machine are kept.
MOST_RUNS = 5

INK = "#102030"
GRID = "#405060"
# Of middle brightness: each can be told from white, from black and from the other two.
SIDES = {"this": "#0a9396", "plain": "#e07a1f", "floor": "#8d99ae"}
# How a host's model saves, in the benchmark of that.
WAYS = {"original": "the original", "in_line": "in line", "behind": "behind the caller"}
NAMES = {"this": "this", "plain": "plain Erlang", "floor": "floor"}

STYLE = """<style>
  .paper { fill: #ffffff } .text { fill: #24292f } .line { stroke: #57606a }
  .gridline { stroke: #d8dee4 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } .text { fill: #d0d7de } .line { stroke: #8b949e }
    .gridline { stroke: #262c34 }
  }
</style>
<rect class="paper" width="100%" height="100%" rx="6"/>
"""

COMMON = f"""
set encoding utf8
set border 3 lc rgb '{INK}'
set tics nomirror textcolor rgb '{INK}'
set grid lw 1 lt 1 lc rgb '{GRID}'
set title textcolor rgb '{INK}'
set xlabel textcolor rgb '{INK}'
set ylabel textcolor rgb '{INK}'
set key textcolor variable samplen 2
"""

SIZES = {2**12: "4 KiB", 2**16: "64 KiB", 2**20: "1 MiB", 2**22: "4 MiB", 2**24: "16 MiB",
         2**26: "64 MiB", 2**28: "256 MiB", 2**30: "1 GiB"}
# What bounds.config calls them.
SIZE_IDS = {2**12: "4k", 2**16: "64k", 2**20: "1m", 2**22: "4m", 2**24: "16m", 2**26: "64m",
            2**28: "256m", 2**30: "1g"}
# The file systems on which saves are measured beside ext4 with a journal and tmpfs.
OTHERS = {"no_journal": "ext4 without a journal", "xfs": "xfs", "btrfs": "btrfs"}


def terminal(name, width, height):
    return (f"set terminal svg size {width},{height} font 'sans-serif,14' enhanced\n"
            f"set output '{DOCS / name}'\n")


def block(name, rows):
    lines = [" ".join(str(cell) for cell in row) for row in rows]
    return "\n".join([f"${name} << EOD", *lines, "EOD", ""])


def saves(figures):
    """Time of a save by size, one panel for each file system."""
    commands = [terminal("bench-save.svg", 860, 420), COMMON]
    for panel in ("save_disk", "save_ram_file"):
        for side in SIDES:
            rows = sorted((int(size), row[side]["p50"] / 1e6)
                          for size, row in figures[panel].items())
            commands.append(block(f"{panel}_{side}", rows))
    # Not all have room for their names.
    tics = ", ".join(f"'{name if size not in (2**22, 2**26, 2**28) else ''}' {size}"
                     for size, name in SIZES.items())
    commands.append(f"""
set logscale xy
set xrange [2500:1.6e9]
set yrange [0.03:15000]
set xtics ({tics}) font ',12'
set ytics ('0.1 ms' 0.1, '1 ms' 1, '10 ms' 10, '100 ms' 100, '1 s' 1000, '10 s' 10000) font ',12'
set key top left reverse Left
set multiplot layout 1,2
""")
    for panel, title in (("save_disk", "a save by its size, ext4: median"),
                         ("save_ram_file", "a save by its size, tmpfs: median")):
        commands.append(f"set title '{title}' font ',14' offset 0,-0.3\n")
        plots = [f"${panel}_{side} using 1:2 with linespoints title '{NAMES[side]}' lw 2.5 pt 7 "
                 f"ps 0.6 dt {2 if side == 'floor' else 1} lc rgb '{SIDES[side]}'"
                 for side in ("plain", "floor", "this")]
        commands.append("plot " + ", \\\n  ".join(plots) + "\n")
    commands.append("unset multiplot\n")
    return "".join(commands)


def waits(figures):
    """What part of the waits was at most so long."""
    commands = [terminal("bench-waits.svg", 860, 360), COMMON]
    for side, key in (("this", "sixteen_waits_ns"), ("plain", "sixteen_plain_waits_ns")):
        samples = sorted(figures[key])
        # In milliseconds; what is below the axis' left end is drawn at that.
        rows = [(max(sample / 1e6, 0.001), 100 * (n + 1) / len(samples))
                for n, sample in enumerate(samples)]
        commands.append(block(side, [(0.001, 0), *rows, (2000, 100)]))
    commands.append(f"""
set logscale x
set xrange [0.001:2000]
set yrange [0:104]
set xtics ('1 µs' 0.001, '10 µs' 0.01, '0.1 ms' 0.1, '1 ms' 1, '10 ms' 10, '100 ms' 100, '1 s' 1000) font ',12'
set ytics 25 format '%g %%' font ',12'
set title '16 contenders for one slot, 10 turns of 2 ms each: share of waits that were at most so long' font ',14' offset 0,-0.3
set key at 0.03,62 left top reverse Left
plot $plain using 1:2 with steps title '{NAMES["plain"]}' lw 2.5 lc rgb '{SIDES["plain"]}', \\
  $this using 1:2 with steps title '{NAMES["this"]}' lw 2.5 lc rgb '{SIDES["this"]}'
""")
    return "".join(commands)


def tokens(figures):
    """The time from each token to the next, while the state is saved after two of them."""
    commands = [terminal("bench-tokens.svg", 860, 380), COMMON]
    colours = {"original": SIDES["plain"], "in_line": "#7b6fd0", "behind": SIDES["this"]}
    timeline = figures["tokens"]["timeline_ns"]
    for way in WAYS:
        at, rows = 0, []
        for gap in timeline[way]:
            rows.append((at / 1e9, gap / 1e6))
            at += gap
        commands.append(block(way, [*rows, (at / 1e9, rows[-1][1])]))
    longest = max(sum(gaps) for gaps in timeline.values()) / 1e9
    commands.append(f"""
set logscale y
set xrange [0:{longest * 1.01:.2f}]
set yrange [2:12000]
set xtics format '%g s' font ',12'
set ytics ('2 ms' 2, '5 ms' 5, '10 ms' 10, '100 ms' 100, '1 s' 1000, '10 s' 10000) font ',12'
set title 'time from each token to the next, while a state of 256 MiB is saved twice' font ',14' offset 0,-0.3
set key top right reverse Left horizontal
""")
    plots = [f"${way} using 1:2 with steps title '{name}' lw 2.5 lc rgb '{colours[way]}'"
             for way, name in WAYS.items()]
    commands.append("plot " + ", \\\n  ".join(plots) + "\n")
    return "".join(commands)


def first_tokens(figures):
    """The time to a model's first token by the length of the prompt, cold and warm."""
    commands = [terminal("bench-llm.svg", 860, 360), COMMON]
    rows = sorted((int(length), row) for length, row in figures["llm"].items())
    ways = {"cold": ("the model reads the prompt", SIDES["plain"]),
            "warm": ("its state is loaded", SIDES["this"])}
    for way in ways:
        commands.append(block(way, [(length, row[way]["p50"] / 1e6) for length, row in rows]))
    tics = ", ".join(f"'{length:,} tokens' {length}" for length, _ in rows)
    commands.append(f"""
set logscale xy
set xrange [{rows[0][0] / 1.25}:{rows[-1][0] * 1.25}]
set yrange [5:200000]
set xtics ({tics}) font ',12'
set ytics ('10 ms' 10, '100 ms' 100, '1 s' 1000, '10 s' 10000, '100 s' 100000) font ',12'
set title 'time to the first token by the length of the prompt, Gemma 3 270M: median' font ',14' offset 0,-0.3
set key top left reverse Left
""")
    plots = [f"${way} using 1:2 with linespoints title '{name}' lw 2.5 pt 7 ps 0.6 lc rgb '{colour}'"
             for way, (name, colour) in ways.items()]
    commands.append("plot " + ", \\\n  ".join(plots) + "\n")
    return "".join(commands)


def rgb(colour):
    """How gnuplot writes it, with blanks or without."""
    parts = [int(colour[at:at + 2], 16) for at in (1, 3, 5)]
    return r"rgb\(\s*%d,\s*%d,\s*%d\)" % tuple(parts)


def draw(commands, name):
    subprocess.run(["gnuplot"], input=commands, text=True, check=True)
    picture = DOCS / name
    drawn = picture.read_text()
    drawn = re.sub(r"<title>.*?</title>\s*<desc>.*?</desc>\s*", lambda _: STYLE, drawn, flags=re.S)
    drawn = re.sub(f"""fill=["']{rgb(INK)}["']""", 'class="text"', drawn)
    drawn = re.sub(f"""stroke=["']{rgb(INK)}["']""", 'class="line"', drawn)
    drawn = re.sub(f"""stroke=["']{rgb(GRID)}["'](?=\\s+class="gridline")""", "", drawn)
    # What is left of its black is not seen.
    picture.write_text(re.sub(r"[ \t]+$", "", drawn, flags=re.M))
    print(f"  {picture.relative_to(PROJECT)}")


def number(value):
    """To three digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def duration(nanoseconds):
    """In the unit that reads best, to three digits."""
    for unit, name in ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1, "ns")):
        if nanoseconds >= unit:
            break
    return f"{number(nanoseconds / unit)} {name}"


def percentile(samples, percent):
    """As bench_report.erl takes it."""
    ordered = sorted(samples)
    return ordered[max(1, (len(ordered) * percent + 99) // 100) - 1]


def markdown(*rows):
    """A table, whose first row is its head."""
    lines = ["".join(f"| {cell} " if cell else "| " for cell in row) + "|\n" for row in rows]
    return "".join([lines[0], "|---" * len(rows[0]) + "|\n", *lines[1:]])


def read_bounds():
    """The lines of bounds.config."""
    pattern = re.compile(r'\{(\w+), (\w+), "(.*)", (at_most|at_least), ([0-9.]+), "([^"]*)"'
                         r'(?:, ([0-9.]+))?\}\.')
    lines = (BENCH / "bounds.config").read_text().splitlines()
    return [pattern.fullmatch(line).groups() for line in lines if line and line[0] != "%"]


def is_of_others(name):
    """Whether a bound is one of those of other file systems, which have a table of their own."""
    return any(name.startswith(other + "_") for other in OTHERS)


def bounds_table(benchmark, report):
    """Each bound beside the median of the runs, and beside the runs."""
    rows = []
    for of, name, what, relation, bound, unit, each in read_bounds():
        if of == benchmark and not (benchmark == "save" and is_of_others(name)):
            runs = [run[name] for run in report["runs"] if name in run]
            sign = {"at_most": "≤", "at_least": "≥"}[relation]
            of_each = f", each {sign} {each}" if each else ""
            rows.append([what, f"{sign} {bound} {unit}".strip() + of_each,
                         f"**{number(percentile(runs, 50))}**" if runs else "not measured yet",
                         " ".join(number(run) for run in runs)])
    return markdown(["", "bound", "median", "runs"], *rows) + f"\n{measured_on(report)}\n"


def measured_on(report):
    machine = report["machine"]
    kernel = machine["system"].split()[1].split("-")[0]
    return (f"On {machine['schedulers']} processors ({machine['processor']}), OTP {machine['otp']}, "
            f"Linux {kernel}.")


def others_table(report):
    """A save on each of the other file systems, times the floor of that: medians of the runs."""
    def cell(name, size):
        runs = [run[f"{name}_{SIZE_IDS[size]}"] for run in report["runs"]
                if f"{name}_{SIZE_IDS[size]}" in run]
        return number(percentile(runs, 50)) if runs else "not measured yet"

    def times(name, size):
        panel = report["figures"].get(f"save_{name}", {}).get(str(size))
        return f" ({duration(panel['floor']['p50'])}, {duration(panel['this']['p50'])})" if panel else ""

    rows = [[size_name, *[cell(name, size) + times(name, size) for name in OTHERS]]
            for size, size_name in SIZES.items()]
    bounds = {bound for of, name, _, _, bound, *_ in read_bounds()
              if of == "save" and is_of_others(name)}
    return markdown(["save: times the floor (floor, this)", *OTHERS.values()], *rows) + (
        f"\nThe bound is {', '.join(sorted(bounds))} each.\n")


def medians(what, panel):
    sides = ("floor", "this", "plain")
    return [what, *[duration(panel[side]["p50"]) if side in panel else "" for side in sides]]


def readme_table(save, semaphore):
    """What is measured, the floor, this, plain Erlang."""
    return markdown(
        ["", "floor", "this", "plain Erlang"],
        medians("load 256 MiB, from the page cache", save["load"][str(2**28)]),
        ["take a slot that is free, and give it back",
         *[duration(semaphore[key]) for key in ("pair_floor_ns", "pair_ns", "pair_plain_ns")]],
        ["16 contenders for one slot: the longest wait", "",
         *[duration(max(semaphore[key])) for key in ("sixteen_waits_ns", "sixteen_plain_waits_ns")]],
    )


def semaphore_table(figures):
    def quantiles(summary, *keys):
        return ", ".join(duration(summary[key]) for key in keys or ("p50", "p99"))

    def waits(key):
        return ", ".join(duration(percentile(figures[key], percent)) for percent in (50, 99))

    def times(*keys):
        return [duration(figures[key]) if key else "" for key in keys]

    busy, resting, awake = (figures[f"wake_up_{when}_ns"] for when in ("busy", "resting", "awake"))
    return markdown(
        ["", "floor", "this", "plain Erlang"],
        ["acquire and release, one process", *times("pair_floor_ns", "pair_ns", "pair_plain_ns")],
        ["the same from 8 processes, per pair", *times(None, "pair_eight_ns", "pair_eight_plain_ns")],
        ["release to the waiter running, releaser busy: p50, p99",
         quantiles(busy["message"]), quantiles(busy["this"]), ""],
        ["the same, releaser at rest", quantiles(resting["message"]), quantiles(resting["this"]), ""],
        ["the same, VM awake", quantiles(awake["message"]), quantiles(awake["this"]),
         quantiles(figures["wake_up_plain_ns"])],
        ["64 contenders, per turn", *times(None, "stampede_turn_ns", "stampede_turn_plain_ns")],
        ["16 contenders, 10 turns of 2 ms, in all",
         *times("sixteen_alone_ns", "sixteen_total_ns", "sixteen_plain_ns")],
        ["16 contenders, one wait: p50, p99", "",
         waits("sixteen_waits_ns"), waits("sixteen_plain_waits_ns")],
        ["owner killed to slot granted: p50, p99, max", "",
         quantiles(figures["killed_owner_ns"], "p50", "p99", "max"), ""],
    )


def save_tables(figures):
    """Saves on each file system, and loads."""
    def cells(panel, sides):
        return [f"{duration(panel[side]['p50'])} ({duration(panel[side]['p99'])})" for side in sides]

    tables = []
    for key, head in (("disk", "save, ext4, BLAKE3"), ("ram_file", "save, tmpfs")):
        sides = ("floor", "this", "plain")
        rows = [[size, *cells(figures[f"save_{key}"][str(bytes_)], sides)]
                for bytes_, size in SIZES.items()]
        rows.insert(1, ["4 KiB, alone", *cells(figures[f"rested_{key}"], sides)])
        tables.append(markdown([head, "floor", "this", "plain Erlang"], *rows))
    tables.append(markdown(["load, warm, ext4", "floor", "this"],
                           *[[size, *cells(figures["load"][str(bytes_)], ("floor", "this"))]
                             for bytes_, size in SIZES.items()]))
    return "\n".join(tables)


def other_figures(figures):
    """Many writers, and what else a save takes."""
    def order(row):
        count, size = re.fullmatch("([0-9]+) of ([0-9]+ [KM]iB)", row).groups()
        return size != "64 KiB", int(count)

    writers = markdown(
        ["writers at once, ext4, saves per second", "floor", "this", "plain Erlang"],
        *[[name, *[number(figures["writers"][name][side]) for side in ("floor", "this", "plain")]]
          for name in sorted(figures["writers"], key=order)])
    asynchronous = figures["async_ns"]
    return writers + "\n" + markdown(
        ["", ""],
        ["processor time of a 256 MiB save, user and system, all threads",
         f"{figures['cpu_ms']} ms; plain Erlang {figures['cpu_plain_ms']} ms"],
        ["longest NIF call in a save of 4 GiB; until its process ran again",
         f"{duration(figures['longest_call_ns'])}; {duration(figures['longest_away_ns'])}"],
        ["the call with the final sync", duration(figures["sync_call_ns"])],
        ["a store's start on 100,000 files", f"{duration(figures['start_ns'])}, "
         f"{figures['start_bytes_a_file']:.0f} bytes of memory a file"],
        ["the caller of `save_async` with 256 MiB stands still, p50 and max",
         f"{duration(asynchronous['p50'])}, {duration(asynchronous['max'])}"])


def slow_table(slow):
    """What another process waits for beside a slow disk."""
    rows = [[name, *[duration(slow[key][quantile]) for quantile in ("p50", "p99", "max")]]
            for name, key in (("alone", "alone_ns"), ("beside a slow disk", "beside_ns"))]
    done = ", ".join(f"{count} {what}" for what, count in sorted(slow["done"].items()))
    return markdown(["`read_file_info`", "p50", "p99", "max"], *rows) + f"\nMeanwhile: {done}.\n"


def fetch_table(fetch):
    """A fetch by its size, beside what it is made of, and what else the two nodes say meanwhile."""
    def row(size):
        each = fetch["fetch_ns"][size]
        cells = [f"{duration(each[side]['p50'])} ({duration(each[side]['max'])})"
                 for side in ("fetch", "sendfile", "save")]
        call = each["call"]
        return [SIZES[int(size)], *cells, f"{duration(call['p50'])}, {duration(call['p99'])}"]

    head = ["p50 (max)", "fetch", "`sendfile`, thrown away", "save", "`erpc:call` meanwhile: p50, p99"]
    rows = [row(size) for size in sorted(fetch["fetch_ns"], key=int)]
    question = fetch["question_ns"]
    return (markdown(head, *rows) + "\nThe question to eight peers: p50 "
            f"{duration(question['p50'])}, p99 {duration(question['p99'])}.\n")


def prefix_table(figures):
    """A look for the longest prefix by the number of lengths, and its parts."""
    parts = ("encode", "lengths", "hash", "look_up")
    rows = [[f"{count} lengths", *[duration(row[part]["p50"]) for part in ("whole", *parts)]]
            for count, row in sorted(figures["prefix_ns"].items(), key=lambda item: int(item[0]))]
    return markdown(["", "`longest_prefix/2`", "encode the tokens", "list the lengths",
                     "hash, once", "look up"], *rows)


def host_tables(figures):
    """Of each kind of host: gaps between tokens, calls and losses, loads, a save beside a load."""
    def p50_and(summary, other="p99"):
        return f"{duration(summary['p50'])} ({duration(summary[other])})"

    def above(summary):
        return " ".join(sign.format(duration(max(summary[key], 0)))
                        for key, sign in (("p50", "{}"), ("max", "({})")))

    gaps, calls, loads = [], [], []
    for kind, host in (("tokens", figures["tokens"]), ("text", figures["text"])):
        for size in (2**24, 2**28, 2**30):
            rows = host["gaps"][str(size)]
            gaps.append([f"{SIZES[size]}, keys of {kind}, nothing saved in as many tokens",
                         above(rows["alone_ns"]), "", "", ""])
            gaps += [[f"{SIZES[size]}, keys of {kind}, {name}", above(rows[way]["above_ns"]),
                      p50_and(rows[way]["call_ns"], "max"), p50_and(rows[way]["saved_ns"], "max"),
                      f"{number(rows[way]['rate_percent']['p50'])} %"]
                     for way, name in WAYS.items()]
        calls += [[f"`save/5`, {int(count):,} tokens, keys of {kind}",
                   *[p50_and(host["calls_ns"][count][way]) for way in WAYS]]
                  for count in sorted(host["calls_ns"], key=int)]
        calls.append([f"saves lost of {host['lost_of']}, keys of {kind}",
                      *[str(host["lost"][way]) for way in WAYS]])
        loads += [[f"{what}, keys of {kind}", *[p50_and(host[key][side])
                                                for side in ("tier", "reader")]]
                  for what, key in (("256 MiB", "load_256m_ns"),
                                    ("4 KiB beside four of 256 MiB", "load_4k_ns"))]
    beside = [[f"{size}, keys of {kind}", *[p50_and(row[key]) for key in ("alone_ns", "beside_ns")],
               duration(row["root_ns"])]
              for kind in ("tokens", "text")
              for size, row in ((SIZES.get(int(bytes_)), row) for bytes_, row in sorted(
                  figures[kind]["beside_load"].items(), key=lambda item: int(item[0])))]
    return "\n".join([
        markdown(["gaps: p50 (max)", "longest, above the usual", "`save/5`", "until on the disk",
                  "tokens per second, of the usual"], *gaps),
        markdown(["calls: p50 (p99)", *WAYS.values()], *calls),
        markdown(["load, warm: p50 (p99)", "by the tier server", "by the reader"], *loads),
        markdown(["save beside a load of 2 GiB: p50 (p99)", "alone", "beside it",
                  "`dir/1` answers after"], *beside)])


def peers_table(peers):
    """Saves and loads of a model's state, beside others."""
    names = {"this": "this", "llama": "llama.cpp, `llama_state_seq_save_file`",
             "llama_in_memory": "the same in tmpfs",
             "safetensors": "safetensors, as vLLM's example connector",
             "numpy": "`tofile`, `readinto`, as SGLang's file back end"}

    def cell(row, what):
        return f"{duration(row[what]['p50'])} ({duration(row[what]['p99'])})"

    tables = []
    for tokens, rows in sorted(peers["figures"]["peers"].items(), key=lambda item: int(item[0])):
        head = (f"{int(tokens):,} tokens, {rows['bytes'] / 2**20:.1f} MiB; the model read them in "
                f"{duration(rows['prefill_ms'] * 1e6)}")
        tables.append(markdown([head, "save", "save, then `fsync`", "load"],
                               *[[name, *[cell(rows[peer], what) for what in ("save", "synced", "load")]]
                                 for peer, name in names.items()]))
    return "\n".join(tables) + f"\n{measured_on(peers)}\n"


def llm_table(llm):
    """What a warm start of a real model consists of."""
    rows = []
    for length, row in sorted(llm["figures"]["llm"].items(), key=lambda item: int(item[0])):
        cold, warm = row["cold"]["p50"], row["warm"]["p50"]
        rows.append([f"{int(length):,} tokens", f"{row['bytes'] / 2**20:.1f} MiB", duration(cold),
                     duration(warm), f"{cold / warm:.0f}", duration(row["load"]["p50"]),
                     duration(row["save"])])
    shared = [[f"{row['tokens']:,} tokens", f"{row['after']:,}", f"{row['bytes'] / 2**20:.1f} MiB",
               f"{row['shared'] / 2**20:.1f} MiB", f"{100 * row['shared'] / row['bytes']:.0f} %"]
              for row in llm["figures"]["dup"]]
    return "\n".join([
        markdown(["", "state", "cold", "warm", "cold / warm", "of warm, the load", "save"], *rows),
        markdown(["a state of", "continues one of", "bytes", "of them in that, too", ""], *shared),
        f"{measured_on(llm)}\n"])


def blocks(save, semaphore, prefix, slow, fetch, host, peers, llm):
    """What stands between two marks of a page: page, name and text of each."""
    page = "docs/benchmarks.md"
    return [
        ("README.md", "figures", readme_table(save["figures"], semaphore["figures"])),
        (page, "bounds of the semaphore", bounds_table("semaphore", semaphore)),
        (page, "figures of the semaphore", semaphore_table(semaphore["figures"])),
        (page, "bounds of saves and loads", bounds_table("save", save)),
        (page, "figures of saves and loads", save_tables(save["figures"])),
        (page, "saves on other file systems", others_table(save)),
        (page, "other figures of saves", other_figures(save["figures"])),
        (page, "longest prefix", bounds_table("prefix", prefix) + "\n" +
         prefix_table(prefix["figures"])),
        (page, "slow disk", bounds_table("slow", slow) + "\n" + slow_table(slow["figures"])),
        (page, "two nodes", bounds_table("fetch", fetch) + "\n" + fetch_table(fetch["figures"])),
        (page, "others", peers_table(peers)),
        (page, "first tokens", llm_table(llm)),
        (page, "tokens in a host", bounds_table("host", host) + "\n" + host_tables(host["figures"])),
    ]


def with_block(page, what, text):
    """The page, with what stands between two marks replaced."""
    begin, end = f"<!-- {what}, by make bench-plots -->\n", f"<!-- end of {what} -->\n"
    before, rest = page.split(begin)
    return before + begin + text + end + rest.split(end)[1]


def is_whole(name, report):
    """Whether a run has measured all that pictures and tables show, on a machine at rest."""
    figures = report["figures"]
    # An image of another file system is not made everywhere.
    wanted = {bound for of, bound, *_ in read_bounds()
              if of == name and not (name == "save" and is_of_others(bound))}
    if not report["judged"] or wanted - {target["id"] for target in report["targets"]}:
        return False
    return name != "save" or all(set(figures[panel]) == {str(size) for size in SIZES}
                                 for panel in ("save_disk", "save_ram_file", "load"))


def take(name):
    """Makes the last run the one whose figures are shown, and adds its targets to those of the runs
    before, if they were made on such a machine."""
    result, kept = BENCH / "results" / f"{name}.json", BENCH / "figures" / f"{name}.json"
    if not result.exists():
        return
    report = read(result)
    if not is_whole(name, report):
        print(f"  {result} is of part of a run, or of one that was not judged: not taken")
        return
    before = read(kept) if kept.exists() else {**report, "runs": []}
    run = {target["id"]: target["value"] for target in report["targets"]}
    alike = all(before["machine"][key] == report["machine"][key]
                for key in ("processor", "schedulers", "otp"))
    runs = before["runs"] if alike else []
    report["runs"] = runs if run in runs else [*runs, run][-MOST_RUNS:]
    kept.write_text(json.dumps(report, separators=(",", ":"), sort_keys=True, ensure_ascii=False) + "\n")


def read(file):
    return json.loads(Path(file).read_text())


def main(arguments):
    names = ("save", "semaphore", "prefix", "slow", "fetch", "host", "peers", "llm")
    checks = arguments == ["--check"]
    if not checks:
        for name in names:
            take(name)
    reports = {name: read(BENCH / "figures" / f"{name}.json") for name in names}
    if not checks:
        draw(saves(reports["save"]["figures"]), "bench-save.svg")
        draw(waits(reports["semaphore"]["figures"]), "bench-waits.svg")
        draw(tokens(reports["host"]["figures"]), "bench-tokens.svg")
        draw(first_tokens(reports["llm"]["figures"]), "bench-llm.svg")
    differ = 0
    for page, what, text in blocks(**reports):
        file = PROJECT / page
        old = file.read_text()
        new = with_block(old, what, text)
        if checks and old != new:
            print(f"{page}, its {what}: not what make bench-plots writes")
            differ = 1
        elif not checks:
            file.write_text(new)
            print(f"  {page}, its {what}")
    return differ


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
