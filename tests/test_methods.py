"""Every method's layout is legal and shows what it promises; scores of a batch equal one item at a time, written out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.config import GPTConfig, MemoryConfig
from megacontext.context.gist_function import build_levels
from megacontext.context.working_context import WorkingContext
from megacontext.errors import UserError
from megacontext.eval.bm25 import best_blocks, bm25_scores
from megacontext.eval.continuation import score_continuation
from megacontext.eval.methods import METHODS, History, NormedMean, Prompt, choose_methods, layout, offered
from megacontext.inference.focus import LensScorer
from megacontext.inference.session_options import resolve_options
from megacontext.model import flops
from megacontext.model.gpt import GPT
from megacontext.model.norm import rms_norm
from megacontext.model.rotary_entries import entry_rotary

R, VOCAB, WIDTH = 4, 60, 32
MEMORY = MemoryConfig(mc=1, block_size=R, routing_slots=2, routing_width=16, positional_type="slot")


def make(memory: MemoryConfig | None = MEMORY, token_shift: bool = True, seed: int = 0, trained: bool = True) -> GPT:
    shape = GPTConfig(sequence_len=64, vocab_size=VOCAB, n_layer=2, n_head=2, n_kv_head=1, n_embd=WIDTH)
    model = GPT(replace(shape, token_shift=token_shift))
    if memory is not None:
        model.attach_memory(memory, router_trained=trained)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():  # as after training: nothing is zero
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


MODEL, VANILLA = make(), make(None, token_shift=False)


def prompt_of(model: GPT, tokens: int, question: int, seed: int = 0, evidence: tuple[int, ...] = ()) -> Prompt:
    ids = np.random.default_rng(seed).integers(0, VOCAB, tokens + question)
    return Prompt(History(model, ids[:tokens], R), ids[tokens:], evidence)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(R, 400),
    question=st.integers(0, 5),
    budget=st.integers(40, 80),
    tail=st.integers(1, 12),
    seed=st.integers(0, 99),
    vanilla=st.booleans(),
)
def test_layouts_are_legal(tokens: int, question: int, budget: int, tail: int, seed: int, vanilla: bool) -> None:
    model = VANILLA if vanilla else MODEL
    evidence = tuple(np.random.default_rng(seed).integers(0, tokens, 2).tolist())
    prompt = prompt_of(model, tokens, question, seed, evidence)
    for method in offered(model):
        shown = layout(method, prompt, budget, tail, seed)
        again = layout(method, prompt, budget, tail, seed)
        assert shown.context == again.context
        context = shown.context
        assert len(context) <= budget or method == "full"
        ends = context.starts + context.spans
        assert (context.starts[1:] >= ends[:-1]).all()
        assert ends[-1] == prompt.tokens == shown.tree.tokens
        newest = min(tail, prompt.tokens)
        assert (context.lod[-newest:] == 0).all()
        assert shown.shows(range(prompt.tokens - newest, prompt.tokens))
        if method in ("window", "sinks", "bm25", "full"):
            assert not context.lod.any()
            assert len(context) == (prompt.tokens if method == "full" else min(budget, prompt.tokens))
        else:
            context.check()
        if method not in ("full", "ours") and prompt.tokens <= budget:
            assert len(context) == prompt.tokens
        if method == "ours":  # as a session, it leaves room for tokens to come
            options = resolve_options(MODEL, {"budget": budget, "recent_tokens": tail})
            assert len(context) <= budget - options.headroom(prompt.tokens)
        assert shown.gists == ("mean" if vanilla or method == "mean_age" else "learned")


def test_what_each_method_shows() -> None:
    block = 17
    prompt = prompt_of(MODEL, 603, 3, evidence=(block * R + 1,))
    budget, tail = 48, 9
    shown = {name: layout(name, prompt, budget, tail, 5) for name in METHODS}
    coarsest = WorkingContext.initial(606, R, budget, tail)
    raw = {name: {i for lod, i in shown[name].context.entries if lod == 0} for name in METHODS}
    assert raw["window"] == {*range(606 - 48, 606)}
    assert raw["sinks"] == {0, 1, 2, 3, *range(606 - 44, 606)}
    assert shown["mean_age"].context == shown["gist_age"].context == WorkingContext.by_age(606, R, budget, tail)
    assert raw["full"] == {*range(606)}
    in_block = {*range(block * R, block * R + R)}
    assert in_block <= raw["oracle"]
    assert shown["oracle"].shows([block * R + 1])
    assert not shown["window"].shows([block * R + 1])
    assert len(shown["oracle"].context) - len(coarsest) == (R - 1) * coarsest.lod[coarsest.at_token(block * R)]
    old = (606 - tail) // R
    best = best_blocks(bm25_scores(prompt.history.ids[: old * R], prompt.question, R))[: (budget - tail) // R]
    chosen = {token for b in best.tolist() for token in range(b * R, b * R + R)}
    assert chosen | {*range(606 - tail, 606)} <= raw["bm25"]
    assert len(raw["bm25"]) == budget
    other = layout("random", prompt, budget, tail, 6).context
    assert other != shown["random"].context
    assert len(coarsest) < len(other) <= budget
    found = LensScorer(MODEL, prompt.tree("learned"), tail).found
    assert found is not None
    first = int(found.block[0])
    assert {*range(first * R, first * R + R)} <= raw["flat"]
    query = flops.routing_key_flops(MODEL.config, MEMORY, 32)
    assert shown["flat"].flops == query + old * 2 * 2 * 16
    looked = (shown["ours"].flops - query - found.visits * R * 2 * 2 * 16) / flops.lens_flops(MODEL.config, MEMORY, 48)
    assert 0 < looked <= MEMORY.mc_infer_allocator_iterations + 1
    assert shown["window"].flops == 0


def test_a_question_with_little_text_before_it() -> None:
    prompt = prompt_of(MODEL, 6, 2, evidence=(5,))
    for name in METHODS:
        assert layout(name, prompt, 20, 10).context.entries == [(0, i) for i in range(8)]


def reference(
    model: GPT, ids: np.ndarray, entries: list[tuple[int, int]], gists: str, targets: list[int]
) -> list[tuple]:
    """(nll, likeliest) of each target: embeddings entry by entry, one forward pass per target, nothing shared."""
    function = model.memory if gists == "learned" else NormedMean(model, R)
    levels = build_levels(torch.from_numpy(ids)[None], function)
    nodes = [(lod, index) for lod, index in entries]
    text = list(ids)
    out = []
    for target in targets:
        rows, positions, sigmas = [], [], []
        for lod, index in nodes:
            span = R**lod
            positions.append(index * span + (span - 1) / 2)
            sigmas.append(span / 12**0.5 if lod else 0.0)
            if lod:
                gist = levels[lod - 1][:, index, : model.config.n_embd]
                rows.append(rms_norm(gist) if model.memory is None else model.memory.tagged(gist, torch.tensor([lod])))
            else:
                before = text[index - 1] if index else -1
                rows.append(model.embed(torch.tensor([[text[index]]]), torch.tensor([[before]]))[0])
        x = torch.stack(rows, 1)
        rotary = entry_rotary(
            "slot" if model.memory is None else model.memory.config.positional_type,
            torch.tensor([positions], dtype=torch.float64),
            torch.tensor([sigmas], dtype=torch.float64),
            torch.arange(len(nodes))[None],
            model.config.head_dim,
            model.config.sequence_len,
            torch.tensor([len(ids)]),
        )
        logits = model.head(model.trunk(x, rotary))[0, -1].double()
        out.append((float(-logits.log_softmax(0)[target]), bool(logits.argmax() == target)))
        nodes.append((0, len(text)))
        text.append(target)
    return out


@pytest.mark.parametrize("batch_entries", [1, 1 << 14])
@pytest.mark.parametrize("positional_type", ["slot", "simple", "gaussian", "gaussian_alibi"])
def test_scores_equal_one_at_a_time(positional_type: str, batch_entries: int) -> None:
    model = make(replace(MEMORY, positional_type=positional_type))
    rng = np.random.default_rng(1)
    layouts, prompts = [], []
    for tokens, question in ((150, 3), (90, 0)):
        prompt = prompt_of(model, tokens, question, seed=tokens, evidence=(20, 61))
        for method in METHODS:
            prompts.append(prompt)
            layouts.append(layout(method, prompt, int(rng.integers(34, 44)), 6))
    with torch.no_grad():
        targets = rng.integers(0, VOCAB, (len(layouts), 4))
        scores = score_continuation(model, layouts, targets, batch_entries)
        for at, (prompt, shown) in enumerate(zip(prompts, layouts, strict=True)):
            ids = np.concatenate([prompt.history.ids, prompt.question])
            expected = reference(model, ids, shown.context.entries, shown.gists, targets[at].tolist())
            np.testing.assert_allclose(scores.nll[at], [nll for nll, _ in expected], rtol=2e-5, atol=2e-5)
            assert scores.likeliest[at].tolist() == [hit for _, hit in expected]
    read = [len(shown) + 3 for shown in layouts]
    assert scores.flops.tolist() == [n * flops.forward_flops_per_token(model.config, n) for n in read]


def test_the_likeliest_is_what_greedy_decoding_says() -> None:
    prompt = prompt_of(MODEL, 90, 2)
    shown = layout("ours", prompt, 40, 6)
    every = score_continuation(MODEL, [shown] * VOCAB, np.arange(VOCAB)[:, None])
    assert every.likeliest.sum() == 1
    assert every.likeliest[int(every.nll.argmin()), 0]
    assert np.exp(-every.nll).sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("token_shift", [False, True])
def test_all_raw_equals_the_model_itself(token_shift: bool) -> None:
    for model in (make(token_shift=token_shift), make(None, token_shift=token_shift)):
        prompt = prompt_of(model, 41, 3)
        targets = np.random.default_rng(0).integers(0, VOCAB, (1, 6))
        ids = torch.from_numpy(np.concatenate([prompt.history.ids, prompt.question, targets[0]]))[None]
        with torch.no_grad():
            expected = model.loss(ids[:, :-1], ids[:, 1:], reduction="none")[0, -6:]
        for method in ("full", "window", "mean_age"):
            scores = score_continuation(model, [layout(method, prompt, 60, 8)], targets)
            np.testing.assert_allclose(scores.nll[0], expected.double().numpy(), rtol=1e-5, atol=1e-5)


def test_questions_share_the_trees_of_their_history() -> None:
    history = History(MODEL, np.random.default_rng(0).integers(0, VOCAB, 200))
    one, two = Prompt(history, [1, 2]), Prompt(history, [3, 4, 5])
    shown = [layout("gist_age", prompt, 40, 6) for prompt in (one, two)]
    base = history.tree("learned")
    assert base.tokens == 200
    assert [s.tree.tokens for s in shown] == [202, 203]
    assert shown[0].tree.ids(199, 202).tolist() == [int(history.ids[-1]), 1, 2]
    assert base.gist_runs == {1: 50, 2: 12, 3: 3}
    assert all(sum(s.tree.gist_runs.values()) <= 1 for s in shown)
    assert set(history.build_seconds) == {"learned"}


def test_mean_gists_are_normed_means() -> None:
    tree = prompt_of(VANILLA, 70, 0).tree("mean")
    ids = tree.ids(0, 64)
    table = VANILLA.embed(ids[None])[0]
    leaves = rms_norm(table.view(16, R, WIDTH).mean(1))
    torch.testing.assert_close(tree.records(1, range(16)), leaves)
    torch.testing.assert_close(tree.records(2, range(4)), rms_norm(leaves.view(4, R, WIDTH).mean(1)))


def test_what_a_model_cannot_do_is_refused() -> None:
    assert offered(MODEL) == tuple(METHODS)
    assert offered(VANILLA) == ("window", "sinks", "mean_age", "random", "bm25", "oracle", "full")
    assert "full" not in offered(MODEL, 16385)
    for model in (make(replace(MEMORY, routing_slots=0)), make(trained=False)):
        assert set(METHODS) - set(offered(model)) == {"flat"}
        prompt = prompt_of(model, 200, 2)
        assert LensScorer(model, prompt.tree("learned"), 6).found is None
    assert LensScorer(MODEL, prompt_of(MODEL, 200, 2).tree("learned"), 6).found is not None
    assert choose_methods(VANILLA, []) == offered(VANILLA)
    assert choose_methods(MODEL, ["ours", "window"]) == ("ours", "window")
    with pytest.raises(UserError, match="'ours' needs a model that was trained with --mc; here are window,"):
        choose_methods(VANILLA, ["window", "ours"])
    with pytest.raises(UserError, match="'theirs' is unknown; choose from window,"):
        choose_methods(MODEL, ["theirs"])
    with pytest.raises(UserError, match="needs trained routing keys"):
        layout("flat", prompt_of(make(replace(MEMORY, routing_slots=0)), 50, 0), 40, 6)
    with pytest.raises(UserError, match="a history of 3 tokens is shorter than a block of 4"):
        History(MODEL, np.zeros(3, np.int64))
    prompt = prompt_of(MODEL, 1000, 2)
    with pytest.raises(UserError, match="a raw tail of 9 tokens in a budget of 9"):
        layout("window", prompt, 9, 9)
    with pytest.raises(UserError, match="a budget of 12 entries cannot hold a history of 1000 tokens"):
        layout("ours", prompt, 12, 9)
    with pytest.raises(UserError, match="oracle needs to be told"):
        layout("oracle", prompt, 60, 9)
    with pytest.raises(UserError, match="'full' needs a prompt of at most 16384 tokens, not 16386; here are window,"):
        layout("full", prompt_of(VANILLA, 16384, 2), 60, 9)
