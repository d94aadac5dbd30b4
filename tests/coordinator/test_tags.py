# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.tags import MAX_DEPTH, MAX_LENGTH, assigned, where
from edge_sdk.errors import ConfigError

NORTH = {"site": "north", "beta": False, "ram_mib": 2048, "t": 21.5, "rack": ""}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("site == 'north'", True),
        ('site == "north"', True),
        ("site == 'north' and not beta", True),
        ("site == 'south' or ram_mib >= 2048", True),
        ("site == 'south' or ram_mib > 2048", False),
        ("not (site == 'north' and ram_mib == 2048)", False),
        ("site in ['east', 'north']", True),
        ("site in ['east']", False),
        ("t > -3.5 and t < 21.6", True),
        ("ram_mib <= 2048.0", True),
        ("rack", False),
        ("site", True),
        ("not not site", True),
        ("beta == false", True),
        ("beta != true", True),
        # `and` binds closer than `or`
        ("site or rack and rack", True),
        ("(site or rack) and rack", False),
        # what is not there, or of another kind, equals nothing and has no order
        ("ghost == 'x'", False),
        ("ghost != 'x'", True),
        ("ghost", False),
        ("not ghost", True),
        ("ghost < 5 or ghost >= 5", False),
        ("ram_mib == '2048'", False),
        ("ram_mib < 'z'", False),
        ("beta == 0", False),
        ("beta < true", False),
    ],
)
def test_an_expression_means_what_it_says(text: str, holds: bool) -> None:
    assert where(text).holds(NORTH) is holds


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a tag's name"),
        ("site =", "cannot read '=' at 5"),
        ("site == north", "a number, true, false or text in quotes"),
        ("site == 'north", "cannot read"),
        ("site == 'no\\rth'", "cannot read"),
        ("(site", "expected ')'"),
        ("site beta", "expected the end, and, or at 5"),
        ("and", "a tag's name"),
        ("site in 'north'", "expected '['"),
        ("site in ['north'", "',' or ']'"),
        ("site in []", "a number"),
        ("true", "a tag's name"),
        ("ram >= 10pi", "cannot read"),
        ("__import__('os')", "expected the end"),
        ("site == 'a'; beta", "cannot read ';"),
        ("(" * (MAX_DEPTH + 2) + "a" + ")" * (MAX_DEPTH + 2), "levels of brackets"),
        ("a or " * MAX_LENGTH, "characters"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_says_where(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        where(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_long_line_of_not_costs_no_depth() -> None:
    assert where("not " * 200 + "site").holds(NORTH)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="()[]'\"=<>!,. andortiseb01-_", max_size=60))
def test_no_text_does_more_than_answer_or_refuse(text: str) -> None:
    try:
        test = where(text)
    except ConfigError:
        return
    assert test.holds(NORTH) in (True, False)


_LEAVES = {"a": True, "b": False, "ghost": False}


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.sampled_from(sorted(_LEAVES)),
        lambda inner: st.one_of(
            inner.map(lambda x: f"not ({x})"),
            st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(
                lambda x: f"({x[0]}) {x[1]} {x[2]}"
            ),
        ),
        max_leaves=12,
    )
)
def test_and_or_not_bind_as_in_python(text: str) -> None:
    meant = eval(text, {"__builtins__": {}}, _LEAVES)  # noqa: S307  # built from three names above
    assert where(text).holds({"a": True, "b": False}) is bool(meant)


def test_an_operator_writes_name_and_value() -> None:
    assert assigned("site=north") == ("site", "north")
    assert assigned("beta=true") == ("beta", True)
    assert assigned("ram=2048") == ("ram", 2048)
    assert assigned("t=-1.5") == ("t", -1.5)
    assert assigned("note=a=b") == ("note", "a=b")
    assert assigned("site=") == ("site", None)
    for bad in ("site", "=x", "9a=1", "not=1", "a b=1", "site=" + "x" * 65):
        with pytest.raises(ConfigError):
            assigned(bad)
