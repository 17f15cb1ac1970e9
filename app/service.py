"""The engine, its one thread, and the requests that wait for it. app/server.py is the network around it.

One thread reads requests, since a long prompt takes a while to tokenise. One drives the engine, and nobody else touches
it. Everything else here runs on the network's thread, on its event loop, which never waits for the other two: so there
are no locks between threads. No prompt and no answer is logged.
"""
import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from tokenizers import Encoding
from tokenizers import Tokenizer as BPE

from app.answer import generate
from app.api import Asked, Refusal, Served, read_request
from app.command import end_at_once

WAITING = 32  # requests that may wait; the next one is refused
GRACE_S = 3.0  # seconds that the current answer gets to finish at shutdown; the server ends within 5 s


class Job:
    """A request from its arrival to the end of its answer. Its events are pieces of text; the last one is the result of
    app.answer.generate with two more keys, `queue_s` (seconds) and `reused` (prompt tokens), or a Refusal."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[str | dict | Refusal] = asyncio.Queue()
        self.arrived = time.perf_counter()
        self.task: asyncio.Task | None = None  # see Service.take_turn
        self.begun = False  # the engine has it
        self.left = False  # nobody waits for the answer any more: the engine stops after its next cycle or chunk

    def end(self, why: Refusal) -> None:
        self.left = True
        self.events.put_nowait(why)
        if self.task and not self.begun:
            self.task.cancel()

    def leave(self) -> None:
        """The client has gone."""
        self.end(gone())  # nobody reads it

    async def news(self) -> tuple[str, dict | Refusal | None]:
        """Wait for the next event. Returns all text that has come, and the end if it has come too."""
        text = ""
        while True:
            event = await self.events.get()
            if not isinstance(event, str):
                return text, event
            text += event
            if self.events.empty():
                return text, None


class Unlocked:
    """A tokenizers.Tokenizer whose `encode` lets other threads run. The package's own holds Python's lock, for a second
    or more where the prompt is long (docs/experiments.md, CPU); its `encode_batch` does not."""

    def __init__(self, bpe: BPE) -> None:
        self.bpe = bpe
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it would start a thread on every core

    def __getattr__(self, name: str) -> object:
        return getattr(self.bpe, name)

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoding:
        return self.bpe.encode_batch([text], add_special_tokens=add_special_tokens)[0]


class Service:
    """Answers requests one by one, in order of arrival."""

    def __init__(self, served: Served) -> None:
        self.served = served
        served.engine.tokenizer.bpe = Unlocked(served.engine.tokenizer.bpe)
        self.driver = ThreadPoolExecutor(1, "engine")
        self.reader = ThreadPoolExecutor(1, "requests")
        self.engine_lock = asyncio.Lock()  # those who wait get it in order of arrival
        self.jobs: set[Job] = set()  # the one that is answered, and those that wait
        self.counts: Counter[str] = Counter()
        self.closing = False
        self.failing = False  # the engine failed at the last request

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[Job]:
        """A place in the queue, until the engine is done with the job. Raises Refusal: 429 if full, 503 at shutdown."""
        if self.closing:
            raise closed()
        if len(self.jobs) > WAITING:
            raise Refusal(429, f"{WAITING} requests are waiting already: try again later")
        job = Job()
        self.jobs.add(job)
        try:
            yield job
        finally:
            job.leave()  # after a whole answer, this changes nothing
            if job.task:
                await asyncio.wait([job.task])
            self.jobs.discard(job)

    async def begin(self, job: Job, raw: bytes, chat: bool) -> Asked:
        """Read a request and put it in the queue: from now on, the job has news. Raises Refusal."""
        asked = await job.loop.run_in_executor(self.reader, read_request, raw, chat, self.served)
        job.task = asyncio.create_task(self.take_turn(job, asked))
        return asked

    async def take_turn(self, job: Job, asked: Asked) -> None:
        """Wait for the engine, and let it answer."""
        async with self.engine_lock:
            if job.left:
                return
            job.begun = True
            end = await job.loop.run_in_executor(self.driver, self.work, job, asked)
            self.failing = isinstance(end, Refusal) and end.status == 500
            if isinstance(end, dict):
                self.counts.update(
                    prompt_tokens=end["prompt_tokens"], reused_tokens=end["reused"], new_tokens=end["new_tokens"],
                    steps=end["cycles"], prefill_seconds=end["prefill_s"], decode_seconds=end["decode_s"])
            job.events.put_nowait(end)

    def work(self, job: Job, asked: Asked) -> dict | Refusal:
        """Generate the answer, on the engine's thread."""
        began = time.perf_counter()
        engine = self.served.engine

        def push(text: str) -> bool:
            if text and asked.stream:
                job.loop.call_soon_threadsafe(job.events.put_nowait, text)
            return job.left

        def stop_if_left() -> None:
            if job.left:
                raise gone()

        engine.before_chunk = stop_if_left
        try:
            result = generate(engine, asked.ids, asked.max_tokens, asked.sampling, engine.tokenizer, self.served.method,
                              stops=asked.stops, push=push, reuse=True)
        except Refusal as end:  # the client left during prefill
            return end
        except Exception as error:  # whatever it is, the next request may well succeed
            logging.getLogger(__name__).error("the engine failed", exc_info=error)
            return Refusal(500, "the engine failed; the server's stderr says why")
        return result | {"queue_s": began - job.arrived, "reused": engine.reused}

    def close(self) -> None:
        """Refuse what waits, and end what is answered if it takes too long."""
        self.closing = True
        for job in self.jobs:
            if job.begun:
                job.loop.call_later(GRACE_S, job.end, closed())
            else:
                job.end(closed())

    def finish(self) -> None:
        """The network has ended. If the engine does not within half a second, as in a long prompt, end at once."""
        try:
            self.driver.submit(int).result(0.5)
        except TimeoutError:
            end_at_once()


def closed() -> Refusal:
    return Refusal(503, "the server is shutting down")


def gone() -> Refusal:
    return Refusal(499, "the client has gone")
