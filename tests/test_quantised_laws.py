"""The laws over every method, on a linear layer in every storage whose library is installed."""

from __future__ import annotations

import pytest

from veneer import LoraConfig
from veneer.method import Method, load_methods
from veneer.testing import Case, Exempt, cases, examples, hold, packed_sites

OFTEN = ("nf4_double", "llm_int8", "torchao_int8_inputs", "quanto_int4", "hqq_4bit")  # the others are slow tests
METHODS = [m for m in load_methods().values() if issubclass(m, Method)]
STARTS = [(f"start-{kind}", LoraConfig(r=4, init_lora_weights=kind)) for kind in ("pissa", "olora", "orthogonal", "mica", False)]
CONFIGS = STARTS + [(f"{m.__name__}-{i}", config) for m in METHODS for i, config in enumerate(examples(m)) if "linear" in config.kinds]
LAWS = (
    "identity_at_the_start", "moves_the_output", "output_is_that_of_the_changed_weight", "merged_equals_unmerged", "unmerging_is_exact",
    "saved_and_loaded_is_the_same", "only_the_adapter_trains", "several_adapters", "both_at_once_merge_as_they_run",
    "mixed_batch_equals_one_by_one", "autocast_runs", "checkpointing_recomputes_the_same", "fused_equals_reference", "builds_on_meta",
)  # fmt: skip


@pytest.mark.parametrize("storage", [pytest.param(s, marks=[] if s in OFTEN else [pytest.mark.slow]) for s in packed_sites()])
@pytest.mark.parametrize(("name", "config"), CONFIGS, ids=[n for n, _ in CONFIGS])
def test_laws_hold_on_quantised_layers(name: str, config: Method, storage: str) -> None:
    (case,) = cases([config], [storage])
    broken = [f"{law}: {e}" for law in LAWS if (e := _broken(law, case))]
    assert not broken, "\n".join(broken)


def _broken(law: str, case: Case) -> str:
    try:
        hold(law, case)
    except Exempt:
        return ""
    except AssertionError as e:
        return str(e)[:300]
    return ""
