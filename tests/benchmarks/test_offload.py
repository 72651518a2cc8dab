"""Goal: the offloading table compares like with like, over a link that is what it is said to be.

Method: a real engine on a tiny store walks a text; two real hosts with a bounded link, where the
machine allows it; arithmetic on made-up repetitions. No speed is asserted but the link's bound.
"""

from __future__ import annotations

import subprocess
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.offload_parts import hosts, rivals
from benchmarks.offload_parts.contestants import CONTESTANTS, RESIDENT, chosen
from benchmarks.offload_parts.hosts import ADDRESS, HostsUnavailable, TwoHosts, check_machine
from benchmarks.offload_parts.rival_transformers import TransformersRival
from benchmarks.offload_parts.rows import MEASURES, Repetition, Results, Spread
from benchmarks.offload_parts.turn import Phase, Turn, Work
from benchmarks.offload_parts.wire_speed import Pourer, pour
from benchmarks.offload_parts.work import WorkSizes, sizes_for, works
from cluster.texts import EvalText, built_in_text
from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.format import load_manifest
from expert_store.segment import Segment
from gpu_worker.build import build_engine
from gpu_worker.config import WorkerConfig
from models import MIXTRAL_MINI
from tests.tiny_checkpoints import write_tiny_checkpoint

TEXTS = [[(7 * text + 3 * place) % 90 + 5 for place in range(40)] for text in range(3)]
WORK = Work(
    prefill=list(range(5, 25)), texts=TEXTS, prompt_tokens=6, warm_up=2, steps=5, batch_steps=3
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload") / "model"
    return write_tiny_checkpoint("mixtral", folder, hidden=128, ffn=128)


@pytest.fixture(scope="module")
def store(model: Path) -> Path:
    folder = model.parent / "store"
    compress(model, folder, CompressionConfig(recipe="paper", avg_rank=16), jobs=1)
    return folder


def phases_of(store: Path, **config: object) -> dict[str, Phase]:
    with closing(Segment(store)) as segment:
        settings = WorkerConfig(device="cpu", max_sequences=8, **config)  # type: ignore[arg-type]
        with closing(build_engine(store, segment, None, settings)) as engine:
            Turn(engine).run(WORK)  # fills the cache, where there is one
            told = Turn(engine).run(WORK)
            assert not engine.has_work, "a turn leaves an idle engine"
    return {name: Phase(**told[name]) for name in ("prefill", "one", "many")}  # type: ignore[arg-type]


def test_a_turn_counts_the_steps_it_says_and_all_their_bytes(store: Path) -> None:
    phases = phases_of(store, cache_bytes=0, prefetch="never")
    assert phases["prefill"].tokens == len(WORK.prefill)
    assert phases["one"].tokens == WORK.steps
    assert phases["many"].tokens == WORK.batch_steps * len(TEXTS)
    for phase in phases.values():
        assert phase.seconds > 0
        moved = phase.codes_bytes + phase.factors_bytes
        assert moved - phase.vain_bytes == phase.planned_bytes > 0
    # Without a cache a lone token moves the codes of its two experts in each of two layers.
    codes = next(iter(load_manifest(store).experts.values())).codes.num_bytes
    assert phases["one"].codes_bytes == WORK.steps * 2 * 2 * codes
    assert phases_of(store, cache_bytes=1 << 30)["one"].planned_bytes == 0


def test_every_contestant_walks_the_text_whatever_it_chose_itself(store: Path) -> None:
    """What is routed, and so what moves, depends on the text and not on the sampled tokens."""
    with closing(Segment(store)) as segment:
        config = WorkerConfig(device="cpu", cache_bytes=0)
        with closing(build_engine(store, segment, None, config)) as engine:
            turn = Turn(engine)
            running = turn._start(TEXTS[:1], WORK)
            turn._decode(running, 0, 4)
            (sequence,) = running
            given = TEXTS[0][WORK.prompt_tokens :][: len(sequence.output_ids)]
            assert sequence.output_ids == given
            turn._cancel(running)
            free = turn.greedy([TEXTS[0][: WORK.prompt_tokens]], len(given))
            assert free != [given], "the text is not what the model would have said"


def test_a_repetition_has_its_own_pieces_of_the_texts() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MIXTRAL_MINI)
    sizes = WorkSizes(prefill_tokens=20, prompt_tokens=8, sequences=3, steps=4, batch_steps=2)
    one, two = works(tokenizer, [built_in_text()], 2, sizes)
    pieces = [tuple(text) for work in (one, two) for text in work.texts]
    assert len(set(pieces)) == 6
    assert all(len(piece) == sizes.text_tokens for piece in pieces)
    assert one.prefill != two.prefill
    with pytest.raises(ValueError, match="too few"):
        works(tokenizer, [EvalText("short", "a few words")], 1, sizes)


def test_larger_models_get_less_work(store: Path) -> None:
    manifest = load_manifest(store)
    assert sizes_for(manifest) == WorkSizes()
    shape = replace(manifest.model.expert, hidden=8192, ffn=8192)
    large = replace(manifest, model=replace(manifest.model, expert=shape))
    assert sizes_for(large).text_tokens < WorkSizes().text_tokens


def test_contestants_have_names_of_their_own_and_settings_that_the_worker_knows() -> None:
    every = (*CONTESTANTS, *RESIDENT)
    assert len({item.key for item in every}) == len({item.label for item in every}) == len(every)
    known = {field.name for field in fields(WorkerConfig)}
    assert all(set(item.settings) <= known for item in every)
    assert [item.key for item in chosen(["a", "c"])] == ["a", "c4", "c3", "c2"]
    assert chosen([]) == list(CONTESTANTS)
    with pytest.raises(ValueError, match="--only: got 'z'"):
        chosen(["z"])


def repetition(key: str, number: int, seconds: float) -> Repetition:
    phase = Phase(seconds, 10, 0.5 * seconds, 4000, 1000, 0, 6000, 5000, 0, 0, 0, 0)
    answer = {name: asdict(phase) for name in ("prefill", "one", "many")} | {"first_token_s": 1.0}
    return Repetition.of(answer, key, number, 1.0, 10_000.0)


def test_ratios_are_of_the_same_repetition() -> None:
    """A machine that slows down for one repetition slows both; the ratio does not see it."""
    slow = [repetition("a", number, seconds) for number, seconds in enumerate((1.0, 10.0, 2.0))]
    fast = [repetition("e", number, seconds) for number, seconds in enumerate((0.5, 5.0, 1.0))]
    results = Results([*slow, *fast])
    assert results.ratio(1.0, "e", "a", "decode, batch 1") == Spread(2.0, 2.0, 2.0)
    assert results.spread(1.0, "e", "decode, batch 1") == Spread(2.0, 10.0, 20.0)
    assert results.ratio(1.0, "e", "b", "decode, batch 1") is None
    # 6000 bytes in half a second over a link of 10,000 a second.
    assert results.spread(1.0, "e", "link share, batch 1").high == pytest.approx(1.2)
    assert results.spread(1.0, "e", "codes, batch 1").median == pytest.approx(0.4)
    assert results.spread(1.0, "e", "waiting, batch 8").median == pytest.approx(0.5)
    assert set(MEASURES) >= {"decode, batch 1", "decode, batch 8", "prefill", "first token"}


def test_pour_gets_all_the_bytes_and_says_when_it_cannot() -> None:
    with closing(Pourer("127.0.0.1")) as pourer:
        assert pour("127.0.0.1", pourer.port, 3_000_001) > 0
    with pytest.raises(OSError, match="refused"):
        pour("127.0.0.1", pourer.port, 1)


def test_what_a_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 1000)
    with pytest.raises(HostsUnavailable, match="root"):
        check_machine()
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostsUnavailable, match="iproute2"):
        check_machine()


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


@pytest.fixture
def two_hosts() -> TwoHosts:
    try:
        with TwoHosts() as pair:
            pair.set_rate(1.0)
    except HostsUnavailable as error:
        pytest.skip(str(error))
    return TwoHosts()


def test_the_link_is_bounded_for_small_transfers_too_and_goes_away(two_hosts: TwoHosts) -> None:
    with two_hosts:
        memory = two_hosts.start(
            "memory", "benchmarks.offload_parts.memory_node", ADDRESS["memory"]
        )
        where = {"host": ADDRESS["memory"], "port": memory.hear()["pour"]}
        gpu = two_hosts.start("gpu", "benchmarks.offload_parts.gpu_node")
        two_hosts.set_rate(0.05)
        for num_bytes in (200_000, 2_000_000):
            speed = gpu.ask(do="pour", **where, num_bytes=num_bytes) * 8 / 1e9
            assert 0 < speed < 1.15 * 0.05, f"{num_bytes} bytes came at {speed:.3f} Gbit/s"
        assert all(name in namespaces() for name in two_hosts.names.values())
        with pytest.raises(RuntimeError, match="gpu_node ended with status"):
            gpu.ask(do="pour", host=ADDRESS["memory"], port=1, num_bytes=1)
    assert not any(name in namespaces() for name in two_hosts.names.values())


def test_a_rival_computes_the_same_text(model: Path) -> None:
    in_memory, stepped = TransformersRival(model), TransformersRival(model)
    told = rivals.run(in_memory, WORK)
    assert told["one"]["tokens"] == WORK.steps  # type: ignore[index]
    assert told["many"]["tokens"] == WORK.batch_steps * len(TEXTS)  # type: ignore[index]
    assert in_memory.bytes_per_step == 0
    # A token after others: what was computed step by step is what a whole pass says.
    stepped.start([TEXTS[0][:10]])
    stepped.step([TEXTS[0][10]])
    assert stepped._cache.get_seq_length() == 11
    assert in_memory.nats(TEXTS[0]) == pytest.approx(stepped.nats(TEXTS[0]), abs=1e-6)


def test_accelerate_keeps_only_the_experts_on_disk(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="extra bench-offload")
    rival = TransformersRival(model, tmp_path / "offloaded")
    # All of them in bfloat16, whatever is routed to: 2 layers, 4 experts, 3 matrices.
    assert rival.bytes_per_step == 2 * 2 * 4 * 3 * 128 * 128
    assert rival.nats(TEXTS[0]) == pytest.approx(TransformersRival(model).nats(TEXTS[0]), abs=1e-6)


def test_gguf_holds_the_weights_as_llama_cpp_names_them(model: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="extra bench-offload")
    from benchmarks.offload_parts.gguf_file import write_gguf

    file = tmp_path / "model.gguf"
    write_gguf(model, file, "bf16")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert tensors["blk.1.ffn_down_exps.weight"].shape.tolist() == [128, 128, 4]
    own = TransformersRival(model)._model.state_dict()
    norm = torch.from_numpy(tensors["blk.0.attn_norm.weight"].data.copy())
    assert torch.equal(norm, own["model.layers.0.input_layernorm.weight"].float())
