"""Observers are told everything, in order, and one that breaks harms nobody."""

import logging

from cluster.server.errors import Code
from cluster.server.observe.observer import Observer, Observers
from tests.server.serving import serve


class Noting(Observer):
    """Notes what it is told, in a list that it may share."""

    def __init__(self, notes):
        self.notes = notes

    def refused(self, code):
        self.notes.append(("refused", code))

    def admitted(self, request):
        self.notes.append(("admitted", request.info.request_id))

    def progressed(self, request, num_tokens, since_last_s):
        self.notes.append(("progressed", request.info.request_id, num_tokens, since_last_s is None))

    def ended(self, request, outcome):
        self.notes.append(("ended", request.info.request_id, outcome))


class Broken(Observer):
    def admitted(self, request):
        raise RuntimeError("no room for notes")

    progressed = ended = heard = refused = lambda self, *facts: 1 / 0


class Blind(Observer):
    """Looks at nothing."""


def test_a_request_is_admitted_then_progresses_then_ends():
    notes = []
    with serve(observer=Observers([Broken(), Noting(notes), Blind()])) as serving:
        answer = serving.client.generate([5], max_tokens=3, ignore_eos=True, request_id="r")
        assert len(answer.token_ids) == 3
    assert notes == [
        ("admitted", "r"),
        ("progressed", "r", 1, True),
        ("progressed", "r", 1, False),
        ("progressed", "r", 1, False),
        ("ended", "r", "length"),
    ]


def test_what_an_observer_raises_is_logged_once(caplog):
    notes = []
    observers = Observers([Broken(), Noting(notes)])
    with caplog.at_level(logging.ERROR, "cluster.server.observe.observer"):
        for _ in range(3):
            observers.refused(Code.NOT_FOUND)
    assert notes == [("refused", Code.NOT_FOUND)] * 3
    assert len(caplog.records) == 1
    assert "ZeroDivisionError" in caplog.text
