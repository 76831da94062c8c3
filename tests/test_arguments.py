"""Arguments of a wrong type or value: each is named in an error of ours, and nothing is done or lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from session_programs import BLOCK, OPTIONS, PLAIN, VOCAB, make_model, make_tokenizer, random_ids

import megacontext as mc
from megacontext import arguments
from megacontext.config import GPTConfig, MemoryConfig
from megacontext.context.gist_function import MeanGist
from megacontext.context.tree import Tree
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import DataError, NonFiniteError, UserError
from megacontext.inference.engine import Engine, naive_generate
from megacontext.model.gpt import GPT

MODEL, MEMORY_MODEL, TOKENIZER = make_model(False), make_model(True), make_tokenizer()
NAN = float("nan")


def session_of(model: GPT = MODEL, **options: Any) -> mc.Session:
    return mc.Session(model, TOKENIZER, **{**(OPTIONS if model.memory is not None else PLAIN), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(budget=2.5), "budget is 2.5; it must be a whole number"),
        (dict(budget="64"), "budget is '64'; it must be a whole number"),
        (dict(budget=True), "budget is True; it must be a whole number"),
        (dict(budget=NAN), "budget is nan"),
        (dict(recent_tokens=[3]), r"recent_tokens is \[3\]"),
        (dict(refocus_interval=6.0), "refocus_interval is 6.0"),
        (dict(block_size="4"), "block_size is '4'"),
        (dict(max_lod="two"), "max_lod is 'two'"),
        (dict(seed=-1), "seed is -1; it must be at least 0"),
        (dict(seed=1.5), "seed is 1.5"),
        (dict(expand_threshold="low"), "expand_threshold is 'low'; it must be a finite number"),
        (dict(sample_temperature=NAN), "sample_temperature is nan"),
        (dict(dtype=torch.float32), "dtype is torch.float32; it must be a text"),
        (dict(allocator_type=1), "allocator_type is 1; it must be a text"),
        (dict(path=5), "path is 5; it must be a path"),
        (dict(path=""), "path is ''; it must be a path"),
        (dict(path=b"here"), "path is b'here'; it must be a path"),
        (dict(durable="no"), "durable is 'no'; it must be True or False"),
        (dict(replace_gists=2), "replace_gists is 2; it must be True or False"),
        (dict(on_refocus=3), "on_refocus is 3; it must be a function"),
    ],
)
def test_options_of_a_session(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        session_of(**options)


@pytest.mark.parametrize("name", ["budget", "seed"])
def test_numbers_of_numpy_are_numbers(tmp_path: Path, name: str) -> None:
    with session_of(path=tmp_path / "s", **{name: np.int64(40)}) as session:
        session.append(random_ids(60))
        list(session.generate(np.int32(2), np.float32(0.5), np.int64(3), seed=np.uint8(1), stop=np.array([], np.int64)))
        tokens = session.tokens
    with session_of(path=str(tmp_path / "s"), **{name: np.int16(40)}) as again:
        assert (again.tokens, getattr(again.options, name)) == (tokens, 40)


@pytest.mark.parametrize(
    "ids",
    [[1, 2], (1, 2), range(1, 3), np.array([1, 2], np.uint8), torch.tensor([1, 2], dtype=torch.int16), iter([1, 2])],
)
def test_ids_of_every_kind_that_can_be(ids: Any) -> None:
    session = session_of()
    session.append(ids)
    assert session.tree.ids(0, 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2], [3]], "append must be whole numbers in one dimension, not .*inhomogeneous"),
        ([[1, 2], [3, 4]], r"append must be .* not int64 \[2, 2\]. Give a flat list"),
        (torch.ones(3, requires_grad=True), r"append must be .* not float32 \[3\]"),
        (torch.ones(2, 2, requires_grad=True), r"append must be .* not float32 \[2, 2\]"),
        ([1.5], r"append must be .* not float64 \[1\]"),
        ([True, False], r"append must be .* not bool \[2\]"),
        (["a", "b"], "append must be whole numbers"),
        ([None], "append must be whole numbers"),
        (None, "append must be whole numbers"),
        (7, r"append must be .* not int64 \[\]"),
        ({1: 2}, "append must be whole numbers"),
        ({1, 2}, "append must be whole numbers"),
        (b"abc", "append must be whole numbers"),
        ([2**70], "append must be whole numbers"),
        ([1, VOCAB], f"token id {VOCAB} at position 1 of the append is outside the vocabulary of {VOCAB} tokens"),
        ([-1], "token id -1 at position 0"),
        (np.array([2**63], np.uint64), "token id 9223372036854775808 at position 0"),
    ],
)
def test_an_append_that_cannot_be_loses_nothing(ids: Any, message: str) -> None:
    session = session_of()
    session.append(random_ids(30))
    for receiver in (session, session.tree):
        with pytest.raises(DataError, match=message):
            receiver.append(ids)
    assert session.tokens == session.tree.tokens == 30
    assert len(list(session.generate(1, stop=()))) == 1


SAMPLING: list[tuple[dict[str, Any], str]] = [
    (dict(max_tokens=2.5), "max_tokens is 2.5; it must be a whole number of at least 0"),
    (dict(max_tokens="9"), "max_tokens is '9'"),
    (dict(max_tokens=True), "max_tokens is True"),
    (dict(max_tokens=-1), "max_tokens is -1"),
    (dict(temperature="hot"), "temperature is 'hot'; it must be a finite number of at least 0"),
    (dict(temperature=NAN), "temperature is nan"),
    (dict(temperature=float("inf")), "temperature is inf"),
    (dict(temperature=None), "temperature is None"),
    (dict(temperature=1j), "temperature is 1j"),
    (dict(top_k=2.5), "top_k is 2.5; it must be a whole number of at least 1"),
    (dict(top_k=True), "top_k is True"),
    (dict(top_k=0), "top_k is 0"),
    (dict(seed=-1), "seed is -1; it must be a whole number from 0 to 18446744073709551615"),
    (dict(seed=2**64), "seed is 18446744073709551616"),
    (dict(seed="x"), "seed is 'x'"),
]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *SAMPLING,
        (dict(stop=5), "stop is 5; it must be a list of token ids; .. never stops"),
        (dict(stop="ab"), "stop is 'ab'"),
        (dict(stop=["a"]), "stop must be whole numbers"),
        (dict(stop=[0.5]), "stop must be whole numbers"),
        (dict(stop=[VOCAB]), f"token id {VOCAB} at position 0 of stop is outside"),
    ],
)
def test_settings_of_generate_are_refused_at_the_call(settings: dict[str, Any], message: str) -> None:
    session = session_of()
    session.append(random_ids(5))
    with pytest.raises(UserError, match=message):
        session.generate(**{"max_tokens": 1, **settings})
    assert session.tokens == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *SAMPLING,
        (dict(num_samples=1.0), "num_samples is 1.0; it must be a whole number of at least 1"),
        (dict(prompt="the cat"), "the prompt must be whole numbers"),
        (dict(prompt=[[1]]), "the prompt must be whole numbers"),
        (dict(prompt=5), "the prompt must be whole numbers"),
        (dict(prompt=[0.5]), "the prompt must be whole numbers"),
        (dict(prompt=[]), "the prompt is empty"),
        (dict(prompt=[VOCAB]), f"token id {VOCAB} at position 0 of the prompt"),
        (dict(cache={}), "cache is a dict; make one by engine.new_cache"),
    ],
)
def test_settings_of_an_engine(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Engine(MODEL, TOKENIZER).generate(**{"prompt": [1], "max_tokens": 1, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(prompts="the cat"), "prompts is 'the cat'; it must be a list of prompts"),
        (dict(prompts=[1, 2]), "prompt 0 must be whole numbers"),
        (dict(prompts=[[1], [VOCAB]]), f"token id {VOCAB} at position 0 of prompt 1"),
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(max_rows=0), "max_rows is 0; it must be a whole number of at least 1"),
        (dict(max_tokens=None), "max_tokens is None"),
        (dict(top_k=1.5), "top_k is 1.5"),
    ],
)
def test_settings_of_an_engine_for_many_prompts(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Engine(MODEL, TOKENIZER).generate_many(**{"prompts": [[1]], "max_tokens": 1, **settings})


def test_prompts_may_be_arrays_and_tensors() -> None:
    engine = Engine(MODEL, TOKENIZER)
    expected = naive_generate(MODEL, [3, 4, 5], 3)
    for prompt in (np.array([3, 4, 5]), torch.tensor([3, 4, 5])):
        assert engine.generate_batch(prompt, 1, 3, temperature=0)[0].new_ids == expected  # type: ignore[arg-type]
        assert engine.generate_many([prompt], 3)[0].new_ids == expected  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2]], r"takes ids \[B, T\] int64, at least one, not a list. Use torch.tensor\(\[ids\]\)"),
        (np.array([[1]]), "not a ndarray"),
        (torch.tensor([1, 2]), r"not torch.int64 \[2\]"),
        (torch.tensor([[0.5]]), r"not torch.float32 \[1, 1\]"),
        (torch.empty(1, 0, dtype=torch.int64), r"not torch.int64 \[1, 0\]"),
        (torch.tensor([[0, VOCAB]]), f"ids are 0 to {VOCAB}; the vocabulary has 0 to {VOCAB - 1}"),
        (torch.tensor([[-1]]), "ids are -1 to -1"),
        (torch.zeros(1, 1, dtype=torch.int64, device="meta"), "on meta, the model is on cpu; use ids.to"),
    ],
)
def test_ids_of_a_model(ids: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        MODEL(ids)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TOKENIZER.encode(None), "text is None; it must be a text"),
        (lambda: TOKENIZER.encode(b"a"), "text is b'a'; it must be a text"),
        (lambda: TOKENIZER.encode(["a"]), r"text is \['a'\]; .* one by one"),
        (lambda: TOKENIZER.decode("12"), "ids must be whole numbers"),
        (lambda: TOKENIZER.decode(5), "ids must be whole numbers"),
        (lambda: TOKENIZER.decode([1.5]), "ids must be whole numbers"),
        (lambda: TOKENIZER.decode([[1]]), "ids must be whole numbers"),
        (lambda: TOKENIZER.decode(None), "ids must be whole numbers"),
        (lambda: TOKENIZER.special([]), "no special token"),
        (lambda: TOKENIZER.render_conversation("hi"), "a conversation is"),
        (lambda: TOKENIZER.render_conversation({"messages": [{"role": "user", "content": 5}]}), "it must be a text"),
        (
            lambda: TOKENIZER.render_conversation({"messages": [{"role": "user", "content": "x"}]}, 2.5),
            "max_tokens is 2.5",
        ),
        (lambda: TOKENIZER.render_for_completion([]), "a conversation is"),
        (lambda: Tokenizer.train(["a"], 300.5), "vocab_size is 300.5"),
        (lambda: Tokenizer.train("a long text", 300), "texts is one text; give a list"),
        (
            lambda: GPTConfig(sequence_len=8, vocab_size=9, n_layer="2", n_head=1, n_kv_head=1, n_embd=8),
            "n_layer is '2'",
        ),
        (lambda: MemoryConfig(block_size=4.0), "block_size is 4.0"),
        (lambda: mc.load(5), "path is 5"),
        (lambda: mc.load(""), "path is ''"),
        (lambda: mc.load(".", step=1.5), "step is 1.5"),
        (lambda: mc.load(".", stage=1), "stage 1 is unknown"),
        (lambda: mc.load(".", tag=1), "tag is 1"),
        (lambda: mc.load(".", dtype=[]), r"dtype \[\] is unknown; choose one of auto, fp32, bf16"),
        (lambda: mc.load(".", device="gpu"), "device 'gpu' cannot be used"),
        (lambda: mc.load(".", device="cuda:99"), "device 'cuda:99' cannot be used"),
        (lambda: mc.load(".", trainable="yes"), "trainable is 'yes'"),
        (lambda: mc.save_nanochat(TOKENIZER, MODEL, "x"), "model is a Tokenizer and tokenizer is a GPT"),
        (lambda: mc.save_nanochat(MODEL, TOKENIZER, 5), "directory is 5"),
        (lambda: mc.save_nanochat(MODEL, TOKENIZER, "x", stage="chat"), "stage 'chat' is unknown"),
        (lambda: mc.save_nanochat(MODEL, TOKENIZER, "x", step=-1), "step is -1"),
        (lambda: mc.save_nanochat(MODEL, TOKENIZER, "x", tag="a/b"), "tag is 'a/b'"),
        (lambda: mc.Session(TOKENIZER, MODEL), "model is a Tokenizer and tokenizer is a GPT"),
        (lambda: Engine(MODEL, None), "tokenizer is a NoneType"),
        (lambda: Tree(MeanGist(torch.zeros(9, 4), 2, 4)).append("ab"), "append must be whole numbers"),
    ],
)
def test_the_rest_of_the_public_api(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    other = Tokenizer.train(["the cat sat on the mat"] * 8, 270)
    for use in (
        lambda: mc.Session(MODEL, other),
        lambda: Engine(MODEL, other),
        lambda: mc.save_nanochat(MODEL, other, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=f"tokenizer has 270 tokens, the model was made for {VOCAB}"):
            use()
    assert not (tmp_path / "out").exists()


def broken(memory: bool, name: str) -> GPT:
    model = make_model(memory)
    dict(model.named_parameters())[name].data.view(-1)[0] = NAN
    return model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_proj.weight", "lm_head.weight"])
def test_weights_that_are_no_numbers_say_nothing(name: str, temperature: float) -> None:
    model = broken(False, name)
    session = session_of(model)
    session.append(random_ids(5))
    with pytest.raises(NonFiniteError, match=r"largest logit is not a finite number.*earlier checkpoint"):
        next(session.generate(1, temperature, 5))
    assert session.tokens == session.tree.tokens == 5
    engine = Engine(model, TOKENIZER)
    with pytest.raises(NonFiniteError, match="largest logit"):
        next(engine.generate([1, 2], 2, 3, temperature))
    with pytest.raises(NonFiniteError, match="largest logit"):
        engine.generate_many([[1], [2, 3]], 3, temperature)
    with pytest.raises(NonFiniteError, match="largest logit"):
        naive_generate(model, [1], 1, temperature)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("lens.head.c_proj.weight", "a score of LensNet"),
        ("router.gate.weight", "the routing query"),
        ("router.log_scale", "the router's scale"),
    ],
)
def test_a_memory_whose_weights_are_no_numbers_is_named(name: str, what: str) -> None:
    session = session_of(broken(True, f"memory.{name}"))
    session.append(random_ids(300))
    with pytest.raises(NonFiniteError, match=f"{what}.* is not a finite number"):
        list(session.generate(1))
    assert session.tokens == 300


def test_a_session_says_what_it_is(tmp_path: Path) -> None:
    assert repr(session_of()) == "<Session: 0 tokens, 0 of 48 entries, levels 0 to 0, in memory>"
    folder = tmp_path / "ada"
    session = session_of(MEMORY_MODEL, path=folder)
    session.append(random_ids(3000))
    session.refocus()
    said = f"<Session: 3,000 tokens, {len(session.entries)} of 48 entries, levels 0 to {max(session.entries)[0]}, at {str(folder)!r}"
    assert str(session) == said + ">"
    tree = f"<Tree: 3,000 tokens, 5 levels, blocks of {BLOCK}, at {str(folder / 'tree')!r}>"
    assert repr(session.tree) == tree
    session.close()
    assert repr(session) == said + ", closed>"
    assert repr(session.tree) == f"<Tree: blocks of {BLOCK}, at {str(folder / 'tree')!r}, closed>"
    assert "in memory" in repr(Tree(MeanGist(torch.zeros(9, 4), 2, 4)))


def test_numbers_and_their_limits() -> None:
    assert arguments.whole_number("n", 3, 3, 3) == 3
    assert arguments.number("n", np.float32(0.5), 0, 1) == 0.5
    assert arguments.truth("n", 1) is True
    for call in (
        lambda: arguments.whole_number("n", 4, 3, 3),
        lambda: arguments.number("n", 10**400),
        lambda: arguments.number("n", 2, 0, 1),
    ):
        with pytest.raises(UserError, match="n is"):
            call()
