"""How processes become the ranks of a run: the environment, ranks that do not come, what they
compare; and signals. Several ranks at work are in tests/test_ranks.py."""

import contextlib
import os
import signal
import socket
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import grpo.engine.ranks
import train_cls
from data.errors import UserError
from grpo.engine.join import VARIABLES, place
from grpo.engine.ranks import leave_unjoined, start
from grpo.run import exits
from grpo.run.exits import StopSignal
from grpo.run.folder import check_output
from grpo.run.same import check_same, own_settings

TWO = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """Sets what torchrun sets, and nothing else of it."""

    def only(**values: str) -> None:
        for name in (*VARIABLES, "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return only


LEFT_BEHIND = [
    ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK is 1 and WORLD_SIZE 1. .*: unset RANK WORLD_SIZE, "),
    ({"RANK": "3"}, "RANK is 3 and WORLD_SIZE not set"),
    ({"LOCAL_RANK": "1"}, "LOCAL_RANK is 1 and WORLD_SIZE not set"),
    ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', not a whole number"),
    ({"WORLD_SIZE": "-2", "RANK": "0"}, "WORLD_SIZE is '-2', not a whole number"),
    ({"WORLD_SIZE": "²"}, "WORLD_SIZE is '²', not a whole number"),
    ({"WORLD_SIZE": "0", "RANK": "0"}, "RANK is 0 and WORLD_SIZE 0"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK, MASTER_ADDR, MASTER_PORT not set"),
    (TWO | {"RANK": "2"}, "RANK is 2 and WORLD_SIZE 2"),
    (TWO | {"MASTER_PORT": "99999"}, "MASTER_PORT is 99999"),
    (TWO | {"MASTER_PORT": "tcp"}, "MASTER_PORT is 'tcp', not a whole number"),
]


@pytest.mark.parametrize("values, said", LEFT_BEHIND)
def test_what_a_scheduler_left_behind_is_named(environment, monkeypatch, capsys, values, said):
    """Whatever rank it says, the one process prints it."""
    environment(**values)
    with pytest.raises(UserError, match=f"environment variables: {said}"):
        start(1.0)
    monkeypatch.setattr(exits.sys, "argv", ["x"])
    with pytest.raises(SystemExit, match="2"):
        exits.run_and_exit(lambda argv: start(1.0))
    assert "environment variables: " in capsys.readouterr().err


def test_one_process_and_torchruns_own_environment_are_taken(environment):
    environment()
    assert place() == (0, 1, 0)
    environment(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="a", MASTER_PORT="29500")
    assert place() == (0, 1, 0) and start().world == 1
    environment(**TWO | {"RANK": "1", "LOCAL_RANK": "1"})
    assert place() == (1, 2, 1)


def test_a_port_in_use_and_ranks_that_never_come_are_named(environment):
    with closing(socket.create_server(("", 0))) as taken:
        environment(**TWO | {"MASTER_PORT": str(taken.getsockname()[1])})
        with pytest.raises(UserError, match=r"MASTER_PORT \d+ is in use on .*: end it, or name"):
            start(1.0)
    with closing(socket.create_server(("", 0))) as free:
        port = str(free.getsockname()[1])
    environment(**TWO | {"MASTER_PORT": port})
    with pytest.raises(UserError, match=f"2 ranks did not come together at 127.0.0.1:{port} with"):
        start(1.0)


@pytest.fixture
def agent(environment, monkeypatch):
    """Sets the environment of a rank of torchrun's, whose agent serves the store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(grpo.engine.ranks, "starts", 0)

    def rank(number: int) -> None:
        served = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        environment(**TWO | served | {"RANK": str(number), "LOCAL_RANK": str(number)})

    return rank


def test_a_rank_that_does_not_come_is_named(agent):
    agent(0)
    with pytest.raises(UserError, match=r"rank\(s\) 1 of 2 did not come within --timeout 0.2 s"):
        start(0.2)


def test_a_rank_that_fails_before_it_joins_ends_the_others_at_once(agent, capsys, monkeypatch):
    """On its own node it has printed why; on another that is said."""
    monkeypatch.setattr(grpo.engine.ranks.time, "sleep", lambda seconds: None)
    agent(1)
    leave_unjoined("unknown flag --seeed")
    agent(0)
    with pytest.raises(SystemExit, match="2"):
        start(600.0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(grpo.engine.ranks, "starts", 0)
    monkeypatch.setattr(socket, "gethostname", lambda: "node-a")
    with pytest.raises(SystemExit, match="2"):
        start(600.0)
    assert " left: unknown flag --seeed" in capsys.readouterr().err


# ---- what ranks compare -------------------------------------------------------------------------


def ranks_with(*tables: dict) -> SimpleNamespace:
    """Ranks as the first of them sees them: the others' tables, each on a node of its own."""

    def share(what: str, own: dict) -> list[dict]:
        others = [{"host": f"node-{r}", "table": table} for r, table in enumerate(tables, 1)]
        return [own | {"host": "node-0"}, *others]

    return SimpleNamespace(world=1 + len(tables), share=share, working=contextlib.nullcontext)


def test_what_differs_among_ranks_is_named_with_ranks_and_values():
    check_same(ranks_with(), "x", lambda: {"--seed": 1})
    check_same(ranks_with({"--seed": "1"}, {"--seed": "1"}), "x", lambda: {"--seed": 1})
    others = {"--seed": "2", "torch": "2.13", "same": "a"}
    with pytest.raises(UserError) as caught:
        check_same(
            ranks_with(others, others, {"same": "a"}), "x", lambda: {"--seed": 1, "same": "a"}
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == "the ranks of this run are not the same:"
    assert lines[1] == (
        "  --seed: 1 on rank 0 (node-0), 2 on ranks 1 to 2 (node-1, node-2), "
        "nothing on rank 3 (node-3)"
    )
    assert lines[2] == "  torch: nothing on ranks 0, 3 (node-0, node-3), 2.13 on ranks 1 to 2 " + (
        "(node-1, node-2)"
    )
    assert len(lines) == 4 and lines[3].startswith("Start each node with the same command")


def test_long_values_that_differ_at_their_ends_are_told_apart_and_cut():
    mine, seen = {"what is paid for": "a" * 10_000 + "b"}, {}

    def share(what: str, own: dict) -> list[dict]:
        seen.update(own["table"])
        return [own, {"host": "h", "table": {"what is paid for": "a" * 72 + "... (0)"}}]

    with pytest.raises(UserError) as caught:
        check_same(
            SimpleNamespace(world=2, share=share, working=contextlib.nullcontext), "x", lambda: mine
        )
    assert len(str(caught.value)) < 500
    check_same(ranks_with(seen), "x", lambda: mine)


def test_the_sources_are_compared_without_an_editor_s_locks(tmp_path, monkeypatch):
    """Emacs leaves a link to nowhere beside each file that is being edited."""
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo" / "__init__.py").write_text("")
    (tmp_path / "grpo" / ".#loss.py").symlink_to("user@host.123")
    monkeypatch.setattr(grpo, "__file__", str(tmp_path / "grpo" / "__init__.py"))
    table = own_settings(train_cls.Config(run_name="a"), None)
    assert "grpo/__init__.py" in table and "--seed" in table
    assert not any("#" in name for name in table) and "--run_name" not in table


# ---- the folder's name, signals ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, said",
    [
        ("x" * 256, "a name of 256 bytes, and 255 is the most"),
        ("ü" * 128, "a name of 256 bytes, and 255 is the most"),
        ("/".join(["y" * 200] * 20), "leaves room for the files in it"),
        ("\udcff", r"'\S*\\udcff': cannot be written as utf-8"),
        ("a\0b", "a zero byte in it"),
    ],
)
def test_an_output_folder_that_no_file_system_takes_is_refused(tmp_path, name, said):
    for resuming in (False, True):
        with pytest.raises(UserError, match=said):
            check_output(tmp_path / name, resuming, ["none"])
    check_output(tmp_path / ("x" * 255), False, ["none"])


def test_a_hangup_stops_the_run_as_sigterm_does_unless_it_is_ignored(capfd):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    ignoring = StopSignal()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not ignoring.asked
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.asked
    os.write(1, b"to a file: kept")
    assert capfd.readouterr().out == "to a file: kept"
