"""Serving over HTTP, as `python -m cluster.serve` starts it: one server for all of this file."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import ray  # noqa: F401 - brings psutil along
from rich.console import Console

from cluster.nodes import ENVIRONMENT
from cluster.packing import ROOT
from cluster.serve import main
from cluster.serve_api import PAGE
from cluster.serve_export import digest_of
from tests.cluster.browser import Page, find_browser, wait_until
from tests.cluster.malformed import malformed
from tests.conftest import FEATURES, NUM_USERS, tiny_config, write_cycle
from torchrec_pt import pipeline
from torchrec_pt.item_filter import ItemFilter
from torchrec_pt.package import export_package
from torchrec_pt.recommender import Recommendation, Recommender

import psutil  # isort: skip

STEPS = {"epochs": 2, "batch_size": 10, "learning_rate": 0.02, "warmup_steps": 0}
TITLE = {"column": "title", "of": "item", "kind": "text"}
# Products of several rows at once are rounded otherwise than those of one.
CLOSE = {"rel": 1e-4, "abs": 1e-5}

Json = dict[str, Any]


@dataclass(frozen=True)
class Server:
    """Attributes:
    folder: a link, to `first` while no test has turned it.
    first, second: exports of different models over the same data; `first` knows every task.
    """

    port: int
    process: subprocess.Popen[str]
    folder: Path
    first: Path
    second: Path

    def ask(self, path: str, body: object | None = None) -> tuple[int, Any]:
        """Status and answer; a body is posted."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            if body is None:
                connection.request("GET", path)
            else:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", path, json.dumps(body), headers)
            answer = connection.getresponse()
            content = answer.read()
            is_json = answer.headers["Content-Type"] == "application/json"
            return answer.status, json.loads(content) if is_json else content.decode()
        finally:
            connection.close()

    def get(self, path: str, body: object | None = None) -> Any:
        status, answer = self.ask(path, body)
        assert status == 200, answer
        return answer

    def turn_to(self, export: Path) -> None:
        """As whoever publishes a new export does."""
        link = self.folder.with_name("next")
        link.symlink_to(export)
        link.rename(self.folder)

    def export(self) -> str:
        return str(self.get("/health")["export"])


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the packages `first` and `second`."""
    folder = tmp_path_factory.mktemp("exports")
    write_cycle(folder / "log.tsv")
    head, *rows = (folder / "log.tsv").read_text().splitlines()
    titled = [f"{row}\t<i>Film</i> {row.split(chr(9))[1][1:]}" for row in rows]
    (folder / "log.tsv").write_text("\n".join([f"{head}\ttitle", *titled]) + "\n")
    tasks = {"ctr": {**STEPS, "positive_rating": 4}, "ranking": STEPS, "rating": STEPS}
    for name, more in (("first", {"finetune": tasks}), ("second", {"seed": 1})):
        config = tiny_config(folder, [*FEATURES, TITLE], **more)
        config = config.model_copy(update={"run_dir": folder / f"run-{name}"})
        with (folder / "said").open("w") as said:
            pipeline.run(config, Console(file=said))
        export_package(config.run_dir, folder / name)
    return folder


@pytest.fixture(scope="module")
def recommender(exports: Path) -> Recommender:
    """The first export in Python."""
    return Recommender.from_pretrained(exports / "first")


@pytest.fixture(scope="module")
def server(exports: Path) -> Iterator[Server]:
    (exports / "served").symlink_to(exports / "first")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(exports / "served"), "--local", "--port", str(port), "--watch", "0.2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.serve", *words],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said == (
            f"serving {exports / 'served'} at http://127.0.0.1:{port}; Ctrl-C ends it\n"
        )
        yield Server(port, process, exports / "served", exports / "first", exports / "second")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
        process.wait()


def offered(found: list[Recommendation]) -> Json:
    """What the server makes of a list."""
    return {
        "items": [
            {
                "item": one.item,
                "title": one.features["title"],
                "score": pytest.approx(one.score, **CLOSE),
                "features": one.features,
                "because": [
                    {
                        "item": why.item,
                        "title": f"<i>Film</i> {str(why.item)[1:]}",
                        "share": pytest.approx(why.share, **CLOSE),
                    }
                    for why in one.because
                ],
            }
            for one in found
        ]
    }


def test_an_export_has_one_name_wherever_it_lies(exports: Path) -> None:
    assert digest_of(exports / "first") == digest_of(exports / "run-first")
    assert digest_of(exports / "first") != digest_of(exports / "second")


def test_every_route_answers_as_python_does(server: Server, recommender: Recommender) -> None:
    history, items = ["i3", "i4", "i5"], ["i7", "i1", "i29"]
    red = {"where": {"colour": ["red"]}, "without": ["i7"]}
    for asked, found in (
        ({"user": "u1"}, recommender.recommend("u1")),
        ({"history": history, "k": 4}, recommender.recommend(history=history, k=4)),
        ({"history": []}, recommender.recommend(history=[])),
        (
            {"user": "u1", "exclude_seen": False, "filter": red, "explain": True},
            recommender.recommend(
                "u1",
                exclude_seen=False,
                filter=ItemFilter(where={"colour": ["red"]}, without=["i7"]),
                explain=True,
            ),
        ),
        (
            {"user": "u2", "diversity": 0.5, "filter": {"only": [f"i{n}" for n in range(12)]}},
            recommender.recommend(
                "u2", diversity=0.5, filter=ItemFilter(only=[f"i{n}" for n in range(12)])
            ),
        ),
    ):
        assert server.get("/recommend", asked) == offered(found)
    assert server.get("/similar", {"item": "i3", "k": 5}) == offered(
        recommender.similar_items("i3", 5)
    )
    someone: Mapping[str, Any]
    for someone in ({"user": "u1"}, {"history": history}):
        for task in ("ctr", "ranking", None):
            scores = recommender.score(items, **someone, task=task)  # type: ignore[arg-type]
            answer = server.get("/score", {**someone, "items": items, "task": task})
            assert answer["task"] == scores.task
            assert [one["item"] for one in answer["scores"]] == items
            values = [one["score"] for one in answer["scores"]]
            assert values == pytest.approx(scores.values, **CLOSE)
        ratings = recommender.predict_rating(items, **someone)
        answer = server.get("/rate", {**someone, "items": items})
        assert [one["item"] for one in answer["ratings"]] == items
        assert [one["rating"] for one in answer["ratings"]] == pytest.approx(
            ratings.values, **CLOSE
        )
    for asked, vectors in (
        ({"users": ["u2", "u1"]}, recommender.embed_users(["u2", "u1"])),
        ({"histories": [history, []]}, recommender.embed_users(histories=[history, []])),
        ({"items": items}, recommender.embed_items(items)),
    ):
        answer = server.get("/embed", asked)
        assert answer["dim"] == vectors.shape[1]
        assert answer["vectors"] == [pytest.approx(row, **CLOSE) for row in vectors.tolist()]


def test_requests_that_come_together_are_answered_as_alone(
    server: Server, recommender: Recommender
) -> None:
    asked: list[Json] = [{"user": f"u{n}", "k": 3 + n % 2} for n in range(NUM_USERS)]
    asked += [{"history": [f"i{n}", f"i{n + 1}"], "explain": n % 3 == 0} for n in range(20)]
    unknown = [{"user": f"nobody-{n}"} for n in range(10)]
    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(lambda body: server.ask("/recommend", body), [*asked, *unknown]))
    for body, (status, answer) in zip(asked, answers, strict=False):
        assert (status, answer) == (200, offered(recommender.recommend(**body)))
    assert [status for status, _ in answers[len(asked) :]] == [404] * len(unknown)


@pytest.mark.parametrize(
    ("path", "body", "status", "line"),
    [
        ("/recommend", {"user": "nobody"}, 404, 'user: user "nobody": not in the '),
        ("/recommend", {"history": ["i1", "i99"]}, 404, 'history[1]: item "i99": not in the'),
        ("/similar", {"item": "i99"}, 404, 'item: item "i99": not in the prepared'),
        ("/recommend", {"user": "u1", "filter": {"only": ["x"]}}, 404, 'filter.only[0]: item "x"'),
        ("/embed", {"histories": [["i1"], ["x"]]}, 404, 'histories[1][0]: item "x": not in'),
        ("/recommend", {}, 422, "body: give either user or history"),
        ("/recommend", {"user": "u1", "k": 0}, 422, "k: Input should be greater than or equal to"),
        ("/recommend", {"user": "u1", "k": 1001}, 422, "k: Input should be less than or equal to"),
        ("/recommend", {"user": "u1", "k": "3"}, 422, "k: Input should be a valid integer"),
        ("/recommend", {"user": "u1", "top": 3}, 422, "top: Extra inputs are not permitted"),
        ("/recommend", {"history": ["i1"] * 1001}, 422, "history: List should have at most 1000"),
        ("/recommend", {"history": ["i1", None]}, 422, "history[1]: an id is a string or an int"),
        ("/recommend", {"user": "u1", "diversity": float("nan")}, 422, "diversity: Input should"),
        (
            "/recommend",
            {"user": "u1", "filter": {"where": {"size": ["XL"]}}},
            422,
            'filter.where: no item feature "size"; use some of ',
        ),
        ("/score", {"user": "u1", "items": []}, 422, "items: List should have at least 1 item"),
        ("/embed", {"users": ["u1"], "items": ["i1"]}, 422, "body: give exactly one of users, "),
        ("/rate", [1], 422, "body: Input should be a valid dictionary or object"),
        ("/recommend", {"history": ["x" * 2_000_000]}, 413, "body: has 1,048,576 bytes at most"),
        ("/history?user=nobody", None, 404, 'user: user "nobody": not in the '),
        ("/nothing", None, 404, "Not Found"),
        ("/recommend", None, 405, "Method Not Allowed"),
    ],
)
def test_a_refusal_is_one_line_that_names_the_field(
    server: Server, path: str, body: object, status: int, line: str
) -> None:
    found, answer = server.ask(path, body)
    assert found == status, answer
    assert answer["detail"].startswith(line)
    assert "\n" not in answer["detail"]


def test_the_answers_are_those_that_openapi_describes(server: Server) -> None:
    described = server.get("/openapi.json")
    paths = {"/recommend", "/similar", "/score", "/rate", "/embed", "/health", "/metrics"}
    assert paths | {"/items", "/users", "/history"} == described["paths"].keys()
    offered_item = described["components"]["schemas"]["OfferedItem"]["properties"]
    (first, *_) = server.get("/similar", {"item": "i3"})["items"]
    assert first.keys() == offered_item.keys()


def test_prometheus_reads_what_was_answered(server: Server) -> None:
    before = re.search(r'/similar",status="404"} (\S+)', server.get("/metrics"))
    server.ask("/similar", {"item": "nothing"})
    server.ask("/nothing-of-this-name")
    text = server.get("/metrics")
    after = re.search(r'/similar",status="404"} (\S+)', text)
    assert after is not None
    assert float(after[1]) == (float(before[1]) if before else 0) + 1
    assert f'digest="{server.export()}"' in text
    assert 'torchrec_pt_request_seconds_bucket{le="0.005",' in text
    assert 'route="other",status="404"' in text
    assert "/nothing-of-this-name" not in text  # a label for each would fill the memory


def answer_of(port: int, request: bytes) -> tuple[int, bytes]:
    """Status and body of what a server says to bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        try:
            connection.sendall(request)
            said = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        except ConnectionError:  # a body that is refused before it has come
            return 413, b""
    head, _, body = said.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def check_malformed(server: Server, seeds: range) -> None:
    """No 5xx and no crash, and every refusal of ours is one line."""
    statuses: dict[int, int] = {}
    for seed in seeds:
        request = malformed(seed)
        status, body = answer_of(server.port, request)
        assert 200 <= status < 500, (seed, request[:500], body)
        statuses[status] = statuses.get(status, 0) + 1
        if body.startswith(b'{"detail"'):
            assert json.loads(body)["detail"].isprintable(), seed
    assert statuses.keys() >= {200, 404, 405, 415, 422}, statuses
    assert server.get("/recommend", {"user": "u1", "k": 1})["items"]


def test_malformed_requests_get_no_5xx_and_crash_nothing(server: Server) -> None:
    check_malformed(server, range(300))


@pytest.mark.soak
def test_ten_thousand_malformed_requests_get_no_5xx_and_crash_nothing(server: Server) -> None:
    check_malformed(server, range(1000, 11_000))


def test_a_new_export_takes_over_under_load_and_no_request_is_lost(server: Server) -> None:
    models = [Recommender.from_pretrained(export) for export in (server.first, server.second)]
    users = [f"u{n}" for n in range(8)]
    right = {
        user: [[one.item for one in model.recommend(user, k=5)] for model in models]
        for user in users
    }
    assert all(first != second for first, second in right.values())
    first, second = (digest_of(export) for export in (server.first, server.second))
    assert server.export() == first
    ended = threading.Event()

    def keep_asking(user: str) -> list[bool]:
        """Of each answer, whether the second model gave it."""
        found = []
        while not ended.is_set():
            status, answer = server.ask("/recommend", {"user": user, "k": 5})
            assert status == 200, answer
            items = [one["item"] for one in answer["items"]]
            assert items in right[user]
            found.append(items == right[user][1])
        return found

    with ThreadPoolExecutor(len(users)) as threads:
        asking = [threads.submit(keep_asking, user) for user in users]
        try:
            server.turn_to(server.second)
            wait_until(lambda: server.export() == second)
            server.get("/recommend", {"user": "u1"})
        finally:
            ended.set()
    for one in asking:
        answers = one.result()
        assert answers == sorted(answers)  # the first model's, then the second's
    server.turn_to(server.first)
    wait_until(lambda: server.export() == first)


def _cut(export: Path) -> None:
    shard = max(export.rglob("*.safetensors"))
    content = shard.read_bytes()
    shard.unlink()  # it is a hard link
    shard.write_bytes(content[: len(content) // 2])


def _no_configuration(export: Path) -> None:
    (export / "config.json").unlink()


def _empty(export: Path) -> None:
    shutil.rmtree(export)
    export.mkdir()


@pytest.mark.parametrize("damage", [_cut, _no_configuration, _empty])
def test_a_broken_export_is_refused_and_the_old_one_goes_on(
    server: Server, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(server.second, broken)
    damage(broken)
    before = server.get("/recommend", {"user": "u1"})
    server.turn_to(broken)
    wait_until(lambda: server.get("/health")["refused"] is not None)
    health = server.get("/health")
    assert health["export"] == digest_of(server.first)
    assert "\n" not in health["refused"]
    assert server.get("/recommend", {"user": "u1"}) == before
    server.turn_to(server.first)
    wait_until(lambda: server.get("/health")["refused"] is None)


def test_nothing_of_it_listens_beyond_loopback(server: Server) -> None:
    root = psutil.Process(server.process.pid)
    listening = [
        (process.name(), connection.laddr.ip)
        for process in (root, *root.children(recursive=True))
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert any(name.startswith("ray::ServeReplica") for name, _ in listening)
    assert {ip for _, ip in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening


# --- the page -----------------------------------------------------------------------------------


def test_the_page_is_served_and_needs_nothing_from_elsewhere(server: Server) -> None:
    for path, file in (("/", "index.html"), ("/page.js", "page.js"), ("/page.css", "page.css")):
        served = server.get(path)
        assert served == (PAGE / file).read_text()
        assert not re.search(r"https?://|//cdn", served)
    # What comes from the data is text, whatever is in it.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval", served)


def test_the_page_shows_a_user_and_recommends_after_clicked_items(
    server: Server, recommender: Recommender, tmp_path: Path
) -> None:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium is installed, which drives the page")
    page = Page(program, tmp_path / "profile", f"http://127.0.0.1:{server.port}/")
    try:
        look_around(page, recommender)
    finally:
        page.close()


def look_around(page: Page, recommender: Recommender) -> None:
    def offered_titles(**someone: Any) -> list[str]:
        return [str(one.features["title"]) for one in recommender.recommend(**someone)]

    def shows(titles: list[str]) -> None:
        page.wait(
            "JSON.stringify([...document.querySelectorAll('#offered span:first-child')]"
            f".map(e => e.textContent)) === {json.dumps(json.dumps(titles, separators=(',', ':')))}"
        )

    page.wait("document.querySelector('#status')?.textContent === 'Choose a user, or add items.'")
    page.run("document.querySelector('#user').value = 'u3'")
    page.run("document.querySelector('#user-form button').click()")
    shows(offered_titles(user="u3"))
    taken = page.texts("#history span")
    assert len(taken) >= 4
    assert all(title.startswith("<i>Film</i> ") for title in taken)  # as a text, not as HTML
    assert page.run("document.querySelectorAll('i').length") == 0
    assert page.texts("#offered .note")[0].startswith("because of <i>Film</i> ")

    page.run("document.querySelector('#clear').click()")
    page.wait("document.querySelectorAll('#history li').length === 0")
    search = "document.querySelector('#search')"
    page.run(f"{search}.value = 'FILM</I> 7'; {search}.dispatchEvent(new Event('input'))")
    page.wait("document.querySelectorAll('#found li').length === 1")
    page.run("document.querySelector('#found button').click()")
    shows(offered_titles(history=["i7"]))
    page.run("document.querySelector('#offered button').click()")
    added = recommender.recommend(history=["i7"])[0].item
    shows(offered_titles(history=["i7", added]))
    page.run("document.querySelector('#history li:last-child button').click()")
    shows(offered_titles(history=[added]))

    page.run("document.querySelector('#user').value = 'nobody'")
    assert not page.problems
    page.run("document.querySelector('#user-form button').click()")
    page.wait("document.querySelector('#status').textContent.startsWith('user: user \"nobody\"')")
    tree = page.send("Accessibility.getFullAXTree")["nodes"]
    controls = [n for n in tree if n.get("role", {}).get("value") in ("button", "searchbox")]
    assert len(controls) > 10
    assert all(control["name"]["value"].strip() for control in controls)


# --- mistakes on the command line ---------------------------------------------------------------


def test_a_mistake_is_one_line_and_exit_code_2(
    exports: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, line in (
            ([str(tmp_path), "--local"], f"{tmp_path}: holds no run; give the run_dir of a "),
            ([str(exports / "first")], "--address: which Ray? give --address HEAD:6379; "),
            (
                [str(exports / "first"), "--local", "--port", port],
                f"--port: cannot listen at 127.0.0.1:{port}, Address already in use; ",
            ),
        ):
            monkeypatch.setattr("sys.argv", ["cluster.serve", *words])
            with pytest.raises(SystemExit) as stop:
                main()
            said = capsys.readouterr()
            assert stop.value.code == 2
            assert said.err.startswith(f"cluster.serve: {line}")
            assert said.err.count("\n") == 1
