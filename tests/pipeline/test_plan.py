"""What `plan` says beforehand, against what a run writes; and that it says all at once what would go wrong."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from rich.console import Console
from safetensors.torch import load_file, save_file

from pipeline.config.loading import ConfigError, load_config
from pipeline.config.schema import RunConfig
from pipeline.context import build_context, recognizer_fingerprint, recognizer_problems
from pipeline.plan import _memory_notes, make_plan, plan_config
from pipeline.planning import stage_memory
from pipeline.planning.machine import disk_of, run_problems
from pipeline.planning.model_size import CheckpointSize, checkpoint_size, copied_bytes, planned_layers, source_tensors
from pipeline.planning.plan_result import Plan, StagePlan
from pipeline.planning.plan_tables import show_plan
from pipeline.planning.stage_memory import StageMemory
from reelquant.checkpoint.verify import verify_checkpoint
from reelquant.checkpoint.writer import write_checkpoint
from reelquant.families.hunyuan_video import FAMILY
from reelquant.tokens import TokenLayout
from tests.errors import names, raises
from tests.pipeline.small_run import ROOT, Recorded, small_run
from tests.reelquant.narrow_blocks import constants_of, streams_of
from tests.unit_cache import UnitCache
from workers.distillation_worker import DistillationWorker
from workers.messages import DistillationSettings, PromptUnit, SampleUnit, SegmentUnit
from workers.model_source import build_on_meta, transformer_config
from workers.stored_calls import write_constants

REFERENCE = ROOT / "configs" / "models" / "hunyuanvideo-13b"


@pytest.fixture
def torch_as_before() -> Iterator[None]:
    """Workers make torch deterministic for their process."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, four CPU cores, no cluster."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def small(folder: Path, *overrides: str, **changes: Any) -> RunConfig:
    return load_config(small_run(folder, **changes), overrides)


def large(*overrides: str) -> RunConfig:
    """HunyuanVideo-13B, from its configuration files."""
    return load_config(ROOT / "configs" / "hunyuanvideo-13b.yaml", [f"model={REFERENCE}", *overrides])


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Override for `large`: three blocks of 60, in the same ratios to each other, planned in half the time."""
    model = Path(shutil.copytree(REFERENCE, tmp_path_factory.mktemp("shallow") / "model"))
    path = model / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 1, "num_single_layers": 2}))
    return f"model={model}"


def large_size(*overrides: str) -> CheckpointSize:
    """The checkpoint of HunyuanVideo-13B."""
    context = build_context(large(*overrides), weights=False)
    return checkpoint_size(context.model, context.methods[0], tensors=source_tensors(context.model), component_bytes={})


def shown(plan: Plan, width: int = 80) -> str:
    console = Console(width=width, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        show_plan(plan, console)
    return capture.get()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a random transformer of five narrow blocks, in float32 shards. Read only."""
    model = copy_of_model(tmp_path_factory.mktemp("tiny"))
    (model / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    config = json.loads((model / "transformer" / "config.json").read_text())
    config.update(
        num_attention_heads=3, attention_head_dim=32, rope_axes_dim=[8, 12, 12], num_layers=2, num_single_layers=3
    )
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel.from_config(config)
    transformer.save_pretrained(model / "transformer", max_shard_size="1MB")
    return model


# HunyuanVideo-13B


@pytest.mark.parametrize(("layout", "least"), [("per_channel", 3.9), ("two_level", 3.75)])
def test_hunyuanvideo_shrinks_as_promised(layout: str, least: float) -> None:
    size = large_size(f"method.weight_layout={layout}")
    assert size.source_bytes / 2**30 == pytest.approx(23.881, abs=1e-3)
    assert size.compression >= least  # 3.910 and 3.794
    assert size.transformer_bytes / 2**30 <= 23.881 / least


def test_hunyuanvideo_is_planned_from_its_configuration_files_alone() -> None:
    assert not list(REFERENCE.rglob("*.safetensors"))
    plan = plan_config(large(), shapes_only=True)
    stages = {stage.name: stage for stage in plan.stages}
    assert {name: stage.units for name, stage in stages.items()} == {
        "trajectories": 10, "selection": 1, "activations": 20, "distillation": 9, "refinement": 0,
        "assembly": 1, "evaluation": 35,
    }  # fmt: skip
    assert plan.problems == []
    assert plan.counts.layout.num_video == 57_600
    # 20 samples at 8 boundaries of 57,856 tokens, 3,072 wide, two bytes each; two rotary tables in float32 each; checksums and
    # metadata on top.
    numbers = 20 * (8 * 57_856 * 3072 * 2 + 2 * 57_600 * 128 * 4)
    assert numbers < stages["activations"].disk_bytes < numbers * 1.001
    memory = {name: (stage.peak_memory_bytes or 0) / 2**30 for name, stage in stages.items()}
    # Llama's 14.0 GiB, CLIP's 0.2, the VAE's 0.5 and the transformer's 23.9 lie on the GPU together.
    assert memory["activations"] == pytest.approx(38.6 + 6.0, abs=0.3)
    assert [name for name, peak in memory.items() if not peak] == ["selection", "refinement", "assembly"]


def test_the_noise_floor_is_planned(shallow: str) -> None:
    without, floor = (
        {stage.name: stage for stage in plan_config(large(shallow, *more), shapes_only=True).stages}["evaluation"]
        for more in ((), ("evaluation.noise_floor=true",))
    )
    # Two of the 16 prompts with teacher-forced passes, and the weights of the steps.
    assert (without.units, floor.units) == (2 * 16 + 1 + 2, 3 * 16 + 1 + 2 * 2)
    assert floor.disk_bytes == without.disk_bytes, "it writes no video"
    # Its scores in float32, before and after the softmax, and the probabilities in bfloat16.
    scores = 24 * 57_856**2
    assert floor.peak_memory_bytes is not None
    assert 8 * scores < floor.peak_memory_bytes < 11 * scores


def test_prompts_of_one_pass_take_memory_together(shallow: str) -> None:
    at_once = ("evaluation.velocity_prompts=4", "evaluation.prompts_per_pass=4")
    one, four = (
        plan_config(large(shallow, "method=rtn", *o), shapes_only=True).worker_bytes["evaluation"]
        for o in ((), at_once)
    )
    assert (four - one) / 2**30 == pytest.approx(3 * 6.0, rel=0.05)  # a forward pass beside the weights, as above


def distillation_peak(*overrides: str) -> float:
    """GiB."""
    peak = plan_config(large(*overrides), shapes_only=True).worker_bytes["distillation"]
    return peak / 2**30


NEAREST_480P = ("generation.height=480", "generation.width=848", "distillation.segment_length=1")


@pytest.mark.parametrize(
    ("method", "measured"),
    [
        ("{preset: reelquant, rounding: nearest}", 13.09),  # 13.06
        ("{preset: quantsparse, attention: {density: 0.25, calibrate: sparse}}", 13.53),  # 13.50
    ],
)
def test_distillation_peaks_where_it_was_measured(shallow: str, method: str, measured: float) -> None:
    """benchmarks/results/full_size.json: one block at a time of HunyuanVideo-13B at 480p, on an H200."""
    assert distillation_peak(shallow, f"method={method}", *NEAREST_480P) == pytest.approx(measured, rel=0.02)


def test_what_makes_distillation_take_more_memory(shallow: str) -> None:
    def peak(method: str, *overrides: str) -> float:
        return distillation_peak(shallow, f"method={{preset: s2q, rounding: nearest, {method}}}", *overrides)

    whole, half, quarter = (peak(f"tokens_per_step: {share}") for share in (1.0, 0.5, 0.25))
    assert whole > half >= quarter, "a step sees fewer tokens; then all tokens without gradients take the most"
    assert peak("attention_distillation: both") > whole
    assert peak("tokens_per_step: 0.25", "distillation.segment_length=1") < quarter, "one block at a time"
    assert peak("tokens_per_step: 0.25", "selection.num_samples=5") == quarter, "samples wait in host memory"


def test_a_shared_model_takes_its_part_of_a_gpu(shallow: str) -> None:
    recorded = "selection.recorded_features=[block_input, weight_error]"

    def memory(*overrides: str) -> dict[str, float]:
        plan = plan_config(large(shallow, "method=gptq", *overrides), shapes_only=True)
        return {stage.name: (stage.peak_memory_bytes or 0) / 2**30 for stage in plan.stages}

    config = transformer_config(Path(shallow.removeprefix("model=")))
    transformer = sum(p.numel() for p in build_on_meta(config, FAMILY).parameters()) * 2 / 2**30
    whole = memory()
    halves = memory("workers.sharding=fsdp", "workers.gpus_per_replica=2", recorded)
    # Half of the transformer and two double-stream blocks; the text encoders and the VAE are away.
    assert halves["activations"] == pytest.approx(transformer / 2 + 2 * 0.63 + 6.0, abs=0.3)
    offloaded = memory("workers.sharding=deepspeed", "workers.offload=cpu", "workers.gpus_per_replica=2")
    assert halves["activations"] - offloaded["activations"] == pytest.approx(transformer / 2, abs=0.1)
    assert halves["trajectories"] < whole["trajectories"] - 10
    for stage in ("distillation", "evaluation"):
        assert halves[stage] == whole[stage]
    # What the salience hooks add: benchmarks/results/sharded_forward_whole.json has 0.29 GiB, at 480p. The decoder, in tiles,
    # takes less than a forward pass.
    assert halves["trajectories"] - halves["activations"] == pytest.approx(0.29, abs=0.02)
    quarters = memory("workers.sharding=fsdp", "workers.gpus_per_replica=4")
    assert halves["activations"] - quarters["activations"] == pytest.approx(transformer / 4, abs=0.1)


def test_unquantized_embedders_cost_what_their_bits_say() -> None:
    layout = "method.weight_layout=per_channel"
    default, size = large_size(layout), large_size(layout, "bits.embedder.weight=16")
    linears = [(3072, 256), (3072, 3072), (3072, 4096), (3072, 3072), (3072, 4096)]  # context_embedder
    linears += [(3072, 256), (3072, 3072), (3072, 768), (3072, 3072), (3072, 256), (3072, 3072), (6144, 3072)]
    assert size.transformer_bytes - default.transformer_bytes == sum(out * (d - 4) for out, d in linears)
    assert size.source_bytes == default.source_bytes


# Against what the workers write


METHODS: dict[str, dict[str, Any]] = {
    "nearest": {"method": "rtn"},
    "rotated, two-level": {"method": {"preset": "quarot", "weight_layout": "two_level"}},
    "everything learned": {"method": {"preset": "s2q", "epochs": 1}},
    "odd bits": {
        "method": {"preset": "quarot", "weight_layout": "two_level"},
        "bits": {
            "weight": 3,
            "activation": 8,
            "modulation": {"weight": 5, "activation": 8},
            "refiner": {"weight": 16},
            "embedder": {"weight": 7, "activation": 8},
            "exceptions": [
                {"pattern": "transformer_blocks.0.attn.to_q", "weight": 16},  # its group gets another leader
                {"pattern": "single_transformer_blocks.2.*", "weight": 16},
                {"pattern": "transformer_blocks.1.ff.*", "weight": 2, "activation": 16},
            ],
        },
    },
    "activations as they are": {"method": "quarot", "bits": {"activation": 16}},
}


@pytest.mark.usefixtures("torch_as_before")
@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_checkpoint_has_the_planned_bytes(tmp_path: Path, tiny_model: Path, changes: dict[str, Any]) -> None:
    context = build_context(small(tmp_path, model=str(tiny_model), **changes), weights=False)
    [method] = context.methods
    size = checkpoint_size(
        context.model, method, tensors=source_tensors(context.model), component_bytes=copied_bytes(tiny_model)
    )
    cache, width = UnitCache(tmp_path / "run"), 96
    cache.write("trajectories", "prompt-000", {"conditioning": torch.randn(3, width)})
    layout = TokenLayout(1, 2, 3, 3)
    arrays: dict[str, torch.Tensor] = {}
    constants = constants_of(dict(context.model.config), layout, torch.randn(1, width))
    write_constants(constants, lambda name, value: arrays.__setitem__(f"cond/{name}", value))
    for segment in context.segments:
        streams = streams_of(torch.randn(layout.num_tokens, width).bfloat16(), layout)
        arrays.update({f"cond/{segment[0]}/{name}": stream for name, stream in streams.items()})
    cache.write("activations", "sample", arrays)
    worker = DistillationWorker(
        DistillationSettings(
            context.source, (SampleUnit("sample", "prompt-000", 0),), (PromptUnit("prompt-000", ""),), False
        )
    )
    artifacts = []
    for index, blocks in enumerate((*context.segments, ())):
        written = cache.do(worker, "distillation", SegmentUnit(f"unit-{index}", method, blocks)).outputs
        artifacts += [cache.outputs.file(f"distillation/unit-{index}/{output.path}") for output in written]
    spec = write_checkpoint(
        context.model.folder,
        tmp_path / "result",
        artifacts=artifacts,
        bits="",
        method=method.name,
        max_shard_bytes=10**6,
    )
    report = verify_checkpoint(tmp_path / "result")
    assert report.problems == []
    assert size.transformer_bytes == report.total_bytes
    assert size.source_bytes == report.source_bytes
    assert size.compression == report.compression
    assert size.num_layers == len(report.layers)
    tensors = [tensor for path in artifacts for tensor in load_file(path).values()]
    assert size.artifact_bytes == sum(tensor.nbytes for tensor in tensors)
    planned = {name: {**layer.to_dict(), "digest": ""} for name, layer in planned_layers(context.model, method).items()}
    assert planned == {name: {**layer.to_dict(), "digest": ""} for name, layer in spec.layers.items()}


@pytest.mark.ray
def test_finished_run_took_what_the_plan_says(finished_run: Path) -> None:
    plan = plan_config(load_config(finished_run / "run.yaml"))
    run = finished_run / "run"
    for stage in plan.stages:
        records = Recorded(run).records(stage.name)
        assert stage.units == len(records), stage.name
        outputs = [output for record in records for output in record.outputs if not output.path.endswith(".mp4")]
        written = sum(output.num_bytes for output in outputs)
        if stage.name in ("trajectories", "activations", "evaluation", "selection", "refinement"):
            assert stage.disk_bytes == written, stage.name
        else:  # headers of safetensors files and JSON are not counted
            assert stage.disk_bytes < written < stage.disk_bytes * 1.1, stage.name
        if stage.peak_memory_bytes is not None:
            measured = max(record.peak_memory_bytes for record in records)
            # One process serves several stages, and the C library keeps some of what was freed before: 370 MB were seen.
            assert 0.5 < stage.peak_memory_bytes / measured < 1.3, (stage.name, stage.peak_memory_bytes, measured)
    record = Recorded(run).records("assembly")[0].result
    [size] = plan.checkpoints
    assert (size.transformer_bytes, size.source_bytes) == (record["transformer_bytes"], record["source_bytes"])
    assert plan.problems == []
    assert plan.disk.existing_bytes > plan.disk_bytes * 0.99


def test_shapes_give_the_same_bytes_as_weights(tmp_path: Path) -> None:
    config = small(tmp_path)
    with_weights, without = plan_config(config), plan_config(config, shapes_only=True)
    assert with_weights.checkpoints == without.checkpoints
    assert with_weights.stages == without.stages


def test_components_without_weights_are_counted(tmp_path: Path) -> None:
    model = copy_of_model(tmp_path, weights=False)
    for name, num_bytes in copied_bytes(ROOT / "assets" / "hunyuanvideo-digits").items():
        assert copied_bytes(model)[name] == pytest.approx(num_bytes, rel=0.02), name


def test_prompt_files_that_are_not_there_are_counted_by_their_number_and_longest_text(tmp_path: Path) -> None:
    here = small(tmp_path)
    absent = (f"prompts.calibration={tmp_path / 'gone.txt'}", f"prompts.held_out={tmp_path / 'gone.jsonl'}")
    away = load_config(tmp_path / "run.yaml", absent)
    plan, counted = plan_config(away, shapes_only=True), plan_config(here, shapes_only=True)
    assert plan.problems == []
    assert names(
        "\n".join(plan.lacking), *away.prompts.model_dump().values(), 2, 1, here.generation.max_sequence_length
    )
    assert names(shown(plan, 200), "Ready to run elsewhere")
    assert plan.counts.text == dict.fromkeys(counted.counts.text, 32)
    assert [stage.units for stage in plan.stages] == [stage.units for stage in counted.stages]
    longest = [f"{'word ' * 40}{number}" for number in range(2)]
    (tmp_path / "calibration.txt").write_text("\n".join(longest))
    assert plan.stages == plan_config(here, shapes_only=True).stages
    with raises(ConfigError, "prompts.calibration", "gone.txt", "prompts.held_out", "gone.jsonl"):
        plan_config(away)
    (tmp_path / "gone.txt").write_text("the digit 3\n")
    with raises(ConfigError, "prompts.calibration", "gone.txt", "prompts.num_calibration", 2):
        plan_config(away, shapes_only=True)


# What would go wrong


def copy_of_model(folder: Path, *, weights: bool = True) -> Path:
    ignore = None if weights else shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(ROOT / "assets" / "hunyuanvideo-digits", folder / "model", ignore=ignore))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.usefixtures("plain_machine")
def test_everything_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy_of_model(tmp_path)
    tensors = load_file(model / "vae" / "diffusion_pytorch_model.safetensors")
    tensors["decoder.conv_in.conv.bias"][1] = torch.nan
    save_file(tensors, model / "vae" / "diffusion_pytorch_model.safetensors")
    edit(model / "vae" / "config.json", spatial_compression_ratio=16, temporal_compression_ratio=8, latent_channels=4)
    config = small(
        tmp_path,
        "generation.max_sequence_length=418",
        "generation.height=48",
        "generation.width=64",
        "generation.num_frames=13",
        "numerics.threads=64",
        model=str(model),
        workers={"num_gpus": 1.5, "num_workers": 0},
    )
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40 - 1000, 1000))
    plan = plan_config(config)
    expected: list[tuple[object, ...]] = [
        (model / "vae", "AutoencoderKLHunyuanVideo"),
        ("NaN", "decoder.conv_in.conv.bias"),
        ("generation.height", 48, "16x", "2x", "32 or 64"),
        ("generation.num_frames", 13, "8x", "1x", "8 k + 1"),
        ("VAE", 4, "transformer", 8),
        ("generation.max_sequence_length", 418, 95, 512, 417),
        ("workers.num_workers", 0, "auto"),
        ("workers.num_gpus", 1.5),
        ("workers.num_gpus", 1.5, "cluster.address"),
        ("numerics.threads", 64, 4),
        ("run", config.run, "MiB"),
    ]
    for words, problem in zip(expected, plan.problems, strict=True):
        assert names(problem, *words)
    with raises(ConfigError, "NaN") as raised:
        plan.require_feasible()
    assert raised.value.problems == tuple(plan.problems)
    for problem in plan.problems:
        assert problem in shown(plan)


@pytest.mark.usefixtures("plain_machine")
def test_unplannable_run_still_lists_what_the_machine_lacks(tmp_path: Path) -> None:
    config = small(tmp_path, "workers.num_gpus=1", model=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError) as raised:
        plan_config(config)
    assert names(str(raised.value), "model", tmp_path / "nowhere", "workers.num_gpus", 1)


@pytest.mark.usefixtures("plain_machine")
@pytest.mark.parametrize("changes", [{"vae": ["os", "system"]}, {"_class_name": "HunyuanVideoImageToVideoPipeline"}])
def test_an_unsound_model_is_refused_with_all_that_is_known(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = copy_of_model(tmp_path)
    edit(model / "model_index.json", **changes)
    (model / "scheduler" / "scheduler_config.json").write_text("{")
    for shapes_only in (False, True):
        with raises(ConfigError, "model_index.json") as raised:
            plan_config(small(tmp_path, "workers.num_workers=0", model=str(model)), shapes_only=shapes_only)
        assert ("workers.num_workers is 0" in str(raised.value)) is not shapes_only


@pytest.mark.usefixtures("plain_machine")
def test_a_config_whose_model_cannot_be_built_is_named_though_planning_fails_too(tmp_path: Path) -> None:
    model = copy_of_model(tmp_path)
    edit(model / "vae" / "config.json", block_out_channels=[16, 32, 60])
    with raises(ConfigError, "vae") as raised:
        plan_config(small(tmp_path, model=str(model)))
    assert [p for p in raised.value.problems if str(model / "vae") in p]


def test_places_where_no_run_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    model = copy_of_model(tmp_path)
    for run in ("file", "file/run", "link", "model", "model/run", "model/../model/run"):
        [problem] = run_problems(tmp_path / run, model)
        assert problem.startswith(f"run: {tmp_path / run} "), problem
    [problem] = run_problems(Path("/proc/foo"), model)
    assert "/proc/foo" in problem
    assert "not writable" in problem
    before = sorted(tmp_path.iterdir())
    assert run_problems(tmp_path / "new" / "run", model) == run_problems(tmp_path, model) == []
    assert sorted(tmp_path.iterdir()) == before


def test_a_recognizer_is_known_by_its_content(tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(ROOT / "assets" / "digit-recognizer", tmp_path / name)
    first, same = (recognizer_fingerprint(tmp_path / name) for name in ("one", "two"))
    assert first == same
    edit(tmp_path / "two" / "config.json", num_votes=1)
    assert recognizer_fingerprint(tmp_path / "two") != first
    (tmp_path / "one" / "model.safetensors").unlink()
    [problem] = recognizer_problems(tmp_path / "one")
    assert "model.safetensors" in problem
    assert recognizer_problems(None) == []
    with raises(ConfigError, "evaluation.recognizer", tmp_path / "one"):
        build_context(small(tmp_path, evaluation={"recognizer": str(tmp_path / "one")}), weights=False)


@pytest.mark.usefixtures("plain_machine")
def test_a_run_that_cannot_be_written_is_not_said_to_lack_disk(tmp_path: Path) -> None:
    [problem] = plan_config(small(tmp_path, "run=/proc/foo", method="rtn")).problems
    assert "not writable" in problem


@pytest.mark.usefixtures("plain_machine")
def test_model_without_index(tmp_path: Path) -> None:
    model = copy_of_model(tmp_path)
    (model / "model_index.json").unlink()
    for shapes_only in (False, True):
        with raises(ConfigError, "model_index.json"):
            plan_config(small(tmp_path, model=str(model)), shapes_only=shapes_only)


@pytest.mark.usefixtures("plain_machine")
def test_missing_weights_are_a_problem_only_with_weights(tmp_path: Path) -> None:
    config = small(tmp_path, "workers.num_gpus=1", model=str(copy_of_model(tmp_path, weights=False)), method="rtn")
    assert [p for p in plan_config(config).problems if "has neither" in p]
    plan = plan_config(config, shapes_only=True)
    assert plan.problems == []
    assert any(note.startswith("here it would not run: workers.num_gpus is 1") for note in plan.notes)
    assert "problem:" not in shown(plan)


@pytest.mark.usefixtures("plain_machine")
def test_cluster_is_not_judged_by_this_machine(tmp_path: Path) -> None:
    config = small(tmp_path, "workers.num_gpus=8", "cluster.address=auto", "numerics.threads=64", method="rtn")
    assert plan_config(config, shapes_only=True).notes == []
    assert make_plan(plan_config(config, shapes_only=True).context).problems == []


@pytest.mark.usefixtures("plain_machine")
def test_what_replicas_need_and_this_machine_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = {"sharding": "fsdp", "gpus_per_replica": 4, "num_gpus": 1}
    [problem] = plan_config(small(tmp_path, method="rtn", workers=sharded)).problems
    assert names(problem, "workers.num_gpus", 1)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    [problem] = plan_config(small(tmp_path, method="rtn", workers=sharded)).problems
    assert names(problem, "workers.gpus_per_replica", 4, 2)
    [problem] = plan_config(small(tmp_path, method="rtn", workers={"sharding": "fsdp", "gpus_per_replica": 5})).problems
    assert names(problem, "workers.gpus_per_replica", 5, 4)
    plan = plan_config(small(tmp_path, method="rtn", workers={"sharding": "fsdp", "gpus_per_replica": 4}))
    assert plan.problems == []
    assert "model over 4 by fsdp" in shown(plan)


@pytest.mark.usefixtures("plain_machine")
def test_deepspeed_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.planning.machine.find_spec", lambda _: None)
    [problem] = plan_config(
        small(tmp_path, method="rtn", workers={"sharding": "deepspeed", "gpus_per_replica": 2})
    ).problems
    assert "pip install -e '.[application,deepspeed]'" in problem


@pytest.mark.usefixtures("plain_machine")
def test_cut_prompts_and_too_many_workers_are_notes(tmp_path: Path) -> None:
    config = small(tmp_path, "generation.max_sequence_length=4", "workers.num_workers=9", method="rtn")
    plan = plan_config(config)
    assert plan.problems == []
    assert [note.split(" prompts ha")[0] for note in plan.notes[:2]] == [
        "prompts.calibration: 2 of 2", "prompts.held_out: 1 of 1",
    ]  # fmt: skip
    assert names(plan.notes[2], "workers.num_workers", 9, 4)
    assert set(plan.counts.text.values()) == {4}


def test_existing_files_count_against_the_disk(tmp_path: Path) -> None:
    (tmp_path / "run" / "deep").mkdir(parents=True)
    (tmp_path / "run" / "deep" / "file").write_bytes(bytes(1234))
    assert disk_of(tmp_path / "run").existing_bytes == 1234
    assert disk_of(tmp_path / "not" / "yet").existing_bytes == 0
    assert (disk_of(tmp_path / "not" / "yet").free_bytes or 0) > 0


def test_methods_without_calibration_read_no_activations(tmp_path: Path) -> None:
    plan = plan_config(small(tmp_path, method="rtn", compare=["quarot"]))
    stages = {stage.name: stage for stage in plan.stages}
    assert (stages["activations"].units, stages["activations"].disk_bytes) == (0, 0)
    assert stages["activations"].peak_memory_bytes is None
    assert stages["distillation"].units == 2 * (3 + 1)


def test_memory_is_counted_once_for_seeds_of_a_study_and_anew_for_what_changes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def peaks(_: StageMemory) -> dict[str, int]:
        counted.append(1)
        return {"distillation": len(counted)}

    monkeypatch.setattr(StageMemory, "peaks", peaks)
    monkeypatch.setattr(stage_memory, "_counted", {})
    plans = [
        plan_config(small(tmp_path, *changes))
        for changes in ((), ("seed=5", f"run={tmp_path / 'other'}"), ("selection.num_samples=2",))
    ]
    assert len(counted) == 2
    assert [plan.worker_bytes["distillation"] for plan in plans] == [1, 1, 2]


def test_plan_fits_eighty_columns(tmp_path: Path) -> None:
    config = small(tmp_path, method="rtn", compare=["quarot", "smoothquant", "gptq"])
    for line in shown(plan_config(config)).splitlines():
        assert len(line.rstrip()) <= 80 or line.startswith(("run", "model")), line


def test_sizes_add_up(tmp_path: Path) -> None:
    plan = plan_config(small(tmp_path))
    model, [method] = plan.context.model, plan.context.methods
    size = checkpoint_size(model, method, tensors=source_tensors(model), component_bytes={"vae": 1000})
    assert size.folder_bytes == size.transformer_bytes + 1000
    assert 4 < size.bits_per_weight < 6
    assert plan.disk_bytes == sum(stage.disk_bytes for stage in plan.stages)


def test_memory_that_a_machine_lacks_is_noted() -> None:
    stages = [
        StagePlan(name, name.capitalize(), 1, 0, peak)
        for name, peak in (("activations", 20 * 2**30), ("distillation", 44 * 2**30), ("selection", None))
    ]
    [note] = _memory_notes(tuple(stages), 23 * 2**30, "in a worker, this machine has")
    assert names(note, "distillation", "44.0", "23.0")
