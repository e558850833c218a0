"""Several merges in a row, of which only the last one's result stays: later stages merge the results of earlier ones.

The others lie in one hidden folder beside the output, `.NAME.stages`, locked while it is used, so that what a killed run left
is told from what a running one needs. Price: the disk holds every stage's result until the last is written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fusion.errors import OutputError
from fusion.merge import RECIPE_FILE, Engine, MergeResult, merge
from fusion.plan import MergePlan
from fusion.progress import Work
from fusion.recipe import Recipe
from fusion.shards import MAX_SHARD_BYTES, disk_error

_MARK = "fusechat-stages"  # a file that says whose folder it is


def merge_stages(recipes: Sequence[Recipe], out: str | os.PathLike, *, max_shard_bytes: int = MAX_SHARD_BYTES,
                 resume: bool = False, flush: bool = True, engine: Engine | None = None) -> Work[MergeResult]:
    """Run the stages of a recipe file one after the other into the new folder `out`; yields Progress, returns the last result.

    The other stages' results are removed whatever happens, unless `resume`: then what is finished outlives a failure, and is
    used by the next run with `resume`. `flush` and `engine` as in `merge`. Raises what `merge` raises.
    """
    *earlier, last = recipes
    if not earlier:
        return (yield from merge(last, out, max_shard_bytes=max_shard_bytes, resume=resume, flush=flush, engine=engine))
    out = Path(out).absolute()
    if os.path.lexists(out):
        raise OutputError("exists already; nothing is ever overwritten", where=str(out), todo="Choose another folder.")
    with scratch_folder(out, resume) as scratch:
        places: dict[str, Path] = {}
        done: list[Recipe] = []
        for number, recipe in enumerate(earlier, 1):
            folder = scratch / str(number)
            if not (resume and _is_finished(folder, recipe, places)):
                with _disk_errors(out):
                    shutil.rmtree(folder, ignore_errors=True)
                mark = _digest(recipe, folder, places)
                yield from merge(recipe, folder, max_shard_bytes=max_shard_bytes, flush=flush, places=places, engine=engine)
                with _disk_errors(out):
                    _mark_of(folder).write_text(mark)
            places[recipe.name] = folder
            done.append(Recipe.load(folder / RECIPE_FILE))
        return (yield from merge(last, out, max_shard_bytes=max_shard_bytes, resume=resume, flush=flush, places=places, stages=done,
                                 engine=engine))


def _is_finished(folder: Path, recipe: Recipe, places: Mapping[str, Path]) -> bool:
    """Whether an earlier run has finished this very stage, of models that are still the same files."""
    return folder.is_dir() and _mark_of(folder).is_file() and _mark_of(folder).read_text() == _digest(recipe, None, places)


def _digest(recipe: Recipe, out: Path | None, places: Mapping[str, Path]) -> str:
    plan = MergePlan.open(recipe, out, places)
    plan.close()
    return plan.digest


def _mark_of(folder: Path) -> Path:
    return folder.with_suffix(".plan")


@contextlib.contextmanager
def scratch_folder(out: Path, resume: bool = False) -> Iterator[Path]:
    """The locked hidden folder beside `out` for earlier stages; it is empty at first unless `resume`, and is removed at the
    end unless `resume` failed. OutputError when another run uses it, or when it is not ours."""
    folder = out.parent / f".{out.name}.stages"
    with _disk_errors(out):
        made = [parent for parent in out.parents if not parent.exists()]
        lock = _locked(folder, out)
    keep = False
    try:
        if not resume:
            with _disk_errors(out):
                _clear(folder)
        try:
            yield folder
        except BaseException:
            keep = resume
            raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
        os.close(lock)


def _locked(folder: Path, out: Path) -> int:
    """Make or find the folder and lock it; the lock goes with the process, however it dies."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.lstat(folder)):
                names = os.listdir(lock)
                if names and _MARK not in names:
                    raise OutputError("is in the way: it is no folder of a merge", where=str(folder),
                                      todo="Move it away, or choose another folder.")
                (folder / _MARK).touch()
                return lock
        except FileNotFoundError:  # its last owner has just removed it
            pass
        except OSError as error:
            os.close(lock)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise OutputError("another merge is writing there", where=str(out),
                                  todo="Wait for it, or choose another folder.") from error
            raise
        except OutputError:
            os.close(lock)
            raise
        os.close(lock)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != _MARK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Turn the system's errors into the house's."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, out) from error
