"""Which tests run when: `make fast`, `make test`, `make test-all`.

`make fast` runs FAST: files whose tests start no process, load no model and train nothing; a test of them that starts a
process fails there. `make test` leaves out EXHAUSTIVE: long tables of cases of which a few stay, and whole runs of
which a smaller one stays. `make test-all`, and `.ci/run`, run everything.
"""

from __future__ import annotations

# Files, relative to tests/.
FAST: frozenset[str] = frozenset(
    {
        "attack/test_gguf_files.py",
        "distill/test_data.py",
        "distill/test_losses.py",
        "distill/test_packed_attention.py",
        "distill/test_sweep.py",
        "formats/test_compressed_tensors.py",
        "formats/test_gguf_blocks.py",
        "models/test_block_inputs.py",
        "models/test_files.py",
        "models/test_gguf_tokenizer.py",
        "models/test_model_refusals.py",
        "quant/test_allocate.py",
        "quant/test_awq.py",
        "quant/test_fp8.py",
        "quant/test_gptq.py",
        "quant/test_gptq_blocks.py",
        "quant/test_grid.py",
        "report/test_distillation.py",
        "report/test_sweep_plots.py",
        "teacher/test_budget.py",
        "teacher/test_local.py",
        "teacher/test_prices.py",
        "test_defaults.py",
        "test_docs.py",
        "test_fake_cuda.py",
        "test_imports.py",
        "test_recipe.py",
        "test_recipes_load.py",
        "test_runs.py",
        "test_stats.py",
        "text2sql/test_agreement.py",
        "text2sql/test_clock.py",
        "text2sql/test_dataset.py",
        "text2sql/test_duplicates.py",
        "text2sql/test_exact_match.py",
        "text2sql/test_extract.py",
        "text2sql/test_judge.py",
        "text2sql/test_mutants.py",
        "text2sql/test_name_check.py",
        "text2sql/test_prompts.py",
        "text2sql/test_question_writing.py",
        "text2sql/test_result_compare.py",
        "text2sql/test_schema_linking.py",
        "tools/test_corpus.py",
        "tools/test_domains.py",
        "tools/test_josa.py",
        "tools/test_test_set.py",
    }
)

# Files, or file::test, relative to tests/.
EXHAUSTIVE: frozenset[str] = frozenset(
    {
        "distill/test_logits.py::test_a_kill_in_the_middle_loses_at_most_a_shard",
        "distill/test_student.py::test_a_quantized_checkpoint_can_be_merged_too",
        "distill/test_train.py::test_a_training_killed_in_the_middle_ends_as_an_undisturbed_one",
        "distill/test_train.py::test_two_processes_reach_the_loss_of_one_with_the_same_global_batch",
        "evals/test_lm_eval_task.py::test_the_command_line",
        "evals/test_speed.py::test_a_quantized_cache_is_measured_too",
        "formats/test_gguf_file.py::test_llama_cpp_computes_every_type",
        "formats/test_gguf_file.py::test_llama_cpp_computes_the_same",
        "models/test_architectures.py::test_checkpoints_are_read_back",
        "models/test_embedded.py::test_plain_transformers_in_a_fresh_process",
        "models/test_embedded.py::test_three_bits_hurt_and_gptq_helps",
        "models/test_gguf.py::test_a_student_is_trained_from_it",
        "models/test_gguf.py::test_other_methods_take_it_too",
        "models/test_remote_code.py::test_the_checkpoint_is_verified_with_its_own_code",
        "models/test_weight_files.py::test_an_older_index_changes_nothing",
        "quant/test_experts.py::test_killed_and_resumed_it_ends_in_the_same_bytes",
        "quant/test_gguf_run.py::test_a_killed_run_ends_in_the_same_bytes",
        "quant/test_kill.py::test_killed_runs_end_in_the_same_bytes",
        "quant/test_pipeline.py::test_a_write_that_fails_leaves_no_checkpoint",
        "quant/test_pipeline.py::test_real_model_gptq_beats_rtn_and_awq_never_loses",
        "teacher/test_client.py::test_a_hostile_server",
        "test_benchmark_peers.py::test_a_missing_tool_is_a_result_and_not_a_crash",
        "test_benchmark_peers.py::test_quantlab_through_the_worker",
        "test_cli.py::test_sigterm_leaves_a_state_to_resume_from",
        "test_contributing.py::test_an_interrupted_export_starts_from_the_assembled_parts",
        "test_distill.py::test_evidence_from_the_file_to_teacher_judge_and_student",
        "text2sql/test_transpile.py::test_monsters_end",
        "zoo/test_zoo.py::test_many",
        "tools/test_build.py::test_what_is_committed_is_what_would_be_built",
    }
)


def tiers_of(file: str, test: str) -> tuple[str, ...]:
    """The marks of a test function in a file (relative to tests/)."""
    exhaustive = file in EXHAUSTIVE or f"{file}::{test}" in EXHAUSTIVE
    return ("exhaustive",) if exhaustive else ("fast",) if file in FAST else ()
