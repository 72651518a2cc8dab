"""Goal: text comes out whole, in order and as soon as it may; a stop string never does.

Method: the bundled byte-level tokenizer and a sentencepiece-like one with byte fallback, on text
with characters of every length; slicing of text must not move the cut of a stop string.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gpu_worker.text import UNFINISHED, Detokenizer, StopFilter, TextStream
from tests.gpu_worker.plain_engine import mini_tokenizer

TEXTS = [
    "Plain English, with  two spaces.\n\tTab and newline.\r\n",
    "Grüße, naïve café: “quotes” – dashes…",
    "漢字とかな, русский, ελληνικά, עברית",
    "family 👨‍👩‍👧‍👦, flag 🇫🇷, thumbs 👍🏽!",
    " leading space",
    "",
]


@pytest.fixture(scope="module")
def byte_level() -> Any:
    return mini_tokenizer()


@pytest.fixture(scope="module")
def byte_fallback() -> Any:
    """Words with a leading mark and single bytes, as Llama's tokenizer has them."""
    words = ["▁", "▁the", "▁end", "a", "b"]
    vocab = {word: i for i, word in enumerate(["<unk>", *words])}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def pieces(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_hold_whole_characters(byte_level: Any, text: str) -> None:
    ids = byte_level.encode(text, add_special_tokens=False)
    out = pieces(Detokenizer(byte_level), ids)
    assert "".join(out) == text
    assert not any(UNFINISHED in piece for piece in out)


@pytest.mark.parametrize("split", [1, 3, 7])
@pytest.mark.parametrize("text", TEXTS[:4])
def test_output_continues_the_prompt(byte_level: Any, text: str, split: int) -> None:
    ids = byte_level.encode(text)
    while byte_level.decode(ids[:split]).endswith(UNFINISHED):
        split += 1
    out = "".join(pieces(Detokenizer(byte_level, tuple(ids[:split])), ids[split:]))
    assert byte_level.decode(ids[:split], skip_special_tokens=True) + out == text


def test_single_bytes_wait_for_their_character(byte_level: Any) -> None:
    ids = [byte_level.convert_tokens_to_ids(c) for c in ("ð", "Ł", "ĺ", "Ģ")]  # f0 9f 98 80
    detokenizer = Detokenizer(byte_level)
    assert [detokenizer.push(i) for i in ids] == ["", "", "", "😀"]
    assert detokenizer.flush() == ""


def test_bytes_that_are_no_text_come_out_as_replacements(byte_level: Any) -> None:
    lone = byte_level.convert_tokens_to_ids("ð")
    detokenizer = Detokenizer(byte_level)
    assert detokenizer.push(lone) == ""
    assert detokenizer.flush() == UNFINISHED
    forever = pieces(Detokenizer(byte_level), [lone] * 100)
    assert "".join(forever) == UNFINISHED * 100
    assert max(map(len, forever)) <= 16, "text must not be withheld without end"


def test_byte_fallback_and_leading_spaces(byte_fallback: Any) -> None:
    def ids(*tokens: str) -> list[int]:
        return [byte_fallback.convert_tokens_to_ids(t) for t in tokens]

    hello = ids(*(f"<0x{b:02X}>" for b in "你好".encode()))
    out = pieces(
        Detokenizer(byte_fallback, tuple(ids("▁the"))), [*ids("▁end"), *hello, *ids("▁end")]
    )
    assert out == [" end", "", "", "你", "", "", "好", " end", ""]


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab.\n", max_size=24),
    stops=st.lists(st.text("ab.\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 24), max_size=6),
)
def test_the_cut_does_not_depend_on_how_text_arrives(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    expected = text[: min(ends)[1]] if ends else text
    borders = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    filter_ = StopFilter(tuple(stops))
    out, sent = "", ""
    for start, end in zip(borders, borders[1:], strict=False):
        sent += text[start:end]
        out += filter_.push(text[start:end])
        assert expected.startswith(out)
        if not filter_.stopped:
            # Nothing is held back that could not begin a stop string.
            held = sent[len(out) :]
            assert held == "" or any(s.startswith(held) for s in stops)
    out += filter_.flush()
    assert out == expected
    assert filter_.stopped == bool(ends)


def test_stop_strings_across_token_borders(byte_level: Any) -> None:
    text = "The quick brown fox. END of it"
    ids = byte_level.encode(text, add_special_tokens=False)
    stream = TextStream(byte_level, (), ("x. EN", "never"))
    out, used = "", 0
    for token in ids:
        out += stream.push(token)
        used += 1
        if stream.stopped:
            break
    assert out + stream.finish() == "The quick brown fo"
    assert used < len(ids)


def test_a_held_beginning_comes_out_when_it_is_not_a_stop(byte_level: Any) -> None:
    stream = TextStream(byte_level, (), ("brown bear",))
    ids = byte_level.encode("The quick brown be", add_special_tokens=False)
    early = "".join(stream.push(i) for i in ids)
    assert "brown" not in early
    assert early + stream.finish() == "The quick brown be"


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None, (1, 2), ())
    assert stream.push(3) + stream.finish() == ""
    assert not stream.stopped
