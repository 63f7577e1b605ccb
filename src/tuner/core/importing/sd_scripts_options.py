"""The options that every training script of kohya-ss/sd-scripts has, and what they are called here.

Options of data sets are in ``sd_scripts_data``, those of one model in its plugin.
"""

from __future__ import annotations

from tuner.core.config.foreign import Refused, Settings, ignored, option, unbuilt
from tuner.core.importing import lycoris
from tuner.core.importing import sd_scripts_convert as to

_ON_OFF = {True: "block", False: "off"}
_NO_BETAS = "it belongs to noise-prediction models with a schedule of betas"
_DEAD = "it does nothing for this kind of model there either, although it is accepted"
_OTHER_MODELS = "it belongs to other model families"
_SECRET = "secrets are read from the environment, never from a file"

GENERAL = (
    # model
    option("pretrained_model_name_or_path", "model.path", "text"),
    option("vae ae", "model.vae.path", "text"),
    option("disable_mmap_load_safetensors", "model.mmap", "flag", values={True: False, False: True}),
    option("lowram", "model.load_to", "flag", values={True: "accelerator"}, off=(None, False)),
    option("base_weights", kind="list", convert=to.merged),
    option("base_weights_multiplier", kind="list", convert=to.merged),
    *ignored("v2 v_parameterization clip_skip zero_terminal_snr scale_v_pred_loss_like_noise_pred v_pred_like_loss",
             _NO_BETAS),
    *ignored("max_token_length tokenizer_cache_dir weighted_captions",
             "it belongs to the text encoders of older models"),
    # network
    option("network_module", kind="text", convert=to.network_module),
    option("network_dim", kind="int", convert=to.rank, default=4),
    option("network_alpha", kind="float", convert=to.alpha, default=1.0),
    option("network_dropout", "network.dropout", "float"),
    option("network_weights", "network.init_from", "text"),
    option("dim_from_weights", "network.rank", "flag", values={True: "from_file"}, off=(None, False)),
    option("scale_weight_norms", "network.max_norm", "float"),
    option("network_args.rank_dropout", "network.rank_dropout", "float"),
    option("network_args.module_dropout", "network.module_dropout", "float"),
    option("network_args.split_qkv", "network.split_fused", "flag"),
    option("network_args.loraplus_lr_ratio", kind="float", convert=to.loraplus),
    option("network_args.loraplus_unet_lr_ratio", "optimizer.loraplus.denoiser", "float"),
    option("network_args.loraplus_text_encoder_lr_ratio", "optimizer.loraplus.text_encoder", "float"),
    option("network_args.ggpo_sigma", "network.perturbation.sigma", "float"),
    option("network_args.ggpo_beta", "network.perturbation.beta", "float"),
    *lycoris.COMMAND_LINE,
    option("network_args.verbose", refused="not_applicable", note="every run lists its modules"),
    *ignored("network_args.conv_dim network_args.conv_alpha network_args.conv_lora_dim",
             "trained blocks have no 3x3 convolutions"),
    *ignored("network_args.block_dims network_args.block_alphas network_args.down_lr_weight network_args.mid_lr_weight"
             " network_args.up_lr_weight network_args.block_lr_zero_threshold", _OTHER_MODELS),
    # optimizer and schedule
    option("learning_rate", "optimizer.lr", "float", default=2e-6),
    option("unet_lr", "optimizer.lr_by_component.denoiser", "float"),
    option("optimizer_type", kind="text", convert=to.optimizer),
    option("optimizer_args.*", convert=to.optimizer_argument),
    option("use_8bit_adam", "optimizer.name", "flag", values={True: "adamw8bit"}, off=(None, False)),
    option("use_lion_optimizer", "optimizer.name", "flag", values={True: "lion"}, off=(None, False)),
    option("max_grad_norm", kind="float", convert=to.clip, default=1.0),
    option("fused_backward_pass", "optimizer.fuse", "flag", values={True: "parameter"}, off=(None, False)),
    option("blockwise_fused_optimizers", "optimizer.fuse", "flag", values={True: "block"}, off=(None, False)),
    option("fused_optimizer_groups", kind="int", off=(None, 0), convert=lambda value, given: Settings(
        {"optimizer.fuse": "block"}, "parameters are updated by blocks instead of by groups", changed=True)),
    option("lr_scheduler", "schedule.name", "text", values=to.LR_SCHEDULERS, default="constant"),
    option("lr_warmup_steps", convert=to.steps_or_share("schedule.warmup"), off=(None, 0, "0")),
    option("lr_decay_steps", convert=to.steps_or_share("schedule.decay"), off=(None, 0, "0")),
    option("lr_scheduler_num_cycles", "schedule.cycles", "int"),
    option("lr_scheduler_power", "schedule.power", "float"),
    option("lr_scheduler_timescale", "schedule.timescale", "int"),
    option("lr_scheduler_min_lr_ratio", "schedule.min_ratio", "float"),
    option("lr_scheduler_type", "schedule.class", "text", off=(None, "")),
    option("lr_scheduler_args.*", convert=to.scheduler_argument),
    # length, batches, precision
    option("max_train_steps", kind="int", convert=to.lengths, default=1600),
    option("max_train_epochs", "train.epochs", "int"),
    option("gradient_accumulation_steps", "train.accumulate", "int"),
    option("seed", "train.seed", "int"),
    option("mixed_precision", "precision.compute", "text", values={"no": "fp32"}, default="no"),
    option("full_bf16", kind="flag", convert=to.weights_dtype("bf16"), off=(None, False)),
    option("full_fp16", kind="flag", convert=to.weights_dtype("fp16"), off=(None, False)),
    option("no_half_vae", "precision.vae", "flag", values={True: "fp32"}, off=(None, False)),
    option("fp8_base fp8_base_unet", kind="flag", convert=to.low_bits, off=(None, False), changed=True),
    # memory and speed
    option("gradient_checkpointing", "memory.checkpointing", "flag", values=_ON_OFF),
    option("cpu_offload_checkpointing", kind="flag", off=(None, False), convert=lambda value, given: Settings(
        {"memory.checkpointing": "block", "memory.offload_activations": "sync"})),
    option("unsloth_offload_checkpointing", kind="flag", off=(None, False), convert=lambda value, given: Settings(
        {"memory.checkpointing": "block", "memory.offload_activations": "async"})),
    option("blocks_to_swap", kind="int", convert=to.swapped_blocks, off=(None, 0)),
    *(option(name, kind="flag", convert=to.attention(name, backend), off=(None, False)) for name, backend in (
        ("sdpa", "sdpa"), ("xformers", "xformers"), ("mem_eff_attn", "xformers"), ("flash_attn", "flash"))),
    option("attn_mode", kind="text", convert=to.attention("attn_mode")),
    option("split_attn", "attention.split", "flag"),
    option("torch_compile", "compile.enabled", "flag", off=(None, False)),
    option("dynamo_backend", "compile.backend", "text", off=(None, "no"), needs=("torch_compile", (True,))),
    *ignored("highvram", "memory goes back to the device only with memory.empty_cache_every", "flag"),
    *ignored("mem_eff_save", "tensors are always written one by one", "flag"),
    # caches and loading
    option("cache_latents", kind="flag", convert=to.cached("cache.latents", "cache_latents_to_disk"),
           off=(None, False)),
    option("cache_latents_to_disk", "cache.latents", "flag", values={True: "disk"}, off=(None, False)),
    option("cache_text_encoder_outputs", kind="flag", off=(None, False),
           convert=to.cached("cache.text", "cache_text_encoder_outputs_to_disk")),
    option("cache_text_encoder_outputs_to_disk", "cache.text", "flag", values={True: "disk"}, off=(None, False)),
    option("vae_batch_size", "cache.vae_batch_size", "int"),
    option("text_encoder_batch_size", "cache.text_batch_size", "int"),
    *ignored("skip_cache_check skip_latents_validity_check", "a cached entry is found by the content of its image",
             "flag"),
    option("max_data_loader_n_workers", "data.workers.load", "int", changed=True,
           note="threads here, not processes"),
    *ignored("persistent_data_loader_workers", "workers always stay", "flag"),
    *ignored("debug_dataset", "tuner check lists images and buckets", "flag"),
    *unbuilt("dataset_class", "data sets of one's own code; a plugin is the way to other sources"),
    # noise and loss
    option("weighting_scheme", kind="text", convert=to.density),
    option("logit_mean", "noise.logit_mean", "float"),
    option("logit_std", "noise.logit_std", "float"),
    option("mode_scale", "noise.mode_scale", "float"),
    option("min_timestep", "noise.min_timestep", "int"),
    option("max_timestep", "noise.max_timestep", "int"),
    option("ip_noise_gamma", "noise.input_perturbation.gamma", "float", off=(None, 0.0)),
    option("ip_noise_gamma_random_strength", "noise.input_perturbation.random", "flag", off=(None, False),
           needs=("ip_noise_gamma", ())),
    option("loss_type", "loss.type", "text"),
    option("huber_c", "loss.huber_c", "float", needs=("loss_type", ("huber", "smooth_l1"))),
    option("huber_scale", "loss.huber_scale", "float", needs=("loss_type", ("huber", "smooth_l1"))),
    option("huber_schedule", "loss.huber_schedule", "text", needs=("loss_type", ("huber", "smooth_l1")), changed=True,
           default="snr", default_with="loss_type",
           note="snr, the default, stops with an error there for flow models; here it works"),
    option("prior_loss_weight", "data.regularisation_weight", "float"),
    option("masked_loss", kind="flag", off=(None, False),
           note="masks count as soon as a source has them; conditioning_data_dir becomes one"),
    *ignored("noise_offset noise_offset_random_strength adaptive_noise_scale multires_noise_iterations"
             " multires_noise_discount min_snr_gamma debiased_estimation_loss", _DEAD),
    # outputs
    option("output_dir", "checkpoint.dir", "text", default="output",
           note="every run has a folder"),
    option("output_name", "checkpoint.name", "text"),
    option("save_model_as", kind="text", values={
        "safetensors": Settings({}, "the only format here"),
        **dict.fromkeys(("ckpt", "pt", "diffusers", "diffusers_safetensors"),
                        Refused("not_applicable", "only safetensors files are written"))}),
    option("save_precision", "checkpoint.dtype", "text", values={"float": "fp32"}),
    option("save_every_n_epochs", "checkpoint.every.epochs", "int", off=(None, 0)),
    option("save_every_n_steps", "checkpoint.every.steps", "int", off=(None, 0)),
    option("save_n_epoch_ratio", kind="int", convert=to.epoch_ratio),
    option("save_last_n_epochs", "checkpoint.keep_last", "int"),
    option("save_last_n_steps", kind="int", convert=to.keep_steps),
    option("save_state", "checkpoint.state", "flag", values={True: "every"}, off=(None, False)),
    option("save_state_on_train_end", "checkpoint.state", "flag", values={True: "last"}, off=(None, False)),
    *ignored("save_last_n_epochs_state save_last_n_steps_state", "a state goes with its checkpoint"),
    *ignored("resume", "states of another program cannot be read; network.init_from takes its weights"),
    *ignored("skip_until_initial_step", "the position in the data is part of the state"),
    option("initial_step", "checkpoint.start_at", "int", off=(None, 0), changed=True,
           note="learning rates and the order of the data go on from there as well"),
    *ignored("initial_epoch", "updates are counted here: write checkpoint.start_at"),
    option("no_metadata", "checkpoint.metadata.embed", "flag", values={True: False, False: True}),
    option("training_comment", "checkpoint.metadata.comment", "text"),
    option("metadata_title", "checkpoint.metadata.title", "text"),
    option("metadata_author", "checkpoint.metadata.author", "text"),
    option("metadata_description", "checkpoint.metadata.description", "text"),
    option("metadata_license", "checkpoint.metadata.license", "text"),
    option("metadata_tags", kind="text", convert=lambda value, given: Settings(
        {"checkpoint.metadata.tags": [tag.strip() for tag in value.split(",") if tag.strip()]})),
    option("script.format", kind="text", convert=to.file_names, default="sd-scripts",
           note="files there have sd-scripts names; the default here suits ComfyUI and diffusers"),
    # samples and validation
    option("sample_prompts", "sample.prompts", "text", changed=True,
           note="--l is classifier-free guidance and --g the embedded guidance, as there since 30 July 2025; older"
                " files have them the other way round"),
    option("sample_every_n_epochs", "sample.every.epochs", "int", off=(None, 0)),
    option("sample_every_n_steps", "sample.every.steps", "int", off=(None, 0),
           needs=("sample_every_n_epochs", (None, 0))),
    option("sample_at_first", "sample.at_start", "flag"),
    *ignored("sample_sampler", "flow models are drawn with Euler steps, there too"),
    option("validate_every_n_steps", "validate.every.steps", "int"),
    option("validate_every_n_epochs", "validate.every.epochs", "int"),
    option("max_validation_steps", "validate.max_batches", "int"),
    # logging, publishing, launching
    option("log_with", "log.to", "text", values={
        "tensorboard": ["tensorboard"], "wandb": ["wandb"], "all": ["tensorboard", "wandb"]}),
    option("logging_dir", kind="text", convert=to.logging_dir),
    *ignored("log_prefix", "it begins the name of a folder of logs; here that is the run's own"),
    option("wandb_run_name", "log.run", "text", needs=("log_with", ("wandb", "all"))),
    option("log_tracker_name", "log.project", "text"),
    *unbuilt("log_tracker_config", "arguments of trackers from a file; write them into log.args", "text"),
    *ignored("log_config", "the settings of a run are in its folder", "flag"),
    *ignored("wandb_api_key huggingface_token", _SECRET),
    option("console_log_level", "log.level", "text", convert=lambda value, given: Settings(
        {"log.level": {"critical": "error"}.get(value.lower(), value.lower())})),
    option("console_log_file", "log.file", "text"),
    option("console_log_simple", "log.plain", "flag", off=(None, False)),
    option("huggingface_repo_id", "publish.hub.repo", "text"),
    option("huggingface_repo_type", "publish.hub.type", "text"),
    option("huggingface_path_in_repo", "publish.hub.path", "text"),
    option("huggingface_repo_visibility", "publish.hub.private", "text"),
    option("save_state_to_huggingface", "publish.hub.state", "flag", off=(None, False)),
    option("async_upload", "publish.hub.background", "flag", off=(None, False)),
    option("resume_from_huggingface", "publish.hub.resume", "flag", off=(None, False)),
    option("deepspeed", "distributed.deepspeed", "flag", off=(None, False)),
    *(option(name, f"distributed.deepspeed_{name}", off=(None, False), needs=("deepspeed", (True,))) for name in (
        "zero_stage", "offload_optimizer_device", "offload_optimizer_nvme_path", "offload_param_device",
        "offload_param_nvme_path", "zero3_init_flag", "zero3_save_16bit_model", "fp16_master_weights_and_gradients")),
    option("ddp_timeout", "distributed.ddp.timeout", "int"),
    option("ddp_gradient_as_bucket_view", "distributed.ddp.gradient_as_bucket_view", "flag", off=(None, False)),
    option("ddp_static_graph", "distributed.ddp.static_graph", "flag", off=(None, False)),
    *ignored("output_config", "it makes that program write its settings and stop", "flag"),
)  # fmt: skip

LAUNCHER = (
    option("mixed_precision", refused="not_applicable",
           note="sd-scripts always hands its own --mixed_precision on, which is no unless it is given"),
    option("num_processes nproc_per_node", "distributed.processes", "int", off=(None, 1)),
    option("num_machines", "distributed.machines", "int", off=(None, 1)),
    option("multi_gpu", "distributed.processes", "flag", off=(None, False)),
    option("use_deepspeed", "distributed.deepspeed", "flag", off=(None, False)),
    option("use_fsdp", "distributed.fsdp", "flag", off=(None, False)),
    option("dynamo_backend", kind="text", off=(None, "no", "NO"), refused="not_applicable",
           note="sd-scripts compiles with its own --torch_compile only"),
    option("gradient_accumulation_steps", refused="not_applicable", note="the script's own option counts"),
    *ignored("num_cpu_threads_per_process machine_rank gpu_ids main_process_port main_process_ip config_file debug"
             " quiet module same_network rdzv_backend dynamo_mode dynamo_use_fullgraph dynamo_use_dynamic"
             " enable_cpu_affinity downcast_bf16 cpu standalone m u",
             "it belongs to the launcher; tuner needs none"),
)  # fmt: skip
