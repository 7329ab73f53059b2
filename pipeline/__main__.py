"""`python -m pipeline`."""

import gc
import os

from cluster.proxies import loopback_excluded
from pipeline.cli import app

# A command imports half a million objects that stay: looking through them every 700 is a tenth of its start.
gc.set_threshold(50_000)
os.environ.update(loopback_excluded())  # the processes that a run starts inherit it
app(prog_name="python -m pipeline")
