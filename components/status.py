"""Small pieces of HTML that say how work stands; text from elsewhere is escaped."""

from __future__ import annotations

from html import escape

from fusion.progress import Progress
from fusion.tables import bytes_text


def bar(progress: Progress | None, title: str = "") -> str:
    """A progress bar with tensors, bytes, pace and time left."""
    if progress is None:
        return f"<div class='fs-job'><p><b>{escape(title)}</b> waits for its turn …</p></div>"
    percent = round(100 * progress.fraction)
    facts = [f"{progress.done} of {progress.total} {progress.unit}"] if progress.total else []
    if progress.bytes_total:
        facts += [f"{bytes_text(progress.bytes_done)} of {bytes_text(progress.bytes_total)}",
                  f"{progress.bytes_per_s / 1e9:.2f} GB/s"]
    if progress.seconds_left is not None:
        facts.append(f"{time_text(progress.seconds_left)} left")
    label = escape(title or progress.stage)
    return (f"<div class='fs-job' role='status' aria-live='polite'><p><b>{label}</b><span>{percent} %</span></p>"
            f"<div class='fs-bar' role='progressbar' aria-label='{label}' aria-valuenow='{percent}' aria-valuemin='0' "
            f"aria-valuemax='100'><i style='width:{percent}%'></i></div><small>{' · '.join(map(escape, facts))}</small></div>")


def note(level: str, text: str) -> str:
    """A sentence with its light: good, warning or bad."""
    return f"<p class='fs-note fs-{level}' role='status'><span class='fs-light'></span><span>{escape(text)}</span></p>"


def error_note(text: str) -> str:
    """What went wrong and what to do."""
    return note("bad", text)


def as_comment(error: object) -> str:
    """What is wrong, as comment lines where a recipe would stand."""
    return f"# {error}".replace("\n", "\n# ")


def time_text(seconds: float) -> str:
    """A duration as people say it."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
