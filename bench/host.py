"""The engine's work on the host: microseconds of processor time, over a runner that computes nothing.

python -m bench.host [--streams 1,64,256] [--device-ms 0.42,1.1,2.7] [--tokens 128] [--profile] [--out FILE]

The engine's own loop publishes to a process that reads what it says and asks for more. The runner's launch and collect
are left out of the work; collect waits, busily, as long as a GPU would compute (`--device-ms 0`: not at all).
"""

import argparse
import cProfile
import json
import multiprocessing
import platform
import pstats
import random
import socket
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np

from service.engine.channel import HEADER_BYTES, Channel, frame
from service.engine.compiler import Compile
from service.engine.loop import Loop
from service.engine.request import Publish, Request, SamplingParams, Submit, ToApi, ToEngine
from service.engine.scheduler import Scheduler
from service.model.batch import Batch, StepOutput

BLOCK_SIZE = 16
CONTEXT_LENGTH = 1024
VOCAB_SIZE = 50257
NUM_BLOCKS = 14_000  # so few that all have soon held something, as those of any GPU in a long run
NUM_PROMPT = 128
PREFILL_US_A_TOKEN = 1.5


class IdleRunner:
    """Any token for any row, after the time that a GPU takes; notes the loop's own work at each launch."""

    depth = 1
    num_blocks = NUM_BLOCKS

    def __init__(self, device_seconds: float) -> None:
        self._device_seconds = device_seconds
        self._launched: deque[tuple[float, StepOutput]] = deque()
        self._free_at = 0.0
        self._own = 0.0  # processor time inside this class
        self._tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE - 1, 4096, np.int32)
        self.notes: list[tuple[float, float, int, int]] = []  # the loop's processor time, wall time, tokens, sampled

    def launch(self, batch: Batch) -> None:
        began = time.thread_time()
        num_tokens, num_sampled = len(batch.token_ids), len(batch.sample_indices)
        self.notes.append((began - self._own, time.perf_counter(), num_tokens, num_sampled))
        seconds = self._device_seconds
        if seconds:
            seconds += PREFILL_US_A_TOKEN * 1e-6 * (num_tokens - batch.num_decodes)
        self._free_at = max(self._free_at, time.perf_counter()) + seconds
        self._launched.append((self._free_at, StepOutput(self._tokens[:num_sampled].copy())))
        self._own += time.thread_time() - began

    def collect(self) -> StepOutput:
        began = time.thread_time()
        done_at, output = self._launched.popleft()
        while time.perf_counter() < done_at:
            pass
        self._own += time.thread_time() - began
        return output

    def close(self) -> None:
        self._launched.clear()


def ask(sock: socket.socket, num_streams: int, num_requests: int, max_tokens: int) -> None:
    """The other process: keeps `num_streams` requests open until `num_requests` are answered, then closes.

    Prompts differ in length, so that streams need blocks at different steps; where requests follow one another, the
    first also in `max_tokens`, so that the rest do not come in waves.
    """
    rng = random.Random(0)  # noqa: S311
    prompts = [
        tuple(rng.choices(range(VOCAB_SIZE - 1), k=NUM_PROMPT + number % BLOCK_SIZE)) for number in range(num_requests)
    ]
    lengths = [max_tokens] * num_requests
    if num_requests > num_streams:
        lengths[:num_streams] = [max_tokens * (number + 1) // num_streams for number in range(num_streams)]
    encoder = msgspec.msgpack.Encoder()
    decoder = msgspec.msgpack.Decoder(ToApi)
    asked = answered = 0
    reader = sock.makefile("rb")
    while answered < num_requests:
        while asked < min(num_requests, answered + num_streams):
            params = SamplingParams(max(1, lengths[asked]), temperature=1.0, seed=1)
            sock.sendall(frame(Submit((Request(asked, prompts[asked]),), params), encoder))
            asked += 1
        message = decoder.decode(reader.read(int.from_bytes(reader.read(HEADER_BYTES), "big")))
        if isinstance(message, Publish):
            answered += sum(delta.finish is not None for delta in message.deltas)
    sock.close()


@dataclass(frozen=True, slots=True)
class Row:
    streams: int
    device_ms: float
    decode_us: float  # a step in which every stream decodes: mean
    decode_p99_us: float
    decode_period_ms: float
    closed_us: float  # a step of the closed loop: mean
    closed_period_ms: float
    closed_streams: float  # that a step has on average
    closed_tokens_per_second: float
    request_us: float  # a whole request that generates one token, in a closed loop with no device to wait for


def run(
    num_streams: int,
    num_requests: int,
    max_tokens: int,
    *,
    device_seconds: float,
    profile: cProfile.Profile | None,
) -> list[tuple[float, float, int, int]]:
    """The runner's notes of one run."""
    ours, theirs = socket.socketpair()
    spawn = multiprocessing.get_context("spawn")
    client = spawn.Process(target=ask, args=(theirs, num_streams, num_requests, max_tokens))
    client.start()
    theirs.close()
    scheduler = Scheduler(
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_seqs=max(256, num_streams),
        max_num_batched_tokens=8192,
        context_length=CONTEXT_LENGTH,
        vocab_size=VOCAB_SIZE,
        end_of_text_id=VOCAB_SIZE - 1,
    )
    runner = IdleRunner(device_seconds)
    compile_grammar: Compile = lambda text: (_ for _ in ()).throw(ValueError(text))  # noqa: E731 - nobody asks
    loop = Loop(Channel(ours, ToEngine), scheduler, runner, compile_grammar, max_event_interval=0.016)
    if profile is None:
        loop.run()
    else:
        profile.runcall(loop.run)
    client.join()
    ours.close()
    return runner.notes


def measure(num_streams: int, device_seconds: float, num_tokens: int, profile: cProfile.Profile | None) -> Row:
    def notes_of(num_requests: int, max_tokens: int, seconds: float) -> list[tuple[float, float, int, int]]:
        return run(num_streams, num_requests, max_tokens, device_seconds=seconds, profile=profile)

    steady = [note for note in notes_of(num_streams, 600, device_seconds) if note[2:] == (num_streams, num_streams)][
        20:
    ]
    work, wall = (np.diff([note[part] for note in steady]) for part in (0, 1))
    notes = notes_of(max(16, 5 * num_streams), num_tokens, device_seconds)
    prompts = [number for number, note in enumerate(notes) if note[2] > note[3]]  # steps with one
    closed = notes[prompts[min(len(prompts) // 5, num_streams)] : prompts[-1] + 1]  # while all streams are busy
    num_steps, num_sampled = len(closed) - 1, sum(note[3] for note in closed[:-1])
    closed_work, closed_wall = (closed[-1][part] - closed[0][part] for part in (0, 1))
    num_short = 2000
    short = notes_of(num_short, 1, 0.0)
    return Row(
        streams=num_streams,
        device_ms=1e3 * device_seconds,
        decode_us=1e6 * float(work.mean()),
        decode_p99_us=1e6 * float(np.percentile(work, 99)),
        decode_period_ms=1e3 * float(wall.mean()),
        closed_us=1e6 * closed_work / num_steps,
        closed_period_ms=1e3 * closed_wall / num_steps,
        closed_streams=num_sampled / num_steps,
        closed_tokens_per_second=num_sampled / closed_wall,
        request_us=1e6 * (short[-1][0] - short[0][0]) / num_short,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,64,256")
    parser.add_argument("--device-ms", default="0.42,1.1,2.7", help="of a decode step, for each of the streams")
    parser.add_argument("--tokens", type=int, default=128, help="that a request of the closed loop generates")
    parser.add_argument("--profile", action="store_true", help="say which functions take the time; slows all down")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    streams = [int(number) for number in arguments.streams.split(",")]
    device = [float(number) / 1e3 for number in arguments.device_ms.split(",")]
    device += device[-1:] * (len(streams) - len(device))
    rows = []
    for num_streams, device_seconds in zip(streams, device, strict=False):
        profile = cProfile.Profile() if arguments.profile else None
        rows.append(measure(num_streams, device_seconds, arguments.tokens, profile))
        if profile is not None:
            print(f"{num_streams} streams")
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    print("         device |     decode: us          | closed loop:                            | short")
    print("streams      ms | a step   p99  period ms | us a step  period ms  streams  tokens/s | us a request")
    for row in rows:
        print(
            f"{row.streams:7} {row.device_ms:7.2f} | {row.decode_us:6.1f} {row.decode_p99_us:5.0f} "
            f"{row.decode_period_ms:10.3f} | {row.closed_us:9.1f} {row.closed_period_ms:10.3f} "
            f"{row.closed_streams:8.1f} {row.closed_tokens_per_second:9.0f} | {row.request_us:12.1f}"
        )
    if arguments.out is not None:
        about = {
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
            "rows": [asdict(row) for row in rows],
        }
        arguments.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
