"""What a run, its stages and a session send: spans that nest, with what they measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from collector import Collector, plain
from test_resume import train_here
from tiny import make_task, make_tokenizer
from tiny_memory import make_model

import megacontext as mc
from jobs.runtime import cli, environment
from jobs.runtime.stage import Job, run_stage
from megacontext.config import RunConfig
from megacontext.stages import TOK_EVAL
from megacontext.telemetry import otel


def test_a_run_is_one_trace(tmp_path: Path, collector: Collector) -> None:
    """Steps with their loss, validations, saving and loading of checkpoints nest below the stage, with real durations."""
    task = make_task(tmp_path, "traced", num_iterations=4, save_every=2, eval_every=2)
    with otel.opened(run="traced", rank=0):
        for name in ("base_train", "again"):
            with otel.span(name):
                train_here(task)
    spans = collector.all_spans()
    stages = {name: collector.spans()[name] for name in ("base_train", "again")}

    def below(stage: str) -> list[tuple[str, dict[str, Any]]]:
        found = sorted((span for span in spans if span.parent_span_id == stages[stage].span_id),
                       key=lambda span: span.start_time_unix_nano)  # fmt: skip
        for span in found:
            assert stages[stage].start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
            assert span.end_time_unix_nano <= stages[stage].end_time_unix_nano
        return [(span.name, plain(span.attributes)) for span in found]

    first = below("base_train")
    names = [name for name, _ in first if name != "checkpoint_save"]
    assert names == ["validation", *["train_step"] * 2, "validation", *["train_step"] * 2, "validation"]
    assert [values["mc.step"] for name, values in first if name == "checkpoint_save"] == [2, 4]
    records = [json.loads(line) for line in (tmp_path / "traced" / "metrics.jsonl").read_text().splitlines()]
    assert [values["mc.loss"] for name, values in first if name == "train_step"] == [
        record["train/loss"] for record in records if "train/loss" in record
    ]
    assert [values["mc.bpb"] for name, values in first if name == "validation"] == [
        record["val/bpb"] for record in records if "val/bpb" in record
    ]
    assert below("again") == [("checkpoint_load", {"mc.path": f"{task.run_dir}/checkpoints/megacontext_base_000004"})]


def test_a_stage_is_a_span_with_its_metrics(tmp_path: Path, collector: Collector) -> None:
    args = cli.parse([RunConfig], None, ["--tier", "cpu", "--base_dir", str(tmp_path), "--run", "mine"])
    run_stage(Job(TOK_EVAL, lambda args: {"tok_eval/bytes_per_token": 3.5, "tok_eval/text": "x"}), args)
    assert plain(collector.spans()["tok_eval"].attributes) == {"mc.bytes_per_token": 3.5}
    assert collector.senders()[0]["mc.run"] == "mine"


def test_a_job_on_a_cluster_gets_the_variables_but_not_the_secret_one() -> None:
    given = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}
    secret = {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer 1"}
    assert environment.forwarded(given | secret) == given
    assert environment.secrets_kept_back(given | secret) == list(secret)


def test_a_session_sends_what_it_appends_refocuses_and_generates(tmp_path: Path, collector: Collector) -> None:
    with (
        otel.opened(run="chat") as telemetry,
        mc.Session(make_model(vocab_size=300), make_tokenizer(tmp_path / "t"), budget=40, recent_tokens=8) as session,
    ):
        session.append(list(range(90)))
        with telemetry.span("turn"):
            assert len(list(session.generate(max_tokens=3, stop=()))) == 3
        abandoned = session.generate(max_tokens=3, stop=())
        next(abandoned)
        abandoned.close()
    spans = collector.all_spans()
    assert [span.name for span in spans] == [
        "session_append", "session_refocus", "session_generate", "turn", "session_generate",
    ]  # fmt: skip
    appended, refocused, generated, turn, cut = spans
    assert plain(appended.attributes) == {"mc.tokens": 90}
    assert {"mc.tokens": 90, "mc.entries": len(session.context) - 4}.items() <= plain(refocused.attributes).items()
    assert refocused.parent_span_id == generated.span_id
    assert generated.parent_span_id == turn.span_id
    assert [plain(span.attributes)["mc.items"] for span in (generated, cut)] == [3, 1]
    assert not any(span.status.code for span in spans)
