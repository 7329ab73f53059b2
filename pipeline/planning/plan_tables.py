"""A plan as human-readable tables, at most 80 columns wide so that they read the same in a terminal and in a file."""

from __future__ import annotations

from rich.console import Console

from pipeline.config.schema import RunConfig
from pipeline.hub_model import could_be_hub_id
from pipeline.planning.plan_result import Plan
from pipeline.terminal import PlainTable, counted, human_bytes, new_table, say, say_sentence, say_table


def show_plan(plan: Plan, console: Console) -> None:
    """Prints `plan`."""
    config, counts, model = plan.context.config, plan.counts, plan.context.model
    layout, generation = counts.layout, config.generation
    lines = (
        ("run", str(config.run)),
        ("model", f"{config.model} ({_origin(config)}{model.family.architecture}, {len(model.blocks)} blocks)"),
        (
            "video",
            f"{generation.height}x{generation.width}, {generation.num_frames} frames, "
            f"{generation.num_inference_steps} steps",
        ),
        (
            "tokens",
            f"{layout.num_video:,} of video ({layout.num_frames}x{layout.height}x{layout.width}), "
            f"up to {layout.num_text} of text",
        ),
        ("workers", _workers(plan)),
    )
    for key, value in lines:
        say(console, (f"{key:<8}", "bold"), f" {value}")
    for table in (_stage_table(plan), _checkpoint_table(plan)):
        console.line()
        say_table(console, table)
    console.line()
    _show_disk(plan, console)
    say(console, ("Peak memory is that of one worker, without the workspaces of libraries.", "dim"))
    say(console, ("How long it takes: plan --measure, or a run after its first units.", "dim"))
    for note in plan.notes:
        say_sentence(console, ("note:", "yellow"), f" {note}")
    for problem in plan.problems:
        say_sentence(console, ("problem:", "bold red"), f" {problem}")
    if not plan.problems:
        say(console, ("Ready to run elsewhere." if plan.lacking else "Ready to run.", "green"))


def _origin(config: RunConfig) -> str:
    """Commit of a model of the Hub; that a folder is one, where its name could be an id."""
    if config.model_commit is not None:
        return f"Hub, {config.model_commit}, "
    return "local folder, " if could_be_hub_id(config.model) else ""


def _workers(plan: Plan) -> str:
    config = plan.context.config
    device = f"{config.workers.num_gpus:g} GPU" if config.workers.num_gpus else "CPU"
    where = f", cluster {config.cluster.address}" if config.cluster.address else ""
    dtype = str(plan.dtype).removeprefix("torch.")
    if config.workers.num_ranks is not None:
        offload = "" if config.workers.offload == "none" else f", offloaded to {config.workers.offload}"
        where += f"; model over {config.workers.num_ranks} by {config.workers.sharding}{offload}"
    return (
        f"{config.workers.num_workers} on {device}, {counted(config.numerics.threads, 'thread')} each, {dtype}{where}"
    )


def _stage_table(plan: Plan) -> PlainTable:
    table = new_table("Stage", "Units", "Disk", "Peak memory")
    for stage in plan.stages:
        table.add_row(
            stage.title,
            f"{stage.units:,}",
            human_bytes(stage.disk_bytes) if stage.disk_bytes else "-",
            "-" if stage.peak_memory_bytes is None else human_bytes(stage.peak_memory_bytes),
            end_section=stage is plan.stages[-1],
        )
    table.add_row(
        "All",
        f"{sum(stage.units for stage in plan.stages):,}",
        human_bytes(plan.disk_bytes),
        "",
        style="bold",
    )
    return table


def _checkpoint_table(plan: Plan) -> PlainTable:
    table = new_table("Checkpoint", "Bits", "Layers", "Bits/weight", "Transformer", "Smaller", "Folder", left=2)
    for size in plan.checkpoints:
        table.add_row(
            size.method,
            plan.context.bits_label,
            f"{size.num_layers:,}",
            f"{size.bits_per_weight:.2f}",
            human_bytes(size.transformer_bytes),
            f"{size.compression:.2f}x",
            human_bytes(size.folder_bytes),
        )
    table.add_row("source", "16", "", "16.00", human_bytes(plan.checkpoints[0].source_bytes), "1.00x", "", style="dim")
    return table


def _show_disk(plan: Plan, console: Console) -> None:
    there = f", {human_bytes(plan.disk.existing_bytes)} are there" if plan.disk.existing_bytes else ""
    free = plan.disk.free_bytes
    room = "in a bucket" if free is None else f"{human_bytes(free)} are free"
    say(console, ("disk", "bold"), f"     {human_bytes(plan.disk_bytes)} in all{there}; {room}")
