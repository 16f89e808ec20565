"""What Prometheus reads."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from prometheus_client.parser import text_string_to_metric_families

from dsjax.generate.balancing import Balance
from dsjax.generate.engine import Statistics
from dsjax.serve.metrics import Metrics


def values(metrics):
    families = text_string_to_metric_families(metrics.text().decode())
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_compilations_are_counted_until_closed():
    metrics = Metrics()
    before = values(metrics)["dsjax_compilations_total"]
    jax.jit(lambda x: x * 3.25 + 1)(jnp.ones(3))
    after = values(metrics)["dsjax_compilations_total"]
    assert after > before
    metrics.close()
    jax.jit(lambda x: x * 4.25 + 2)(jnp.ones(3))
    assert values(metrics)["dsjax_compilations_total"] == after


def test_two_servers_count_apart():
    first, second = Metrics(), Metrics()
    first.generated.inc(3)
    assert values(first)["dsjax_generated_tokens_total"] == 3
    assert values(second)["dsjax_generated_tokens_total"] == 0
    first.close()
    second.close()


def test_the_balance_of_redundant_experts_is_told():
    balance = Balance(plain=3.0, before=2.0, after=1.25, placements=4)
    engine = SimpleNamespace(statistics=Statistics(), balance=balance)
    metrics = Metrics()
    metrics.observe(SimpleNamespace(n_running=1, n_waiting=0, engine=engine))  # type: ignore
    text = metrics.text().decode()
    for name, value in (("plain", 3.0), ("before", 2.0), ("after", 1.25)):
        assert f'dsjax_expert_imbalance{{experts="{name}"}} {value}' in text
    assert values(metrics)["dsjax_expert_placements"] == 4
    metrics.close()
