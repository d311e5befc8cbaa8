"""Real servers on free ports of this machine."""

import contextlib
import json
import re
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from reward import serve
from reward.arguments import main_guard
from reward.feedback import Reward, RewardError
from reward.http import HttpReward, question, read_question
from reward.serve import make_server

PROMPTS = ["a red circle", "two"]
IMAGES = torch.randint(0, 256, (2, 3, 5, 7), generator=torch.Generator().manual_seed(0)).float() / 255


class Everything:
    """A reward with all that one may have, each part in numbers that a short decimal would not keep."""

    differentiable = True

    def __call__(self, images, prompts):
        red = images[:, 0].mean((-2, -1))
        return Reward(
            total=red / 3,
            penalties={"blue": images[:, 2], "small": images[:, :1].mean((2, 3), keepdim=True)[:, 0] / 7},
            word_penalties=[torch.full((len(prompt.split()),), 0.1) for prompt in prompts],
            terms={"red": red},
            wrong_words=[torch.arange(len(prompt.split())) == 0 for prompt in prompts],
            heatmaps={"green": images[:, 1]},
        )


@contextlib.contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def serving(reward):
    return running(make_server(reward))


@contextlib.contextmanager
def answering(*answers):
    """A server that gives these answers, (status, bytes or seconds of silence), the last one again and again."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            status, body = answers[min(len(asked), len(answers) - 1)]
            asked.append(time.monotonic())
            if isinstance(body, float):
                time.sleep(body)
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url, asked


def as_json(**content):
    return 200, json.dumps(content).encode()


def test_a_reward_from_afar_is_the_same_to_the_bit():
    """Of pictures in 8 bits, which is what is sent."""
    near = Everything()(IMAGES, PROMPTS)
    with serving(Everything()) as url:
        far = HttpReward(url)(IMAGES, PROMPTS)
    assert torch.equal(near.total, far.total)
    for kind in ("terms", "penalties", "heatmaps"):
        assert getattr(near, kind).keys() == getattr(far, kind).keys()
        for name, value in getattr(near, kind).items():
            assert torch.equal(value, getattr(far, kind)[name]), name
    assert all(torch.equal(*pair) for pair in zip(near.word_penalties, far.word_penalties, strict=True))
    assert all(torch.equal(*pair) for pair in zip(near.wrong_words, far.wrong_words, strict=True))


def test_questions_come_back_as_they_were_asked():
    images, prompts = read_question(json.dumps(question(IMAGES, PROMPTS)).encode())
    assert torch.equal(images, IMAGES)
    assert prompts == PROMPTS


def test_maps_may_be_nested_lists_and_only_the_total_is_needed():
    with answering(as_json(total=[1, 2]), as_json(total=[1, 2], penalties={"m": [[[0.5, 1]], [[0, 0]]]})) as (url, _):
        reward = HttpReward(url)
        plain, mapped = reward(IMAGES, PROMPTS), reward(IMAGES, PROMPTS)
    assert plain.total.tolist() == [1.0, 2.0]
    assert (plain.penalties, plain.heatmaps) == ({}, {})
    assert (plain.word_penalties, plain.wrong_words) == (None, None)
    assert mapped.penalties["m"].tolist() == [[[0.5, 1.0]], [[0.0, 0.0]]]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (as_json(total=[1]), r"total has shape \(1,\) for 2 pictures"),
        (as_json(total=[1, float("nan")]), "total is nan for the prompt 'two'"),
        (as_json(total=["a", "b"]), r"total is no list of numbers: .*a"),
        (as_json(total=[[1], [2, 3]]), "total is no list of numbers"),
        (as_json(total=[1, 2], penalties={"m": [[1], [2]]}), r"map `m` has shape \(2, 1\) for 2 pictures"),
        (as_json(total=[1, 2], penalties={"m": {"shape": [2, 1, 1], "float32": "AAAA"}}), "no multiple of 4"),
        (as_json(total=[1, 2], penalties={"m": {"shape": [2, 1, 1], "float32": "AAAAAA=="}}), "has 1 numbers, not"),
        (as_json(total=[1, 2], penalties={"m": {"shape": [2], "float32": "?"}}), "is not base64"),
        (as_json(total=[1, 2], penalties={"m": {"data": 1}}), "must be nested lists, or"),
        (as_json(total=[1, 2], penalties=[1]), "`penalties` must be an object"),
        (as_json(total=[1, 2], heatmaps={"m": [[[2.0]], [[0.0]]]}), r"heatmap `m` has values from 0.0 to 2.0"),
        (as_json(total=[1, 2], word_penalties=3), "`word_penalties` must be a list"),
        (as_json(total=[1, 2], wrong_words=True), "`wrong_words` must be a list"),
        (as_json(total=[1, 2], penalty={}), "unknown entries penalty"),
        (as_json(terms={}), "has no `total`"),
        ((200, b"[1, 2]"), r"must be a JSON object, not '\[1, 2\]'"),
        ((200, b"<html>" + b"x" * 1000), r"it is not JSON: '<html>x*\.\.\.'"),
        ((200, b"\xff"), "it is not JSON"),
    ],
)
def test_wrong_answers_are_refused_at_once(answer, message):
    with answering(answer) as (url, asked), pytest.raises(RewardError, match=message) as caught:
        HttpReward(url, backoff=0)(IMAGES, PROMPTS)
    assert f"the answer of the reward at {url} cannot be used: " in str(caught.value)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("answer", "tries", "message"),
    [
        ((500, b'{"error": "out of memory"}'), 3, "no answer in 3 tries: HTTP 500: out of memory;"),
        ((503, b"busy"), 3, "no answer in 3 tries: HTTP 503: 'busy';"),
        ((404, b""), 1, "no answer in 1 try: HTTP 404: '';"),
        ((200, 0.3), 3, "no answer in 3 tries: no whole answer within 0.1 s;"),
        ((200, 0.0), 3, "no answer in 3 tries: RemoteDisconnected"),
    ],
)
def test_silence_is_tried_again_and_then_an_error(answer, tries, message):
    with answering(answer) as (url, asked), pytest.raises(RewardError, match=f"gave {message}") as caught:
        HttpReward(url, timeout=0.1, backoff=0)(IMAGES, PROMPTS)
    assert f"the reward at {url} " in str(caught.value)
    assert len(asked) == tries


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"])
def test_an_answer_that_trickles_in_is_not_waited_for(head):
    class Drip(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(65536)
            self.request.sendall(head)
            with contextlib.suppress(OSError):  # nobody listens any longer
                for _ in range(100):
                    self.request.sendall(b" ")
                    time.sleep(0.05)

    start = time.perf_counter()
    with running(socketserver.TCPServer(("127.0.0.1", 0), Drip)) as url:
        with pytest.raises(RewardError, match=r"no answer in 1 try: no whole answer within 0.2 s;"):
            HttpReward(url, timeout=0.2, tries=1)(IMAGES, PROMPTS)
        assert time.perf_counter() - start < 1


def test_an_answer_at_the_last_try_is_one_and_waits_grow():
    with answering((500, b""), (500, b""), as_json(total=[1, 2])) as (url, asked):
        assert HttpReward(url, backoff=0.1)(IMAGES, PROMPTS).total.tolist() == [1.0, 2.0]
    assert 0.1 <= asked[1] - asked[0] < asked[2] - asked[1]
    assert asked[2] - asked[1] >= 0.2


def test_nobody_there():
    server = make_server(Everything())
    port = server.server_address[1]
    server.server_close()
    with pytest.raises(RewardError, match="no answer in 2 tries: ConnectionRefusedError"):
        HttpReward(f"http://127.0.0.1:{port}", tries=2, backoff=0)(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:80",
        "ftp://host/",
        "http://",
        "http://host:port/",
        "",
        "http://host..name/",
        "http://host/für",
        None,
    ],
)
def test_urls_that_are_none(url):
    with pytest.raises(ValueError, match="write http://host:port/"):
        HttpReward(url)


@pytest.mark.parametrize(
    "wrong",
    [{"timeout": 0}, {"timeout": "30"}, {"timeout": float("nan")}, {"tries": 0}, {"tries": 2.5}, {"backoff": -1}],
)
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match="timeout must be a number above 0"):
        HttpReward("http://host/", **wrong)


def failing(images, prompts):
    raise RuntimeError("the model is gone")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (failing, "HTTP 500: RuntimeError: the model is gone"),
        (
            lambda images, prompts: Reward(images.mean((1, 2, 3)) * float("nan")),
            "HTTP 500: RewardError: .*total is nan",
        ),
    ],
)
def test_who_asks_hears_why_the_served_reward_failed(reward, message, caplog):
    with serving(reward) as url, pytest.raises(RewardError, match=message):
        HttpReward(url, tries=1)(IMAGES, PROMPTS)
    assert "the reward failed" in caplog.text


def test_a_question_is_dropped_whose_client_has_left_while_it_waited():
    """Else whoever tries again would stand behind its own old questions."""
    begun, free, asked = threading.Event(), threading.Event(), []

    def slow(images, prompts):
        asked.append(prompts)
        begun.set()
        assert free.wait(20)
        return Reward(images.mean((1, 2, 3)))

    with serving(slow) as url:
        first = threading.Thread(target=lambda: HttpReward(url)(IMAGES, ["first", "first"]))
        first.start()
        assert begun.wait(20)
        with pytest.raises(RewardError, match="no answer in 1 try"):
            HttpReward(url, timeout=0.3, tries=1)(IMAGES, ["left", "left"])
        free.set()
        first.join()
        HttpReward(url)(IMAGES, ["last", "last"])
    assert asked == [["first", "first"], ["last", "last"]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{}", "`images` must be a list"),
        (b"no", "not JSON"),
        (b'{"images": [], "prompts": []}', "0 images and 0 prompts"),
        (b'{"images": ["AAAA"], "prompts": ["a"]}', "no picture that can be read"),
        (b'{"images": ["?"], "prompts": ["a"]}', "an image is not base64"),
        (
            json.dumps(
                {"images": question(IMAGES, PROMPTS)["images"] + question(IMAGES[..., 1:], PROMPTS)["images"],
                 "prompts": PROMPTS * 2}
            ).encode(),
            "different sizes",
        ),
    ],
)  # fmt: skip
def test_wrong_questions_are_told_so(body, message):
    with serving(Everything()) as url:
        reward = HttpReward(url)
        status, said = reward._post(body)
    assert status == 400
    assert re.search(message, json.loads(said)["error"])


def test_the_command_serves_a_named_reward(monkeypatch, capsys):
    made = []
    monkeypatch.setattr(serve, "make_server", lambda *args: made.append(make_server(*args)) or made[-1])
    named = ["--reward", "tests.rl.toy_rewards:Redness", "--reward_kwargs", '{"weight": 2}']
    thread = threading.Thread(target=serve.main, args=([*named, "--port", "0"],))
    thread.start()
    said = ""
    while "Ctrl-C" not in said and thread.is_alive():
        time.sleep(0.01)
        said += capsys.readouterr().out
    (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", said)
    try:
        torch.testing.assert_close(HttpReward(url)(IMAGES, PROMPTS).total, 2 * IMAGES[:, 0].mean((1, 2)))
    finally:
        made[0].shutdown()
        thread.join()


def test_an_address_that_is_taken_is_said_in_one_line(capsys):
    with serving(Everything()) as url, pytest.raises(SystemExit) as caught:
        main_guard(serve.main, ["--reward", "tests.rl.toy_rewards:Redness", "--port", url.split(":")[2].strip("/")])
    assert caught.value.code == 2
    assert re.match(r"error: cannot serve at 127\.0\.0\.1:\d+: .*choose another --port", capsys.readouterr().err)


@pytest.mark.parametrize("wrong", [{"port": 70000}, {"device": "gpuu"}])
def test_places_that_are_none(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        serve.ServeArguments("a:b", **wrong)
