"""Signals become a request; handlers are those of the program before and after."""

import contextlib
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from batchlr.training.interruption import StopRequest, steps_between, stop_request

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("sent", SIGNALS)
def test_a_signal_is_a_request_and_nothing_else(sent):
    with stop_request() as request:
        assert not request.requested
        signal.raise_signal(sent)
        assert request.requested


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_asked_twice_it_stops_at_once(first, second):
    with stop_request() as request:
        signal.raise_signal(first)
        assert request.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)


def test_each_context_has_a_request_of_its_own():
    with stop_request() as outer:
        with stop_request() as inner:
            signal.raise_signal(signal.SIGTERM)
        assert (inner.requested, outer.requested) == (True, False)
        signal.raise_signal(signal.SIGTERM)
        assert outer.requested


@pytest.fixture
def own_handlers():
    """Handlers of the program around, and the signals that the first one has heard."""
    heard = []
    own = [lambda number, _: heard.append(number), signal.SIG_IGN]
    before = [signal.signal(number, handler) for number, handler in zip(SIGNALS, own, strict=True)]
    yield own, heard
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("end", [None, ValueError("of the run"), KeyboardInterrupt()], ids=repr)
def test_the_handlers_of_the_program_come_back(own_handlers, end):
    own, heard = own_handlers
    with contextlib.ExitStack() as stack:
        if end is not None:
            stack.enter_context(pytest.raises(type(end)))
        request = stack.enter_context(stop_request())
        assert handlers() == [request, request]
        signal.raise_signal(signal.SIGINT)
        if end is not None:
            raise end
    assert handlers() == own
    assert heard == []
    signal.raise_signal(signal.SIGINT)
    assert heard == [signal.SIGINT]


def test_in_a_thread_there_is_a_request_that_no_signal_reaches():
    before = handlers()

    def inside():
        assert threading.current_thread() is not threading.main_thread()
        with stop_request() as request:
            return request.requested, handlers()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside).result() == (False, before)
    assert handlers() == before


def test_a_request_asked_for_by_hand():
    request = StopRequest()
    request(signal.SIGTERM, None)
    assert request.requested
    with pytest.raises(KeyboardInterrupt):
        request(signal.SIGTERM, None)


@pytest.mark.parametrize(
    ("seconds", "steps"), [(0.0, 20), (0.01, 20), (0.3, 16), (1.5, 3), (5.0, 1), (60.0, 1)]
)
def test_processes_ask_one_another_every_20_steps_or_5_seconds(seconds, steps):
    assert steps_between(seconds) == steps
