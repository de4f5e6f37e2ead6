"""Tokens to text as they come: what is streamed is what all tokens decode to, and stops are found across tokens, never
inside a symbol."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data.tokenizers import ByteTokenizer, CharTokenizer, IntegerTokenizer, tokenizer_from_json
from research.decode.detokenize import Reader, StopStrings, make_stops, read
from research.errors import UserError

BYTES, NUMBERS = ByteTokenizer(), IntegerTokenizer(1000, eot=(7,))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def pieces(tokenizer, tokens, prompt=(), stops=()):
    reader = Reader(tokenizer, prompt, make_stops(tokenizer, tokenizer.vocab_size, stops))
    shown = [reader.feed(token) for token in tokens]
    shown.append(reader.finish())
    assert "".join(shown) == reader.text
    return reader, shown


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_streamed_text_is_the_text(prompt, text):
    chars = CharTokenizer.of_texts(["x", prompt, text])
    for tokenizer in (BYTES, chars):
        reader, shown = pieces(tokenizer, tokenizer.encode(text), tokenizer.encode(prompt))
        assert (reader.prompt, reader.text) == (prompt, text)
        assert not any("\ufffd" in piece for piece in shown) or "\ufffd" in text


@settings(deadline=None)
@given(st.lists(st.integers(0, 255), max_size=40), st.integers(0, 40))
def test_any_bytes_stream_to_what_they_decode_to_wherever_the_prompt_ends(tokens, cut):
    reader, _ = pieces(BYTES, tokens[cut:], tokens[:cut])
    assert reader.prompt + reader.text == BYTES.decode(np.array(tokens, np.uint8))


@settings(deadline=None)
@given(st.lists(st.integers(0, 999), max_size=20))
def test_numbers_stream_apart(tokens):
    numbers = IntegerTokenizer(1000)
    reader, shown = pieces(numbers, tokens)
    assert reader.text == numbers.decode(np.array(tokens, int)) and len(shown) == len(tokens) + 1


@settings(deadline=None)
@given(TEXTS.filter(len), st.lists(TEXTS.filter(len), min_size=1, max_size=3), st.integers(0, 5))
def test_text_ends_at_the_first_stop_text_and_nothing_of_it_is_shown(text, stops, at):
    text = text[:at] + stops[0] + text[at:]
    ends = min((text.find(s) + len(s), text.find(s)) for s in stops if s in text)
    reader, _ = pieces(BYTES, BYTES.encode(text), stops=stops)
    assert (reader.text, reader.end) == (text[: ends[1]], "stop text")
    assert len(reader.tokens) == len(text[: ends[0]].encode())


def test_a_stop_of_numbers_is_a_token_not_a_digit():
    reader, shown = pieces(NUMBERS, [24, 12, 2, 5], stops=["2"])
    assert (reader.text, reader.tokens, reader.end) == ("24 12", [24, 12, 2], "stop text")
    reader, shown = pieces(NUMBERS, [1, 2, 5, 2, 4, 9], stops=["2 4"])
    assert reader.text == "1 2 5" and shown[:4] == ["1", "", " 2 5", ""]


def test_text_ends_at_tokens_that_the_tokenizer_declares_unless_they_are_ignored():
    ended = read(NUMBERS, (), [1, 7, 2], make_stops(NUMBERS, 1000))
    assert (ended.text, ended.tokens, ended.end) == ("1", [1, 7], "stop token")
    assert read(NUMBERS, (), [1, 7, 2], make_stops(NUMBERS, 1000, ignore_eot=True)).text == "1 7 2"
    assert read(NUMBERS, (), [1, 7, 2], make_stops(NUMBERS, 1000, ids=[2], ignore_eot=True)).text == "1 7"
    assert tokenizer_from_json(NUMBERS.to_json()) == NUMBERS
    assert tokenizer_from_json({"kind": "bytes", "eot": [0]}).eot == (0,) and "eot" not in BYTES.to_json()


def test_stops_that_can_never_come():
    with pytest.raises(UserError, match="stop text 'é' can never come: The character 'é'"):
        make_stops(CharTokenizer("abc"), 3, ["é"])
    with pytest.raises(UserError, match="stop token 9 is outside the vocabulary; valid: 0..8"):
        make_stops(IntegerTokenizer(9), 9, ids=[9])
    with pytest.raises(UserError, match="a stop text is empty"):
        make_stops(BYTES, 256, [""])
    with pytest.raises(UserError, match="end-of-text token 300 is not in the vocabulary"):
        tokenizer_from_json({"kind": "bytes", "eot": [300]})
    with pytest.raises(UserError, match="wanted a list of tokens"):
        tokenizer_from_json({"kind": "bytes", "eot": 0})


def show(strings, pieces):
    stops, shown = StopStrings(strings), []
    for piece in pieces:
        shown.append(stops.feed(piece))
    return [*shown, stops.flush()], stops.stopped


def test_stop_strings_hold_back_what_could_be_a_beginning():
    assert show(["\n\n", "END"], ["a\n", "b", "\n", "\nc"]) == (["a", "\nb", "", "", ""], True)
    assert show(["END"], ["the E", "ND of"]) == (["the ", "", ""], True)
    assert show(["END"], ["the E", "N", "O"]) == (["the ", "", "ENO", ""], False)
    assert show(["END"], ["the EN"]) == (["the ", "EN"], False)
    assert show(["aab"], ["aaa", "b", "x"]) == (["a", "", "", ""], True)
    assert show([], ["a", "b"]) == (["a", "b", ""], False)


def test_stop_strings_do_not_depend_on_how_the_text_is_cut():
    rng = np.random.Generator(np.random.Philox(key=np.array([1, 2], np.uint64)))
    strings = ["abcd", "c", "bb", "abb", "dad"]
    ended = 0
    for _ in range(300):
        text = "".join(rng.choice(list("abd" if rng.random() < 0.7 else "abcd"), 8))
        ends = [(text.find(s) + len(s), -len(s)) for s in strings if s in text]
        wanted = text[: sum(min(ends))] if ends else text
        ended += bool(ends)
        for cuts in (range(1, 8), [], sorted(rng.choice(np.arange(1, 8), 2, replace=False))):
            pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, 8], strict=True)]
            shown, stopped = show(strings, pieces)
            assert ("".join(shown), stopped) == (wanted, bool(ends)), (text, pieces)
    assert 30 < ended < 270


@pytest.mark.parametrize("strings", ["END", ["a", ""]])
def test_stop_strings_that_cannot_be_meant(strings):
    with pytest.raises(UserError, match="valid: a list of strings that are not empty"):
        StopStrings(strings)
