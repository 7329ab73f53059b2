"""`python -m pipeline`."""

import os

from cluster.proxies import loopback_excluded
from pipeline.cli import app

os.environ.update(loopback_excluded())  # the processes that a run starts inherit it
app(prog_name="python -m pipeline")
