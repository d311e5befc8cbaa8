"""Answer for any reward over HTTP, as `reward.http:HttpReward` asks for it.

    python -m reward.serve --reward my_rewards:Redness --port 8765

It serves those who can reach `host`, by default this machine only, and knows no passwords: do not bind it to an address
that others can reach. One question is answered at a time.
"""

import json
import logging
import select
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from reward.arguments import main_guard, parse_arguments
from reward.by_name import make_reward
from reward.feedback import RewardFn, check_reward
from reward.http import answer, read_question

logger = logging.getLogger(__name__)

LARGEST = 2**30
"""Bytes of the largest question that is read."""


@dataclass
class ServeArguments:
    """Which reward is served, and where."""

    reward: str = field(metadata={"help": "The reward, `package.module:Attribute`; a class is called."})
    reward_kwargs: dict = field(default_factory=dict, metadata={"help": "Arguments of the reward's class."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to serve at; the default is this machine only."})
    port: int = field(default=8765, metadata={"help": "Port to serve at; 0 takes a free one."})
    device: str = field(default="cpu", metadata={"help": "Where the reward computes, e.g. cuda, if it has a choice."})

    def __post_init__(self):
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; it must lie in 0..65535")
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device is {self.device!r}; write cpu, cuda or cuda:1") from error


def make_server(
    reward_fn: RewardFn, host: str = "127.0.0.1", port: int = 0, device: str = "cpu"
) -> ThreadingHTTPServer:
    """A server for `reward_fn`, bound but not running; `server_address` says where, `serve_forever()` runs it.

    Raises:
        OSError: the address is taken, or not this machine's.
    """
    alone = threading.Lock()  # rewards need not be made for several threads

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > LARGEST:
                self.close_connection = True
                return self._say(400, {"error": f"Content-Length must be given, and be at most {LARGEST} bytes"})
            try:
                images, prompts = read_question(self.rfile.read(int(length)))
            except ValueError as error:
                return self._say(400, {"error": str(error)})
            try:
                with alone, torch.no_grad():
                    if _has_left(self.connection):  # it asks again, and must not wait behind its own old question
                        self.close_connection = True
                        return None
                    reward = reward_fn(images.to(device), prompts)
                check_reward(reward, prompts)
            except Exception as error:  # whatever it is, it is whoever asks that must hear of it
                logger.exception("the reward failed")
                return self._say(500, {"error": f"{type(error).__name__}: {error}"})
            return self._say(200, answer(reward))

        def _say(self, status: int, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            with suppress(ConnectionError):  # who asked has given up waiting
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *args):
            """Nothing: a line for each question says little."""

    return ThreadingHTTPServer((host, port), Handler)


def _has_left(connection: socket.socket) -> bool:
    """Whether who asked has closed the connection, as after waiting in vain."""
    if not select.select([connection], [], [], 0)[0]:
        return False
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except OSError:
        return True


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    (args,) = parse_arguments([ServeArguments], argv)
    reward = make_reward(args.reward, args.reward_kwargs)
    if hasattr(reward, "to"):
        reward.to(args.device)
    try:
        server = make_server(reward, args.host, args.port, args.device)
    except OSError as error:
        raise OSError(f"cannot serve at {args.host}:{args.port}: {error}; choose another --port or --host") from error
    with server:
        print(f"serving {args.reward} at http://{args.host}:{server.server_address[1]}/; Ctrl-C ends it", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main_guard(main)
