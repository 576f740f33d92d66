"""Metrics on their way to a run, through a file that outlives both ends."""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.settings import ServiceError
from tasks.tracking.connection import chunks, client_of, explained

if TYPE_CHECKING:
    from mlflow.entities import Metric

MAX_METRICS = 1000  # MLflow's limit on one call

_log = logging.getLogger(__name__)


def step_curves(row: Mapping[str, Any]) -> dict[str, float]:
    """A step's metrics by MLflow's names: `loss/m`, `kl/m`, `choices/m/hidden`, `expert_load/m`, `learning_rate`."""
    named = {name: row[name] for name in ("loss", "learning_rate", "temperature", "gradient_norm")}
    for budget, metrics in row["budgets"].items():
        named |= {f"{name}/{budget}": metrics[name] for name in ("loss", "kl", "cross_entropy")}
        named |= {f"{name}/{budget}": value for name, value in metrics["experts"].items()}
        if metrics["choices"]:
            named |= {f"{name}/{budget}": metrics[name] for name in ("router_loss", "expected_params")}
            named |= {f"choices/{budget}/{axis}": size for axis, size in metrics["choices"].items()}
    return named


class MetricSpool:
    """Metrics on their way to a run: appended to a local file at once, delivered when MLflow is there.

    The file holds one JSON object a line and is the truth of what was measured; MLflow is the truth of what arrived: it
    is asked before the first delivery and after every failure. So each (metric, step) arrives exactly once, over
    outages, kill -9 of either side, and steps that a resumed training runs again. Writer and deliverer may be
    different processes: any process may `record`, one delivers.
    """

    def __init__(self, path: Path, *, uri: str, run_id: str) -> None:
        self.path, self.uri, self.run_id = path, uri, run_id
        self._offset = 0  # what of the file is delivered or was found delivered
        self._arrived: dict[str, set[int]] = {}
        self._lock = threading.Lock()

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step; takes microseconds and never waits for MLflow."""
        line = json.dumps({"step": step, "time": int(time.time() * 1000), "metrics": dict(metrics)})
        with self.path.open("a+b", buffering=0) as file:
            if file.seek(0, os.SEEK_END) and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                line = f"\n{line}"  # a process was killed in the middle of a line
            file.write(f"{line}\n".encode())

    def flush(self) -> int:
        """Deliver all that waits; returns how many metrics were sent. A ServiceError leaves the rest waiting."""
        sent = 0
        with self._lock:
            for metrics, offset in self._waiting():
                sent += self._deliver(metrics)
                self._offset = offset
        return sent

    @contextmanager
    def delivering(self, every_s: float = 10.0) -> Iterator[None]:
        """Deliver in the background while the block runs, and once more at its end; an outage is logged once."""
        stop = threading.Event()
        thread = threading.Thread(target=self._deliver_until, args=(stop, every_s), name="metric-spool", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _deliver_until(self, stop: threading.Event, every_s: float) -> None:
        away, pause, last = False, every_s, False
        while not last:
            last = stop.wait(pause)
            try:
                self.flush()
            except ServiceError as error:
                if not away:
                    _log.warning("%s; metrics wait in %s", error, self.path)
                away, pause = True, min(2 * pause, 60.0)
            else:
                if away:
                    _log.info("MLflow is back, the metrics that waited are delivered")
                away, pause = False, every_s

    def _waiting(self) -> Iterator[tuple[list["Metric"], int]]:
        """Batches of whole lines, each with the offset of its end in the file."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            batch: list[Metric] = []
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                metrics = _metrics_of(line, self.path)
                if len(batch) + len(metrics) > MAX_METRICS:
                    yield batch, file.tell() - len(line)
                    batch = []
                batch += metrics
            else:
                line = b""
            yield batch, file.tell() - len(line)

    def _deliver(self, metrics: Sequence["Metric"]) -> int:
        with explained(self.uri, f"delivering metrics to run {self.run_id}"):
            client = client_of(self.uri)
            try:
                for key in {metric.key for metric in metrics} - self._arrived.keys():
                    self._arrived[key] = {metric.step for metric in client.get_metric_history(self.run_id, key)}
                fresh = {
                    (metric.key, metric.step): metric
                    for metric in reversed(metrics)  # of equal ones the first stays
                    if metric.step not in self._arrived[metric.key]
                }
                for chunk in chunks(list(reversed(fresh.values())), MAX_METRICS):
                    client.log_batch(self.run_id, metrics=chunk, synchronous=True)
                    for metric in chunk:
                        self._arrived[metric.key].add(metric.step)
            except BaseException:
                self._arrived.clear()  # a call that failed may have arrived all the same
                raise
            return len(fresh)


def _metrics_of(line: bytes, path: Path) -> list["Metric"]:
    from mlflow.entities import Metric

    if not line.strip():
        return []
    try:
        entry = json.loads(line)
        step, at = int(entry["step"]), int(entry["time"])
        return [Metric(key, float(value), at, step) for key, value in entry["metrics"].items()]
    except (ValueError, TypeError, KeyError, AttributeError):
        _log.warning("%s: skipped a torn line of %d bytes", path, len(line))
        return []
