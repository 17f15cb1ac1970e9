"""What the server's tests share: a tiny model that is served in this process, and what its answers should be."""
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from app.answer import generate
from app.api import Served
from app.options import Engine
from app.server import Server, Service, listen
from sampling import Sampling


def make_served(folder: Path, sampling: Sampling = Sampling()) -> Served:
    """The model of tiny.save_everything with EAGLE-2, fp32."""
    engine = Engine.load(folder, "eagle2", device="cpu", dtype=torch.float32, max_seq_len=256)
    return Served(engine, "tiny", "eagle2", 24, sampling)


def expected(served: Served, ids: list[int], max_tokens: int, sampling: Sampling = Sampling(),
             stops: tuple[str, ...] = ()) -> dict:
    """What generate.py answers, which processes every prompt as a whole."""
    return generate(served.engine, ids, max_tokens, sampling, served.engine.tokenizer, "eagle2", stops=stops)


@contextmanager
def running(served: Served, key: str | None = None) -> Iterator[tuple[str, Service]]:
    """Serve in a thread of this process. Gives the address, and the service, whose engine nobody else may use."""
    service = Service(served)
    server = Server(service, key)
    sock = listen("127.0.0.1:0", None)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    try:
        wait(lambda: server.started)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
        service.driver.shutdown()
        service.reader.shutdown()


def wait(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


class Gate:
    """Stands before an engine's cycles: `generate` waits before each until the test lets it through."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.generate = engine.generate
        self.begun: list[list[int]] = []  # the prompts, in the order in which the engine got them
        self.cycles = 0
        self.free = threading.Semaphore(0)
        engine.generate = self.gated

    def gated(self, ids: list[int], *how: object) -> Iterator[list[int]]:
        self.begun.append(ids)
        for new in self.generate(ids, *how):
            assert self.free.acquire(timeout=120)
            self.cycles += 1
            yield new

    def let(self, cycles: int) -> None:
        self.free.release(cycles)
