"""A small server that answers like vLLM, with made-up tokens."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

Answer = Callable[["FakeServer", str, dict[str, Any]], tuple[int, Any]]


class FakeServer(ThreadingHTTPServer):
    """Answers like vLLM, except where `answer` says otherwise; keeps what it was asked."""

    daemon_threads = True

    def __init__(self, port: int = 0, answer: Answer | None = None) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answer = answer
        self.weights: list[str] = []
        self.label, self.can_sleep, self.vocabulary = "default", False, 97
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def paths(self) -> list[str]:
        return [path.partition("?")[0] for path, _ in self.asked]

    def usual(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        bare = path.partition("?")[0]
        if bare == "/server_info":
            settings = {"max_model_len": 256, "enable_sleep_mode": self.can_sleep}
            return 200, {"vllm_config": {"model_config": {"logprobs_mode": "processed_logprobs", **settings}}}
        if bare == "/v1/models":
            return 200, {"data": [{"id": "served"}]}
        if bare == "/update_weight_version":
            self.label = body["new_version"]
        if bare == "/weight_info":
            return 200, {"weight_version": self.label}
        if bare == "/collective_rpc":
            self.weights = sorted(load_file(next(Path(body["kwargs"]["weights_path"]).iterdir())))
        if bare == "/v1/completions":
            ids = [body["prompt"][-1], body["seed"] % self.vocabulary]
            logprobs = {"token_logprobs": [-0.5, -1.5]}
            return 200, {"choices": [{"token_ids": ids, "logprobs": logprobs, "finish_reason": "length"}]}
        return 200, {"success": True}

    def end(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        self.server.asked.append((self.path, body))
        status, content = (self.server.answer or FakeServer.usual)(self.server, self.path, body)
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST

    def log_message(self, *arguments: Any) -> None:
        pass
