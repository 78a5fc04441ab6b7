"""Talking to vLLM servers: which one is asked, how long is waited, and what an answer that is none means.

Invariants
- Every wait has an end, and says when it comes whom it asked to do what.
- A server that has failed, or has given nothing for a while, may have been started anew, with other weights: it is made
  sure of before it is used again. Now and then it is asked anyway: another run may have given it weights.
"""

import asyncio
import ipaddress
import json
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from llmrl.errors import RefusedError, RunFailedError

FIRST_WAIT, LONGEST_WAIT = 0.25, 10.0
"""Seconds before a server that failed is asked again: doubled at each failure, up to the second number."""
CONNECT_SECONDS = 10.0
SURE_SECONDS = 1.0
"""After its last completion a server is taken to be the same for so long, in which none is started anew."""
ASKED_EVERY_SECONDS = 10.0
"""However busy it is, a server is asked this often whose weights it has."""


@dataclass
class Server:
    """One server and how it is doing."""

    url: str
    in_flight: int = 0
    failures: int = 0
    retry_at: float = 0.0
    is_sure: bool = False
    gave_at: float = -math.inf
    sure_at: float = -math.inf
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def is_known(self) -> bool:
        """Whether it has the weights that it was given last."""
        now = time.monotonic()
        return self.is_sure and now - self.gave_at < SURE_SECONDS and now - self.sure_at < ASKED_EVERY_SECONDS

    def made_sure(self) -> None:
        """It has the newest weights."""
        self.is_sure = True
        self.gave_at = self.sure_at = time.monotonic()

    def failed(self) -> None:
        """Requests that fail together count once."""
        self.is_sure = False
        if time.monotonic() >= self.retry_at:
            self.retry_at = time.monotonic() + min(FIRST_WAIT * 2**self.failures, LONGEST_WAIT)
            self.failures += 1

    def answered(self) -> None:
        self.failures, self.retry_at = 0, 0.0


class Fleet:
    """The servers behind one engine. Its coroutines run on one event loop."""

    def __init__(self, urls: Sequence[str], patience_seconds: float, allow_remote: bool, api_key: str | None) -> None:
        if not urls:
            raise RefusedError("no vLLM server is named. Remedy: start one with launch/vllm_server and name its URL")
        self.servers = [Server(checked_url(url, allow_remote)) for url in urls]
        self.patience_seconds = patience_seconds
        self.make_sure: Callable[[Server], Awaitable[None]] = _nothing
        # Not the proxies of the environment: they would be asked for loopback addresses too.
        self._client = httpx.AsyncClient(
            trust_env=False,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
            timeout=None,
        )

    async def ask_any(self, path: str, body: dict[str, Any], what: str, seconds: float) -> Any:
        """The answer of the least loaded server that works; another is asked, or the same again, where one fails."""
        first_failure: float | None = None
        while True:
            server = min(self.servers, key=lambda s: (s.retry_at > time.monotonic(), s.retry_at, s.in_flight))
            server.in_flight += 1  # at once: those who choose next must see it
            try:
                await asyncio.sleep(max(0.0, server.retry_at - time.monotonic()))
                await self._sure(server)
                answer = await self._once(server, "POST", path, body, what, seconds)
                server.gave_at = time.monotonic()
                return answer
            except NoAnswerError as error:
                first_failure = first_failure or time.monotonic()
                self._give_up_after(first_failure, error, what)
            finally:
                server.in_flight -= 1

    async def ask(
        self,
        server: Server,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        what: str,
        seconds: float,
        patiently: bool = True,
    ) -> Any:
        """The answer of this very server, asked again until patience ends; without it NoAnswerError is raised."""
        first_failure: float | None = None
        while True:
            try:
                return await self._once(server, method, path, body, what, seconds)
            except NoAnswerError as error:
                if not patiently:
                    raise
                first_failure = first_failure or time.monotonic()
                self._give_up_after(first_failure, error, what)
                await asyncio.sleep(max(0.0, server.retry_at - time.monotonic()))

    async def _sure(self, server: Server) -> None:
        if server.is_known():
            return
        async with server.lock:
            if not server.is_known():
                await self.make_sure(server)
                server.made_sure()

    async def _once(
        self, server: Server, method: str, path: str, body: dict[str, Any] | None, what: str, seconds: float
    ) -> Any:
        try:
            async with asyncio.timeout(seconds):
                response = await self._client.request(
                    method, server.url + path, json=body, timeout=httpx.Timeout(None, connect=CONNECT_SECONDS)
                )
        except TimeoutError as error:
            server.failed()
            raise NoAnswerError(server.url, what, f"no answer within {seconds:g} s") from error
        except httpx.TransportError as error:
            server.failed()
            raise NoAnswerError(server.url, what, f"{type(error).__name__}: {error}") from error
        if response.status_code >= 500:
            server.failed()
            raise NoAnswerError(server.url, what, f"HTTP {response.status_code}: {_message(response)}")
        server.answered()
        if response.status_code >= 400:
            raise RequestRefusedError(response.status_code, server.url + path, what, _message(response))
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.json() if is_json else response.text

    def _give_up_after(self, first_failure: float, error: "NoAnswerError", what: str) -> None:
        waited = time.monotonic() - first_failure
        if waited >= self.patience_seconds:
            last = error.reason if error.what == what else f"asked to {error.what}: {error.reason}"
            raise RunFailedError(
                f"the vLLM server at {error.url} did not {what}, though asked again for {waited:.0f} s "
                f"(patience_seconds: {self.patience_seconds:g}). Last: {last}"
            ) from error

    async def close(self) -> None:
        await self._client.aclose()


class RequestRefusedError(RunFailedError):
    """A server answered with 4xx: asking again would not help."""

    def __init__(self, status: int, address: str, what: str, message: str) -> None:
        super().__init__(f"{address} refused to {what} (HTTP {status}): {message}")
        self.status, self.message = status, message
        self._arguments = (status, address, what, message)

    def __reduce__(self) -> tuple[type["RequestRefusedError"], tuple[int, str, str, str]]:
        """Ranks send it to one another."""
        return RequestRefusedError, self._arguments


class NoAnswerError(Exception):
    """A server could not be reached, was too slow, or answered with 5xx: another time, or another server, may do."""

    def __init__(self, url: str, what: str, reason: str) -> None:
        super().__init__(f"{url}: {what}: {reason}")
        self.url, self.what, self.reason = url, what, reason


async def _nothing(server: Server) -> None:
    """What is done before a server that failed is used again, before the engine says more."""


def checked_url(url: str, allow_remote: bool) -> str:
    """The URL without its last slash. Raises RefusedError unless it is http(s), and loopback where it must be."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RefusedError(f"{url!r} is not the URL of a server, such as http://127.0.0.1:8000")
    if not allow_remote and not _is_loopback(parts.hostname):
        raise RefusedError(
            f"{url} is not on this machine. Whoever reaches the server's control endpoints can replace its weights and "
            "run its workers' methods: no key guards them. Remedy: a tunnel to a loopback address, or allow_remote "
            "where the network is yours alone"
        )
    return url.rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _message(response: httpx.Response) -> str:
    """What the server says went wrong: the message in its JSON, else the beginning of its text."""
    try:
        content = response.json()
        return str(content["error"]["message"] if "error" in content else content["detail"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return response.text[:500] or "no message"
