"""Long work outlives the page: a thread drives the generator, pages attach to it by an unguessable id and may stop it."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fusion.errors import FusionError, ResourceError, Stopped
from fusion.progress import Progress, Work

_KEPT, _QUEUED = 32, 8
_LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """One piece of long work: `state` waiting, running, done, stopped or failed; `progress`, `result` and `error` as they come."""

    id: str
    title: str
    state: str = "waiting"
    progress: Progress | None = None
    result: Any = None
    error: str = ""
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in ("done", "stopped", "failed")


class Jobs:
    """Runs jobs one after another; ids are secrets that only the browser that started the job holds."""

    def __init__(self):
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._turn, self._lock = threading.Lock(), threading.Lock()

    def start(self, title: str, work: Callable[[], Work[Any]], finished: Callable[[Any], object] | None = None) -> Job:
        """Start work in a thread and return its job; ResourceError when too many wait already."""
        job = Job(secrets.token_urlsafe(24), title)
        with self._lock:
            if sum(not other.ended for other in self._jobs.values()) >= _QUEUED:
                raise ResourceError("too many jobs are waiting", todo="Try again in a few minutes.")
            self._jobs[job.id] = job
            for old in [key for key, other in self._jobs.items() if other.ended][:max(0, len(self._jobs) - _KEPT)]:
                del self._jobs[old]
        threading.Thread(target=self._run, args=(job, work, finished), daemon=True, name=f"job {title}").start()
        return job

    def get(self, job_id: object) -> Job | None:
        """The job of an id, or None."""
        with self._lock:
            return self._jobs.get(job_id) if isinstance(job_id, str) else None

    def stop(self, job_id: object) -> None:
        """Ask a job to stop at its next step."""
        job = self.get(job_id)
        if job is not None:
            job.stop.set()

    def _run(self, job: Job, work: Callable[[], Work[Any]], finished: Callable[[Any], object] | None) -> None:
        try:
            with self._turn:
                job.result = self._drive(job, work())
            if finished is not None:
                finished(job.result)
            job.state = "done"
        except Stopped:
            job.state = "stopped"
        except FusionError as error:
            job.error, job.state = str(error), "failed"
        except Exception:
            _LOG.exception("job %s failed", job.title)
            job.error, job.state = "Something went wrong; the log of the app says what.", "failed"

    @staticmethod
    def _drive(job: Job, work: Work[Any]) -> Any:
        with contextlib.closing(work):
            while not job.stop.is_set():
                try:
                    job.progress = next(work)
                except StopIteration as end:
                    return end.value
                job.state = "running"
        raise Stopped("stopped")
