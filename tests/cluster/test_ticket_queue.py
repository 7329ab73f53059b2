"""Which unit a worker gets next."""

from cluster.ticket_queue import Ticket, TicketQueue
from tests.errors import raises


def queue(affinities: str) -> TicketQueue:
    return TicketQueue(Ticket(serial, f"{serial}{letter}", None, letter) for serial, letter in enumerate(affinities))


def taken(waiting: TicketQueue, last: str | None, at_work: str = "") -> str:
    return waiting.take(last, at_work).name


def test_one_affinity_is_first_come_first_served() -> None:
    waiting = queue("aaa")
    assert [taken(waiting, None), taken(waiting, "a"), taken(waiting, "b")] == ["0a", "1a", "2a"]
    assert not waiting
    with raises(IndexError, "ticket"):
        waiting.take(None, "")


def test_a_worker_goes_on_with_what_it_has_at_hand() -> None:
    waiting = queue("abab")
    assert [taken(waiting, "b"), taken(waiting, "b"), taken(waiting, "b")] == ["1b", "3b", "0a"]
    assert len(waiting) == 1


def test_workers_spread_over_the_affinities() -> None:
    waiting = queue("aaabbbccc")
    assert taken(waiting, None) == "0a"
    assert taken(waiting, None, "a") == "3b"
    assert taken(waiting, None, "ab") == "6c"
    assert taken(waiting, "x", "abcca") == "4b"
    assert taken(waiting, None, "abc") == "1a"


def test_a_ticket_that_comes_back_goes_to_the_end_of_its_own() -> None:
    waiting = queue("aab")
    first = waiting.take(None, "")
    waiting.append(first)
    assert [taken(waiting, "a"), taken(waiting, "a"), taken(waiting, "a")] == ["1a", "0a", "2b"]


def test_a_round_is_of_one_affinity() -> None:
    waiting = queue("abaab")
    assert [ticket.name for ticket in waiting.take_round(None, "", 2)] == ["0a", "2a"]
    assert [ticket.name for ticket in waiting.take_round("a", "", 2)] == ["3a"]
    assert [ticket.name for ticket in waiting.take_round("a", "", 3)] == ["1b", "4b"]
    assert not waiting


def test_a_ticket_for_a_new_worker_waits_for_one_which_takes_it_first() -> None:
    waiting = queue("ab")
    waiting.append(Ticket(2, "2a", None, "a", priority=1, fresh=True))
    assert waiting.by_priority() == {0: 2, 1: 1}
    assert taken(waiting, "a") == "0a"
    assert taken(waiting, None) == "2a"
    waiting.append(Ticket(2, "2a", None, "a", fresh=True))
    assert taken(waiting, "a") == "1b"
    assert len(waiting) == 1
    assert (waiting.has_for("a"), waiting.has_for(None)) == (False, True)
    with raises(IndexError, "ticket"):
        waiting.take("a", "")


def test_a_ticket_that_is_to_be_alone_is_a_round_of_its_own() -> None:
    waiting = queue("aa")
    waiting.append(Ticket(2, "2a", None, "a", alone=True))
    waiting.append(Ticket(3, "3a", None, "a"))
    rounds = [[ticket.name for ticket in waiting.take_round("a", "", 3)] for _ in range(3)]
    assert rounds == [["0a", "1a"], ["2a"], ["3a"]]


def test_a_promised_ticket_waits_for_its_worker_while_there_are_others() -> None:
    waiting = queue("aaab")
    for level in waiting._levels.values():
        for tickets in level.values():
            for ticket in tickets:
                ticket.prepared = True
    promised = [waiting.promise("a", worker) for worker in "xyx"]
    assert [ticket and ticket.name for ticket in promised] == ["0a", "1a", "0a"], "one at a time"
    assert waiting.take("a", "", "z").name == "2a"
    assert waiting.take("a", "", "y").name == "1a"
    assert waiting.take("a", "", "z").name == "0a", "better than to wait"
    assert waiting.promise("a", "x") is None
    assert taken(waiting, None) == "3b"
    assert waiting.promise("a", "x") is None


def test_what_needs_no_preparation_is_not_promised() -> None:
    assert queue("a").promise("a", "x") is None


def test_a_lower_priority_number_goes_before_affinity() -> None:
    waiting = queue("aab")
    waiting.append(Ticket(3, "3c", None, "c", priority=-1))
    assert waiting.by_priority() == {0: 3, -1: 1}
    assert [taken(waiting, "a"), taken(waiting, "a")] == ["3c", "0a"]
