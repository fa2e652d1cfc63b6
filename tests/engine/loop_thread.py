"""The engine's own loop over the fake runner, in a thread: everything of an engine process but the process."""

import socket
import threading
from collections.abc import Callable

from service.engine.channel import Channel
from service.engine.compiler import Compile
from service.engine.loop import Loop
from service.engine.request import ModelInfo, Ready, ToEngine
from service.engine.scheduler import Scheduler
from tests.engine.fake_grammar import FakeConstraint
from tests.engine.fake_model import END_OF_TEXT, VOCAB_SIZE
from tests.engine.fake_runner import FakeRunner

CONTEXT_LENGTH = 128
MODEL = ModelInfo("/nowhere", CONTEXT_LENGTH, VOCAB_SIZE, END_OF_TEXT, 64, 4, 16, "float32", "cpu", 1, 8, 1)


class LoopThread:
    """Ready at once. `peer` is the API's end of its channel; closing that ends the loop."""

    def __init__(
        self,
        *,
        max_num_seqs: int = 16,
        depth: int = 0,
        before_step: Callable[[], None] | None = None,
        compile_grammar: Compile = FakeConstraint,
    ) -> None:
        self.peer, sock = socket.socketpair()
        self._sock = sock
        self.runner = FakeRunner(64, 4, depth=depth)
        self.scheduler = Scheduler(
            num_blocks=64,
            block_size=4,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=32,
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
            end_of_text_id=END_OF_TEXT,
        )
        if before_step is not None:
            launch = self.runner.launch

            def gated(batch: object) -> None:
                before_step()
                launch(batch)  # type: ignore[arg-type]

            self.runner.launch = gated  # type: ignore[method-assign]
        self._compile_grammar = compile_grammar
        channel = Channel(sock, ToEngine)
        channel.send(Ready(MODEL))
        self.thread = threading.Thread(target=self._run, args=(channel,), daemon=True)
        self.thread.start()

    def _run(self, channel: Channel) -> None:
        try:
            Loop(channel, self.scheduler, self.runner, self._compile_grammar, max_event_interval=0.016).run()
        finally:
            self._sock.close()

    def die(self, gate: threading.Semaphore) -> None:
        """What the API sees when the process is killed: the channel closes, nothing more is said.

        The loop, which may wait at `gate` before a step, is let through only after that.
        """
        self._sock.shutdown(socket.SHUT_RDWR)
        gate.release(1000)
        self.thread.join(timeout=10)
        assert not self.thread.is_alive()
