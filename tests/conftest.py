"""One thread per test process: the suite runs in as many processes as there are cores.

Without a GPU, Triton kernels run in Triton's interpreter; it must be told before triton is imported.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
