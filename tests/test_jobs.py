"""Saving jobs: driven in a thread, followed by id, stopped at the next step, one after another."""

import threading
import time

import pytest

from components.jobs import Jobs
from fusion import FusionError, Progress, ResourceError


def ended(job, seconds=5):
    deadline = time.monotonic() + seconds
    while not job.ended and time.monotonic() < deadline:
        time.sleep(0.005)
    return job


def counting(closed, steps=1000, pause=0.005, result="made"):
    def work():
        try:
            for step in range(steps):
                yield Progress("counting", step, steps, "steps")
                time.sleep(pause)
            return result
        finally:
            closed.append(True)
    return work


def test_a_job_ends_with_its_result_and_tells_who_asked():
    closed, told = [], []
    job = ended(Jobs().start("merge", counting(closed, 3), told.append))
    assert (job.state, job.result, told, closed) == ("done", "made", ["made"], [True])
    assert job.progress.done == 2


def test_stop_closes_the_work():
    jobs, closed = Jobs(), []
    job = jobs.start("merge", counting(closed))
    while job.progress is None:
        time.sleep(0.005)
    jobs.stop(job.id)
    assert ended(job).state == "stopped"
    assert closed == [True] and job.progress.done < 999


def test_a_job_that_waits_can_be_stopped_too():
    jobs, closed = Jobs(), []
    first, second = jobs.start("first", counting(closed)), jobs.start("second", counting([]))
    jobs.stop(second.id)
    jobs.stop(first.id)
    assert ended(first).state == ended(second).state == "stopped"
    assert second.progress is None


def test_jobs_run_one_at_a_time():
    jobs, running, most = Jobs(), [], []

    def work():
        running.append(1)
        most.append(len(running))
        yield Progress("working")
        time.sleep(0.02)
        running.pop()

    for job in [jobs.start(str(n), work) for n in range(4)]:
        assert ended(job).state == "done"
    assert max(most) == 1


def test_what_a_person_caused_is_told_and_a_bug_is_not(caplog):
    def refused():
        raise FusionError("the folder exists", todo="Choose another.")
        yield

    def broken():
        yield Progress("working")
        raise ZeroDivisionError("secret detail")

    jobs = Jobs()
    assert ended(jobs.start("refused", refused)).error == "the folder exists. Choose another."
    job = ended(jobs.start("broken", broken))
    assert job.state == "failed" and "secret" not in job.error
    assert "secret detail" in caplog.text


def test_only_the_id_leads_to_a_job():
    jobs = Jobs()
    job = jobs.start("merge", counting([], 2))
    assert jobs.get(job.id) is job and len(job.id) >= 32
    for other in (None, "", "merge", 7, {"id": job.id}, job.id[:-1]):
        assert jobs.get(other) is None
        jobs.stop(other)
    assert ended(job).state == "done"


def test_too_many_waiting_jobs_are_refused_and_old_ones_forgotten():
    jobs, gate = Jobs(), threading.Event()

    def waits():
        gate.wait(5)
        yield Progress("waiting")

    started = [jobs.start(str(n), waits) for n in range(8)]
    with pytest.raises(ResourceError, match="too many"):
        jobs.start("one more", waits)
    gate.set()
    for job in started:
        ended(job)
    for n in range(60):
        ended(jobs.start(str(n), counting([], 1, 0)))
    assert jobs.get(started[0].id) is None
