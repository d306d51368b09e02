"""Logits of an exported checkpoint in transformers and in a real SGLang server, against the trainer's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsdp2_cases import Gangs
from megatron_cases import Case, largest_difference, make_batch, open_strategy, read_weights, shard
from sglang_cases import Engine, configuration

from roll_r3.batch.batch import Batch
from roll_r3.config.reading.yaml_file import to_yaml
from roll_r3.export import export
from roll_r3.saving.manifest import file_sum, files_below
from roll_r3.saving.state import CONFIG, TRAINER
from roll_r3.saving.store import Store
from roll_r3.strategies.base import ProcessInfo

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

PROMPTS, LENGTH = 3, 16
TOLERANCE = 1e-4
"""Largest difference of a log-probability in fp32.

Every side routes by itself; a tie broken differently would exceed it by far.
"""
TRAINING = {"learning_rate": 1e-2, "warmup_steps": 0}
CASES = {
    "qwen3_moe": {"layout": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}},
    "olmoe": {"engine": "fsdp2"},
}


def prompts() -> np.ndarray:
    """Return prompts of bytes. [PROMPTS, LENGTH]"""
    return np.random.default_rng(7).integers(0, 256, (PROMPTS, LENGTH))


@pytest.mark.parametrize("model", CASES)
def test_what_is_exported_computes_what_was_trained(
    model: str, gang: Gangs, models: dict[str, Path], tmp_path: Path
) -> None:
    case = Case(
        str(models[model]), mode="disable", training=TRAINING, micro_batch_size=4, infer_batch_size=128, **CASES[model]
    )
    checkpoints = Store(tmp_path / "checkpoints")
    ranks = 2
    partial = checkpoints.begin(3)
    trained_PSV = gang(ranks).run(_train_and_save, case, make_batch(checkpoint=models[model]), partial / TRAINER)[0]
    (partial / CONFIG).write_text(to_yaml(case.config(ranks // case.model_parallel_size)))
    checkpoints.seal(3, {name: file_sum(partial / name) for name in files_below(partial)})
    export(checkpoints.finish(3), tmp_path / "hf")
    assert largest_difference(read_weights(models[model]), read_weights(tmp_path / "hf")) > 1e-3, "it was trained"

    with_transformers = np.abs(in_transformers(tmp_path / "hf") - trained_PSV).max()
    untrained = np.abs(in_transformers(models[model]) - trained_PSV).max()
    with_sglang = np.abs(in_sglang(tmp_path / "hf", tmp_path / "server.log") - trained_PSV).max()
    print(f"{model}: transformers {with_transformers:.1e}, SGLang {with_sglang:.1e}, untrained {untrained:.1e}")
    assert with_transformers < TOLERANCE
    assert with_sglang < TOLERANCE
    assert untrained > 100 * TOLERANCE


def _train_and_save(process: ProcessInfo, case: Case, batch: Batch, path: Path) -> np.ndarray | None:
    """Train three steps and save; return the trainer's log-probabilities of the whole vocabulary at every position.

    Without temperature; float64 [PROMPTS, LENGTH, V]. Return None on a rank without results.
    """
    strategy = open_strategy(process, case)
    part = shard(batch, strategy.data_parallel_rank, strategy.data_parallel_size)
    for step in (1, 2, 3):
        strategy.train_step(part, step)
    strategy.snapshot().write(path)
    vocab = len(read_weights(case.checkpoint)["model.embed_tokens.weight"])
    log_probs_N = strategy.compute_log_probs(_every_label(vocab)).log_probs_N
    temperature = strategy.role.temperature
    strategy.close()
    if log_probs_N is None:
        return None
    scaled_PSV = log_probs_N.reshape(PROMPTS, vocab, LENGTH).transpose(0, 2, 1)
    return _log_softmax(scaled_PSV * temperature)


def _every_label(vocab: int) -> Batch:
    """Return each prompt once for every token of the vocabulary, as the label of all its inputs."""
    samples = PROMPTS * vocab
    inputs_nS = prompts().repeat(vocab, axis=0)
    labels_nS = np.tile(np.arange(vocab), PROMPTS)[:, None].repeat(LENGTH, axis=1)
    return Batch(
        sample_ids=tuple(f"sample{i}" for i in range(samples)),
        lengths_n=np.full(samples, LENGTH),
        input_ids_N=inputs_nS.reshape(-1),
        labels_N=labels_nS.reshape(-1),
        loss_mask_N=np.ones(samples * LENGTH, bool),
        rollout_log_probs_N=np.zeros(samples * LENGTH, np.float32),
        routes=None,
    )


def in_transformers(checkpoint: Path) -> np.ndarray:
    """Return the same log-probabilities as `_train_and_save`, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        return _log_softmax(model(input_ids=torch.from_numpy(prompts())).logits.numpy())


def in_sglang(checkpoint: Path, log: Path) -> np.ndarray:
    """Return the same log-probabilities as `_train_and_save`, by a server asked for the whole vocabulary."""
    from transformers import AutoTokenizer

    vocab = len(AutoTokenizer.from_pretrained(checkpoint))
    engine = Engine(configuration(checkpoint, "float32"), log)
    try:
        engine.run(engine.rollout.start())
        client = engine.rollout._client
        assert client is not None
        found_PSV = np.full((PROMPTS, LENGTH, vocab), np.nan)
        for i, prompt in enumerate(prompts()):
            request = {
                "input_ids": prompt.tolist(),
                "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
                "return_logprob": True,
                "logprob_start_len": 0,
                "top_logprobs_num": vocab,
            }
            said = json.loads(engine.run(client.post("/generate", request, 120.0)))["meta_info"]
            places: list[Any] = [*said["input_top_logprobs"][1:], said["output_top_logprobs"][0]]
            assert len(places) == LENGTH
            for position, entries in enumerate(places):
                for log_prob, token, _ in entries:
                    found_PSV[i, position, token] = log_prob
    finally:
        engine.close()
    assert not np.isnan(found_PSV).any(), "it names every token"
    return found_PSV


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).double().log_softmax(-1).numpy()
