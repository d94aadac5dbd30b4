# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import topics
from edge_sdk.errors import MessageError
from edge_sdk.topics import Address

DEVICE = "d0123456789abcde"
ALL = {
    topics.offer("pump"): Address("offer", "pump"),
    topics.part("pump", "weights", 12): Address("part", "pump", what="weights", index=12),
    topics.part("pump", "bundle", 0): Address("part", "pump", what="bundle"),
    topics.up("pump", DEVICE, "update"): Address("update", "pump", DEVICE),
    topics.down("pump", DEVICE, "receipt"): Address("receipt", "pump", DEVICE),
    topics.status(DEVICE): Address("status", device=DEVICE),
}


@pytest.mark.parametrize(("topic", "address"), ALL.items())
def test_a_topic_that_was_built_is_parsed_back(topic: str, address: Address) -> None:
    assert topics.parse(topic) == address


def test_topics_fit_the_smallest_brokers() -> None:
    longest = [
        topics.up("t" * 20, DEVICE, "checkin"),
        topics.down("t" * 20, DEVICE, "receipt"),
        topics.part("t" * 20, "weights", topics.MAX_PARTS - 1),
    ]
    assert max(topic.count("/") for topic in longest) <= 7
    assert max(len(topic) - len(topics.PREFIX) - 1 for topic in longest) <= 64


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "fedge/2/t/pump/offer",
        "fedge/1/t/Pump/offer",
        "fedge/1/t/pump/offer/",
        "fedge/1/t/pump/model/b/01",
        "fedge/1/t/pump/model/x/1",
        "fedge/1/t/pump/model/b/100000",
        f"fedge/1/t/pump/up/{(topics.shard(DEVICE) + 1) % 256}/{DEVICE}/update",
        f"fedge/1/t/pump/up/{topics.shard(DEVICE)}/{DEVICE}/invite",
        "fedge/1/t/pump/dn/dABC/receipt",
        "fedge/1/d/+/status",
        "fedge/1/t/pump\n/offer",
    ],
)
def test_a_topic_that_is_not_ours_is_refused(topic: str) -> None:
    with pytest.raises(MessageError, match="expected a topic"):
        topics.parse(topic)


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for topic in (text, f"fedge/1/{text}"):
        try:
            topics.parse(topic)
        except MessageError:
            continue


def test_names_that_could_carry_wildcards_or_slashes_are_refused() -> None:
    for build in (
        lambda: topics.offer("a/b"),
        lambda: topics.offer("+"),
        lambda: topics.status("d#"),
        lambda: topics.up("pump", DEVICE, "invite"),
        lambda: topics.down("pump", DEVICE, "update"),
        lambda: topics.part("pump", "weights", -1),
    ):
        with pytest.raises(MessageError, match="expected"):
            build()


def test_filters_take_in_what_they_are_for_and_nothing_else() -> None:
    other = "dfedcba987654321"
    cases = {
        topics.down_filter("pump", DEVICE): {topics.down("pump", DEVICE, "receipt")},
        topics.parts_filter("pump", "weights"): {topics.part("pump", "weights", 12)},
        topics.up_filter("pump"): {topics.up("pump", DEVICE, "update")},
        topics.up_filter(): {topics.up("pump", DEVICE, "update")},
        topics.status_filter(): {topics.status(DEVICE)},
    }
    for pattern, wanted in cases.items():
        assert {topic for topic in ALL if topics.matches(pattern, topic)} == wanted
    assert not topics.matches(
        topics.down_filter("pump", DEVICE), topics.down("pump", other, "invite")
    )


@pytest.mark.parametrize(
    ("pattern", "topic", "yes"),
    [
        ("#", "a/b", True),
        ("a/#", "a", True),
        ("a/#", "b", False),
        ("+/b", "a/b", True),
        ("+", "a/b", False),
        ("a/+", "a", False),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
        ("a/b", "a/b/c", False),
    ],
)
def test_wildcards_match_as_mqtt_says(pattern: str, topic: str, yes: bool) -> None:
    assert topics.matches(pattern, topic) is yes


def test_a_shard_is_one_of_256_and_fixed_for_ever() -> None:
    assert topics.shard(DEVICE) == 32
    assert {topics.shard(f"d{i:015x}") for i in range(5000)} == set(range(256))
