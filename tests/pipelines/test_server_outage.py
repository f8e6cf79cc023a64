"""Kubeflow Pipelines is away for a while: what its client repeats, and what it must not repeat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from clincot.pipelines.client import PipelinesFailed, connect_pipelines
from tests.support.fast_clock import FastClock
from tests.support.fault_servers import FaultPlan, Gate, gate_before
from tests.support.kfp_stub import PipelinesStub, serving


@dataclass(frozen=True)
class Remote:
    """A server behind a gate; a wait moves the clock of both."""

    stub: PipelinesStub
    gate: Gate
    clock: FastClock


@pytest.fixture
def remote(fault_plan: FaultPlan, fast_clock: FastClock) -> Iterator[Remote]:
    with serving(PipelinesStub()) as stub, gate_before("kfp", stub.url, fault_plan) as gate:
        yield Remote(stub, gate, fast_clock)


def test_the_health_check_outlasts_a_minute(remote: Remote) -> None:
    remote.gate.plan.begin({"kfp": 60.0})
    assert connect_pipelines(remote.gate.url).server_version == "2.17.0"
    assert remote.clock.slept == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0]


def test_a_read_outlasts_a_minute(remote: Remote) -> None:
    connection = connect_pipelines(remote.gate.url)
    remote.gate.plan.begin({"kfp": 60.0})
    assert connection.client.list_runs().runs is None or connection.client.list_runs().runs == []
    assert sum(remote.clock.slept) == 61.0


def test_a_refusal_is_told_at_once(remote: Remote) -> None:
    connection = connect_pipelines(remote.gate.url)
    remote.stub.refusal = (401, '{"error": "token is expired"}')
    with pytest.raises(PipelinesFailed, match="HTTP 401, access denied"):
        connection.ensure_experiment()
    assert remote.clock.slept == []


def test_after_ten_minutes_there_is_no_answer(remote: Remote) -> None:
    remote.gate.plan.begin({"kfp": 1e9})
    with pytest.raises(PipelinesFailed, match=r"no answer .*still away after 10 min"):
        connect_pipelines(remote.gate.url)
