#!/usr/bin/env python3
"""Draws the pictures of docs/benchmarks.md from the JSON in docs/bench, and writes tables of figures, the
README's and that page's, from the same: tools/plots.sh runs this.

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

INK = "#102030"
GRID = "#405060"
# Of middle brightness: each can be told from white, from black and from the other two.
SIDES = {"this": "#0a9396", "plain": "#e07a1f", "floor": "#8d99ae"}
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

# 256 MiB has no room for its name.
SIZES = {4096: "4 KiB", 65536: "64 KiB", 2**20: "1 MiB", 2**24: "16 MiB", 2**28: "", 2**30: "1 GiB"}


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
    tics = ", ".join(f"'{name}' {size}" for size, name in SIZES.items())
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


def duration(nanoseconds):
    """In the unit that reads best, to three digits."""
    for unit, name in ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1, "ns")):
        if nanoseconds >= unit:
            break
    value = nanoseconds / unit
    return f"{value:.0f} {name}" if value >= 100 else f"{value:.3g} {name}"


def table(save, semaphore):
    """The README's: what is measured, the floor, this, plain Erlang."""
    def median(panel, size, *sides):
        return [duration(save[panel][str(size)][side]["p50"]) for side in sides]

    rows = [
        ["save 64 KiB, ext4", *median("save_disk", 2**16, "floor", "this", "plain")],
        ["save 256 MiB, ext4", *median("save_disk", 2**28, "floor", "this", "plain")],
        ["load 256 MiB, from the page cache", *median("load", 2**28, "floor", "this"), ""],
        ["take a slot that is free, and give it back",
         *[duration(semaphore[key]) for key in ("pair_floor_ns", "pair_ns", "pair_plain_ns")]],
        ["16 contenders for one slot: the longest wait", "",
         *[duration(max(semaphore[key])) for key in ("sixteen_waits_ns", "sixteen_plain_waits_ns")]],
    ]
    lines = ["| | floor | this | plain Erlang |", "|---|---|---|---|"]
    return "".join(line + "\n" for line in lines + [f"| {' | '.join(row)} |" for row in rows])


def slow_table(slow):
    """What another process waits for beside a slow disk."""
    def row(name, times):
        return [name, *[duration(times[key]) for key in ("p50", "p99", "max")]]

    rows = [row("alone", slow["alone_ns"]), row("beside a slow disk", slow["beside_ns"])]
    lines = ["| `read_file_info` | p50 | p99 | max |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    done = ", ".join(f"{count} {what}" for what, count in sorted(slow["done"].items()))
    return "".join(f"{line}\n" for line in [*lines, "", f"Meanwhile: {done}."])


def write_between(page, what, text):
    """Replaces what stands between two marks of a page."""
    file = PROJECT / page
    begin, end = f"<!-- {what}, by make bench-plots -->\n", f"<!-- end of {what} -->\n"
    before, rest = file.read_text().split(begin)
    file.write_text(before + begin + text + end + rest.split(end)[1])
    print(f"  {page}, its {what}")


def is_whole(result, report):
    """Whether a run has measured all that its picture shows, on a machine at rest."""
    figures = report["figures"]
    if not report.get("judged", True):
        return False
    if result == "save":
        return all(set(figures.get(panel, {})) == {str(size) for size in SIZES}
                   for panel in ("save_disk", "save_ram_file", "load"))
    if result == "slow":
        return {"alone_ns", "beside_ns", "done"} <= set(figures)
    return {"sixteen_waits_ns", "sixteen_plain_waits_ns"} <= set(figures)


def read(file):
    return json.loads(Path(file).read_text())


def main(arguments):
    if arguments:
        flag, result, file = arguments
        assert flag == "--is-whole", flag
        whole = is_whole(result, read(file))
        if not whole:
            print(f"  {file} is of part of a run, or of one that was not judged: not taken")
        return 0 if whole else 1
    save = read(DOCS / "bench" / "save.json")["figures"]
    semaphore = read(DOCS / "bench" / "semaphore.json")["figures"]
    draw(saves(save), "bench-save.svg")
    draw(waits(semaphore), "bench-waits.svg")
    write_between("README.md", "figures", table(save, semaphore))
    slow = read(DOCS / "bench" / "slow.json")["figures"]
    write_between("docs/benchmarks.md", "slow disk", slow_table(slow))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
