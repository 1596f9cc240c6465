"""Cuts the power of guests that save, and looks at what is on their disks. See run.sh.

The guests are processes of User Mode Linux, and a cut is a SIGKILL. What the guest's kernel has
handed to its disk is in the image by then, whether it was synced or not; what it still held in
memory is gone. So a cut by itself is a disk without a volatile cache. What such a cache may lose on
top of that, and in which order, the replay of a log of all writes tries out.
"""
import argparse
import concurrent.futures
import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import model

HERE = os.path.dirname(os.path.abspath(__file__))
GUEST = os.path.join(HERE, "guest.py")
MIB = 1 << 20
# Of a guest, in MiB.
MEMORY = 384
# A guest that says nothing for so long hangs.
SILENCE = 120
# A cut comes within so many seconds: of the first save, or of the mount.
AFTER_FIRST_SAVE = 1.5
AFTER_MOUNT = 1.0


# What the keys of root a are made of; those of root b are made of the other. So every disk has
# files of both versions, and of the disks half have each in the root that is used in most ways.
KEYED_BY = ("tokens", "text")


class Failed(Exception):
    pass


class Guest:
    """A virtual machine, and the lines it says."""

    def __init__(self, work, job, disks, preload):
        self.job = job
        self.console = os.path.join(work, "console")
        path = os.path.join(work, "job.json")
        with open(path, "w", encoding="utf-8") as f:
            json.dump(job, f)
        self.lines, say = os.pipe()
        with open(self.console, "wb") as console:
            self.process = subprocess.Popen(
                ["linux.uml", "mem=%dM" % MEMORY, "uml_dir=" + work, "umid=guest",
                 *("ubd%d=%s" % (i, disk) for i, disk in enumerate(disks)),
                 "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "quiet", "selinux=0",
                 "panic=-1", "con=null", "con0=null,fd:%d" % console.fileno(),
                 "con1=null,fd:%d" % say, "init=" + sys.executable, "--", GUEST, path],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                env={**os.environ, "LD_PRELOAD": preload},
                pass_fds=(console.fileno(), say), start_new_session=True)
        os.close(say)
        self.rest = b""
        self.dead = False

    def read(self, timeout):
        """Reads what is said within some seconds; None when nothing is."""
        ready, _, _ = select.select([self.lines], [], [], max(timeout, 0))
        if not ready:
            return None
        data = os.read(self.lines, MIB)
        self.rest += data
        return data

    def taken(self):
        """The whole lines that were read."""
        *lines, self.rest = self.rest.split(b"\n")
        return [line.decode() for line in lines]

    def until(self, wanted, hear=lambda line: None):
        """The lines up to the one that begins with a word; what came after it stays."""
        lines = []
        while True:
            head, newline, rest = self.rest.partition(b"\n")
            if newline:
                self.rest = rest
                lines.append(head.decode())
                hear(lines[-1])
                if lines[-1].split(" ")[0] == wanted:
                    return lines
                if lines[-1].startswith("E guest"):
                    raise self.failed(lines[-1])
            elif not (data := self.read(SILENCE)):
                raise self.failed("is gone" if data == b"" else "says nothing")

    def cut(self, seconds):
        """Cuts the power after some time, and returns what the guest has said until then."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self.read(left) == b"":
                raise self.failed("is gone")
        self.kill()
        while data := self.read(SILENCE):
            pass
        if data is None:
            raise self.failed("is still there")
        return self.taken()

    def kill(self):
        if not self.dead:
            # All of its processes at once: there is no moment to put something in order.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.dead = True

    def failed(self, how):
        with open(self.console, errors="replace") as f:
            return Failed("the guest (%s, %s) %s; its console:\n%s" % (
                self.job["do"], self.job["journal"], how, f.read()[-3000:]))

    def close(self):
        self.kill()
        os.close(self.lines)


class Bench:
    """Where guests find what they need, and are found themselves."""

    def __init__(self, args, work, images):
        self.work, self.images, self.preload = work, images, args.xstate
        self.job = {
            "erl": shutil.which("erl"), "ebins": args.ebin, "modules": args.modules,
            "linger": args.linger, "busy": False, "path": os.environ["PATH"],
        }
        self.lock = threading.Lock()
        self.guests = set()
        self.closed = False

    @contextlib.contextmanager
    def guest(self, disks, **job):
        """A running guest; afterwards there is nothing of it."""
        with tempfile.TemporaryDirectory(dir=self.work) as work:
            with self.lock:
                if self.closed:
                    raise Failed("it was stopped")
                guest = Guest(work, {**self.job, **job}, disks, self.preload)
                self.guests.add(guest)
            try:
                yield guest
            finally:
                with self.lock:
                    self.guests.discard(guest)
                guest.close()

    def close(self):
        with self.lock:
            self.closed = True
            for guest in self.guests:
                guest.kill()

    def image(self, name, mode, mib):
        """An empty file system with the two roots."""
        path = os.path.join(self.images, name)
        with tempfile.TemporaryDirectory(dir=self.work) as roots:
            for root in model.ROOTS:
                os.mkdir(os.path.join(roots, root))
            # A small journal, so that it comes round while we watch.
            journal = ["-O", "^has_journal"] if mode == "none" else ["-J", "size=8"]
            subprocess.run(
                ["mkfs.ext4", "-q", "-F", *journal, "-d", roots,
                 "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard",
                 self.empty(name, mib)], check=True)
        return path

    def empty(self, name, mib):
        path = os.path.join(self.images, name)
        with open(path, "wb") as f:
            f.truncate(mib * MIB)
        return path

def complaints(mode, seed, lost, wrong):
    for kind, all_of_them in (("LOST", lost), ("WRONG", wrong)):
        for what in all_of_them[:20]:
            print("%s %s (journal %s, seed %d)" % (kind, what, mode, seed), flush=True)


def power_cuts(bench, mode, keyed_by, cuts, seed):
    """Row of the table: `cuts` times a check of the disk and then saves until the power goes."""
    rng = random.Random("%d %s" % (seed, mode))
    image = bench.image("cut." + mode, mode, 192)
    known, passed, first = model.Model(), set(), 1
    row = {"mode": mode, "keyed_by": keyed_by, "cuts": 0, "saved": 0, "in_flight": 0, "files": 0,
           "payloads": 0, "pending": 0, "kept": 0, "lost": 0, "wrong": 0, "errors": 0, "counts": {}}
    while True:
        last = row["cuts"] == cuts
        # Not in the middle of e2fsck, which no power cut may meet.
        early = rng.random() < 0.15 and not last and mode != "none"
        job = {"do": "cut", "journal": mode, "keyed_by": keyed_by, "seed": rng.getrandbits(30),
               "first": first, "busy": rng.random() < 0.5,
               "passed": sorted(passed), "expected": model.encode(known.expected())}
        with bench.guest([image], **job) as guest:
            guest.until("MOUNT")
            if early:
                # In the recovery, or in a check: what is known of the disk stays what it was,
                # unless it came to saving.
                told = guest.cut(rng.uniform(0, AFTER_MOUNT))
            else:
                told = guest.until("RUN")
                told += [] if last else guest.cut(rng.uniform(0, AFTER_FIRST_SAVE))
        for line in told:
            what, _, rest = line.partition(" ")
            if what == "FOUND":
                found = model.Found.decode(json.loads(rest))
                expected = known.expected()
                lost, wrong = found.judge(expected, mode != "none", known.fresh)
                complaints(mode, seed, lost, wrong)
                row["lost"] += len(lost)
                row["wrong"] += len(wrong)
                row["files"] += len(found.files)
                row["payloads"] += sum(load == "right" for load in found.loads.values())
                row["pending"] += len(known.pending)
                row["kept"] += sum(found.loads[key] == "right" for key in known.pending)
                known.settle(found.loads, mode != "none")
            elif what == "PASSED":
                passed.update(rest.split())
            elif what not in ("RUN", "MOUNT"):
                known.report(line)
                if what == "B":
                    first = max(first, int(rest.split()[1]) + 100)
        row["in_flight"] += len(known.under_way)
        row["saved"], row["counts"] = known.saved, known.counts
        row["answered"], row["flushed"] = known.answered, known.flushed
        for error in known.errors[row["errors"]:]:
            print("ERROR %s (journal %s, seed %d)" % (error, mode, seed), flush=True)
        row["errors"] = len(known.errors)
        if last or row["lost"] + row["wrong"] + row["errors"] > 20:
            return row
        row["cuts"] += 1
        if row["cuts"] % 10 == 0:
            print("journal %s: %d cuts, %d saves, %d lost, %d wrong" % (
                mode, row["cuts"], row["saved"], row["lost"], row["wrong"]), flush=True)


def replay(bench, mode, busy, saves, samples, seed):
    """Row of the other table: one run on a device that logs all writes, and what may come of it."""
    def hear(line):
        if line.startswith("BAD"):
            print("%s (journal %s, seed %d)" % (line, mode, seed), flush=True)

    name = "%s.%s" % (mode, busy)
    image, log = bench.image("logged." + name, mode, 64), bench.empty("log." + name, 1024)
    before = image + ".before"
    subprocess.run(["cp", "--sparse=always", image, before], check=True)
    keyed_by = KEYED_BY[busy]
    job = {"journal": mode, "keyed_by": keyed_by, "seed": seed}
    with bench.guest([image, log], do="record", saves=saves, busy=busy, **job) as guest:
        said = guest.until("END")
    errors = [line for line in said if line.startswith("E ")]
    cow = bench.empty("cow." + name, 256)
    with bench.guest([before, log, cow], do="replay", samples=samples, **job) as guest:
        said = guest.until("END", hear)
    row = next(json.loads(line.partition(" ")[2]) for line in said if line.startswith("REPLAYED"))
    errors += row["errors"]
    for error in errors:
        print("ERROR %s (journal %s, seed %d)" % (error, mode, seed), flush=True)
    for path in (image, before, log, cow):
        os.unlink(path)
    return {**row, "mode": mode, "keyed_by": keyed_by, "beside": "busy" if busy else "quiet",
            "errors": len(errors)}


def table(title, rows, columns):
    print("\n" + title)
    print("  ".join("%10s" % name for name, _ in columns))
    for row in rows:
        print("  ".join("%10s" % row[key] for _, key in columns))
    counts = {}
    for row in rows:
        for name, count in row["counts"].items():
            counts[name] = counts.get(name, 0) + count
    print("beside them: " + ", ".join("%d %s" % (n, name) for name, n in sorted(counts.items())))


def stop(*_):
    # Once: a second one must not interrupt what the first has set off.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ebin", action="append", required=True)
    parser.add_argument("--linger", required=True)
    parser.add_argument("--xstate", required=True)
    parser.add_argument("--modules", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--modes", required=True)
    parser.add_argument("--cuts", type=int, required=True)
    parser.add_argument("--saves", type=int, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    modes = args.modes.split()
    print("seed %d" % args.seed, flush=True)
    shares = [args.cuts // len(modes) + (i < args.cuts % len(modes)) for i in range(len(modes))]
    # In memory a guest's disk is as safe: it is the guest that crashes, not this machine.
    images = "/dev/shm" if os.access("/dev/shm", os.W_OK) else args.work
    with tempfile.TemporaryDirectory(prefix="crash.", dir=images) as directory, \
            concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        bench = Bench(args, args.work, directory)
        try:
            cuts = [pool.submit(power_cuts, bench, mode, KEYED_BY[i % 2], share, args.seed)
                    for i, (mode, share) in enumerate(zip(modes, shares)) if share]
            replays = [pool.submit(replay, bench, mode, busy, half, args.samples, args.seed)
                       for mode in modes if args.saves and mode != "none"
                       for busy, half in ((True, (args.saves + 1) // 2), (False, args.saves // 2))
                       if half]
            for done in concurrent.futures.as_completed(cuts + replays):
                done.result()
            cut_rows, replay_rows = [[done.result() for done in all_of_them]
                                     for all_of_them in (cuts, replays)]
        except Failed as failed:
            print("crash: FAILED, seed %d: %s" % (args.seed, failed))
            return 1
        finally:
            bench.close()
    if cut_rows:
        table("Power cuts", cut_rows, [
            ("journal", "mode"), ("keys of a", "keyed_by"), ("cuts", "cuts"), ("saves", "saved"),
            ("behind", "answered"), ("flushed", "flushed"), ("pending", "pending"),
            ("kept", "kept"), ("in flight", "in_flight"), ("files", "files"),
            ("payloads", "payloads"), ("errors", "errors"), ("lost", "lost"), ("wrong", "wrong")])
    if replay_rows:
        table("Replay of every write", replay_rows, [
            ("journal", "mode"), ("keys of a", "keyed_by"), ("beside", "beside"),
            ("saves", "saves"), ("flushed", "flushed"), ("entries", "entries"),
            ("boundaries", "boundaries"),
            ("between", "between"), ("files", "checked"), ("errors", "errors"), ("lost", "lost"),
            ("wrong", "wrong")])
    bad = sum(row["lost"] + row["wrong"] + row["errors"] for row in cut_rows + replay_rows)
    print("\ncrash: %s" % ("passed" if not bad else "FAILED, seed %d" % args.seed))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
