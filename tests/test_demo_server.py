"""The demo's server: good questions, bad ones, huge ones, many at once, and Ctrl-C."""

import asyncio
import contextlib
import http.client
import json
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import typer
import uvicorn

import koi.lab.demo
from koi import Koi
from koi.lab.cli import main
from koi.lab.demo import guards
from koi.lab.demo.classifier import Classifier
from koi.lab.demo.messages import MAX_BYTES, MAX_POINTS, MAX_STEPS, MAX_STROKES
from koi.lab.demo.server import application, listen, serve
from koi.models import omniglot_net

LINE = [[[0.1, 0.1], [0.9, 0.2]]]
HOOK = [[[0.2, 0.1], [0.2, 0.8], [0.6, 0.9]]]
DOT = [[[0.5, 0.5]]]
QUESTION = {"examples": [LINE, HOOK, DOT], "query": HOOK, "num_steps": 2}
KOI = [sys.executable, "-c", "from koi.lab.cli import main; main()", "demo", "--no-open"]


class Client:
    """Serves a network from a thread and asks it, over real connections."""

    def __init__(self, num_outputs):
        torch.manual_seed(1)  # other weights than those of the random initialisation
        self.application = application(Classifier(Koi(omniglot_net(num_outputs), 1e-3)))
        self.listening = listen("127.0.0.1", 0)
        self.server = uvicorn.Server(uvicorn.Config(self.application, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, args=([self.listening],))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join()
        self.listening.close()

    def request(self, method, address, body=None, headers=()):
        """Return the status, the headers and the body."""
        connection = http.client.HTTPConnection(*self.listening.getsockname())
        with contextlib.closing(connection):
            connection.request(method, address, body, dict(headers))
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def post(self, body, kind="application/json"):
        """Return the status and what the JSON of the body says."""
        given = body if isinstance(body, str | bytes) else json.dumps(body)
        data = given.encode() if isinstance(given, str) else given
        status, _, content = self.request("POST", "/answer", data, {"Content-Type": kind})
        return status, json.loads(content)


@pytest.fixture(scope="module")
def client():
    torch.manual_seed(1)  # the random initialisation is of another seed
    with Client(num_outputs=5) as client:
        yield client


def nested(depth):
    return "[" * depth + "]" * depth


def with_point(point):
    """A question in which one point is not as it should be, as JSON."""
    return json.dumps({**QUESTION, "query": [["HERE", [0.5, 0.5]]]}).replace('"HERE"', point)


BAD = {
    "nothing": ("", 400, "json"),
    "no JSON": ("draw!", 400, "json"),
    "half": (json.dumps(QUESTION)[:-9], 400, "json"),
    "no text": (b"\xff\xfe\x00", 400, "json"),
    "a deep nest": (nested(50_000), 400, "recursion"),
    "a number": ("3", 422, "question"),
    "a list": ("[]", 422, "question"),
    "no examples": ("{}", 422, "examples"),
    "too few": (json.dumps({"examples": [LINE, DOT]}), 422, "at least 3"),
    "too many": (json.dumps({"examples": [LINE] * 6}), 422, "at most 5"),
    "an empty drawing": (json.dumps({"examples": [LINE, DOT, []]}), 422, "examples[2]"),
    "an empty stroke": (json.dumps({"examples": [LINE, DOT, [[]]]}), 422, "examples[2][0]"),
    "NaN": (with_point("[NaN, 0.5]"), 422, "query[0][0][0]"),
    "infinity": (with_point("[0.5, -Infinity]"), 422, "query[0][0][1]"),
    "a huge number": (with_point("[1e999, 0.5]"), 422, "query[0][0][0]"),
    "far off": (with_point("[5, 0.5]"), 422, "less than or equal to 2"),
    "a word": (with_point('["0.5", 0.5]'), 422, "number"),
    "true": (with_point("[true, 0.5]"), 422, "number"),
    "null": (with_point("null"), 422, "query[0][0]"),
    "one coordinate": (with_point("[0.5]"), 422, "query[0][0]"),
    "three coordinates": (with_point("[0.5, 0.5, 0.5]"), 422, "query[0][0]"),
    "strokes": (json.dumps({**QUESTION, "query": LINE * (MAX_STROKES + 1)}), 422, "64"),
    "points": (json.dumps({**QUESTION, "query": [[[0, 0]] * (MAX_POINTS + 1)]}), 422, "2001"),
    "steps": (json.dumps({**QUESTION, "num_steps": MAX_STEPS + 1}), 422, "num_steps"),
    "half a step": (json.dumps({**QUESTION, "num_steps": 1.5}), 422, "num_steps"),
    "start": (json.dumps({**QUESTION, "initialisation": "lucky"}), 422, "'learned' or 'random'"),
    "unknown": (json.dumps({**QUESTION, "colour": "red"}), 422, "colour"),
    "many mistakes": (json.dumps({"examples": [[["x"] * 99]] * 3}), 422, "294 more mistakes"),
    "large": (json.dumps({**QUESTION, "query": " " * MAX_BYTES}), 413, str(MAX_BYTES)),
}


@pytest.mark.parametrize("initialisation", ["learned", "random"])
def test_an_answer(client, initialisation):
    status, answer = client.post({**QUESTION, "initialisation": initialisation})
    assert status == 200
    assert len(answer["losses"]) == 3
    assert [len(row) for row in answer["probabilities"]] == [3, 3, 3]
    assert all(abs(sum(row) - 1) < 1e-5 for row in answer["probabilities"])
    assert answer["known"] == []  # this network is not calibrated
    assert [len(image) for image in answer["images"]] == [28 * 28] * 4
    line, hook, dot, query = answer["images"]
    assert hook == query
    assert line.count("1") > dot.count("1") > 0


def test_without_a_query(client):
    status, answer = client.post({"examples": QUESTION["examples"]})
    assert status == 200
    assert len(answer["losses"]) == MAX_STEPS + 1
    assert answer["probabilities"] == []
    assert len(answer["images"]) == 3


@pytest.mark.parametrize(("body", "status", "said"), BAD.values(), ids=BAD)
def test_a_bad_question_is_told_what_is_wrong_and_the_server_goes_on(client, body, status, said):
    given, answer = client.post(body)
    assert given == status
    assert said.lower() in answer["error"].lower()
    assert len(answer["error"]) < 500
    assert client.post(QUESTION)[0] == 200


def test_no_more_is_read_of_a_huge_question_than_is_allowed(client):
    """A question without end, as the application sees it."""
    size, part, sent = 0, b" " * 2**16, []

    async def receive():
        nonlocal size
        size += len(part)
        return {"type": "http.request", "body": part, "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/answer", "query_string": b""}
    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    asyncio.run(client.application({**scope, "headers": headers}, receive, send))
    assert sent[0]["status"] == 413
    assert MAX_BYTES < size <= MAX_BYTES + len(part)


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", ""])
def test_only_json_is_taken_so_that_no_other_site_can_ask_unseen(client, kind):
    status, answer = client.post(QUESTION, kind)
    assert status == 415
    assert "JSON" in answer["error"]


@pytest.mark.parametrize(
    ("method", "address", "status"),
    [
        ("GET", "/answer", 404),
        ("DELETE", "/answer", 405),
        ("POST", "/", 405),
        ("GET", "/nothing", 404),
        ("GET", "/../server.py", 404),
        ("GET", "/%2e%2e/server.py", 404),
        ("GET", "/..%2fserver.py", 404),
    ],
)
def test_other_addresses_and_methods(client, method, address, status):
    given, _, content = client.request(method, address)
    assert given == status
    assert json.loads(content)["error"]


def test_a_network_of_three_outputs_tells_three_shapes_apart():
    with Client(num_outputs=3) as small:
        assert json.loads(small.request("GET", "/limits")[2])["max_classes"] == 3
        assert small.post(QUESTION)[0] == 200
        status, answer = small.post({"examples": [LINE] * 4})
    assert status == 422
    assert "at most 3" in answer["error"]


def test_questions_at_once_get_the_answers_that_they_get_one_by_one(client):
    questions = [
        {**QUESTION, "query": query, "initialisation": initialisation}
        for query in (LINE, HOOK, DOT)
        for initialisation in ("learned", "random")
    ]
    alone = [client.post(question) for question in questions]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(client.post, questions * 3))
    assert together == alone * 3
    assert len({tuple(answer["losses"]) for _, answer in alone}) == 2
    assert len({str(answer["probabilities"]) for _, answer in alone}) == 6


@pytest.mark.parametrize("address", ["/", "/app.js", "/limits", "/answer", "/nothing"])
def test_every_response_forbids_what_comes_from_elsewhere(client, address):
    _, headers, _ = client.request("GET", address)
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"


def ask(port, head, host="127.0.0.1"):
    """Return what comes back for a request of any form."""
    with socket.create_connection((host, port)) as connection:
        connection.sendall(head)
        return b"".join(iter(lambda: connection.recv(1000), b""))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *[("localhost", 200), ("LOCALHOST:8000", 200), ("127.0.0.1:80", 200), ("[::1]:8000", 200)],
        *[("192.0.2.7", 200), ("evil.example", 421), ("localhost.evil.example", 421), ("", 421)],
        *[("127.0.0.1.evil.example", 421), ("[evil]", 421), ("[::1].evil.example", 421)],
    ],
)
def test_hosts_that_others_can_give_a_name(client, host, status):
    given, _, content = client.request("GET", "/limits", headers={"Host": host})
    assert given == status
    assert (b"error" in content) == (status == 421)


class TestPatience:
    """As it is served: with little patience, here."""

    @pytest.fixture
    def served(self, monkeypatch):
        monkeypatch.setattr(guards, "HEAD_SECONDS", 0.5)
        monkeypatch.setattr(guards, "BODY_SECONDS", 0.5)
        made, listening = [], listen("127.0.0.1", 0)
        with monkeypatch.context() as changed:
            keep = lambda self, sockets: made.append((self, sockets))  # noqa: E731
            changed.setattr(uvicorn.Server, "run", keep)
            serve(Classifier(Koi(omniglot_net(5), 1e-3)), listening)
        ((server, sockets),) = made
        thread = threading.Thread(target=server.run, args=(sockets,))
        thread.start()
        yield server, listening.getsockname()[1]
        server.should_exit = True
        thread.join()
        listening.close()

    def test_silent_connections_make_room(self, served):
        """Seventy of them gave everybody 503 for as long as they stayed."""
        _, port = served
        request = b"GET /limits HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        with contextlib.ExitStack() as stack:
            for number in range(70):
                silent = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                silent.sendall(b"GET /" if number % 2 else b"")
            while b"200 OK" not in ask(port, request):
                time.sleep(0.1)

    def test_a_question_that_does_not_end(self, served, caplog):
        _, port = served
        head = b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        assert b" 408 " in ask(port, head + b"Content-Length: 99\r\n\r\n{")
        with socket.create_connection(("127.0.0.1", port)) as leaving:
            leaving.sendall(head + b"Content-Length: 99\r\n\r\n{")
        assert b" 408 " in ask(port, head + b"Content-Length: 99\r\n\r\n{")
        assert "Traceback" not in caplog.text

    def test_the_end_during_a_slow_question(self, served, caplog, monkeypatch):
        server, port = served
        monkeypatch.setattr(guards, "BODY_SECONDS", 3000)
        head = b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(head + b"Content-Length: 99\r\n\r\n{")
            while not server.server_state.tasks:
                time.sleep(0.01)
            server.should_exit = True
            assert b" 503 " in slow.recv(1000)
        assert "Traceback" not in caplog.text


class TestCommand:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        path = tmp_path / "koi.safetensors"
        Koi(omniglot_net(5), 1e-3).save(path)
        return path

    def test_it_serves_this_machine_alone_until_ctrl_c(self, checkpoint):
        command = [*KOI, "--port", "0", "--checkpoint", checkpoint]
        with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as process:
            try:
                said = process.stdout.readline()
                host, port = said.split("//")[1].split("/")[0].split(":")
                assert host == "127.0.0.1"
                with socket.create_connection((host, int(port))) as connection:
                    connection.sendall(b"GET /limits HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    assert b"200 OK" in connection.recv(1000)
                    # with a connection that is still open
                    process.send_signal(signal.SIGINT)
                    out, err = process.communicate()
            finally:
                process.kill()
        assert (process.returncode, out, err) == (0, "", "")

    @pytest.fixture
    def koi_demo(self, checkpoint, monkeypatch, capsys):
        """Run the command in this process and return its exit code and what it said."""
        monkeypatch.setattr(torch, "set_num_threads", lambda number: None)

        def run(*arguments):
            given = ["koi", "demo", "--no-open", "--checkpoint", str(checkpoint), *arguments]
            monkeypatch.setattr(sys, "argv", given)
            with pytest.raises(SystemExit) as stopped:
                main()
            return stopped.value.code, capsys.readouterr().err

        return run

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--checkpoint", "nowhere"], "nowhere"),
            (["--port", "65536"], "--port"),
            (["--host", "192.0.2.1"], "192.0.2.1"),
        ],
    )
    def test_wrong_use_is_one_line_and_exit_code_2(self, koi_demo, arguments, said):
        code, error = koi_demo(*arguments)
        assert code == 2
        assert said in error
        assert len(error.splitlines()) == 1

    def test_a_port_in_use(self, koi_demo):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            code, error = koi_demo("--port", port)
        assert code == 2
        assert port in error
        assert "choose another port" in error

    @pytest.mark.parametrize(("flag", "opened"), [("--open", True), ("--no-open", False)])
    def test_the_page_is_opened_unless_told_otherwise(self, koi_demo, flag, opened, monkeypatch):
        addresses = queue.Queue()
        monkeypatch.setattr(webbrowser, "open", addresses.put)
        monkeypatch.setattr("koi.lab.demo.server.serve", lambda classifier, listening, names: None)
        assert koi_demo("--port", "0", flag)[0] == 0
        if opened:
            assert addresses.get().startswith("http://127.0.0.1:")
        else:
            assert addresses.empty()

    @pytest.mark.parametrize("host", ["0.0.0.0", "", "127.0.0.1"])
    def test_others_are_spoken_of_aloud(self, koi_demo, host, monkeypatch):
        monkeypatch.setattr("koi.lab.demo.server.serve", lambda classifier, listening, names: None)
        said = []
        monkeypatch.setattr(typer, "echo", said.append)
        assert koi_demo("--port", "0", "--host", host)[0] == 0
        assert any("Others can reach" in line for line in said) == (host != "127.0.0.1")

    def test_without_the_extra_it_says_what_to_install(self, koi_demo, monkeypatch):
        monkeypatch.delitem(sys.modules, "koi.lab.demo.server")
        monkeypatch.delattr(koi.lab.demo, "server")
        monkeypatch.setitem(sys.modules, "uvicorn", None)
        code, error = koi_demo()
        assert code == 1
        assert 'pip install "koi-x[demo]"' in error
