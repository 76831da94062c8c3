"""CORE: nanochat's own verdicts, a plain scorer written apart, packing against one row at a time, and bad bundles."""

import csv
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import test_bpb
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.config import GPTConfig
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import DataError
from megacontext.eval import core
from megacontext.eval.bpb import BpbResult, evaluate_bpb
from megacontext.eval.core import evaluate_core, pack_question, score_questions
from megacontext.eval.core_tasks import (
    CoreTask,
    Question,
    build_question,
    common_length,
    draw_fewshot,
    load_bundle,
    load_items,
    render_prompts,
)
from megacontext.model.gpt import GPT

BASELINES = {"pick": 25.0, "place": 50.0, "say": 0.0, "gone": 10.0}
ITEMS: dict[str, list[dict[str, Any]]] = {
    "pick": [{"query": f"{i} plus {i}?", "choices": [str(i), str(2 * i), "none of it"], "gold": i % 3} for i in range(9)],
    "place": [
        {"context_options": [f"The box {i} fits the bag", f"The bag {i} fits the box, it"], "continuation": "is big", "gold": i % 2}
        for i in range(7)
    ],
    "say": [{"context": f"count {i} \n", "continuation": f"{i} \u2028 {i + 1}"} for i in range(8)],
}  # fmt: skip
TYPES = {"pick": "multiple_choice", "place": "schema", "say": "language_modeling", "gone": "schema"}


@pytest.fixture(scope="module")
def parity(shared_data: Path) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """nanochat's tiny checkpoint, its tokenizer and its verdicts."""
    folder = shared_data / "nanochat_parity"
    meta = json.loads((folder / "base_checkpoints/d2/meta_000007.json").read_text())
    model = GPT(GPTConfig(**meta["model_config"]))
    model.load_state_dict(torch.load(folder / "base_checkpoints/d2/model_000007.pt"))
    return model, Tokenizer.load(str(folder / "tokenizer")), json.loads((folder / "core.json").read_text())


@pytest.fixture
def bundle_dir(tmp_path: Path) -> Path:
    """A bundle with one small task of each type and one whose file is missing."""
    entries = []
    for label, task_type in TYPES.items():
        uri = f"things/{label}.jsonl"
        entries.append({"label": label, "dataset_uri": uri, "num_fewshot": [2], "icl_task_type": task_type})
    entries[0]["continuation_delimiter"] = "\nAnswer: "
    (tmp_path / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))  # JSON is YAML
    with open(tmp_path / "eval_meta_data.csv", "w", newline="") as file:
        rows = [["Eval Task", "Random baseline"], *([k, v] for k, v in BASELINES.items())]
        csv.writer(file).writerows(rows)
    (tmp_path / "eval_data/things").mkdir(parents=True)
    for label, items in ITEMS.items():
        text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()
        path = tmp_path / "eval_data/things" / f"{label}.jsonl"
        if label == "say":
            with pa.CompressedOutputStream(pa.OSFile(f"{path}.zst", "wb"), "zstd") as sink:
                sink.write(text)
        else:
            path.write_bytes(text)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["The box fits the bag, it is big. Answer: none of it, count 1 plus 1?"] * 4, 280)


def random_model(vocab_size: int, seed: int = 0) -> GPT:
    model = GPT(GPTConfig(sequence_len=64, vocab_size=vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return model


class PlainScorer:
    """CORE as its rules are written, one row at a time, every logit of it; shares no code with the library."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, task: dict[str, Any], lines: list[str], max_items: int
    ) -> None:
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.items = [json.loads(line) for line in lines]
        random.Random(1337).shuffle(self.items)
        self.items = self.items[:max_items]

    def accuracy(self) -> float:
        return sum(self.correct(index) for index in range(len(self.items))) / len(self.items)

    def correct(self, index: int) -> bool:
        item, delimiter = self.items[index], self.task.get("continuation_delimiter", " ")
        others = [other for at, other in enumerate(self.items) if at != index]
        shots = self.task["num_fewshot"][0]
        shots = random.Random(1234 + index).sample(others, shots) if shots else []
        if "choices" in item:
            head = "".join(f"{s['query']}{delimiter}{s['choices'][s['gold']]}\n\n" for s in shots)
            return self.pick([f"{head}{item['query']}{delimiter}{c}" for c in item["choices"]], 1) == item["gold"]
        if "context_options" in item:
            head = "".join(f"{s['context_options'][s['gold']]}{delimiter}{s['continuation']}\n\n" for s in shots)
            options = [f"{head}{c}{delimiter}{item['continuation']}" for c in item["context_options"]]
            return self.pick(options, -1) == item["gold"]
        head = "".join(f"{s['context'].strip()}{delimiter}{s['continuation']}\n\n" for s in shots)
        prompt = head + item["context"].strip() + delimiter
        before = len(self.tokenizer.encode(prompt.strip(), bos=True))
        ids, _, best = self.forward(prompt + item["continuation"])
        return best[before - 1 :] == ids[before:]

    def forward(self, text: str) -> tuple[list[int], list[float], list[int]]:
        """All ids; the loss and the likeliest guess of each but the first."""
        ids = self.tokenizer.encode(text, bos=True)
        with torch.no_grad():
            logits = self.model(torch.tensor([ids]))[0, :-1]
        losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        return ids, losses.tolist(), logits.argmax(-1).tolist()

    def pick(self, texts: list[str], direction: int) -> int:
        """The option with the lowest mean loss after the common beginning (1), or on the common end (-1)."""
        runs = [self.forward(text) for text in texts]
        common = 0
        while len({tuple(ids[::direction][: common + 1]) for ids, _, _ in runs}) == 1:
            common += 1
        kept = [losses[common - 1 :] if direction == 1 else losses[-common:] for _, losses, _ in runs]
        means = [sum(losses) / len(losses) for losses in kept]
        return means.index(min(means))


def test_verdicts_equal_nanochats(parity: tuple[GPT, Tokenizer, dict[str, Any]], shared_data: Path) -> None:
    model, tokenizer, expected = parity
    bundle = load_bundle(str(shared_data / "tasks/eval_bundle"))
    for task in bundle.available:
        if task.label in expected["tasks"]:
            items = load_items(task, expected["max"])
            questions = [
                build_question(task, tokenizer, items, index, expected["max_seq_len"]) for index in range(len(items))
            ]
            verdicts = score_questions(model, questions)
            assert [int(right) for right in verdicts] == expected["tasks"][task.label]["correct"], task.label


@pytest.mark.parametrize("label", ["openbook_qa", "winogrande", "piqa", "bigbench_operators"])
def test_accuracy_equals_a_plain_scorer_on_real_tasks(
    parity: tuple[GPT, Tokenizer, dict[str, Any]], shared_data: Path, label: str
) -> None:
    import yaml

    folder = shared_data / "tasks/eval_bundle"
    listed = yaml.safe_load((folder / "core.yaml").read_text())["icl_tasks"]
    entry = next(entry for entry in listed if entry["label"] == label)
    raw = pa.CompressedInputStream(str(folder / "eval_data" / f"{entry['dataset_uri']}.zst"), "zstd").read()
    lines = raw.decode().strip("\n").split("\n")
    plain = PlainScorer(parity[0], parity[1], entry, lines, 12)
    task = next(task for task in load_bundle(str(folder)).tasks if task.label == label)
    items = load_items(task, 12)
    verdicts = score_questions(parity[0], [build_question(task, parity[1], items, index) for index in range(12)])
    assert verdicts == [plain.correct(index) for index in range(12)]
    assert sum(verdicts) / 12 == plain.accuracy()


def test_core_of_a_bundle(bundle_dir: Path, tokenizer: Tokenizer) -> None:
    model, spoken = random_model(tokenizer.vocab_size), []
    result = evaluate_core(model, tokenizer, load_bundle(str(bundle_dir)), say=spoken.append)
    assert result.missing == ("gone",)
    assert "gone: skipped" in spoken[0]
    assert result.coverage == "3 of 4 tasks"
    centered = []
    for task in result.tasks:
        lines = [json.dumps(item) for item in ITEMS[task.label]]
        entry = {"num_fewshot": [2], "continuation_delimiter": "\nAnswer: " if task.label == "pick" else " "}
        accuracy = PlainScorer(model, tokenizer, entry, lines, 99).accuracy()
        baseline = BASELINES[task.label] / 100
        assert task.accuracy == accuracy
        assert task.centered == pytest.approx((accuracy - baseline) / (1 - baseline))
        centered.append(task.centered)
    assert result.core == pytest.approx(sum(centered) / 3)
    assert (
        len(evaluate_core(model, tokenizer, load_bundle(str(bundle_dir)), 4, say=spoken.append).tasks[0].correct) == 4
    )


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    tokenizer, spoken = Tokenizer.load(f"{folder}/tokenizer"), []
    model = random_model(tokenizer.vocab_size)
    result = evaluate_core(model, tokenizer, load_bundle(folder), say=spoken.append)
    batches = test_bpb.make_batches(1, 3, 0.2) if rank == 0 else []  # a rank may have nothing
    sums = evaluate_bpb(test_bpb.make_model(), batches, test_bpb.token_bytes())
    found = [[task.correct for task in result.tasks], spoken, asdict(sums)]
    Path(f"{folder}/{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_two_ranks_find_what_one_finds(bundle_dir: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(bundle_dir / "tokenizer"))
    mp.spawn(_rank, (str(bundle_dir),), nprocs=2)
    spoken: list[str] = []
    alone = evaluate_core(
        random_model(tokenizer.vocab_size), tokenizer, load_bundle(str(bundle_dir)), say=spoken.append
    )
    sums = evaluate_bpb(test_bpb.make_model(), test_bpb.make_batches(1, 3, 0.2), test_bpb.token_bytes())
    verdicts = [list(task.correct) for task in alone.tasks]
    for rank, lines in ((0, spoken), (1, [])):  # rank 0 speaks
        found = json.loads((bundle_dir / f"{rank}.json").read_text())
        assert found[:2] == [verdicts, lines]
        assert BpbResult(**found[2]) == BpbResult(pytest.approx(sums.nats, rel=1e-9), sums.bytes, sums.tokens)


def test_a_yaml_file_may_be_named(bundle_dir: Path) -> None:
    (bundle_dir / "other.yaml").write_text((bundle_dir / "core.yaml").read_text().replace("things/gone", "things/pick"))
    assert load_bundle(str(bundle_dir / "other.yaml")).missing == ()
    assert load_bundle(str(bundle_dir)).missing == ("gone",)


ROWS = st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=12), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(prefix=st.lists(st.integers(0, 9), max_size=14), rows=ROWS, data=st.data())
def test_packing_changes_no_loss(prefix: list[int], rows: list[list[int]], data: st.DataObject) -> None:
    """Any rows, any spans: packed and batched with others, each judged id has the loss it has alone."""
    model = random_model(16)
    whole = tuple([9, *prefix, *row] for row in rows)
    starts = [data.draw(st.integers(1, len(row) - 1)) for row in whole]
    question = Question(whole, tuple((start, len(row)) for start, row in zip(starts, whole, strict=True)), 0)
    filler = Question(([1] * 40, [1] * 39 + [2]), ((39, 40), (39, 40)), 0)
    packed = pack_question(0, question)
    batch = sorted([*packed, *pack_question(1, filler)], key=lambda seq: -len(seq.ids))
    for kind in (True, False):
        chosen = [seq for seq in batch if seq.plain == kind]
        if chosen:
            with torch.no_grad():
                losses, hits = core._judge(model, chosen)
            judged = [entry for seq in chosen for entry in seq.judged]
            done: dict[tuple[int, int], int] = {}
            for (q, row, _, target), loss, hit in zip(judged, losses, hits, strict=True):
                ids = (question, filler)[q].rows[row]
                at = (question, filler)[q].spans[row][0] + done.get((q, row), 0)
                done[q, row] = done.get((q, row), 0) + 1
                logits = model(torch.tensor([ids]))[0, at - 1].detach()
                assert ids[at] == target
                assert loss == pytest.approx(F.cross_entropy(logits, torch.tensor(target)).item(), abs=1e-4)
                assert hit == (int(logits.argmax()) == target)
    expected = sum(len(row) - start for row, start in zip(whole, starts, strict=True))
    assert sum(len(seq.judged) for seq in packed) == expected


def test_shared_prefixes_are_computed_once() -> None:
    prefix = list(range(50))
    question = Question(([*prefix, 1, 2], [*prefix, 3, 4], [*prefix, 5]), ((50, 52), (50, 52), (50, 51)), 0)
    (packed,) = pack_question(0, question)
    assert packed.ids == [*prefix, 1, 3]  # the last id of a row is only predicted
    assert packed.positions == [*range(50), 50, 50]
    assert packed.branches == [0] * 50 + [1, 2]
    assert packed.judged == [(0, 0, 49, 1), (0, 0, 50, 2), (0, 1, 49, 3), (0, 1, 51, 4), (0, 2, 49, 5)]
    assert [len(seq.ids) for seq in pack_question(0, question, pack=False)] == [51, 51, 50]
    apart = Question(([1, 2, 3, 4], [5, 6, 7, 8]), ((3, 4), (3, 4)), 0)
    assert len(pack_question(0, apart)) == 2


def test_batch_limits_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "BATCH_TOKENS", 64)
    monkeypatch.setattr(core, "LOGIT_ENTRIES", 100)
    generator = torch.Generator().manual_seed(0)
    questions = []
    for size in range(3, 40):
        prefix = torch.randint(0, 16, (size,), generator=generator).tolist()
        questions.append(
            Question(([*prefix, 1, 2, 3], [*prefix, 4, 5]), ((size, size + 3), (size, size + 2)), size % 2)
        )
    model = random_model(16)
    sequences = [seq for q, question in enumerate(questions) for seq in pack_question(q, question)]
    for batch in core._batches(sequences):
        assert len(batch) == 1 or len(batch) * max(len(seq.ids) for seq in batch) <= 64
    small = score_questions(model, questions)
    monkeypatch.undo()
    assert small == score_questions(model, questions) == score_questions(model, questions, pack=False)


def test_prompts() -> None:
    pick = CoreTask("pick", "multiple_choice", 1, ": ", 0.25, "-")
    assert render_prompts(pick, ITEMS["pick"][1], ITEMS["pick"][2:3]) == [
        f"2 plus 2?: none of it\n\n1 plus 1?: {choice}" for choice in ("1", "2", "none of it")
    ]
    say = CoreTask("say", "language_modeling", 1, "\nAnswer: ", 0.0, "-")
    assert render_prompts(say, ITEMS["say"][1], ITEMS["say"][2:3]) == [
        "count 2\nAnswer: 2 \u2028 3\n\ncount 1\nAnswer:",
        "count 2\nAnswer: 2 \u2028 3\n\ncount 1\nAnswer: 1 \u2028 2",
    ]


def test_fewshot_draw_leaves_the_item_out() -> None:
    items = [{"n": i} for i in range(12)]
    for index in range(12):
        drawn = [item["n"] for item in draw_fewshot(items, index, 11)]
        assert sorted(drawn) == [i for i in range(12) if i != index]
    assert draw_fewshot(items, 3, 4) == [
        [i for i in items if i["n"] != 3][at] for at in random.Random(1237).sample(range(11), 4)
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=4))
def test_common_length(rows: list[list[int]]) -> None:
    expected = 0
    while expected < min(map(len, rows)) and len({row[expected] for row in rows}) == 1:
        expected += 1
    assert common_length(rows) == expected


def test_cropping_keeps_the_end(bundle_dir: Path, tokenizer: Tokenizer) -> None:
    task = load_bundle(str(bundle_dir)).tasks[0]
    items = load_items(task)
    whole, cropped = (build_question(task, tokenizer, items, 0, limit) for limit in (None, 20))
    for long, short, (start, end), span in zip(whole.rows, cropped.rows, whole.spans, cropped.spans, strict=True):
        cut = len(long) - 20
        assert cut > 0
        assert short == long[-20:]
        assert span == (start - cut, end - cut)
    with pytest.raises(DataError, match="max_seq_len"):
        build_question(task, tokenizer, items, 0, 2)


def test_an_option_that_begins_all_others_wins_only_in_front() -> None:
    model = random_model(16)
    rows = ([1, 2, 3], [1, 2, 3, 4])
    assert score_questions(model, [Question(rows, ((3, 3), (3, 4)), 0)]) == [True]
    assert score_questions(model, [Question(rows[::-1], ((3, 4), (3, 3)), 1)]) == [False]


def test_missing_bundle(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"core\.yaml does not exist"):
        load_bundle(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "a", "choices": ["b"', r"pick\.jsonl, line 10: not JSON"),
        ('{"query": "a"}', r"line 10: a multiple_choice item needs choices, gold"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', r"line 10: gold 2 is none of 2 options"),
        ('{"query": "a", "choices": [], "gold": 0}', r"line 10: choices must be a list"),
        ("7", r"line 10: a multiple_choice item needs query, choices, gold"),
    ],
)
def test_a_broken_line_is_named(bundle_dir: Path, line: str, message: str) -> None:
    with open(bundle_dir / "eval_data/things/pick.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        load_items(load_bundle(str(bundle_dir)).tasks[0])


def test_a_cut_zstd_file_is_named(bundle_dir: Path) -> None:
    path = bundle_dir / "eval_data/things/say.jsonl.zst"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"say\.jsonl\.zst"):
        load_items(load_bundle(str(bundle_dir)).tasks[2])


def test_too_few_items_for_the_examples(bundle_dir: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"task pick needs 2 examples .* raise --core_max_per_task to 3"):
        evaluate_core(random_model(tokenizer.vocab_size), tokenizer, load_bundle(str(bundle_dir)), max_per_task=2)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("core.yaml", "icl_tasks", "tasks", "icl_tasks"),
        ("core.yaml", "schema", "essay", "'essay' is not one of"),
        ("core.yaml", "{", "{{[", "icl_tasks"),
        ("eval_meta_data.csv", "place", "elsewhere", "task place: no random baseline"),
        ("eval_meta_data.csv", "Random baseline", "Luck", "'Random baseline'"),
    ],
)
def test_a_damaged_bundle_is_explained(bundle_dir: Path, file: str, old: str, new: str, message: str) -> None:
    path = bundle_dir / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        load_bundle(str(bundle_dir))
