"""`python -m pipeline` whose distillation runs under the limits of `tests.workers.limited_memory`."""

from pipeline.cli import app
from pipeline.stages.distillation import Distillation
from tests.workers.limited_memory import LimitedDistillation

if __name__ == "__main__":
    Distillation.worker_class = LimitedDistillation
    app()
