"""Grammars: a JSON schema's lets valid texts through alone, and what cannot be enforced is refused by name."""

import json
import math
import random
import re
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st3_edge import ConfigError
from st3_edge.prompts.grammar import gbnf, numbers, pattern
from st3_edge.prompts.grammar.schema import to_gbnf

sys.path.append(str(Path(__file__).resolve().parents[1]))
from inputs.words import Words


def words(schema, n=40):
    """Texts that the schema's grammar lets through."""
    rng = random.Random(7)
    drawn = Words(to_gbnf(schema))
    return [text for _ in range(n) if (text := drawn.draw(rng)) is not None]


def refused(schema) -> str:
    with pytest.raises(ConfigError) as caught:
        to_gbnf(schema)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def one_property(**schema):
    return {"type": "object", "properties": {"x": schema}, "required": ["x"]}


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("multipleOf", 3),
        ("not", {}),
        ("if", {}),
        ("contains", {}),
        ("patternProperties", {}),
        ("propertyNames", {}),
        ("minProperties", 1),
        ("maxProperties", 1),
        ("dependentRequired", {}),
        ("unevaluatedProperties", False),
        ("contentEncoding", "base64"),
        ("nullable", True),
        ("$anchor", "a"),
        ("$dynamicRef", "#a"),
        ("minimun", 3),
    ],
)
def test_a_keyword_that_is_not_enforced_is_named(keyword, value):
    # broken if it were dropped: the answer would not be what was asked for
    assert repr(keyword) in refused(one_property(type="string", **{keyword: value}))


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "array", "items": {}, "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "minimum": 3}, "'minimum' says nothing about the type string"),
        ({"enum": [1, 2], "minimum": 2}, "'minimum'"),
        ({"type": "string", "format": "made-up"}, "made-up"),
        ({"type": "string", "maxLength": 10**9}, "maxLength"),
        ({"type": "array", "maxItems": 10**6}, "maxItems"),
        ({"type": "array", "minItems": 10**6}, "minItems"),
        ({"type": "string", "pattern": "(?=x)y"}, "lookahead"),
        ({"type": "string", "pattern": "(a|b)*a(a|b){30}$"}, "too large"),
        ({"type": "string", "pattern": "(" * 900 + ")" * 900}, "pattern"),
        ({"type": "string", "pattern": "a" * 5000}, "5000 characters"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "nothing is valid"),
        ({"type": "string", "maxLength": "5"}, "maxLength is a whole number"),
        ({"type": "integer", "minimum": 5, "exclusiveMaximum": 5}, "no number"),
        ({"type": "integer", "exclusiveMinimum": True}, "exclusiveMinimum is a number"),
        ({"type": "number", "maximum": float("nan")}, "not JSON"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "'pattern'"),
        ({"$ref": "#"}, "refers to itself"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "refers to itself"),
        ({"$ref": "https://example.org/schema"}, "$ref"),
        ({"properties": []}, "properties is an object"),
        ({"required": "x"}, "required is a list of names"),
        ({"type": "text"}, "'text'"),
        ({"enum": []}, "enum"),
        ("string", "not str"),
        ({"const": "\ud800"}, "Unicode"),
        (False, "nothing is valid"),
    ],
)
def test_what_cannot_be_enforced_is_said(schema, says):
    # broken by a keyword that is dropped, a native crash on a huge count, or a pattern that never returns
    assert says in refused(schema)


def deep(n):
    schema = {"type": "null"}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


def test_depth_and_size_are_bounded():
    # broken by Python's recursion, or by a grammar that grows without an end
    assert "deep" in refused(deep(200))
    assert "large" in refused({"enum": ["x" * 1000] * 1000})
    doubling = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2, "type": "object"} for i in range(40)}
    assert "JSON schema" in refused({"$defs": {**doubling, "a40": {"type": "object"}}, "$ref": "#/$defs/a0"})


@pytest.mark.parametrize(
    ("low", "high", "inside", "outside"),
    [
        (0, 10, "0 7 10", "-1 11 100 07"),
        (-5, 120, "-5 -1 0 99 120", "-6 121 -50 1000"),
        (17, None, "17 18 90 1000", "16 1 -17"),
        (None, -3, "-3 -30 -99", "-2 0 3"),
        (2**63 - 1, None, "", "1"),
        (0, 99999999999999, "0 99999999999999", "100000000000000 -1"),
        (-999999999999999, 10**13, "-999999999999999 10000000000000", "10000000000001"),
    ],
)
def test_bounds_of_integers(low, high, inside, outside):
    # broken by a digit that is compared by itself
    bounds = [None if v is None else numbers.Bound(Decimal(v), False) for v in (low, high)]
    if not inside:
        with pytest.raises(ValueError, match="digits"):
            numbers.between(*bounds, whole=True)
        return
    fits = regex(numbers.between(*bounds, whole=True))
    assert all(fits.fullmatch(n) for n in inside.split())
    assert not any(fits.fullmatch(n) for n in outside.split())


def regex(text: str) -> re.Pattern[str]:
    """A grammar of digits alone as Python's expression."""
    quoted = re.sub(r'"((?:\\.|[^"])*)"', lambda m: re.escape(m.group(1)), text)
    return re.compile(quoted.replace(" ", ""))


def test_bounds_may_be_numpys():
    # broken if they were read by a name that only Python's numbers are written without
    bounds = {"minimum": np.float64(0.5), "exclusiveMaximum": np.float64(2)}
    assert all(0.5 <= float(word) < 2 for word in words({"type": "number", **bounds}))


decimals = st.decimals(-(10**4), 10**4, places=2, allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(decimals, decimals, st.booleans(), st.booleans(), st.booleans(), st.lists(decimals, max_size=10))
def test_bounds_are_those_of_decimal(a, b, a_open, b_open, whole, others):
    # broken by an end that is left out or let in, or a fraction that is cut
    low, high = numbers.Bound(min(a, b), a_open), numbers.Bound(max(a, b), b_open)
    text = numbers.between(low, high, whole=whole)
    fits = regex(text) if text else re.compile(r"(?!)")
    step = Decimal(1 if whole else "0.01")
    for value in [end + i * step for end in (a, b) for i in (-1, 0, 1)] + others:
        n = Decimal(int(value)) if whole else value
        inside = (n > low.value or (n == low.value and not a_open)) and (
            n < high.value or (n == high.value and not b_open)
        )
        assert bool(fits.fullmatch("0" if n == 0 and whole else f"{abs(n) if n == 0 else n:f}")) == inside, (n, text)


def accepts(automaton: pattern.Automaton, text: str) -> bool:
    at = 0
    for code in map(ord, text):
        ways = [target for ranges, target in automaton.moves[at] if any(a <= code <= b for a, b in ranges)]
        assert len(ways) < 2
        if not ways:
            return False
        at = ways[0]
    return at in automaton.ends


_ATOMS = st.sampled_from(["a", "b", r"\d", ".", "[ab]", "[^a]", r"\.", "é", r"\w", r"\s"])


def _larger(inner):
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda t: f"(?:{t[0]}|{t[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}"])).map(lambda t: f"({t[0]}){t[1]}"),
    )


_EXPRESSIONS = st.recursive(_ATOMS, _larger, max_leaves=8)


@settings(max_examples=300, deadline=None)
@given(_EXPRESSIONS, st.sampled_from(["^{}$", "{}", "^{}", "{}$", "^a|{}$"]), st.lists(st.text("ab1.é \n", max_size=6)))
def test_an_automaton_finds_what_re_finds(expression, form, texts):
    # broken if anchors, repetitions or classes meant something else
    expression = form.format(expression)
    found = re.compile(expression.replace("$", r"\Z"), re.ASCII)  # ECMA's $ and \d
    both = pattern.both([pattern.parse(expression), pattern.length(2, 4)])
    whole = pattern.automaton(pattern.parse(expression))
    try:
        bounded = pattern.automaton(both)
    except pattern.Unsupported:
        bounded = pattern.Automaton([[]], frozenset())
    for text in texts:
        assert accepts(whole, text) == bool(found.search(text))
        assert accepts(bounded, text) == (bool(found.search(text)) and 2 <= len(text) <= 4)


@pytest.mark.parametrize(
    "text",
    ["a{,5}", r"\a", r"[\a]", r"\U0001F600", r"\N{DIGIT ONE}", "(?#c)a", "(?P<x>a)", "[]a]", "[^]", r"a\Z", "[a--b]"],
)
def test_what_python_alone_reads_so_is_refused(text):
    # broken if a pattern meant something else than where it was written
    with pytest.raises(pattern.Unsupported):
        pattern.parse(text)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("text", "fits", "others"),
    [
        ("^[[a]$", "[a", "]b"),
        ("^[a&&b||~~]$", "a&|~", "x"),
        (r"^[^[\]]$", "a", "[]"),
        (r"^(?<x>a)$", "a", "x"),
        (r"^\(?<$", "<", "("),
        (r"^[(?<]$", "(?<", "a"),
        (r"^[+-]$", "+-", ","),
        (r"^\\?a$", "a", "b"),
    ],
)
def test_ecmas_writing_is_read(text, fits, others):
    # broken by a warning of Python's, or a class or group that was taken for another
    automaton = pattern.automaton(pattern.parse(text))
    assert all(accepts(automaton, one) for one in fits)
    assert not any(accepts(automaton, one) for one in others)


def test_every_word_of_a_schemas_grammar_is_valid():
    # broken if a keyword were not enforced where it stands: jsonschema is the reference
    jsonschema = pytest.importorskip("jsonschema")
    from inputs import check_schemas

    print("seed 20241220")
    tried = check_schemas.run(random.Random(20241220), math.inf, 3000, native=False)
    print(tried)
    assert tried["words"] > 1000
    assert jsonschema


def test_strings_are_written_as_json_writes_them():
    # broken if a backslash or a control character reached the grammar unescaped, or an emoji became two halves
    values = ["back\\slash", 'say "hi"', "line\nbreak", "\U0001f600", "é", "\x01"]
    assert {json.loads(word) for word in words({"enum": values}, 100)} == set(values)
    assert all(json.loads(word) == '\\"' for word in words({"type": "string", "pattern": r'^\\"$'}))


def test_properties_that_may_be_left_out_are():
    # broken if a comma stood where none belongs, or all were written
    schema = {"properties": {name: {"const": 1} for name in "abc"}, "required": ["b"], "additionalProperties": False}
    assert {tuple(json.loads(word)) for word in words(schema, 200)} == {
        tuple(names) for names in ("abc", "ab", "bc", "b")
    }


def test_further_properties_have_other_names():
    # broken if a name of the schema's came a second time, with a value of another type
    schema = {"properties": {"ab": {"const": 1}}, "additionalProperties": {"const": "x"}}
    read = [json.loads(word) for word in words(schema, 300)]
    assert all(obj.get("ab", 1) == 1 for obj in read)
    assert any(len(obj) > 1 for obj in read)


@pytest.mark.parametrize(
    "text",
    [
        'root ::= "a" ("b" | [c-e])* # a comment\n\nx-1 ::= root{2,3}\n',
        "root ::= <[3]> !<[4]> .",
        'root ::= (\n "a"\n | "b"\n)+\n',
        r'root ::= "\x41\u00e9\U0001F600\n\"" [^\]\\-]',
        'root ::= "a" |\n "b"',
        'root ::= a{0,2000}\na ::= "x"',
        r'root ::= [a-a] [-z] [a-] [^-a] [+--] [\--0] [\x41-\u00e9] [a-cx-z] "z-a"',
    ],
)
def test_grammars_are_read(text):
    # broken if what llama.cpp reads were refused
    gbnf.check(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "root ::= (",
        "root ::= " + "(" * 100_000,
        'root ::= "a',
        "root ::= [a",
        "root ::= [" + "a-" * 10_000,
        'root ::= "a"{3000}',
        'root ::= "a"{0,99999999999999999999}',
        'root ::= "a"{3,2}',
        'root ::= ("a"{0,100}){100}',
        f'root ::= "{"a" * 1000}"' + "{2000}",
        "root ::= *",
        'root ::= "a" nothing',
        'other ::= "a"',
        'root = "a"',
        'root ::= "\\q"',
        "root ::= )",
        'root ::= "\ud800"',
        'root ::= "a\0"',
        r'root ::= "\uD800"',
        r"root ::= [a\uDFFF]",
        r"root ::= [^\U00110000]",
        "root ::= [9-0]",
        "root ::= [^z-a]",
        r"root ::= [ab\u00e9-\x41]",
        "root ::= [a--]",
        "root ::= " + '"a" ' * 200_000,
        'root ::= "x"\n' + "".join(f'a{i} ::= "x"{{2000}}\n' for i in range(2000)),
    ],
)
def test_grammars_that_native_code_must_not_see_are_refused(text):
    # broken by a crash of its recursive reader, gigabytes, or its messages on standard error
    with pytest.raises(ConfigError, match="grammar") as caught:
        gbnf.check(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
