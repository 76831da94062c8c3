"""A conversation over an engine and over a session: turns, tools, stop texts, whole characters; and its command line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from session_programs import OPTIONS, PLAIN, ids_of, make_model, make_tokenizer, one_thread
from test_mc_training import make_mc_task, train_here

import megacontext as mc
from jobs import chat_cli
from megacontext.errors import UserError
from megacontext.inference import engine as engine_module
from megacontext.inference import session as session_module
from megacontext.inference.chat import Chat, StopStrings
from megacontext.inference.engine import Engine
from megacontext.model.gpt import GPT

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = make_tokenizer()
_threads = pytest.fixture(scope="module", autouse=True)(one_thread)


def special(*names: str) -> list[int]:
    return [TOKENIZER.special(f"<|{name}|>") for name in names]


USER, USER_END, START, END = special("user_start", "user_end", "assistant_start", "assistant_end")
PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = special("python_start", "python_end", "output_start", "output_end")


def over(kind: str, model: GPT | None = None) -> Engine | mc.Session:
    """An engine, or a session of a model with or without a memory."""
    if kind == "engine":
        return Engine(model or make_model(False), TOKENIZER)
    model = model or make_model(kind == "memory")
    return mc.Session(model, TOKENIZER, **(OPTIONS if model.memory is not None else PLAIN))


def history(chat: Chat) -> list[int]:
    """The ids of a conversation."""
    talk: Any = chat._talk
    return list(talk.ids) if hasattr(talk, "ids") else ids_of(talk.session)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], None]:
    """Makes every model say these ids."""

    def scripted(ids: list[int]) -> None:
        said: Iterator[int] = iter(ids)
        for module in (engine_module, session_module):
            monkeypatch.setattr(module, "sample", lambda logits, *rest: torch.tensor([next(said)] * len(logits)))

    return scripted


KINDS = pytest.mark.parametrize("kind", ["engine", "plain", "memory"])


@KINDS
def test_turns_are_rendered_as_in_training(kind: str, script: Callable[[list[int]], None]) -> None:
    """The conversation is the one that `render_conversation` makes of its messages, however its answers ended."""
    hello, bye = TOKENIZER.encode("the cat"), TOKENIZER.encode("on the mat")
    chat = Chat(over(kind), max_tokens=len(bye))
    script([*hello, END])
    said = "".join(chat.reply("12 + 30"))
    script([*bye, *bye])
    cut = "".join(chat.reply("sat <|bos|> on"))
    messages = [
        {"role": "user", "content": "12 + 30"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "sat <|bos|> on"},
        {"role": "assistant", "content": cut},
        {"role": "user", "content": "and"},
    ]
    assert (said, cut) == ("the cat", "on the mat")
    script([END])
    assert "".join(chat.reply("and")) == ""
    expected = TOKENIZER.render_for_completion({"messages": messages})
    assert history(chat)[: len(expected)] == expected
    assert history(chat)[len(expected) :] == [END]


@pytest.mark.parametrize("template", [True, False])
def test_a_session_that_has_room_for_all_holds_what_the_engine_holds(template: bool) -> None:
    """The answers are greedy, so one id that differs in a history would change what follows."""
    model = make_model(False, seq=512)
    session = mc.Session(model, TOKENIZER, budget=400, recent_tokens=350, block_size=4)
    chats = [
        Chat(one, template=template, max_tokens=40, temperature=0.0) for one in (Engine(model, TOKENIZER), session)
    ]
    for text in ("the cat", " sat on", "12 + 30", " the mat", "makes"):
        first, second = ("".join(chat.reply(text)) for chat in chats)
        assert first == second
    assert history(chats[0]) == history(chats[1])
    assert not any(lod for lod, _ in session.entries)
    assert session.host.stop_ids & set(history(chats[0])[1:])  # an answer has ended by itself


@KINDS
def test_text_without_the_template_is_continued(kind: str) -> None:
    model = make_model(kind == "memory")
    chat = Chat(over(kind, model), template=False, max_tokens=4, temperature=0.0)
    prompt = [TOKENIZER.bos_id, *TOKENIZER.encode("the cat")]
    first = "".join(chat.reply("the cat"))
    answer = history(chat)[len(prompt) :]
    assert history(chat)[: len(prompt)] == prompt
    assert len(answer) <= 4
    assert TOKENIZER.decode([token for token in answer if token not in (TOKENIZER.bos_id, END)]) == first
    before = history(chat)
    sat = TOKENIZER.encode(" sat")
    list(chat.reply(" sat"))
    assert history(chat)[: len(before + sat)] == before + sat


def test_a_tool_turn_over_a_session_forces_what_the_engine_forces(script: Callable[[list[int]], None]) -> None:
    called = [PYTHON, *TOKENIZER.encode("12 + 30"), PYTHON_END]
    result = [OUTPUT, *TOKENIZER.encode("42"), OUTPUT_END]
    after = [*TOKENIZER.encode("makes 42"), END]
    told = {}
    for kind in ("engine", "plain", "memory"):
        chat = Chat(over(kind), max_tokens=50)
        # The engine samples an id in the place of every forced one, and drops it. A session samples none.
        script([*called, *([0] * len(result) if kind == "engine" else []), *after])
        told[kind] = "".join(chat.reply("add"))
        assert [token for token in history(chat) if token != END][-len(called + result + after) + 1 :] == [
            *called, *result, *after[:-1],
        ]  # fmt: skip
    assert "<|output_start|>42<|output_end|>" in told["engine"]
    assert len(set(told.values())) == 1


@KINDS
@pytest.mark.parametrize("room", [0, 1, 2])
def test_forced_ids_count_as_tokens_of_the_answer(kind: str, room: int, script: Callable[[list[int]], None]) -> None:
    called = [PYTHON, *TOKENIZER.encode("1+1"), PYTHON_END]
    chat = Chat(over(kind), max_tokens=len(called) + room)
    script([*called, 0, 0, 0, 0])
    list(chat.reply("add"))
    assert history(chat)[-len(called) - room :] == [*called, *[OUTPUT, *TOKENIZER.encode("2")][:room]]


@KINDS
def test_a_character_of_several_tokens_comes_whole(kind: str, script: Callable[[list[int]], None]) -> None:
    text = "mañana 日本 🦊"
    ids = TOKENIZER.encode(text)
    assert len(ids) > len(text)  # the small vocabulary has single bytes for these
    chat = Chat(over(kind))
    script([*ids, END])
    pieces = list(chat.reply("say it"))
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "🦊" in pieces
    script([*TOKENIZER.encode("a"), ids[-2], END])  # half a character
    assert "".join(chat.reply("say it")) == "a\N{REPLACEMENT CHARACTER}"


@given(
    st.text("ab#", max_size=30),
    st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5)),
)
def test_stop_texts_are_found_wherever_pieces_end(text: str, stop: list[str], lengths: list[int]) -> None:
    stops, shown, at = StopStrings(stop), "", 0
    for length in [*lengths, len(text)]:
        shown += stops.take(text[at : at + length])
        at += length
        ends = [place for one in stop if (place := text[:at].find(one)) >= 0]
        assert stops.met == bool(ends)
        if stops.met:
            break
        assert not any(one in shown for one in stop)
        assert shown + stops.held == text[:at]
    if stops.met:
        assert text.startswith(shown)
        assert not any(one in shown for one in stop)
        assert any(text[len(shown) :].startswith(one) for one in stop)


@KINDS
def test_a_stop_text_ends_the_answer_and_is_not_shown(kind: str, script: Callable[[list[int]], None]) -> None:
    chat = Chat(over(kind), stop=["\n\nUser"])
    ids = TOKENIZER.encode("the mat\n\nUs and\n\nUser: on the mat")
    script([*ids, END])
    assert "".join(chat.reply("where")) == "the mat\n\nUs and"
    assert "on" not in TOKENIZER.decode(history(chat)[-4:])
    script([*TOKENIZER.encode("cat\n\nUs"), END])
    assert "".join(chat.reply("who")) == "cat\n\nUs"  # what was held back comes at the end
    with pytest.raises(UserError, match="stop has an empty text"):
        Chat(over(kind), stop=["a", ""])


@KINDS
def test_an_answer_that_was_cut_short_is_ended_by_the_next_turn(kind: str) -> None:
    chat = Chat(over(kind), max_tokens=9, temperature=0.0)
    reply = chat.reply("the cat")
    next(reply)
    reply.close()
    cut = history(chat)
    assert START in cut
    assert END not in cut
    list(chat.reply("sat"))
    turn = [END, USER, *TOKENIZER.encode("sat"), USER_END, START]
    assert history(chat)[: len(cut) + len(turn)] == cut + turn


def test_draws_depend_on_the_seed_and_on_what_was_said() -> None:
    def talk(seed: int, first: str) -> list[str]:
        chat = Chat(over("plain", model), seed=seed, temperature=1.5, max_tokens=12)
        return ["".join(chat.reply(text)) for text in (first, "and")]

    model = make_model(False)
    assert talk(1, "the cat") == talk(1, "the cat") != talk(2, "the cat")


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs `base` and `chat`: two steps with a memory, the second as the stage that teaches chats."""
    folder = tmp_path_factory.mktemp("chat")
    train_here(make_mc_task(folder, "base", num_iterations=2))
    train_here(make_mc_task(folder, "chat", num_iterations=2, stage="sft"))
    return folder


FLAGS = ["--temperature", "0", "--max_tokens", "6", "--device", "cpu", "--dtype", "fp32"]
FOCUS = ["--mc_eval_soft_max_length", "40", "--allocator_recent_tokens", "8", "--mc_infer_refocus_interval", "4"]
WORDS = np.random.default_rng(1).permutation(260)


def words(first: int, count: int = 40) -> str:
    """Words of the tokenizer's own vocabulary."""
    letters = np.random.default_rng(0).integers(0, 26, (260, 4)) + ord("a")
    return " ".join(bytes(letters[at].astype(np.uint8).tolist()).decode() for at in WORDS[first : first + count])


TURNS = [words(0), words(40), words(80), words(120)]


@pytest.fixture
def talk(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Types lines into chat_cli; returns the answers. What it said on stderr is in `talk.told`."""

    def typed(lines: list[str], *flags: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat_cli.main(["--storage", str(folder), "--base_dir", str(folder), *FLAGS, *flags])
        out, typed.told = capsys.readouterr()  # type: ignore[attr-defined]
        return [part.split("\n\nYou:")[0].strip("\n") for part in out.split("Model: ")[1:]]

    return typed


def read(folder: Path, run: str, name: str) -> tuple[list[int], list[tuple[int, int]], dict[str, Any]]:
    model, tokenizer = mc.load(str(folder / run))
    with mc.Session(model, tokenizer, path=folder / run / "sessions" / name, read_only=True) as session:
        return ids_of(session), session.entries, session.options.stored()


@pytest.mark.parametrize("run", ["base", "chat"])
def test_a_conversation_goes_on_where_it_ended(folder: Path, run: str, talk: Callable[..., list[str]]) -> None:
    """Two processes say what one says, over a history of several budgets."""
    whole = talk([*TURNS, "quit"], "--run", run, "--session", "whole", *FOCUS)
    first = talk([*TURNS[:2], "quit"], "--run", run, "--session", "parts", *FOCUS)
    second = talk(TURNS[2:], "--run", run, "--session", "parts")
    assert len(whole) == 4
    assert first + second == whole
    ids, entries, options = read(folder, run, "parts")
    assert (ids, entries, options) == read(folder, run, "whole")
    assert len(ids) > 4 * 40 >= 4 * len(entries)
    assert any(lod for lod, _ in entries)
    assert (options["budget"], options["recent_tokens"], options["refocus_interval"]) == (40, 8, 4)
    _, tokenizer = mc.load(str(folder / run))
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.special("<|user_start|>")) == (4 if run == "chat" else 0)
    for text in TURNS:
        assert text in tokenizer.decode(ids)


def test_a_memory_keeps_the_conversation_unless_told_otherwise(folder: Path, talk: Callable[..., list[str]]) -> None:
    sessions = folder / "base" / "sessions"
    talk([TURNS[0]], "--run", "base", "--session", "none")
    talk([], "--run", "base", "-p", TURNS[0])
    assert not (sessions / "default").exists()
    first = talk([TURNS[0]], "--run", "base")
    assert f"kept in {sessions / 'default'}" in talk.told  # type: ignore[attr-defined]
    talk([], "--run", "base", "-p", TURNS[1], "--session", "default")
    known, _, _ = read(folder, "base", "default")
    again = talk(["clear", TURNS[0]], "--run", "base")
    assert again == first
    assert "--session default.1 goes on with it" in talk.told  # type: ignore[attr-defined]
    assert read(folder, "base", "default.1")[0] == known
    assert len(read(folder, "base", "default")[0]) < len(known)


def test_a_run_of_any_tier_is_talked_to(folder: Path, talk: Callable[..., list[str]]) -> None:
    """Talking reads no setting of the run, so a machine without a GPU talks to a model that was trained on one."""
    known = folder / "base" / "config.yaml"
    known.write_text("stages: [base_train]\nrun: {tier: h100}\n")
    try:
        assert talk([TURNS[0]], "--run", "base", "--session", "none")
    finally:
        known.unlink()


def test_a_model_trained_further_goes_on_with_the_conversation(folder: Path, talk: Callable[..., list[str]]) -> None:
    train_here(make_mc_task(folder, "longer", num_iterations=4))
    newest = folder / "longer" / "checkpoints" / "megacontext_base_000004"
    newest.rename(folder / "later")
    talk([TURNS[0]], "--run", "longer")
    before, _, _ = read(folder, "longer", "default")
    (folder / "later").rename(newest)
    talk([TURNS[1]], "--run", "longer")
    assert "its gists are made anew" in talk.told  # type: ignore[attr-defined]
    assert read(folder, "longer", "default")[0][: len(before)] == before
    talk([TURNS[2]], "--run", "longer")
    assert "made anew" not in talk.told  # type: ignore[attr-defined]


def test_focus_flags_change_the_session_and_contradict_no_stored_one(
    folder: Path, talk: Callable[..., list[str]]
) -> None:
    talk([TURNS[0]], "--run", "base", "--session", "wide", *FOCUS)
    with pytest.raises(SystemExit, match="made with budget 40, but 48 is asked for"):
        talk([TURNS[1]], "--run", "base", "--session", "wide", "--mc_eval_soft_max_length", "48")
    talk([TURNS[1]], "--run", "base", "--session", "wide", "--budget", "40")
    with pytest.raises(SystemExit, match="--allocator_expand_threshold"):
        talk([TURNS[1]], "--run", "base", "--session", "new", "--allocator_expand_threshold", "3")
    for name in ("a/b", "..", "/tmp/x"):
        with pytest.raises(SystemExit, match="it must be the name of a folder"):
            talk([], "--run", "not even looked for", "--session", name)


def test_a_model_without_a_memory_has_a_session_when_it_is_asked_for(
    folder: Path, talk: Callable[..., list[str]]
) -> None:
    train_here(make_mc_task(folder, "vanilla", None, num_iterations=2))
    talk([TURNS[0]], "--run", "vanilla")
    assert not (folder / "vanilla" / "sessions").exists()
    talk(TURNS, "--run", "vanilla", "--session", "ada", "--mc_eval_soft_max_length", "80")
    assert len(read(folder, "vanilla", "ada")[1]) <= 80 < len(read(folder, "vanilla", "ada")[0])
    with pytest.raises(SystemExit, match=r"this model has no memory\. Leave it out, or give --session NAME"):
        talk([TURNS[0]], "--run", "vanilla", *FOCUS)


@pytest.mark.parametrize(
    ("path", "sessions"),
    [
        ("/r/mine", "/r/mine/sessions"),
        ("/r/mine/checkpoints", "/r/mine/sessions"),
        ("/r/mine/checkpoints/megacontext_sft_000010", "/r/mine/sessions"),
        ("/models/megacontext_base_000010/", "/models/sessions"),
        ("s3://bucket/runs/mine/checkpoints/megacontext_base_000010", "/base/runs/mine/sessions"),
    ],
)
def test_where_sessions_are(path: str, sessions: str) -> None:
    assert chat_cli.sessions_folder(path, "/base") == sessions


def test_ctrl_c_while_a_job_is_loaded_is_one_line(tmp_path: Path) -> None:
    """A Ctrl-C in the middle of `import torch`."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    known = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for job in ("jobs/chat_cli.py", "jobs/speedrun.py"):
        done = subprocess.run([sys.executable, job], cwd=ROOT, env=known, capture_output=True, text=True, check=False)
        assert done.stderr == "stopped before anything began\n"
        assert done.returncode in (-2, 130)
