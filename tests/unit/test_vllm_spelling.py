"""How options are spelt in the configuration file. What vLLM makes of it, the stand-in and the real one say in contract.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.gpufleet.llm.plugins.module_utils import vllm_spelling

TABLES = sorted((Path(__file__).resolve().parents[2] / "roles/vllm/files/options").glob("*.json"))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.stem)
def test_the_kinds_are_those_that_vllm_told(table: Path) -> None:
    kinds = json.loads(table.read_text())

    def of(kind: str) -> frozenset[str]:
        return frozenset(name for name, told in kinds.items() if told == kind)

    assert (of("flag"), of("list"), of("append")) == (vllm_spelling.FLAGS, vllm_spelling.LISTS, vllm_spelling.APPENDED)


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"enable-prefix-caching": True}, {"enable-prefix-caching": True}),
        ({"enable-prefix-caching": False}, {"no-enable-prefix-caching": True}),
        ({"disable-custom-all-reduce": False}, {"no-disable-custom-all-reduce": True}),
        # vLLM drops it, and has no opposite
        ({"disable-log-stats": False}, {"disable-log-stats": False}),
        ({"served-model-name": ["a", "b"]}, {"served-model-name": ["a", "b"]}),
        ({"cudagraph-capture-sizes": [1, 2]}, {"cudagraph-capture-sizes": [1, 2]}),
        ({"allowed-origins": ["https://a"]}, {"allowed-origins": '["https://a"]'}),
        ({"allowed-origins": []}, {"allowed-origins": "[]"}),
        ({"hf-overrides": {"rms_norm_eps": 0.00001}}, {"hf-overrides": '{"rms_norm_eps": 1e-05}'}),
        ({"speculative-config": {"prompt": "it's"}}, {"speculative-config": '{"prompt": "it\'s"}'}),
        ({"lora-modules": [{"name": "it's", "path": "/a"}]}, {"lora-modules": ['{"name": "it\'s", "path": "/a"}']}),
        ({"middleware": ["a.One"]}, {"middleware": "a.One"}),
        ({"middleware": ["a.One", "b.Two"]}, {"middleware=a.One": True, "middleware=b.Two": True}),
        ({"max-model-len": "1k"}, {"max-model-len": "1k"}),
        ({"chat-template": "{{ messages }}\n"}, {"chat-template": "{{ messages }}\n"}),
    ],
)
def test_a_wish_is_spelt_as_vllm_takes_it(wish: dict[str, Any], expected: dict[str, Any]) -> None:
    assert yaml.safe_load(vllm_spelling.render_config(wish)) == expected


def test_json_is_easy_to_read_for_operators() -> None:
    told = vllm_spelling.render_config({"hf-overrides": {"a": "it's"}, "served-model-name": ["b"], "port": 8000})
    assert told == 'hf-overrides: \'{"a": "it\'\'s"}\'\nserved-model-name: ["b"]\nport: 8000\n'
