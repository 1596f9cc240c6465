"""File back ends of Python servers as peers: what is written is the state of a model, as bytes in memory.

    python files.py

A command is a line, and so is its answer, `ok NANOSECONDS` or `error REASON`:

    state PATH               takes the bytes of this file as the state
    safetensors save PATH    safetensors' save_file, by which vLLM's example connector stores KV caches
    safetensors load PATH    its load_file
    numpy save PATH          ndarray.tofile, as SGLang's file back end of its hierarchical cache does
    numpy load PATH          readinto a new array, as that does

It ends when its input does.
"""

import sys
import time

import numpy
from safetensors.numpy import load_file, save_file

state = numpy.empty(0, dtype=numpy.uint8)


def numpy_load(path):
    loaded = numpy.empty(state.size, dtype=numpy.uint8)
    with open(path, "rb", buffering=0) as file:
        if file.readinto(memoryview(loaded)) != loaded.nbytes:
            raise IOError(f"short read of {path}")
    return loaded


BACK_ENDS = {
    ("safetensors", "save"): lambda path: save_file({"kv_cache": state}, path),
    ("safetensors", "load"): lambda path: load_file(path)["kv_cache"],
    ("numpy", "save"): lambda path: state.tofile(path),
    ("numpy", "load"): numpy_load,
}


def answer(words):
    global state
    if words[0] == "state":
        state = numpy.fromfile(words[1], dtype=numpy.uint8)
        return f"ok {state.size}"
    run = BACK_ENDS[words[0], words[1]]
    begun = time.perf_counter_ns()
    run(words[2])
    return f"ok {time.perf_counter_ns() - begun}"


def main():
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            print(answer(line.rstrip("\n").split(" ", 2)), flush=True)
        except Exception as error:  # pylint: disable=broad-except  # the other side says what it means
            print("error", str(error).replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
