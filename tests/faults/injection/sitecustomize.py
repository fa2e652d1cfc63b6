"""What breaks the service's processes from within. Each imports this as it starts: its folder is first on PYTHONPATH.

A fault waits for its trigger (tests/faults/trigger.py), a file of its name in the folder $FAULTS. The process that
comes to the place first takes the file away, and then fails there as many times as the file says.
"""

import datetime
import functools
import importlib.abc
import importlib.machinery
import os
import random
import resource
import sys
import time

_FOLDER = os.environ.get("FAULTS", "")
_ARMED = {}  # fault -> [how many times it is still due, what the trigger says]


def due(fault, *, when=lambda told: True):
    """What the fault's trigger says if it is to happen here and now, else None. `when` may say that it is not."""
    path = os.path.join(_FOLDER, fault)
    if os.path.exists(path):  # which takes no descriptor: there may be none
        with open(path) as trigger:
            times, _, told = trigger.read().partition(" ")
        os.unlink(path)
        _ARMED[fault] = [int(times), told]
    times, told = _ARMED.get(fault, (0, ""))
    if not times or not when(told):
        return None
    _ARMED[fault][0] -= 1
    return told


def around(owner, name):
    """Put a function in the place of `owner`'s, which it gets as its first argument."""

    def replace(function):
        before = getattr(owner, name)

        @functools.wraps(before)
        def replaced(*arguments, **named):
            return function(before, *arguments, **named)

        setattr(owner, name, replaced)

    return replace


def break_runner(module):
    """Steps: raise as they are launched, or collected; find no memory; lose the device."""
    runner = module.TorchRunner

    @around(runner, "__init__")
    def init(before, self, *arguments, **named):
        before(self, *arguments, **named)
        self.depth = 1  # as on a GPU: a step is launched before the one before it is collected

    @around(runner, "_step")
    def step(before, self, batch):
        if due("launch") is not None:
            raise ValueError("injected at the launch")
        if due("out_of_memory", when=lambda most: len(batch.token_ids) > int(most)) is not None:
            raise module.torch.OutOfMemoryError("injected: out of memory")
        if due("device_lost") is not None:
            raise RuntimeError("CUDA error: injected: an illegal memory access was encountered")
        return before(self, batch)

    @around(runner, "collect")
    def collect(before, self):
        output = before(self)
        if due("collect") is not None:
            self._launched.clear()  # as a runner's contract has it
            raise ValueError("injected at the collection")
        return output


def break_model(module):
    """Logits: one of the first row is no number."""

    @around(module.GPT2, "logits")
    def logits(before, self, *arguments):
        found = before(self, *arguments)
        if len(found) and due("not_finite") is not None:
            found[0, 7] = float("nan")
        return found


def break_channel(module):
    """Engine to API: bytes that are no message, before one that is."""

    @around(module.Channel, "send")
    def send(before, self, message):
        told = due("to_api")
        if told is not None:
            self._outbox += bytes.fromhex(told)
        before(self, message)


def break_handle(module):
    """API to engine: the same."""

    @around(module, "frame")
    def frame(before, message, encoder):
        told = due("to_engine")
        return (b"" if told is None else bytes.fromhex(told)) + before(message, encoder)


def break_text(module):
    """The API's tokenizer raises as it is loaded, as it encodes, as it decodes."""

    @around(module, "load_tokenizer")
    def load_tokenizer(before, *arguments, **named):
        _raise_if_due("load_tokenizer")
        return before(*arguments, **named)

    @around(module.Tokenizer, "encode")
    def encode(before, *arguments, **named):
        _raise_if_due("encode")
        return before(*arguments, **named)

    @around(module.TextStream, "push")
    def push(before, *arguments, **named):
        _raise_if_due("decode")
        return before(*arguments, **named)


def break_tokenizer_files(module):
    """A tokenizer's files, which the engine reads first, raise what no check has foreseen."""

    @around(module, "read_tokenizer")
    def read_tokenizer(before, *arguments, **named):
        _raise_if_due("read_tokenizer")
        return before(*arguments, **named)


def break_supervisor(module):
    """The log goes to where $FAULTS_LOG says, once the service listens."""

    @around(module.Supervisor, "run")
    async def run(before, self):
        _log_elsewhere()
        return await before(self)


def _log_elsewhere():
    descriptor = os.open(os.environ["FAULTS_LOG"], os.O_WRONLY)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _raise_if_due(fault):
    if due(fault) is not None:
        raise RuntimeError("injected: the tokenizer")


class _Breaking(importlib.abc.Loader):
    """Loads a module as its own loader does, and then breaks it."""

    def __init__(self, loader, break_module):
        self._loader = loader
        self._break_module = break_module

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        self._break_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, breaks):
        self._breaks = breaks

    def find_spec(self, fullname, path, target=None):
        if fullname not in self._breaks:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        spec.loader = _Breaking(spec.loader, self._breaks[fullname])
        return spec


def break_clock():
    """Every look at the wall clock finds it hours away from the last one, forth or back."""
    real, real_datetime = time.time, datetime.datetime
    draw = random.Random(os.getpid())

    def jumping():
        return real() + draw.uniform(-12, 12) * 3600

    class JumpingDatetime(real_datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(jumping(), tz)

        @classmethod
        def utcnow(cls):
            return cls.fromtimestamp(jumping(), datetime.UTC).replace(tzinfo=None)

        @classmethod
        def today(cls):
            return cls.now()

    def given_or_jumping(function):  # no Python function: logging keeps one where that would become a method
        return functools.partial(lambda seconds=None: function(jumping() if seconds is None else seconds))

    time.time = jumping
    time.time_ns = lambda: int(jumping() * 1e9)
    time.localtime, time.gmtime = given_or_jumping(time.localtime), given_or_jumping(time.gmtime)
    datetime.datetime = JumpingDatetime


_BREAKS = {
    "service.model.runner": break_runner,
    "service.model.gpt2": break_model,
    "service.engine.channel": break_channel,
    "service.engine.handle": break_handle,
    "service.api.text": break_text,
    "service.checkpoint.tokenizer": break_tokenizer_files,
}
if "FAULTS_LOG" in os.environ:
    if "--multiprocessing-fork" in sys.orig_argv:
        _log_elsewhere()
    _BREAKS["service.serve"] = break_supervisor
if _FOLDER:
    sys.meta_path.insert(0, _Finder(_BREAKS))
if "FAULTS_CLOCK" in os.environ:
    break_clock()
if "FAULTS_FILE_BYTES" in os.environ:
    most = int(os.environ["FAULTS_FILE_BYTES"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
