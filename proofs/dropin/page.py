"""Does to a project what a section of a page says.

    page.py diff PAGE SECTION FILE PROJECT    apply the section's diff of this file
    page.py sh PAGE SECTION                   print the section's shell commands

A section ends at the next heading of its own level or of a higher one. A diff is that between two
fences: with the lines of its file before and after, and @@ between parts that are apart.
"""

import pathlib
import re
import sys


def section(page, heading):
    lines = iter(page.splitlines())
    level = next((re.match("#+", line)[0] for line in lines
                  if re.fullmatch("#+ " + re.escape(heading), line)), None)
    if level is None:
        sys.exit(f"no section is called {heading}")
    fenced = False
    for line in lines:
        fenced ^= line.lstrip().startswith("```")
        if not fenced and re.match(f"#{{1,{len(level)}}} ", line):
            return
        yield line


def fences(lines, language):
    """What stands in these fences, without the indentation that they have themselves."""
    block = None
    for line in lines:
        indentation = len(line) - len(line.lstrip())
        if block is None and line.strip() == "```" + language:
            block, indented = [], indentation
        elif block is not None and line.strip() == "```":
            yield block
            block = None
        elif block is not None:
            block.append(line[indented:])


def hunks(block):
    """Pairs of the lines that are there and those that take their place."""
    before, after = [], []
    for line in [*block[2:], "@@"]:
        if line.startswith("@@"):
            yield before, after
            before, after = [], []
        elif line.startswith("-"):
            before.append(line[1:])
        elif line.startswith("+"):
            after.append(line[1:])
        else:
            before.append(line[1:])
            after.append(line[1:])


def patched(lines, before, after):
    places = [n for n in range(len(lines)) if lines[n:n + len(before)] == before]
    if len(places) != 1:
        sys.exit("\n".join([f"stands {len(places)} times in the file:", *before]))
    return lines[:places[0]] + after + lines[places[0] + len(before):]


def diff(page, heading, name, project):
    blocks = [block for block in fences(section(page, heading), "diff")
              if block[:2] == ["--- a/" + name, "+++ b/" + name]]
    if not blocks:
        sys.exit(f"{heading} has no diff of {name}")
    file = pathlib.Path(project, name)
    lines = file.read_text().splitlines()
    for block in blocks:
        for before, after in hunks(block):
            lines = patched(lines, before, after)
    file.write_text("\n".join(lines) + "\n")


def sh(page, heading):
    commands = [line for block in fences(section(page, heading), "sh") for line in block]
    if not commands:
        sys.exit(f"{heading} has no commands")
    print("\n".join(commands))


what, page, *arguments = sys.argv[1:]
{"diff": diff, "sh": sh}[what](pathlib.Path(page).read_text(), *arguments)
