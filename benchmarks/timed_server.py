"""`clincot serve` with one more metric: the processor time within the forward passes of its model.

    python -m benchmarks.timed_server serve --checkpoint FOLDER …

serving_throughput.py compares the time of the whole server with it.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from prometheus_client import Gauge

from clincot.cli import app
from clincot.models.vlm import VisionLanguageModel

FORWARD_METRIC = "clincot_benchmark_forward_seconds"


class ForwardTimer:
    """Adds up the processor time within a model's forward passes, which run in one thread and may be nested."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self.seconds = 0.0
        self._began: list[float] = []
        inner = model.model.model
        for module in (inner, inner.vision_model, inner.connector):
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end)

    def _begin(self, *_: object) -> None:
        self._began.append(time.thread_time())

    def _end(self, *_: object) -> None:
        began = self._began.pop()
        if not self._began:  # the outermost
            self.seconds += time.thread_time() - began


def main() -> int:
    """Run the command line of clincot with every model timed."""
    gauge = Gauge(FORWARD_METRIC, "Processor time within the forward passes of the model.")
    load = VisionLanguageModel.__init__

    def load_timed(model: VisionLanguageModel, *arguments: Any, **options: Any) -> None:
        load(model, *arguments, **options)
        timer = ForwardTimer(model)
        gauge.set_function(lambda: timer.seconds)

    VisionLanguageModel.__init__ = load_timed  # type: ignore[method-assign]
    return int(app.main() or 0)


if __name__ == "__main__":
    sys.exit(main())
