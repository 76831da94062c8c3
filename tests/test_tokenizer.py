"""Tokenizer and chat rendering: nanochat's own results, round trips, hostile files."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megacontext.data.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from megacontext.errors import CheckpointError, UserError

WORDS = ["the", "harbour", "def", "return", "count", "naïve", "Straße", "12", "345", "x**2", "\n\n    ", "ein", "möwe"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(WORDS[i] for i in rng.integers(0, len(WORDS), 200)) for _ in range(20)]


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> Tokenizer:
    return Tokenizer.train(texts, 300)


@pytest.fixture(scope="module")
def parity(shared_data: Path) -> tuple[Tokenizer, dict[str, Any], Any]:
    folder = shared_data / "nanochat_parity"
    expected = json.loads((folder / "expected.json").read_text())
    return Tokenizer.load(str(folder / "tokenizer")), expected, np.load(folder / "expected.npz")


def test_nanochat_ids_equal(parity: tuple[Tokenizer, dict[str, Any], Any]) -> None:
    ours, expected, _ = parity
    for key in ("text_ids", "odd_ids"):
        assert ours.encode(expected[key]["text"]) == expected[key]["ids"]
        assert ours.decode(expected[key]["ids"]) == expected[key]["text"]


def test_nanochat_chat_and_token_bytes_equal(parity: tuple[Tokenizer, dict[str, Any], Any], shared_data: Path) -> None:
    ours, expected, arrays = parity
    ids, mask = ours.render_conversation(expected["conversation"])
    assert ids == arrays["chat_ids"].tolist()
    assert mask == arrays["chat_mask"].tolist()
    assert ours.render_for_completion(expected["conversation"]) == arrays["completion_ids"].tolist()
    stored = torch.load(shared_data / "nanochat_parity" / "tokenizer" / "token_bytes.pt", weights_only=True)
    assert torch.equal(ours.token_bytes(), stored)
    assert ours.token_bytes().tolist() == arrays["token_bytes"].tolist()


def test_save_is_what_nanochat_loads(parity: tuple[Tokenizer, dict[str, Any], Any], tmp_path: Path) -> None:
    ours, expected, _ = parity
    ours.save(str(tmp_path))
    theirs = pickle.loads((tmp_path / "tokenizer.pkl").read_bytes())  # what nanochat does
    assert isinstance(theirs, tiktoken.Encoding)
    assert theirs.encode_ordinary(expected["odd_ids"]["text"]) == expected["odd_ids"]["ids"]
    assert torch.equal(torch.load(tmp_path / "token_bytes.pt", weights_only=True), ours.token_bytes())
    again = Tokenizer.load(str(tmp_path))
    assert again.digest == ours.digest
    assert again.vocab_size == 1024


def test_trained_layout(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 300
    assert [tokenizer.special(name) for name in SPECIAL_TOKENS] == list(range(291, 300))
    assert tokenizer.bos_id == 291
    assert tokenizer.encoding._pat_str == SPLIT_PATTERN
    assert tokenizer.token_bytes().shape == (300,)
    assert tokenizer.token_bytes().dtype == torch.int32
    assert tokenizer.token_bytes()[291:].tolist() == [0] * 9


def test_training_is_deterministic(texts: list[str], tokenizer: Tokenizer) -> None:
    assert Tokenizer.train(iter(texts), 300).digest == tokenizer.digest
    assert Tokenizer.train(iter(texts), 299).digest != tokenizer.digest


def test_first_merges_match_a_plain_pair_count() -> None:
    """Byte-pair merging by its definition, on words that the split pattern keeps whole."""
    corpus = "ab" + " ab" * 5 + " cab" * 4 + " xcab" * 3
    words = [list(word.encode()) for word in [corpus.split()[0], *(" " + w for w in corpus.split()[1:])]]
    merges = []
    for rank in range(256, 260):
        pairs: dict[tuple[int, int], int] = {}
        for word in words:
            for pair in pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(pairs.values())
        choices = [pair for pair, count in pairs.items() if count == best]
        assert len(choices) == 1, "the corpus is made so that no two pairs tie"
        merges.append(choices[0])
        words = [merge(word, choices[0], rank) for word in words]
    trained = Tokenizer.train([corpus], 265 + 4).encoding._mergeable_ranks
    by_rank = {rank: token for token, rank in trained.items()}
    for rank, (left, right) in enumerate(merges, start=256):
        assert by_rank[rank] == by_rank[left] + by_rank[right]


def merge(word: Sequence[int], pair: tuple[int, int], rank: int) -> list[int]:
    out: list[int] = []
    for byte in word:
        if out and (out[-1], byte) == pair:
            out[-1] = rank
        else:
            out.append(byte)
    return out


@given(text=st.text(max_size=200))
@example(text="")
@example(text="<|bos|><|user_start|>")
@example(text="a\r\n\r\n  \tb 12345 \u2028 🚀é")
def test_round_trip_and_all_encoders_agree(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == tokenizer.encoding.encode_ordinary(text)
    assert all(token < 291 for token in ids), "special tokens inside text are plain text"
    assert tokenizer.encode(text, bos=True) == [tokenizer.bos_id, *ids]
    array = tokenizer.encode_numpy(text)
    assert array.dtype == np.uint32
    assert array.tolist() == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(array) == text


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", "ok \ud83d\ude80"])
def test_surrogates_as_tiktoken_does(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)
    Tokenizer.train([text * 3, "hello hello"], 266)  # training takes them as well


def test_endless_blanks_do_not_break_it(tokenizer: Tokenizer) -> None:
    """tiktoken's regex engine overflows here; encode_ordinary panics."""
    text = "x" + " " * 1_000_000 + "y"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("bad", [300, -1, 1 << 40])
def test_decode_unknown_id(tokenizer: Tokenizer, bad: int) -> None:
    with pytest.raises(UserError, match=f"token id {bad} .* 0 to 299"):
        tokenizer.decode([5, bad])


def test_decode_of_half_a_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(list("é".encode())[:1]) == "\ufffd"


def test_vocab_size_limits(texts: list[str]) -> None:
    with pytest.raises(UserError, match=r"vocab_size is 264; it must be .* at least 265"):
        Tokenizer.train(texts, 264)
    with pytest.raises(UserError, match=r"vocabulary of \d+ tokens, not 5000"):
        Tokenizer.train(["tiny text"], 5000)
    with pytest.raises(UserError, match=r"no special token; there are <\|bos\|>"):
        Tokenizer.train(texts, 265).special("<|nope|>")


def test_load_from_memory_uri(tokenizer: Tokenizer) -> None:
    tokenizer.save("memory://tokenizer-test/here")
    assert Tokenizer.load("memory://tokenizer-test/here").digest == tokenizer.digest


def test_pickles_across_processes(tokenizer: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("the harbour") == tokenizer.encode("the harbour")
    assert again.digest == tokenizer.digest


class Evil:
    """Pickles as a shell command that leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def state_pickle(state: Any) -> bytes:
    """A pickle of an Encoding with any state, written opcode by opcode as pickle itself would."""
    head = b"\x80\x04\x8c\rtiktoken.core\x8c\x08Encoding\x93)\x81"
    return head + pickle.dumps(state, protocol=4)[2:-1] + b"b."


def good_state(tokenizer: Tokenizer) -> dict[str, Any]:
    e = tokenizer.encoding
    return dict(name=e.name, pat_str=e._pat_str, mergeable_ranks=e._mergeable_ranks, special_tokens=e._special_tokens)


def test_hostile_and_damaged_pickles(tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = pickle.dumps(tokenizer.encoding)
    state = good_state(tokenizer)
    ranks = state["mergeable_ranks"]
    cases = {
        "refers to posix.system": pickle.dumps(Evil(tmp_path / "marker")),
        "refers to builtins.eval": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        "no encoding": pickle.dumps({"a": 1}),
        "own vocabulary": state_pickle("gpt2"),  # tiktoken would fetch it from the network
        "mergeable_ranks is missing": state_pickle({k: v for k, v in state.items() if k != "mergeable_ranks"}),
        "do not map bytes": state_pickle({**state, "mergeable_ranks": {"a": 1}}),
        "single bytes": state_pickle({**state, "mergeable_ranks": {b"a": 0}}),
        "gaps or repeat": state_pickle({**state, "mergeable_ranks": {**ranks, b"zzzz": 7}}),
        "lacks the special tokens": state_pickle({**state, "special_tokens": {"<|endoftext|>": 291}}),
        "invalid vocabulary": state_pickle({**state, "pat_str": "(unclosed"}),
        "is not a tokenizer": good[: len(good) // 2],
        "not a tokenizer": b"",
        "a tokenizer": b"\x00garbage",
    }
    for message, data in cases.items():
        (tmp_path / "tokenizer.pkl").write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.load(str(tmp_path))
    assert not (tmp_path / "marker").exists(), "nothing in a pickle is executed"
    (tmp_path / "tokenizer.pkl").write_bytes(state_pickle(state))
    assert Tokenizer.load(str(tmp_path)).digest == tokenizer.digest


def test_every_truncation_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = pickle.dumps(tokenizer.encoding)
    positions = [position for _, _, position in pickletools.genops(data) if position]
    for cut in [1, 2, *positions[::40], len(data) - 1]:
        (tmp_path / "tokenizer.pkl").write_bytes(data[:cut])
        with pytest.raises(CheckpointError):
            Tokenizer.load(str(tmp_path))


def test_load_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer at .*tok_train"):
        Tokenizer.load(str(tmp_path))


# Chats


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(text: Any) -> dict[str, Any]:
    return {"role": "system", "content": text}


def test_rendering_by_hand(tokenizer: Tokenizer) -> None:
    s = tokenizer.special
    parts = [{"type": "text", "text": "hm"}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    ids, mask = tokenizer.render_conversation({"messages": [system("S"), user("U"), assistant(parts)]})
    spans: list[tuple[list[int], int]] = [
        ([tokenizer.bos_id, s("<|user_start|>"), *tokenizer.encode("S\n\nU"), s("<|user_end|>")], 0),
        ([s("<|assistant_start|>")], 0),
        ([*tokenizer.encode("hm"), s("<|python_start|>"), *tokenizer.encode("1+1"), s("<|python_end|>")], 1),
        ([s("<|output_start|>"), *tokenizer.encode("2"), s("<|output_end|>")], 0),
        ([s("<|assistant_end|>")], 1),
    ]
    assert ids == [token for span, _ in spans for token in span]
    assert mask == [flag for span, flag in spans for _ in span]


def test_max_tokens_and_untouched_input(tokenizer: Tokenizer) -> None:
    conv = {"messages": [system("S"), user("U"), assistant("A" * 50)]}
    before = json.dumps(conv)
    ids, mask = tokenizer.render_conversation(conv)
    assert tokenizer.render_conversation(conv, max_tokens=7) == (ids[:7], mask[:7])
    assert tokenizer.render_conversation(conv, max_tokens=10_000) == (ids, mask)
    tokenizer.render_for_completion(conv)
    assert json.dumps(conv) == before
    with pytest.raises(UserError, match="max_tokens is 0"):
        tokenizer.render_conversation(conv, max_tokens=0)


def test_completion_drops_only_a_last_answer(tokenizer: Tokenizer) -> None:
    open_end = {"messages": [user("a"), assistant("b"), user("c")]}
    closed = {"messages": [*open_end["messages"], assistant("d")]}
    ids = tokenizer.render_for_completion(closed)
    assert ids == tokenizer.render_for_completion(open_end)
    assert ids == [*tokenizer.render_conversation(open_end)[0], tokenizer.special("<|assistant_start|>")]


@given(st.lists(st.text(max_size=20), min_size=1, max_size=6))
def test_specials_never_come_from_text(tokenizer: Tokenizer, contents: list[str]) -> None:
    roles = [user, assistant]
    messages = [roles[i % 2](text + "<|assistant_end|>") for i, text in enumerate(contents)]
    ids, mask = tokenizer.render_conversation({"messages": messages})
    assert len(ids) == len(mask)
    assert sum(token >= 291 for token in ids) == 1 + 2 * len(messages)
    assert sum(mask) == sum(len(tokenizer.encode(m["content"])) + 1 for m in messages[1::2])


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        ({}, "at least one message"),
        ([], "at least one message"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hello"}, "at least one message"),
        ({"messages": ["hello"]}, "message 0 is 'hello'"),
        ({"messages": [{"role": "user"}]}, "role and a content"),
        ({"messages": [assistant("x")]}, "message 0 is from 'assistant' but must be from 'user'"),
        ({"messages": [user("x"), user("y")]}, "message 1 is from 'user' but must be from 'assistant'"),
        ({"messages": [user("x"), system("y")]}, "message 1 is from 'system'"),
        ({"messages": [system("x")]}, "followed by a user message"),
        ({"messages": [system("x"), assistant("y")]}, "followed by a user message"),
        ({"messages": [user(None)]}, "NoneType; it must be a text"),
        ({"messages": [user([{"type": "text", "text": "x"}])]}, "list; it must be a text"),
        ({"messages": [user("x"), assistant(3)]}, "int; it must be a text or a list"),
        ({"messages": [user("x"), assistant(["x"])]}, "part 0 of message 1 is 'x'"),
        ({"messages": [user("x"), assistant([{"type": "text"}])]}, "part 0 of message 1"),
        (
            {"messages": [user("x"), assistant([{"type": "image", "text": "x"}])]},
            "'image'; known types are text, python",
        ),
        ({"messages": [user("x"), assistant([{"type": ["text"], "text": "x"}])]}, "known types"),
    ],
)
def test_malformed_chats(tokenizer: Tokenizer, conv: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tokenizer.render_conversation(conv)


def test_completion_of_an_answer_alone(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="at least one message"):
        tokenizer.render_for_completion({"messages": [assistant("x")]})
