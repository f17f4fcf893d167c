"""A small server with the routes of ``vllm serve`` that clients need, started like it.

    python openai_stand_in.py serve MODEL --enable-lora ... --port 8000

Lists MODEL and the tasks of ``VLLM_VLORA_CHECKPOINT``, answers a chat with the model's name and the
last message, and a model that it does not list with 404.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def make_server(models: list[str], port: int = 0) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/health":
                self._send(200, {})
            elif self.path == "/v1/models":
                data = [{"id": m, "object": "model", "created": 0, "owned_by": ""} for m in models]
                self._send(200, {"object": "list", "data": data})
            else:
                self._send(404, {"error": {"message": self.path}})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions" or request["model"] not in models:
                self._send(404, {"error": {"message": f"no {request.get('model')}"}})
                return
            text = f"{request['model']} says {request['messages'][-1]['content']}"
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            completion = {"id": "1", "object": "chat.completion", "created": 0}
            self._send(200, completion | {"model": request["model"], "choices": [choice]})

        def _send(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main(arguments: list[str]) -> None:
    assert arguments[0] == "serve"
    assert "--enable-lora" in arguments
    options = dict(itertools.pairwise(arguments))
    checkpoint = Path(os.environ["VLLM_VLORA_CHECKPOINT"])
    tasks = list(json.loads((checkpoint / "tasks.json").read_text()))
    with make_server([arguments[1], *tasks], int(options["--port"])) as server:
        server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
