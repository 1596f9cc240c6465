"""The first process of a guest of crash.py: mounts the disk and does what the job says.

    cut      checks what is on the disk, then saves until the power goes
    record   saves a number of payloads on a device that logs every write
    replay   makes of such a log what a power cut at each point may leave, and checks that

The guest's root is the host's, read-only. What it has to tell the host it writes to its second
console, whose other end is a pipe on the host: it is there when the write returns.
"""
import ctypes
import hashlib
import json
import os
import random
import subprocess
import sys
import time
import traceback
import tty

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(os.path.dirname(HERE), "oracle")]
import kvc_oracle  # noqa: E402
import logwrites  # noqa: E402
import model  # noqa: E402

libc = ctypes.CDLL(None, use_errno=True)
DISK = "/run/disk"         # /run is a tmpfs in the guest
# Standard output is for answers.
LOG_TO_CONSOLE = "[{handler, default, logger_std_h, #{config => #{type => standard_error}}}]"
FINIT_MODULE = 313         # of x86-64
MODULES = ("dm-mod", "dm-bufio", "dm-snapshot", "dm-log-writes")


class Host:
    """The console."""

    def __init__(self):
        self.fd = os.open("/dev/tty1", os.O_WRONLY | os.O_NOCTTY)
        tty.setraw(self.fd)

    def tell(self, line):
        data = line.encode() + b"\n"
        while data:
            data = data[os.write(self.fd, data):]


# In sectors.
SUPERBLOCK_END = 8


def call(what, result):
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, "%s: %s" % (what, os.strerror(number)))


def mount(device, on, kind, options=""):
    os.makedirs(on, exist_ok=True)
    call("mount %s" % device, libc.mount(
        device.encode(), on.encode(), kind.encode(), 0, options.encode()))


def mount_disk(device, journal):
    """As a machine that boots does: what has a journal is replayed by the mount."""
    if journal == "none":
        # The bits of 1 and 2 say that it has found something, and corrected it.
        if subprocess.run(["e2fsck", "-f", "-y", device], stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL).returncode & ~3:
            raise OSError("e2fsck cannot correct %s" % device)
        mount(device, DISK, "ext4")
    else:
        if journal == "unknown" and os.listdir("/proc/fs"):
            # Nobody can find out what it is. It is the usual one.
            mount("tmpfs", "/proc/fs", "tmpfs")
        mount(device, DISK, "ext4", "data=" + journal.replace("unknown", "ordered"))


def unmount(on):
    call("umount %s" % on, libc.umount2(on.encode(), 0))


def load_modules(directory):
    paths = {name: os.path.join(at, name + ".ko")
             for at, _, names in os.walk(directory) for name in MODULES if name + ".ko" in names}
    for name in MODULES:
        fd = os.open(paths[name], os.O_RDONLY)
        call("load %s" % name, libc.syscall(FINIT_MODULE, fd, b"", 0))
        os.close(fd)


def dmsetup(*args):
    subprocess.run(["dmsetup", *args], check=True, stdin=subprocess.DEVNULL)


def sectors(device):
    with open(device, "rb") as f:
        return f.seek(0, os.SEEK_END) // logwrites.SECTOR


class Erlang:
    """The VM that saves and loads."""

    def __init__(self, job):
        env = {**os.environ, "LD_PRELOAD": job["linger"]} if job["busy"] else None
        self.vm = subprocess.Popen(
            [job["erl"], "-noshell", "-kernel", "logger", LOG_TO_CONSOLE, "-pa", *job["ebins"],
             "-s", "erllama_cache_crash", "main", "-extra", DISK, str(model.MAX_BYTES),
             job["keyed_by"]],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.names = {}

    def send(self, line):
        self.vm.stdin.write(line + "\n")
        self.vm.stdin.flush()

    def line(self):
        line = self.vm.stdout.readline()
        if not line:
            raise EOFError("the VM has ended: %s" % self.vm.wait())
        return line.rstrip("\n")

    def ask(self, request):
        self.send(request)
        return self.line()

    def name(self, key):
        """The hex of a payload's key."""
        if key not in self.names:
            self.names[key] = self.ask("name %s %d" % key)
        return self.names[key]

    def run(self, request, report):
        """Lets it save, and passes its reports on."""
        self.send(request)
        while True:
            line = self.line()
            if line == "done":
                return
            if not line.startswith("! "):
                raise ValueError("the VM says: " + line)
            report(line[2:])
            self.send("ok")

    def must(self, request, answer):
        got = self.ask(request)
        if got != answer:
            raise ValueError("%s: %s" % (request, got))


class Checker:
    """Looks at a disk that is mounted: at its files first, as no store has seen them yet."""

    def __init__(self, erl, passed=()):
        self.erl = erl
        # The oracle is slow: what it has passed once it need not see again. By content.
        self.passed = set(passed)

    def check(self, expected):
        found = model.Found()
        for root in model.ROOTS:
            directory = os.path.join(DISK, root)
            found.names[root] = {self.erl.name(key): key[1] for key in expected if key[0] == root}
            for name in sorted(os.listdir(directory)):
                found.files[root, name] = self.verdict(os.path.join(directory, name))
        self.erl.must("start", "started")
        for key in expected:
            found.loads[key] = self.erl.ask("load %s %d" % key)
        for root in model.ROOTS:
            found.left[root] = sorted(os.listdir(os.path.join(DISK, root)))
        return found

    def verdict(self, path):
        if not path.endswith(".kvc"):
            return "ok"
        with open(path, "rb") as f:
            data = f.read()
        # The name is a part of what is checked; the two fields that loads rewrite are not.
        data = os.path.basename(path).encode() + data[:12] + data[16:32] + data[40:]
        content = hashlib.sha256(data).hexdigest()
        if content not in self.passed:
            try:
                kvc_oracle.check(path)
            except (ValueError, OSError) as error:
                return str(error)
            self.passed.add(content)
        return "ok"


def pace(job):
    """Busy: somebody else syncs all the time, and whoever changes a name lingers."""
    return "busy" if job["busy"] else "quiet"


def cut(job, host, erl):
    host.tell("MOUNT")
    mount_disk("/dev/ubda", job["journal"])
    expected = model.decode(job["expected"])
    checker = Checker(erl, job["passed"])
    found = checker.check(expected)
    host.tell("FOUND " + json.dumps(found.encode()))
    host.tell("PASSED " + " ".join(checker.passed.difference(job["passed"])))
    signs = {"right": "%d", "corrupt": "%d!"}
    there = " ".join(signs[load] % n for (root, n), load in found.loads.items()
                     if root == "a" and load in signs)
    host.tell("RUN")
    erl.run("run %d %d infinity %s %s" % (job["seed"], job["first"], pace(job), there), host.tell)


def record(job, host, erl):
    load_modules(job["modules"])
    dmsetup("create", "logged", "--table",
            "0 %d log-writes /dev/ubda /dev/ubdb" % sectors("/dev/ubda"))
    mount_disk("/dev/mapper/logged", job["journal"])
    erl.must("start", "started")

    def mark(line):
        # A mark is one word.
        dmsetup("message", "logged", "0", "mark", line.replace(" ", ","))
        host.tell(line)

    erl.run("run %d 1 %d %s" % (job["seed"], job["saves"], pace(job)), mark)
    erl.must("stop", "stopped")
    unmount(DISK)
    dmsetup("remove", "logged")


class Replay:
    """The disk up to a point of the log, and what may be on it besides."""

    def __init__(self, job, host, erl):
        self.job, self.host, self.erl = job, host, erl
        self.checker = Checker(erl)
        self.random = random.Random(job["seed"])
        self.log = logwrites.Log("/dev/ubdb")
        self.base = os.open("/dev/ubda", os.O_WRONLY)
        self.model = model.Model()
        self.done = {"entries": 0, "boundaries": 0, "between": 0, "checked": 0, "lost": 0,
                     "wrong": 0}

    def run(self):
        held = []       # what the next flush makes safe
        for entry in self.log:
            self.done["entries"] += 1
            if entry.flags & logwrites.MARK:
                if entry.text != "dm-log-writes-end":
                    self.model.report(entry.text.replace(",", " "))
            elif entry.flags & logwrites.FLUSH:
                if held:
                    self.between(held)
                self.keep(held + [entry])
                held = []
                self.boundary()
            elif entry.flags & logwrites.FUA:
                self.keep([entry])
                self.boundary()
            else:
                held.append(entry)
            if self.done["lost"] + self.done["wrong"] > 20:
                break
        self.done["saves"] = self.model.saved
        self.done["flushed"] = self.model.flushed
        self.done["counts"] = self.model.counts
        self.done["errors"] = self.model.errors
        self.host.tell("REPLAYED " + json.dumps(self.done))

    def keep(self, entries):
        for entry in entries:
            self.write(self.base, entry.sector, entry.data(self.log))
        # The snapshots read the device beside this cache.
        os.fsync(self.base)

    @staticmethod
    def write(fd, sector, data):
        at = sector * logwrites.SECTOR
        while data:
            done = os.pwrite(fd, data, at)
            data, at = data[done:], at + done

    def boundary(self):
        self.done["boundaries"] += 1
        self.check([])

    def between(self, held):
        """A cut before the flush ended. The disk took what it liked, in the order it liked, and
        what it took need not be all of a write: what is written in one piece is a sector."""
        for i in range(self.job["samples"]):
            # All of it, none of it, and then anything.
            share = (1, 0)[i] if i < 2 else self.random.random()
            torn = self.random.random() / 4 if i > 1 else 0
            parts = []
            for entry in held:
                if self.random.random() >= share:
                    continue
                data = entry.data(self.log)
                # What holds the superblock is whole: a torn one is e2fsck's to replace by its copy.
                if self.random.random() >= torn or entry.sector < SUPERBLOCK_END:
                    parts.append((entry.sector, data))
                    continue
                for i in range(0, len(data), logwrites.SECTOR):
                    if self.random.random() < share:
                        parts.append((entry.sector + i // logwrites.SECTOR,
                                      data[i:i + logwrites.SECTOR]))
            self.done["between"] += 1
            self.check(parts)

    def check(self, parts):
        dmsetup("create", "cut", "--table",
                "0 %d snapshot /dev/ubda /dev/ubdc N 8" % sectors("/dev/ubda"))
        try:
            if parts:
                fd = os.open("/dev/mapper/cut", os.O_WRONLY)
                for sector, data in parts:
                    self.write(fd, sector, data)
                os.fsync(fd)
                os.close(fd)
            mount_disk("/dev/mapper/cut", self.job["journal"])
            try:
                expected = self.model.expected()
                found = self.checker.check(expected)
            finally:
                self.erl.must("stop", "stopped")
                unmount(DISK)
        finally:
            dmsetup("remove", "cut")
        self.done["checked"] += len(found.files)
        self.host.tell("AT %d" % self.done["entries"])
        lost, wrong = found.judge(expected)
        self.done["lost"] += len(lost)
        self.done["wrong"] += len(wrong)
        for what in lost + wrong:
            self.host.tell("BAD entry %d, %s: %s" % (
                self.done["entries"], "between" if parts else "boundary", what))


def main(path):
    mount("proc", "/proc", "proc")
    mount("sysfs", "/sys", "sysfs")
    mount("tmpfs", "/run", "tmpfs")
    host = Host()
    try:
        with open(path, encoding="utf-8") as f:
            job = json.load(f)
        # No udev is here to make device nodes.
        os.environ.update(HOME="/run", PATH=job["path"], LC_ALL="C.UTF-8", DM_DISABLE_UDEV="1")
        erl = Erlang(job)
        if job["do"] == "cut":
            cut(job, host, erl)
        elif job["do"] == "record":
            record(job, host, erl)
        else:
            load_modules(job["modules"])
            Replay(job, host, erl).run()
        host.tell("END")
    except Exception:
        host.tell("E guest: " + traceback.format_exc().replace("\n", " | "))
    # The host turns the machine off: the first process must not end.
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1])
