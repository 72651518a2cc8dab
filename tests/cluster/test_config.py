"""Goal: one YAML file says all of a cluster, and no mistake in it passes silently.

Method: a table of bad files, each with the words its message must have; the documented example is
what the code renders, and every field of every section is in it.
"""

from __future__ import annotations

import dataclasses
from itertools import takewhile
from pathlib import Path

import pytest
import yaml

from cluster.config import (
    ClusterConfig,
    as_mapping,
    config_from_mapping,
    load_config,
    render_example,
)
from cluster.settings import split_label
from cluster.strict import field_texts

EXAMPLE = Path(__file__).resolve().parents[2] / "deploy" / "cluster.example.yaml"

BAD = {
    "unknown section": ("stoer: {}", ["stoer", "unknown field", "did you mean 'store'"]),
    "unknown field": ("store: {replica: 2}", ["store.replica", "did you mean 'replicas'"]),
    "far from any": ("http: {zzzzzzzz: 2}", ["http.zzzzzzzz", "known here: host, port"]),
    "unknown, deep": (
        "replicas: {autoscaling: {min_replica: 1}}",
        ["replicas.autoscaling.min_replica", "did you mean 'min_replicas'"],
    ),
    "type: text for number": (
        "http: {port: '80'}",
        ["http.port", "'80' (str)", "a whole number"],
    ),
    "type: number for text": ("model: 3", ["model", "3 (int)", "a text"]),
    "type: bool is no number": ("store: {replicas: true}", ["store.replicas", "True (bool)"]),
    "type: number is no bool": ("ndp: {enabled: 1}", ["ndp.enabled", "true or false"]),
    "type: list for section": ("store: [1]", ["store", "expected a mapping of fields"]),
    "type: a list": ("[1]", ["the document", "expected a mapping of fields"]),
    "null where none is allowed": ("http: {port: null}", ["http.port", "None"]),
    "choice": ("store: {transport: tcp}", ["store.transport", "object_store, grpc"]),
    "choice: compression": ("store: {compression: gzip}", ["store.compression", "none, zstd"]),
    "compression without grpc": (
        "store: {compression: zstd}",
        ["store.compression", "object_store", "set transport grpc"],
    ),
    "range: port": ("http: {port: 70000}", ["http.port", "70000", "0 to 65535"]),
    "range: replicas": ("store: {replicas: 0}", ["store.replicas", "1 to 64"]),
    "range: not finite": ("http: {request_timeout_s: .inf}", ["http.request_timeout_s", "inf"]),
    "range: max below min": (
        "replicas: {autoscaling: {min_replicas: 3, max_replicas: 2}}",
        ["replicas.autoscaling.max_replicas", "3 to 1000"],
    ),
    "range: window": (
        "replicas: {autoscaling: {look_back_s: 1, metrics_interval_s: 1}}",
        ["replicas.autoscaling.look_back_s", "more than metrics_interval_s"],
    ),
    "targets without times": (
        "replicas: {autoscaling: {targets: {ttft_s: 2}}}",
        ["replicas.autoscaling.service", "moetier tune"],
    ),
    "range: targets": (
        "replicas: {autoscaling: {targets: {sequences_per_replica: 0}}}",
        ["replicas.autoscaling.targets.sequences_per_replica", "positive"],
    ),
    "worker's own check": ("worker: {max_sequences: 0}", ["worker.max_sequences", "at least 1"]),
    "label": ("ndp: {label: memory}", ["ndp.label", "key=value"]),
    "ports": ("store: {port_range: 20000}", ["store.port_range"]),
    "ports order": ("ndp: {port_range: 20009-20000}", ["port_range", "20009-20000", "FIRST-LAST"]),
    "near data without ndp": ("worker: {near_data: low_bit}", ["worker.near_data", "ndp.enabled"]),
    "redis by http": (
        "directory: {kind: redis, redis_url: 'http://h:1'}",
        ["directory.redis_url", "unknown scheme 'http'", "redis+sentinel://"],
    ),
    "sentinels of no service": (
        "directory: {kind: redis, redis_url: 'redis+sentinel://a:1,b:2'}",
        ["directory.redis_url", "without the name of a service"],
    ),
    "a CA without TLS": (
        "directory: {kind: redis, redis_url: 'redis://a:1', ca_file: /ca.pem}",
        ["directory.ca_file", "rediss://"],
    ),
    "a Sentinel password without one": (
        "directory: {kind: redis, redis_url: 'redis://a:1', sentinel_password_file: /p}",
        ["directory.sentinel_password_file", "redis+sentinel://"],
    ),
    "redis without url": ("directory: {kind: redis}", ["directory.redis_url", "redis://"]),
    "password in url": (
        "directory: {kind: redis, redis_url: 'redis://:hunter2@h:1/0'}",
        ["directory.redis_url", "password_file"],
    ),
    "twice": ("model: a\nmodel: b", [":2:", "given twice"]),
    "not YAML": ("model: [", ["not valid YAML"]),
    "two documents": ("model: a\n---\nmodel: b", ["not valid YAML"]),
    "tag": ("model: !!python/object/apply:os.getcwd []", ["not valid YAML"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_names_its_place(case: str, tmp_path: Path) -> None:
    text, words = BAD[case]
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are the check
        load_config(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_a_secret_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(BAD["password in url"][0])
    with pytest.raises(ValueError, match="password_file") as caught:
        load_config(path)
    assert "hunter2" not in str(caught.value)


def test_a_missing_or_huge_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "huge.yaml").write_text("#" * (1 << 21))
    with pytest.raises(ValueError, match="not a cluster config"):
        load_config(tmp_path / "huge.yaml")


def test_empty_means_all_defaults(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("# nothing\n")
    assert load_config(path) == ClusterConfig()


def test_yaml_words_are_read_as_people_mean_them(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("worker: {near_data: off, link_bytes_per_s: 1e9}\nstore: {label: null}\n")
    config = load_config(path)
    assert config.worker.near_data == "off"
    assert config.worker.link_bytes_per_s == 1e9
    assert config.store.label is None


def test_plain_values_there_and_back() -> None:
    config = config_from_mapping(
        {"store": {"path": "/s", "replicas": 2}, "replicas": {"autoscaling": {"max_replicas": 2}}},
        source="test",
    )
    plain = as_mapping(config)
    assert config_from_mapping(yaml.safe_load(yaml.safe_dump(plain)), source="test") == config


def test_resolve_leaves_no_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETIER_CACHE", str(tmp_path))
    resolved = config_from_mapping({"ndp": {"enabled": True}}, source="test").resolve()
    assert resolved.store.path == str(tmp_path / "stores" / "mixtral-mini")
    assert resolved.worker.near_data == "low_bit"
    assert resolved.resolve() == resolved


def test_labels_split() -> None:
    assert split_label("moetier.io/store=true") == {"moetier.io/store": "true"}
    assert split_label(None) == {}


def test_the_example_is_what_the_code_says() -> None:
    assert EXAMPLE.read_text() == render_example(), (
        "run `python -m cluster.config > deploy/cluster.example.yaml`"
    )
    assert load_config(EXAMPLE) == ClusterConfig()


def test_the_example_documents_every_field() -> None:
    text = EXAMPLE.read_text()

    def check(config: object) -> None:
        assert dataclasses.is_dataclass(config)
        for name, words in field_texts(type(config)).items():
            assert f"{name}:" in text, name
            assert len(words) > 10, f"{type(config).__name__}.{name} has no real text"
            value = getattr(config, name)
            if dataclasses.is_dataclass(value):
                check(value)

    check(ClusterConfig())


def test_the_commented_sections_of_the_example_are_valid_too(tmp_path: Path) -> None:
    lines = EXAMPLE.read_text().splitlines()
    starts = [at for at, line in enumerate(lines) if line == "  # autoscaling:"]
    assert len(starts) == 2
    for start, given in zip(starts, ("store:\n    placement: full", "replicas:"), strict=True):
        after = takewhile(lambda line: line.startswith("  #  "), lines[start + 1 :])
        section = [line.replace("#", " ", 1) for line in (lines[start], *after)]
        path = tmp_path / "cluster.yaml"
        path.write_text("\n".join([given, *section]))
        config = load_config(path)
        found = config.store.autoscaling or config.replicas.autoscaling
        assert found is not None
        assert found == type(found)()
