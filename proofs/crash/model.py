"""What may and what must be on a disk after a power cut, and whether it is.

The guest reports each step before it takes it and each success once it has it, one line each:

    B root n bytes   a save of payload n begins, whose file will have about so many bytes
    S root n         it has returned {ok, Key}
    A root n         instead of that, a save behind its caller has
    F root n         a flush has returned ok since
    D root n         a delete of n begins
    G root n         the file of n is about to be damaged, for the next save to replace it
    C what count     something else was done so often
    E text           something went wrong

A payload and its key follow from root and n, see erllama_cache_crash.erl.
"""

MUST = "must"          # there, whole and right
MAY = "may"            # there, whole and right, or not at all
DAMAGED = "damaged"    # there: whole and right, or what was damaged on purpose

# What each report makes of a payload.
STATE = {"B": MAY, "S": MUST, "A": MAY, "F": MUST, "D": MAY, "G": DAMAGED}

ROOTS = ("a", "b")
# The root of the store with max_bytes, and that bound. What it evicts it decides by itself: of the
# youngest files that take half of the bound together it may have evicted none.
BOUNDED = "b"
MAX_BYTES = 2 << 20


class Model:
    """What is known of each payload."""

    def __init__(self):
        self.state = {}       # (root, n): MUST, MAY or DAMAGED, in the order of the last change
        self.sizes = {}       # (root, n): bytes
        self.under_way = set()
        # Of those, what is saved for the first time.
        self.fresh = set()
        # And what has been answered, but not flushed.
        self.pending = set()
        self.saved = 0
        self.answered = 0
        self.flushed = 0
        self.counts = {}
        self.errors = []

    def report(self, line):
        """Takes in one line."""
        what, *words = line.split(" ")
        if what == "C":
            self.counts[words[0]] = self.counts.get(words[0], 0) + int(words[1])
            return
        if what not in STATE:
            self.errors.append(line)
            return
        key = words[0], int(words[1])
        if what == "B":
            self.sizes[key] = int(words[2])
            self.under_way.add(key)
            if key not in self.state:
                self.fresh.add(key)
        elif what == "A":
            self.pending.add(key)
            self.answered += 1
        elif what in ("S", "F"):
            for saves in (self.under_way, self.fresh, self.pending):
                saves.discard(key)
            if what == "S":
                self.saved += 1
            else:
                self.flushed += 1
        self._set(key, STATE[what])

    def _set(self, key, state):
        # A save that begins does not take away what is there.
        if state == MAY and self.state.get(key) == DAMAGED:
            state = DAMAGED
        self.state.pop(key, None)
        self.state[key] = state

    def expected(self):
        """(root, n): state, oldest first, with what the bounded store may have evicted as MAY."""
        expected, young = {}, 0
        for key, state in reversed(self.state.items()):
            if key[0] == BOUNDED and state == MUST:
                young += self.sizes[key]
                if young > MAX_BYTES // 2:
                    state = MAY
            expected[key] = state
        return dict(reversed(expected.items()))

    def settle(self, loads, in_order=True):
        """After a check, what is on the disk is what has to be there the next time. Not in order,
        what is gone may come back."""
        kept = {}
        for key, state in self.state.items():
            if loads[key] == "right":
                kept[key] = MUST
            elif loads[key] == "corrupt":
                kept[key] = DAMAGED
            elif not in_order:
                kept[key] = MAY
        self.state = kept
        self.under_way, self.fresh, self.pending = set(), set(), set()


def encode(table):
    """A table whose keys are pairs, as JSON takes it."""
    return [[*key, value] for key, value in table.items()]


def decode(rows):
    """The table that was encoded."""
    return {(first, second): value for first, second, value in rows}


class Found:
    """What a check has found."""

    def __init__(self):
        self.names = {}     # root: {key's hex: n}, of all that is expected
        self.files = {}     # (root, file name): "ok" or why the oracle refuses it, before the start
        self.loads = {}     # (root, n): right, wrong, miss, corrupt, or another error
        self.left = {}      # root: file names once the store has started

    def encode(self):
        return [self.names, encode(self.files), encode(self.loads), self.left]

    @staticmethod
    def decode(fields):
        found = Found()
        found.names, found.left = fields[0], fields[3]
        found.files, found.loads = decode(fields[1]), decode(fields[2])
        return found

    def judge(self, expected, in_order=True, fresh=()):
        """Two lists of complaints: what is lost, and what is wrong.

        Not in order: the name of a file that was deleted may come back, with what was written in its
        place since. No load may accept that. Of what is saved for the first time there is no such name.
        """
        lost, wrong = [], []
        damaged = set()
        for (root, n), state in expected.items():
            load = self.loads.get((root, n), "not tried")
            comes_back = not in_order and state != MUST and (root, n) not in fresh
            if state == DAMAGED or comes_back:
                damaged.add((root, n))
            if load == "right" or (load, state) in (("miss", MAY), ("corrupt", DAMAGED)):
                continue
            if comes_back and load in ("miss", "corrupt"):
                continue
            (lost if load == "miss" else wrong).append(
                "%s %d: %s, and %s be there" % (root, n, load, state))
        for (root, name), verdict in sorted(self.files.items()):
            if name.endswith(".tmp"):
                continue
            n = self.names[root].get(name[:-len(".kvc")])
            if not name.endswith(".kvc") or n is None:
                wrong.append("%s/%s: nobody saved that" % (root, name))
            elif verdict != "ok" and (root, n) not in damaged:
                wrong.append("%s/%s, of %d: %s" % (root, name, n, verdict))
            elif verdict != "ok" and not in_order:
                continue    # the start removes what it takes for another's
            elif root != BOUNDED and name not in self.left[root]:
                wrong.append("%s/%s, of %d: removed at the start" % (root, name, n))
        for root, names in self.left.items():
            for name in names:
                if (root, name) not in self.files or not name.endswith(".kvc"):
                    wrong.append("%s/%s: there after the start" % (root, name))
        return lost, wrong
