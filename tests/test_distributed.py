"""Ranks: what starting one does to the process."""

import subprocess
import sys

import pytest

TENSORS = """
import sys, threading, torch
from fastsskd import distributed
if sys.argv[1] == "rank":
    distributed._keep_freed_memory()
def heap():
    lines = [line.split()[0] for line in open("/proc/self/maps") if line.endswith("[heap]\\n")]
    return [int(end, 16) for end in lines[0].split("-")]
tensors = [torch.ones(2**24) for _ in range(5)]
first, grown = tensors[0].data_ptr(), heap()
del tensors
print(grown[0] <= first < grown[1], heap() == grown)
done = []
other = threading.Thread(target=lambda: done.append(torch.ones(2**25).sum().item() == 2**25))
other.start()
other.join()
print(done == [True])  # a thread's own memory is bounded, and it finds some all the same
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_step_s_memory_stays_for_the_next_step():
    def in_heap_and_kept(kind):
        return subprocess.run([sys.executable, "-c", TENSORS, kind], capture_output=True, text=True, check=True).stdout

    assert in_heap_and_kept("rank").split() == ["True", "True", "True"]
    assert in_heap_and_kept("other").split()[0] == "False"  # or nothing was to be gained
