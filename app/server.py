"""A server with OpenAI's API: generate.py --serve. One sequence at a time, the others wait in order of arrival.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --eagle2 --serve 127.0.0.1:8000
    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

Here is the network: uvicorn and starlette, keys, limits of sizes and times. app/api.py says what a request means and
what an answer looks like, app/service.py has the queue and the engine.
"""
import argparse
import asyncio
import hmac
import ipaddress
import json
import logging
import socket
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from app.api import Refusal, Reply, Served, check_model
from app.options import explain_template, load_engine
from app.service import GRACE_S, Job, Service
from formats.eagle import folder_of
from sampling import Sampling

try:
    import h11
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ModuleNotFoundError as error:
    raise ValueError(f"--serve needs {error.name}: pip install -r requirements-server.txt") from None

CONNECTIONS = 256
HEADER_S = 10.0  # seconds for a request's headers to arrive
BODY_S = 30.0  # and for its body
UNREAD_S = 60.0  # for which a client may leave an answer unread
KEEP_ALIVE_S = 30  # between two requests on a connection


def as_json(content: dict, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """In ASCII: a text may hold what some clients take for the end of a line."""
    return Response(json.dumps(content), status, headers, "application/json")


def event_of(chunk: dict) -> Message:
    return {"type": "http.response.body", "body": f"data: {json.dumps(chunk)}\n\n".encode(), "more_body": True}


async def refuse(request: Request, error: Exception) -> Response:
    """The answer to a request that raised `error`."""
    if isinstance(error, HTTPException):
        error = Refusal(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}")
    elif not isinstance(error, Refusal):
        error = Refusal(500, "the server failed; its stderr says why")
    close = {"connection": "close"}  # however much of the body is to come
    headers = {401: {"www-authenticate": "Bearer", **close}, 403: close, 408: close, 429: {"retry-after": "1"}}
    return as_json(error.body(), error.status, headers.get(error.status))


class Completions:
    """/v1/chat/completions and /v1/completions."""

    def __init__(self, service: Service, chat: bool) -> None:
        self.service = service
        self.chat = chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "send JSON, with the header Content-Type: application/json")  # other sites' pages cannot
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "send the body without Content-Encoding")
        try:
            raw = await read_body(request, 2**16 + 64 * self.service.served.engine.max_seq_len)
        except ClientDisconnect:
            return
        async with self.service.admit() as job:
            watch = asyncio.create_task(self.watch(job, receive))
            try:
                await self.answer(job, raw, scope, receive, send)
            finally:
                watch.cancel()

    async def watch(self, job: Job, receive: Receive) -> None:
        """End the job when its client goes away."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.service.counts["clients_gone"] += 1
        job.leave()

    async def answer(self, job: Job, raw: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises Refusal where the answer ends before anything is sent."""
        asked = await self.service.begin(job, raw, self.chat)
        reply = Reply(asked, self.service.served)
        text, end = await job.news()
        if isinstance(end, Refusal):
            raise end
        if not asked.stream:
            return await as_json(reply.whole(end))(scope, receive, send)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send(event_of(reply.piece(text, first=True)))
        while end is None:
            text, end = await job.news()
            if text:
                await send(event_of(reply.piece(text)))
        if isinstance(end, Refusal):
            await send(event_of(end.body()))
            return await send({"type": "http.response.body", "body": b""})
        for chunk in reply.last(end):
            await send(event_of(chunk))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def read_body(request: Request, most: int) -> bytes:
    """The body, of at most so many bytes, enough for a prompt that fills the context. A longer one is read to its end
    and thrown away, since many clients look for an answer only when they have sent everything."""
    chunks = []
    size = 0
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                size += len(chunk)
                chunks.append(chunk)
                if size > most:
                    chunks.clear()
    except TimeoutError:
        raise Refusal(408, f"the request did not arrive within {BODY_S:g} s") from None
    if size > most:
        raise Refusal(413, f"the body has more than {most} bytes, which is the most that this server takes")
    return b"".join(chunks)


class Pages:
    """The other routes: /health, /metrics, /v1/models and /v1/models/NAME."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.started = int(time.time())

    async def health(self, request: Request) -> Response:
        state = "closing" if self.service.closing else "failing" if self.service.failing else "ok"
        return as_json({"status": state}, 200 if state == "ok" else 503)

    async def models(self, request: Request) -> Response:
        return as_json({"object": "list", "data": [self.service.served.card(self.started)]})

    async def model(self, request: Request) -> Response:
        check_model(request.path_params["name"], self.service.served)
        return as_json(self.service.served.card(self.started))

    async def metrics(self, request: Request) -> Response:
        """What was counted since the start, in the text format of Prometheus."""
        lines = [f"generate_{name} {value:.9g}" for name, value in sorted(self.service.counts.items())]
        return PlainTextResponse("\n".join([*lines, f"generate_requests_now {len(self.service.jobs)}", ""]))


class Gate:
    """Lets requests through: with a key, those that send it, and /health; without, those with a local Host header."""

    def __init__(self, app: ASGIApp, service: Service, key: str | None) -> None:
        self.app = app
        self.service = service
        self.key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.service.counts[f'answers{{status="{message["status"]}"}}'] += 1
            await send(message)

        try:
            self.check(Headers(scope=scope), scope["path"])
        except Refusal as error:
            return await (await refuse(Request(scope), error))(scope, receive, counting)
        await self.app(scope, receive, counting)

    def check(self, headers: Headers, path: str) -> None:
        if self.key is None:
            # A page whose name was pointed at this machine would send its own name.
            if not is_this_machine(headers.get("host", "localhost")):
                raise Refusal(403, "the header Host names another machine: start the server with --api_key to allow it")
        elif path != "/health":
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
                raise Refusal(401, "no such key: send the header Authorization: Bearer KEY", code="invalid_api_key")


def is_this_machine(host: str) -> bool:
    """Whether HOST or HOST:PORT is localhost or a loopback address."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def make_app(service: Service, key: str | None = None) -> ASGIApp:
    pages = Pages(service)
    routes = [Route("/v1/chat/completions", Completions(service, True), methods=["POST"]),
              Route("/v1/completions", Completions(service, False), methods=["POST"]),
              Route("/v1/models", pages.models), Route("/v1/models/{name:path}", pages.model),
              Route("/health", pages.health), Route("/metrics", pages.metrics)]
    return Starlette(routes=routes, middleware=[Middleware(Gate, service=service, key=key)],
                     exception_handlers={Refusal: refuse, HTTPException: refuse, Exception: refuse})


class Http(H11Protocol):
    """Closes connections whose request line and headers do not arrive in time, for which uvicorn waits for ever."""
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.time_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.time_headers()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self.timer:
            self.timer.cancel()

    def time_headers(self) -> None:
        """While a request's line and headers are not complete, a timer runs that closes the connection."""
        if self.conn.their_state is not h11.IDLE:
            if self.timer:
                self.timer.cancel()
            self.timer = None
        elif not self.timer:
            self.timer = self.loop.call_later(HEADER_S, self.transport.close)


class Server(uvicorn.Server):
    def __init__(self, service: Service, key: str | None = None) -> None:
        super().__init__(uvicorn.Config(
            make_app(service, key), loop="asyncio", http=Http, ws="none", lifespan="off", log_config=None,
            log_level="warning", access_log=False, proxy_headers=False, server_header=False,
            limit_concurrency=CONNECTIONS, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=int(GRACE_S) + 1))
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.close()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # tracebacks of requests that never came
        await super().shutdown(sockets)


def listen(address: str, key: str | None) -> socket.socket:
    """A socket that is bound to HOST:PORT, or to PORT of this machine. ValueError where that cannot be, or where others
    could reach it without a key."""
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) < 6 and int(port) < 2**16):
        raise ValueError(f"--serve {address}: should be HOST:PORT, such as 127.0.0.1:8000")
    try:
        family, kind, _, _, where = socket.getaddrinfo(host.strip("[]") or "127.0.0.1", int(port),
                                                       type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * UNREAD_S))  # connections inherit it
        sock.bind(where)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
        raise ValueError(f"--serve {address}: {getattr(error, 'strerror', error)}") from None
    if key is None and not is_this_machine(f"[{where[0]}]" if ":" in where[0] else where[0]):
        sock.close()
        raise ValueError(f"--serve {address}: other machines could use it; give --api_key KEY, or serve on 127.0.0.1")
    return sock


def serve(args: argparse.Namespace, sampling: Sampling) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises ValueError or OSError with one line to show."""
    key = None if args.api_key is None else read_key(args.api_key)
    sock = listen(args.serve, key)  # before the model is loaded, which takes long
    engine = load_engine(args)
    explain_template(engine.tokenizer, args)
    name = folder_of(args.checkpoint).resolve().name
    service = Service(Served(engine, name, args.method, args.max_new_tokens, sampling, tuple(args.stop)))
    service.driver.submit(engine.warm_up, sampling).result()
    host, port = sock.getsockname()[:2]
    print(f"{name} with {args.method} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", file=sys.stderr)
    try:
        Server(service, key).run([sock])
    finally:
        service.finish()


def read_key(text: str) -> str:
    """--api_key KEY, or @FILE, which no list of processes shows."""
    key = Path(text[1:]).read_text(encoding="utf-8").strip() if text.startswith("@") else text
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        raise ValueError("--api_key should be printable ASCII, without spaces around it, which HTTP takes away")
    return key
