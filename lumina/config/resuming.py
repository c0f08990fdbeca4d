"""What may change when a run is resumed: a verdict for every setting of the schema, in this one table.

The order of samples, the schedule of learning rates and the loss of the steps that were taken hang on some settings
(laws 1, 2 and 6); others change what follows, and are shown; the rest say where and how a run is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple


class OnResume(Enum):
    """What a changed setting does to a resume."""

    REFUSED = "refused"  # whatever the new value
    CHECKPOINT = "refused: the checkpoint itself says what it must be"
    DATA = "refused where it changes the training data, by its fingerprint"
    SCHEDULE = "refused where a step that was taken would have had another learning rate"
    SHOWN = "allowed and shown"
    FREE = "free"


_NAMES: dict[OnResume, str] = {
    OnResume.REFUSED: """
        objective seed rope_theta rope_scaling rms_norm_eps partial_rotary_factor nope_layers sliding_window
        sliding_layers sliding_rope_theta attention_scale attention_softcap logit_softcap embedding_multiplier
        residual_multiplier logit_scale
    """,
    OnResume.CHECKPOINT: """
        hidden_size num_layers num_heads num_kv_heads head_size vocab_size intermediate_size family tie_word_embeddings
        experts lora_rank lora_alpha lora_targets global_batch_size chat_template
    """,
    OnResume.DATA: "train_data data columns eval_fraction dedup packing overlong overlong_context seq_length tokenizer",
    OnResume.SCHEDULE: "epochs max_steps lr_scheduler warmup_ratio",
    OnResume.SHOWN: """
        learning_rate min_lr max_grad_norm weight_decay adam_beta1 adam_beta2 adam_eps dpo_beta lora_dropout precision
        router_aux_loss_coef router_z_loss_coef float8 eval_data eval_every_n_batches early_stopping_patience
        health_window health_warmup health_check_interval disabled_rules rule_settings spike_deviations
        grad_explosion_factor on_spike rollback_after max_rollbacks on_corrupt_sample
    """,
    # Where and how: the batch of a device and its accumulation make up the same global batch.
    OnResume.FREE: """
        model_name experiment_name output_dir resume init_from trained_seq_length ds_config init_std
        batch_size gradient_accumulation_steps sequence_parallel_size compile deterministic gradient_checkpointing
        activation_offloading mlp_tile_tokens attention_head_groups cache_dir num_workers
        save_every_n_batches hang_timeout stop_timeout straggler_interval straggler_factor keep_last
        grad_vanishing_factor plateau_steps plateau_gain divergence_evaluations loss_scale_floor layer_stats_every
        layer_dead_fraction layer_update_ratio layer_gradient_factor throughput_fall data_wait_fraction memory_growth
        disk_free_checkpoints gpu_temperature on_oom emergency_checkpoint emergency_seconds
        save_async save_timeout_minutes backup_dir backup_every_n_batches backup_every_minutes backup_keep_last
        backup_keep_every backup_keep_best
        trackers system_metrics_seconds sample_prompts sample_tokens live_view profile
    """,
}
ON_RESUME: dict[str, OnResume] = {name: verdict for verdict, names in _NAMES.items() for name in names.split()}


class Difference(NamedTuple):
    """A setting that is not what it was. `str()` gives it for people."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} {self.now}, was {self.before}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *verdicts: OnResume) -> list[Difference]:
    """The settings of these verdicts that differ, in the table's order. One that `before` lacks (an earlier version's
    record) is not compared."""
    return [
        Difference(name, before[name], now[name])
        for name, verdict in ON_RESUME.items()
        if verdict in verdicts and name in before and before[name] != now[name]
    ]
