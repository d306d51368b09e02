"""Local server in the form of OpenAI's API; the question says how it answers."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class JudgeServer(ThreadingHTTPServer):
    """Answers a question `KIND rest`; the kinds are in `_Handler.do_POST`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.open, self.most_open = 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing where a client hangs up."""

    def asked(self, question: str) -> int:
        """Return the number of requests with a question."""
        return sum(request["messages"][0]["content"] == question for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        with self.server.lock:
            self.server.requests.append(body)
            self.server.keys.append(self.headers["Authorization"])
            self.server.paths.append(self.path)
            times = self.server.asked(question)
            self.server.open += 1
            self.server.most_open = max(self.server.most_open, self.server.open)
        try:
            self._reply(*question.partition(" ")[::2], times)
        finally:
            with self.server.lock:
                self.server.open -= 1

    def _reply(self, kind: str, rest: str, times: int) -> None:
        match kind:
            case "say":
                self._send(200, _completion(rest))
            case "null":
                self._send(200, _completion(None))
            case "twice":  # fails twice with the status, then says YES
                self._send(int(rest), b"try again") if times <= 2 else self._send(200, _completion("YES"))
            case "later":
                self._send(429, b"", {"Retry-After": "1"}) if times == 1 else self._send(200, _completion("YES"))
            case "status":
                self._send(int(rest), f"no: {self.headers['Authorization']}".encode())
            case "slow":
                time.sleep(float(rest))
                self._send(200, _completion("YES"))
            case "plain":
                self._send(200, _completion("YES"), {"Content-Type": "text/html"})
            case "garbage":
                self._send(200, b"<html>\x00")
            case "other":
                self._send(200, b'{"choices": []}')
            case "large":
                self._send(200, b" " * (5 << 20))
            case "redirect":
                self._send(307, b"", {"Location": f"{self.server.url}/elsewhere"})
            case _:
                self.close_connection = True

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def _completion(text: str | None) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
