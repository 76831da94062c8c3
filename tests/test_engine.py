"""The engine against recomputing everything: greedy and sampled tokens, batches of unequal prompts, tools, stops."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.bench import decode
from megacontext.config import GPTConfig
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import UserError
from megacontext.eval.samples import PROMPTS, continuations
from megacontext.inference.engine import FINISHED, Engine, naive_generate
from megacontext.model.gpt import GPT

VOCAB = 290
CONFIG = GPTConfig(sequence_len=64, vocab_size=VOCAB, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)


def random_model(seed: int = 0) -> GPT:
    """A model whose logits depend on everything: no zero matrices."""
    model = GPT(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        std = 1.0 if "wte" in name else 0.3
        parameter.data = torch.randn(parameter.shape, generator=generator) * std
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat, and 12 + 30 makes 42 strawberries"] * 8, VOCAB)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    model = random_model()
    # The model never says a special id of its own accord; tests put them in with Scripted.
    model.lm_head.weight.data[VOCAB - 9 :] = 0
    model.lm_head.weight.data[: VOCAB - 9] += 0.01
    return model


class Scripted(GPT):
    """A model that says a script: row content and cache do not matter, only how many ids were fed."""

    def __init__(self, scripts: list[list[int]], prompt_tokens: int) -> None:
        super().__init__(CONFIG)
        self.scripts, self.prompt_tokens, self.said = scripts, prompt_tokens, 0
        self.fed: list[list[int]] = []

    def embed(self, ids):
        self.fed.append(ids[:, -1].tolist())
        return super().embed(ids)

    def head(self, hidden):
        logits = torch.zeros(len(hidden), VOCAB)
        for row in range(len(hidden)):
            script = self.scripts[min(row, len(self.scripts) - 1)]
            logits[row, script[min(self.said, len(script) - 1)]] = 1.0
        self.said += 1
        return logits


def special(tokenizer: Tokenizer, *names: str) -> list[int]:
    return [tokenizer.special(f"<|{name}|>") for name in names]


def test_greedy_equals_recomputing_everything(model: GPT, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("the cat", bos=True)
    engine = Engine(model, tokenizer)
    expected = naive_generate(model, prompt, 100)  # longer than sequence_len: the cache grows
    assert [ids[0] for ids, _ in engine.generate(prompt, max_tokens=100, temperature=0.0)] == expected
    rows = engine.generate_batch(prompt, num_samples=3, max_tokens=100, temperature=0.0)
    assert [row.new_ids for row in rows] == [expected] * 3
    assert rows[0].mask == [0] * len(prompt) + [1] * 100
    assert not rows[0].stopped


def test_sampling_equals_recomputing_everything(model: GPT, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("on the mat", bos=True)
    row = Engine(model, tokenizer).generate_batch(prompt, 1, 40, temperature=1.0, top_k=20, seed=7)[0]
    assert row.new_ids == naive_generate(model, prompt, 40, 1.0, 20, 7)


def test_a_row_is_the_same_whatever_the_number_of_rows(model: GPT, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("the", bos=True)
    engine = Engine(model, tokenizer)
    few, many = (engine.generate_batch(prompt, rows, 20, temperature=1.0, seed=3) for rows in (2, 7))
    assert [row.ids for row in many[:2]] == [row.ids for row in few]
    assert len({tuple(row.ids) for row in many}) == 7
    assert len({row.new_ids[0] for row in many}) > 1  # the first token is sampled per row as well


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), max_rows=st.integers(1, 6), seed=st.integers(0, 99)
)
def test_many_prompts_equal_each_alone(
    model: GPT, tokenizer: Tokenizer, lengths: list[int], max_rows: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, VOCAB - 9, (n,), generator=generator).tolist() for n in lengths]
    rows = Engine(model, tokenizer).generate_many(prompts, max_tokens=12, max_rows=max_rows)
    assert [row.ids[: row.prompt_tokens] for row in rows] == prompts
    assert [row.new_ids for row in rows] == [naive_generate(model, prompt, 12) for prompt in prompts]


def test_many_prompts_sample_by_their_place(model: GPT, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    prompts = [tokenizer.encode(text, bos=True) for text in ("the cat sat", "mat", "42 strawberries", "on")]
    together, apart = (engine.generate_many(prompts, 10, 1.0, None, 5, max_rows=rows) for rows in (4, 1))
    assert together == apart


def test_tool_result_is_forced(tokenizer: Tokenizer) -> None:
    start, end, output_start, output_end, stop = special(
        tokenizer, "python_start", "python_end", "output_start", "output_end", "assistant_end"
    )
    expression, filler = tokenizer.encode("12+30"), tokenizer.encode("z")[0]
    result = [output_start, *tokenizer.encode("42"), output_end]
    script = [start, *expression, end, *[filler] * len(result), filler, stop]
    model = Scripted([script], 1)
    columns = list(Engine(model, tokenizer).generate([tokenizer.bos_id], max_tokens=50, temperature=0.0))
    said = [ids[0] for ids, _ in columns]
    assert said == [start, *expression, end, *result, filler, stop]
    asked = 2 + len(expression)
    assert [forced[0] for _, forced in columns] == [0] * asked + [1] * len(result) + [0, 0]
    assert [fed[0] for fed in model.fed[1:]] == said[:-1]  # forced ids go through the model too
    row = Engine(Scripted([script], 1), tokenizer).generate_batch([tokenizer.bos_id], 1, 50, temperature=0.0)[0]
    assert row.stopped
    assert row.new_ids == said[:-1]
    assert row.mask == [0] + [1] * (2 + len(expression)) + [0] * len(result) + [1]


@pytest.mark.parametrize("text", ["1/0", "exit()", ""])
def test_without_a_result_nothing_is_forced(tokenizer: Tokenizer, text: str) -> None:
    start, end, stop = special(tokenizer, "python_start", "python_end", "assistant_end")
    script = [start, *tokenizer.encode(text), end, tokenizer.encode("z")[0], stop]
    row = Engine(Scripted([script], 1), tokenizer).generate_batch([tokenizer.bos_id], 1, 50, temperature=0.0)[0]
    assert row.new_ids == script[:-1]
    assert all(row.mask[1:])


def test_python_end_without_start_is_just_an_id(tokenizer: Tokenizer) -> None:
    end, stop = special(tokenizer, "python_end", "assistant_end")
    script = [*tokenizer.encode("1+1"), end, stop]
    row = Engine(Scripted([script], 1), tokenizer).generate_batch([tokenizer.bos_id], 1, 50, temperature=0.0)[0]
    assert row.new_ids == script[:-1]


def test_rows_stop_one_by_one_and_leave_the_batch(model: GPT, tokenizer: Tokenizer) -> None:
    """Sampling is per row, so rows that stop early must not change the others, nor be computed for ever."""
    engine = Engine(model, tokenizer)
    engine.stop_ids = frozenset()
    prompt = tokenizer.encode("the cat", bos=True)
    free = engine.generate_batch(prompt, 8, 24, temperature=1.0, seed=1)
    stops = frozenset(whole.new_ids[3 * row] for row, whole in enumerate(free[:6]))  # ids that rows say by chance
    engine.stop_ids = stops
    columns = list(engine.generate(prompt, 8, 24, temperature=1.0, seed=1))
    ends = [next((at for at, token in enumerate(whole.new_ids) if token in stops), None) for whole in free]
    assert len(set(ends)) > 3
    for row, (whole, end) in enumerate(zip(free, ends, strict=True)):
        said = [ids[row] for ids, _ in columns]
        expected = whole.new_ids if end is None else whole.new_ids[: end + 1]
        assert said == expected + [FINISHED] * (len(columns) - len(expected))
    rows = engine.generate_batch(prompt, 8, 24, temperature=1.0, seed=1)
    assert [row.stopped for row in rows] == [end is not None for end in ends]
    assert [row.new_ids for row in rows] == [whole.new_ids[:end] for whole, end in zip(free, ends, strict=True)]


def test_finished_rows_cost_nothing(tokenizer: Tokenizer) -> None:
    stop, letter = tokenizer.bos_id, tokenizer.encode("z")[0]
    model = Scripted([[letter] * 20, [stop], [stop], [letter, stop]], 1)
    columns = list(Engine(model, tokenizer).generate([letter], 4, 6, temperature=0.0))
    # The first column is drawn from the shared prefill, so all rows say a letter; then scripts count by place.
    assert [len(fed) for fed in model.fed] == [1, 4, *[1] * 4]
    assert [ids[0] for ids, _ in columns] == [letter] * 6
    assert [ids[1] for ids, _ in columns] == [letter, stop, *[FINISHED] * 4]


def test_a_conversation_computes_only_what_is_new(model: GPT, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    cache = engine.new_cache(capacity=4)
    fed: list[int] = []
    forward = engine._forward
    engine._forward = lambda ids, live, last=None: (fed.append(ids.numel()), forward(ids, live, last))[1]  # type: ignore[method-assign]
    ids = tokenizer.encode("the cat sat", bos=True)
    for turn in ("on the mat", "42", "strawberries"):
        ids = ids + tokenizer.encode(turn)
        fed.clear()
        before = len(cache.ids)
        new = [column[0] for column, _ in engine.generate(ids, 1, 9, temperature=0.0, cache=cache)]
        assert new == naive_generate(model, ids, 9)
        assert fed == [len(ids) - before, *[1] * 8]
        ids = ids + new
    assert cache.kv.length == len(cache.ids) == len(ids) - 1


def test_a_cache_with_another_beginning_is_still_right(model: GPT, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    cache = engine.new_cache()
    for text in ("the cat sat on the mat", "the cat makes", "the cat makes", "12"):
        prompt = tokenizer.encode(text, bos=True)
        stream = engine.generate(prompt, 1, 6, temperature=0.0, cache=cache)
        assert [next(stream)[0][0] for _ in range(3)] == naive_generate(model, prompt, 3)
        stream.close()  # left in the middle


def test_default_length_is_what_the_model_was_trained_on(model: GPT, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    assert len(list(engine.generate([1] * 60, temperature=0.0))) == CONFIG.sequence_len - 60
    assert list(engine.generate([1] * 70, temperature=0.0)) == []


@pytest.mark.parametrize(
    ("prompt", "settings_"),
    [
        ([], {}),
        ([VOCAB], {}),
        ([-1], {}),
        ([1], {"num_samples": 0}),
        ([1], {"max_tokens": -1}),
        ([1], {"temperature": -0.1}),
        ([1], {"top_k": 0}),
    ],
)
def test_bad_requests_fail_at_once(
    model: GPT, tokenizer: Tokenizer, prompt: list[int], settings_: dict[str, float]
) -> None:
    with pytest.raises(UserError):
        Engine(model, tokenizer).generate(prompt, **settings_)  # type: ignore[arg-type]


def test_bfloat16_decodes(model: GPT, tokenizer: Tokenizer) -> None:
    half = random_model()
    half.compute_dtype = torch.bfloat16
    half.prepare_inference()
    rows = Engine(half, tokenizer).generate_many([[1, 2, 3], [4]], 5)
    assert [len(row.new_ids) for row in rows] == [5, 5]


def test_samples_are_greedy_continuations(model: GPT, tokenizer: Tokenizer) -> None:
    found = continuations(model, tokenizer, 6)
    assert [sample.prompt for sample in found] == list(PROMPTS)
    ids = tokenizer.encode(PROMPTS[2], bos=True)
    assert found[2].continuation == tokenizer.decode(naive_generate(model, ids, 6))


def test_the_benchmark_ends_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--depth", "1", "--width", "64", "--vocab", "64", "--prompt", "20", "--new", "4"]
    result = decode.main([*shape, "--batches", "1,3", "--repeats", "1", "--device", "cpu", "--threads", "1"])
    assert json.loads(capsys.readouterr().out.strip().split("\n")[-1]) == result
    assert [(row["dtype"], row["batch"]) for row in result["rows"]] == [
        ("fp32", 1), ("fp32", 3), ("bf16", 1), ("bf16", 3)
    ]  # fmt: skip
    assert all(row["decode_tokens_per_s"] > 0 for row in result["rows"])


def test_greedy_tokens_of_nanochat(shared_data: Path) -> None:
    folder = shared_data / "nanochat_parity"
    meta = json.loads((folder / "base_checkpoints/d2/meta_000007.json").read_text())
    parity = GPT(GPTConfig(**meta["model_config"]))
    parity.load_state_dict(torch.load(folder / "base_checkpoints/d2/model_000007.pt"))
    expected = np.load(folder / "expected.npz")
    prompt, greedy = expected["prompt"].tolist(), expected["greedy"].tolist()
    engine = Engine(parity, Tokenizer.load(str(folder / "tokenizer")))
    assert engine.generate_batch(prompt, 2, 24, temperature=0.0)[1].ids == greedy
    assert prompt + naive_generate(parity, prompt, 24) == greedy
