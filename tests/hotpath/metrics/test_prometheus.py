"""The hot paths of a process, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.hotpath_kernels import compile_kernel, same, total, values
from synapse.hotpath import PATHS, hotpath
from synapse.hotpath.metrics.prometheus import prometheus_text


@pytest.fixture
def _path(tmp_path: Path) -> Iterator[None]:
    hotpath("total", kernel=compile_kernel(tmp_path), agrees=same)(total)
    PATHS["total"].on_first_call = None
    yield
    del PATHS["total"]


@pytest.mark.usefixtures("_path")
def test_a_scrape_has_the_counts_latencies_share_and_alerts_of_each_path() -> None:
    for _ in range(7):
        PATHS["total"].call(values(1, 2))
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(prometheus_text().decode())
        for sample in family.samples
        if sample.labels["path"] == "total"
    }
    reference, path = (("path", "total"), ("runtime", "reference")), ("path", "total")
    assert samples["synapse_hotpath_answers_total", *reference] == 7
    assert samples["synapse_hotpath_answers_total", path, ("runtime", "native")] == 0
    assert samples["synapse_hotpath_latency_seconds_count", *reference] == 7
    assert 0 < samples["synapse_hotpath_latency_seconds_sum", *reference] < 1
    buckets = [value for name, value in samples.items() if name[0].endswith("_bucket") and name[-1] == reference[1]]
    assert buckets == sorted(buckets)
    assert buckets[-1] == 7
    assert samples["synapse_hotpath_wrong_total", path] == 0
    assert samples["synapse_hotpath_share", path] == 0
    assert samples["synapse_hotpath_alert", ("alert", "latency"), path] == 0
