"""The process in which raw checkpoints are opened, with bounds on memory and time; and its parent's side of it.

`python -m service.checkpoint.worker` reads a Job as one line of JSON from its standard input, which stays open for as
long as its parent lives. It writes lines of JSON: progress as [done, total], and at last {} or {"error": why}.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from service.checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    from service.checkpoint.convert import Job
    from service.checkpoint.export import OnTensor

_BASE_BYTES = 4 * 2**30  # of torch itself, and of a pickle's objects
_SECONDS = 30 * 60


def run(job: Job, on_tensor: OnTensor, *, seconds: float = _SECONDS) -> None:
    """Convert in a process of its own; it ends with this one. Raises CheckpointError, and then leaves nothing."""
    from service.checkpoint.convert import raw_files, temporary_beside

    source = Path(job.source)
    try:
        input_bytes = sum(file.stat().st_size for file in raw_files(source))
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from error
    # Memory that is no file's: an output file of Megatron-LM's is made in it, at most twice as wide as its input. What
    # is written may come out of a compressed archive.
    bounds = (int(seconds) + 1, _BASE_BYTES + 3 * input_bytes, _BASE_BYTES + 20 * input_bytes)
    # -P: the folder that this is called in has no say in what is imported.
    command = [sys.executable, "-P", "-m", "service.checkpoint.worker", *map(str, bounds)]
    answer: object = None
    late = threading.Event()
    with (
        temporary_beside(Path(job.target)) as work,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,  # noqa: S603
    ):

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps({"job": asdict(job), "work": str(work)}) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                answer = json.loads(line)
                if isinstance(answer, list):
                    on_tensor(*answer)
        except (BrokenPipeError, ValueError):
            answer = None  # it has died in the middle of a word
        finally:
            timer.cancel()
            process.kill()
    if isinstance(answer, dict) and not answer:
        return
    if isinstance(answer, dict):
        raise CheckpointError(answer["error"])
    why = f"took longer than {seconds:g} s" if late.is_set() else "ended without a word; it may have run out of memory"
    raise CheckpointError(f"{source}: the process that reads it {why}")


def main(seconds: str, memory_bytes: str, file_bytes: str) -> None:
    """The child: bounds first, and only then a look at the job."""
    for limit, value in (
        (resource.RLIMIT_CPU, int(seconds)),
        (resource.RLIMIT_DATA, int(memory_bytes)),
        (resource.RLIMIT_FSIZE, int(file_bytes)),
        (resource.RLIMIT_CORE, 0),
    ):
        _, most = resource.getrlimit(limit)  # which may not be raised
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which kills
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was begun is removed
    told = json.loads(sys.stdin.readline())
    answer: dict[str, str] = {}
    work = Path(told["work"])
    try:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        from service.checkpoint.convert import Job, convert

        job = Job(**told["job"])
        convert(job, lambda done, total: print(json.dumps([done, total]), flush=True), work=work)
    except CheckpointError as error:
        answer = {"error": str(error)}
    except OSError as error:
        answer = {"error": f"{error.filename or work.parent}: {error.strerror}"}
    except MemoryError:
        answer = {"error": f"{told['job']['source']}: needs more memory than a checkpoint of its size may"}
    finally:
        shutil.rmtree(work, ignore_errors=True)  # also where the parent is gone
    print(json.dumps(answer), flush=True)


def _end_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(*sys.argv[1:])
