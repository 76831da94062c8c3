"""recall_eval: answers equal plain forward passes, summaries are right, and the job writes what it prints."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import megacontext as mc
from jobs import lens_audit, recall_eval, recall_ladder
from megacontext.config import GPTConfig, MemoryConfig
from megacontext.data.parquet import encode_texts
from megacontext.data.recall import recall_items
from megacontext.data.recall_words import WordList
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import DataError
from megacontext.eval.recall import Answer, distance_edges, evaluate_recall, summarize, wilson
from megacontext.model.gpt import GPT
from megacontext.train.checkpoint import CheckpointWriter

RNG = np.random.default_rng(0)
TEXT = " ".join(RNG.choice(["".join(RNG.choice(list("abcdefghij"), 4)) for _ in range(150)], 20_000))


def make(tokenizer: Tokenizer, memory: bool) -> GPT:
    shape = GPTConfig(sequence_len=64, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
    model = GPT(shape)
    if memory:
        model.attach_memory(MemoryConfig(mc=1, block_size=8, routing_slots=2, routing_width=16, mc_recall_share=0.25))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vanilla`: a nanochat directory; `ours`: a checkpoint with a memory; some text."""
    folder = tmp_path_factory.mktemp("recall")
    tokenizer = Tokenizer.train([TEXT], 500)
    mc.save_nanochat(make(tokenizer, memory=False), tokenizer, str(folder / "vanilla"))
    model = make(tokenizer, memory=True)
    assert model.memory is not None
    writer = CheckpointWriter(str(folder / "ours"), "base", str(folder / "vanilla/tokenizer"), 1)
    config = {"model_config": asdict(model.config), "memory_config": asdict(model.memory.config)}
    writer.save(3, model.state_dict(), {}, config)
    writer.close()
    (folder / "text.txt").write_text(TEXT[:20_000])
    (folder / "text.parquet").write_bytes(encode_texts([TEXT[:9_000], TEXT[9_000:20_000]]))
    return folder


def test_answers_equal_plain_forward_passes(folder: Path) -> None:
    model, tokenizer = mc.load(str(folder / "vanilla"))
    words = WordList.from_tokenizer(tokenizer)
    items = list(recall_items("mqar", words, 500, 3, 1, block_size=8, pairs=20, questions=4))
    done: list[int] = []
    answers = evaluate_recall(
        model, items, ["window", "full", "oracle"], budget=70, tail=10, block_size=8,
        on_item=lambda number, asked: done.append(number * 100 + len(asked)),
    )  # fmt: skip
    assert done == [12, 112, 212]
    assert len(answers) == 3 * 3 * 4
    questions = [question for item in items for question in item.questions]
    for method, shown in (("window", 70), ("full", 503)):
        mine = [answer for answer in answers if answer.method == method]
        for at, (answer, question) in enumerate(zip(mine, questions, strict=True)):
            ids = np.concatenate([items[at // 4].ids, question.ids])[-shown:]
            with torch.no_grad():
                logits = model(torch.from_numpy(ids)[None])[0, -1].double()
            assert answer.nll == pytest.approx(float(-logits.log_softmax(0)[question.answer[0]]), abs=1e-4)
            assert answer.correct == (int(logits.argmax()) == question.answer[0])
            assert answer.item == at // 4
            assert answer.distance == 500 - question.evidence[0]
            assert answer.entries == shown
            first = 503 - shown
            assert answer.evidence_raw == (question.evidence[0] >= first)
    assert all(answer.evidence_raw for answer in answers if answer.method in ("full", "oracle"))
    assert all(answer.ms > 0 and answer.flops > 0 and answer.build_ms > 0 for answer in answers)


def test_a_model_that_knows_is_right(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model that copies what follows the words of the question, a method is right where it shows the fact."""
    model, tokenizer = mc.load(str(folder / "vanilla"))
    words = WordList.from_tokenizer(tokenizer)
    items = list(recall_items("mk_niah", words, 900, 12, 1, block_size=8, recent_tokens=10))
    answer_of = {tuple(q.ids[1:3].tolist()): int(q.answer[0]) for item in items for q in item.questions}
    seen: dict[str, Any] = {}

    def head(hidden: torch.Tensor) -> torch.Tensor:
        ids, asked = seen["ids"].tolist(), tuple(seen["ids"][-2:].tolist())
        facts = {tuple(ids[n + 1 : n + 3]): ids[n + 3] for n in range(len(ids) - 4) if ids[n] == words.tell}
        found = facts.get(asked, 0)
        assert found in (0, answer_of[asked])
        return torch.nn.functional.one_hot(torch.tensor([found]), tokenizer.vocab_size).float()

    embed_entries = model.embed_entries

    def watched(ids: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen["ids"] = ids[0]
        return embed_entries(ids, *rest)

    monkeypatch.setattr(model, "head", head)
    monkeypatch.setattr(model, "embed_entries", watched)
    answers = evaluate_recall(model, items, ["window", "bm25", "random", "oracle"], budget=100, tail=10, block_size=8)
    assert all(answer.correct == answer.evidence_raw for answer in answers)
    summary = summarize(answers, 900)
    rows = summary["methods"]
    assert rows["oracle"]["accuracy"] == rows["bm25"]["accuracy"] == 1
    assert rows["window"]["accuracy"] < 0.4
    assert "lens_recall" not in summary


def answer(method: str, distance: int, correct: bool, raw: bool = False) -> Answer:
    return Answer(method, 0, distance, correct, 0.5, raw, 10, 2.0, 100.0, 0.1)


def test_summary() -> None:
    answers = [answer("ours", d, d > 100, raw=d != 900) for d in (50, 100, 125, 126, 600, 900)]
    answers += [answer("oracle", d, True, raw=True) for d in (50, 100, 125, 126, 600, 900)]
    summary = summarize(answers, 1000)
    ours = summary["methods"]["ours"]
    assert (ours["items"], ours["correct"], ours["accuracy"]) == (6, 4, 4 / 6)
    near = ours["by_distance"]
    assert [(b["above_tokens"], b["up_to_tokens"]) for b in near] == [(0, 125), (125, 250), (250, 500), (500, 1000)]
    assert [(b["items"], b["correct"]) for b in near] == [(3, 1), (1, 1), (0, 0), (2, 2)]
    assert near[2]["accuracy"] is None
    assert summary["lens_recall"] == 5 / 6
    assert summary["lens_regret"] == pytest.approx(2 / 6)
    assert distance_edges(3) == [0, 1, 3]
    json.dumps(summary)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (1, 1, 0.2065, 1.0), (450, 500, 0.8706, 0.9234)],
)  # fmt: skip
def test_wilson_intervals(hits: int, total: int, low: float, high: float) -> None:
    rate = wilson([True] * hits + [False] * (total - hits))
    assert rate.value == hits / total
    assert (rate.low, rate.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize("task", ["niah", "mqar", "vt"])
@pytest.mark.parametrize("haystack", ["text.txt", "text.parquet"])
def test_the_job_writes_what_it_prints(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, haystack: str
) -> None:
    out = tmp_path / "deep/result.json"
    recall_eval.main([
        "--checkpoint", str(folder / "ours"), "--task", task, "--history", "700", "--items", "3", "--seed", "2",
        "--tail", "12", "--pairs", "9", "--haystack", str(folder / haystack), "--json", str(out), "--device", "cpu",
        "--dtype", "fp32",
    ])  # fmt: skip
    result = json.loads(out.read_text())
    assert list(result["methods"]) == [
        "window", "sinks", "mean_age", "gist_age", "random", "bm25", "flat", "ours", "oracle", "full",
    ]  # fmt: skip
    assert result["config"]["budget"] == 64
    assert result["config"]["block_size"] == 8
    rows = result["methods"]
    assert {row["items"] for row in rows.values()} == {24 if task == "mqar" else 3}
    assert all(row["entries"] <= 64 for name, row in rows.items() if name != "full")
    assert rows["full"]["entries"] == 703
    assert rows["oracle"]["evidence_raw"] == (1 if task != "vt" else pytest.approx(0.5, abs=0.5))
    assert result["lens_regret"] == rows["oracle"]["accuracy"] - rows["ours"]["accuracy"]
    assert (tmp_path / "deep/result.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert any(line.split()[:2] == [name, f"{100 * row['accuracy']:.1f}"] for line in printed.splitlines())
    assert "item 3/3" in printed


def test_the_lens_is_audited_on_a_recall_task(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "audit.json"
    flags = ["--checkpoint", str(folder / "ours"), "--history", "300", "--tail", "12", "--device", "cpu"]
    lens_audit.main([*flags, "--task", "mk_niah", "--windows", "2", "--json", str(out)])
    result = json.loads(out.read_text())
    assert result["config"]["windows"] == 8  # two histories, four questions each
    assert result["config"]["horizon"] == 1
    assert result["best"]["value"] >= result["rows"][0]["picked"]["value"] >= -result["best"]["value"]
    assert result["rows"][0]["picked"] != result["rows"][0]["picked_other"]
    for both in ([], ["--task", "niah", "--docs", str(folder / "text.txt")]):
        with pytest.raises(SystemExit, match="either --docs, long documents, or --task"):
            lens_audit.main([*flags, *both])


def test_the_job_on_a_vanilla_model_and_its_own_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recall_eval.main([
        "--checkpoint", str(folder / "vanilla"), "--budget", "150", "--history", "16500", "--items", "1",
        "--device", "cpu",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert "left out, since this model or history cannot have them: gist_age,flat,ours,full" in printed
    assert "lens recall" not in printed
    assert "haystack=library" in printed


def test_as_much_text_as_asked_for_is_read() -> None:
    tokenizer = Tokenizer.train([TEXT], 500)
    ids = recall_eval.haystack_ids("", tokenizer, 20_000)
    assert len(ids) >= 20_000
    assert len(recall_eval.haystack_ids("", tokenizer, 10)) < len(ids)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget", "20", "--tail", "20"], "a raw tail of 20 tokens in a budget of 20 entries"),
        (["--budget", "20", "--tail", "16"], "a budget of 20 entries cannot hold a history of 703 tokens"),
        (["--history", "5"], "a history of 5 tokens has 0 blocks of 8 tokens for facts"),
        (["--task", "mqar", "--history", "300"], "mqar needs 64"),
        (["--items", "0"], "--items is 0"),
        (["--methods", "ours,theirs"], "method 'theirs' is unknown"),
        (["--haystack", "nowhere.txt"], r"--haystack '.*/nowhere.txt' does not exist"),
        (["--haystack", "nowhere.parquet"], r"no parquet file at '.*/nowhere.parquet'"),
        (["--checkpoint", "nowhere"], "CheckpointError"),
    ],
)
def test_bad_requests(folder: Path, flags: list[str], message: str) -> None:
    text = str(folder / "text.txt")
    common = ["--checkpoint", str(folder / "ours"), "--history", "700", "--items", "1", "--haystack", text]
    with pytest.raises(SystemExit, match=message):
        recall_eval.main([*common, "--device", "cpu", *flags])


def test_bad_flags_and_bad_text(folder: Path, tmp_path: Path) -> None:
    for flags in (["--task", "needle"], ["--tasks", "niah"], []):
        with pytest.raises(SystemExit) as stopped:
            recall_eval.main([*(["--checkpoint", "x"] if flags else []), *flags])
        assert stopped.value.code == 2
    tokenizer = Tokenizer.load(str(folder / "vanilla/tokenizer"))
    (tmp_path / "latin.txt").write_bytes("Straße".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"latin\.txt' is not UTF-8 text"):
        recall_eval.haystack_ids(str(tmp_path / "latin.txt"), tokenizer, 10)
    with pytest.raises(DataError, match="holds no text"):
        recall_eval.haystack_ids(str(tmp_path / "empty.txt"), tokenizer, 10)


def test_the_ladder_asks_each_question_once_and_judges_by_its_bar(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = "window,ours,oracle"
    rungs = (
        recall_ladder.Rung("expansion", "mk_niah", 4, 4, methods, "oracle", 0.0, questions=2),
        recall_ladder.Rung("search", "mk_niah", 4, 4, methods, "ours", 1.01, questions=2),
        recall_ladder.Rung("left out", "niah", 4, 4, methods, "ours", 0.5),
    )
    monkeypatch.setattr(recall_ladder, "RUNGS", rungs)
    asked: list[Any] = []
    ask = recall_eval.run
    monkeypatch.setattr(recall_eval, "run", lambda args: asked.append(args) or ask(args))
    args = recall_ladder.parse(["--budget", "64", "--rungs", "1,2", "--items", "0.5", "--seed", "3"])
    rows = recall_ladder.climb(args, str(folder / "ours"), str(tmp_path))
    assert len(asked) == 1
    assert (asked[0].items, asked[0].history, asked[0].seed) == (2, 256, 1003)
    assert [(row["rung"], row["judged"], row["met"], row["questions"]) for row in rows] == [
        (1, "oracle", True, 4), (2, "ours", False, 4),
    ]  # fmt: skip
    assert rows[0]["accuracy"] == rows[1]["others"]["oracle"]
    text = recall_ladder.table(rows)
    assert "met" in text.splitlines()[0]
    assert "MISSED" in text.splitlines()[1]
    assert (tmp_path / "rung_1.json").exists()
