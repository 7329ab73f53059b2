"""Makes the small trained `WanPipeline` of two moving digits, stage by stage.

    python -m tools.train_wan_digits text vae transformer assemble check --run runs/wan-digits --budget-s 300    # a GPU

| stage       | makes                                                        | from            |
|-------------|--------------------------------------------------------------|-----------------|
| start       | the files of RUN that text, vae and transformer go on from    | assets/wan-digits |
| text        | RUN/text_encoder.safetensors                                 | -               |
| vae         | RUN/vae.safetensors, its latents' statistics                 | rendered clips  |
| transformer | RUN/transformer.safetensors, RUN/average.safetensors; goes on from them, stops at --budget-s | text, vae |
| assemble    | the folder assets/wan-digits, and configs/prompts/wan_digits_*.txt | all of them |
| check       | RUN/check.png, RUN/check-small.png and printed rates         | assets/wan-digits |
| distill     | the folder RUN/few-step: 4 steps without guidance; printed rates | average.safetensors |
| accept      | RUN/acceptance.json and the lines of `tools.wan_digits.acceptance` | assets/wan-digits, `--quantized` |

A finished stage `text` or `vae` is loaded from `--run`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from transformers import UMT5EncoderModel

from tools.digits.components import keep_old_names
from tools.digits.evaluation import save_picture
from tools.wan_digits.acceptance import measure, open_float32, table
from tools.wan_digits.autoencoder import ClipPool, train_vae
from tools.wan_digits.components import bf16, build_pipeline, make_transformer, make_vae, save_whole
from tools.wan_digits.distillation import Trajectories, distill, few_step_scheduler
from tools.wan_digits.evaluation import generate, score
from tools.wan_digits.rendering import Renderer, hands
from tools.wan_digits.scenes import prompt, prompt_scenes
from tools.wan_digits.settings import PRESETS, Settings
from tools.wan_digits.text import Embedder, make_text_encoder, make_tokenizer, train_text_encoder
from tools.wan_digits.transformer import AVERAGE, WEIGHTS, Trainer
from workers.recognition import DigitRecognizer

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("start", "text", "vae", "transformer", "assemble", "check", "distill", "accept")
PROMPTS = {"calibration": 40, "held_out": 64}


class Run:
    """One invocation: its settings and folders."""

    def __init__(self, settings: Settings, root: Path, folder: Path, quantized: Path | None = None) -> None:
        self.settings, self.root, self.folder, self.quantized = settings, root, folder, quantized
        self.renderer = Renderer(hands().to(settings.device))
        self.tokenizer = make_tokenizer()
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Goes on from the published model: with Adam anew and a schedule of its own, `--horizon-s`."""
        folder = self.root / "assets/wan-digits"
        parts = {
            name: load_file(next((folder / name).glob("*.safetensors")))
            for name in ("text_encoder", "transformer", "vae")
        }
        config = json.loads((folder / "vae/config.json").read_text())
        parts["vae"] |= {name: torch.tensor(config[name]) for name in ("latents_mean", "latents_std")}
        parts["text_encoder"].pop("encoder.embed_tokens.weight", None)
        progress = {"elapsed_s": torch.tensor(0.0, dtype=torch.float64), "steps": torch.tensor(0)}
        for name, tensors in parts.items():
            save_whole(tensors, self.folder / f"{name}.safetensors")
        save_whole(parts["transformer"], self.folder / AVERAGE)
        save_whole({**parts["transformer"], **progress}, self.folder / WEIGHTS)

    def text(self) -> UMT5EncoderModel:
        """The text encoder, trained or loaded, with bfloat16 values."""
        path = self.folder / "text_encoder.safetensors"
        if not path.exists():
            encoder, right = train_text_encoder(self.settings, self.tokenizer)
            print(f"text: probes right {right:.4f}", flush=True)
            weights = bf16(encoder)
            weights.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
            save_whole(weights, path)
        encoder = make_text_encoder(self.settings, len(self.tokenizer))
        encoder.load_state_dict(load_file(path), strict=False)
        return encoder.eval()

    def vae(self) -> AutoencoderKLWan:
        """The autoencoder, trained or loaded, with bfloat16 values."""
        path = self.folder / "vae.safetensors"
        if not path.exists():
            vae = train_vae(self.settings, self.renderer)
            statistics = {name: torch.tensor(vae.config[name]) for name in ("latents_mean", "latents_std")}
            save_whole({**bf16(vae), **statistics}, path)
        weights = load_file(path)
        mean, std = ([round(float(x), 4) for x in weights.pop(name)] for name in ("latents_mean", "latents_std"))
        vae = make_vae(self.settings, mean, std)
        vae.load_state_dict(weights)
        return vae.to(self.settings.device).eval().requires_grad_(False)

    def transformer(self) -> None:
        """Flow matching, until the budget is spent."""
        settings, begin = self.settings, time.monotonic()
        vae, embed = self.vae(), Embedder(settings, self.tokenizer, self.text())
        trainer = Trainer(settings, self.folder)
        small, large = (ClipPool(vae, self.renderer, settings, clip, settings.seed + 1000 * trainer.steps + i)
                        for i, clip in enumerate((settings.small, settings.large)))  # fmt: skip
        print(f"pools of {settings.pool} clips: {time.monotonic() - begin:.0f} s", flush=True)
        trainer.train((small, large), embed)

    def averaged(self) -> WanTransformer3DModel:
        """The transformer with the averaged weights."""
        if not (self.folder / AVERAGE).exists():
            raise SystemExit(f"{self.folder / AVERAGE} is not there: the stage transformer writes it")
        transformer = make_transformer(self.settings)
        transformer.load_state_dict(load_file(self.folder / AVERAGE))
        return transformer

    def pipeline(self, transformer: WanTransformer3DModel) -> WanPipeline:
        """All parts, in bfloat16."""
        pipe = build_pipeline(self.settings, self.tokenizer, self.text(), self.vae(), transformer)
        return pipe.to(dtype=torch.bfloat16)

    def assemble(self) -> None:
        """The folder as anyone loads it, and the prompt files."""
        folder, made = self.root / "assets/wan-digits", self.folder / "assembled"
        shutil.rmtree(made, ignore_errors=True)
        self.pipeline(self.averaged()).save_pretrained(made, safe_serialization=True)
        keep_old_names(made)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made, folder)
        prompts = self.root / "configs/prompts"
        prompts.mkdir(parents=True, exist_ok=True)
        for part, num in PROMPTS.items():
            lines = "".join(f"{prompt(scene)}\n" for scene in prompt_scenes(num, part))
            (prompts / f"wan_digits_{part}.txt").write_text(lines)
        trained = load_file(self.folder / "transformer.safetensors")
        print(json.dumps({"steps": int(trained["steps"]), "elapsed_s": float(trained["elapsed_s"])}), flush=True)

    def check(self) -> None:
        """Rates and pictures of held-out prompts, of both sizes, by the folder loaded and called as anyone would."""
        pipe = WanPipeline.from_pretrained(self.root / "assets/wan-digits", dtype=torch.bfloat16)
        self._rates(pipe, self.settings, "check")

    def distill(self) -> None:
        """A model of few steps, and its rates."""
        settings = self.settings
        teacher, student = (self.averaged().to(settings.device) for _ in range(2))
        embed = Embedder(settings, self.tokenizer, self.text())
        with torch.no_grad():
            sizes = settings.small, settings.large
            pools = tuple(Trajectories(teacher.requires_grad_(False), embed, settings, clip) for clip in sizes)
        distill(student, pools, settings)
        pipe = self.pipeline(student.requires_grad_(False))
        pipe.register_modules(scheduler=few_step_scheduler(settings))
        pipe.save_pretrained(self.folder / "few-step")
        keep_old_names(self.folder / "few-step")
        pipe = WanPipeline.from_pretrained(self.folder / "few-step", dtype=torch.bfloat16)
        self._rates(pipe, replace(settings, eval_steps=settings.student_steps, guidance=1.0), "few-step")

    def _rates(self, pipe: WanPipeline, settings: Settings, name: str) -> None:
        pipe.to(settings.device)
        scenes = prompt_scenes(settings.eval_prompts, "held_out")
        recognizer = DigitRecognizer(self.root / "assets/digit-recognizer")
        for label, clip in ((name, settings.large), (f"{name}-small", settings.small)):
            begin = time.monotonic()
            videos = generate(pipe, scenes, settings, clip)
            read, moved, failures = score(videos, scenes, recognizer, clip)
            print(f"{label}: {len(scenes)} videos, read {read:.4f}, path right {moved:.4f}, "
                  f"{time.monotonic() - begin:.0f} s", *failures[:5], sep="\n  ", flush=True)  # fmt: skip
            save_picture(videos[:8], self.folder / f"{label}.png")

    def accept(self) -> None:
        """What the model is good for."""
        if self.quantized is None:
            raise SystemExit(
                "accept needs --quantized: the folder of the model after rtn W4A8 (python -m pipeline run)"
            )
        settings = self.settings
        exact, quantized = (
            open_float32(folder, settings.device) for folder in (self.root / "assets/wan-digits", self.quantized)
        )
        scenes = prompt_scenes(settings.eval_prompts, "held_out")
        found = measure(exact, quantized, scenes, settings, DigitRecognizer(self.root / "assets/digit-recognizer"))
        (self.folder / "acceptance.json").write_text(json.dumps(found, indent=1) + "\n")
        print(table(found), flush=True)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return value


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--run", type=Path, required=True, help="folder of the training's state")
    parser.add_argument("--root", type=Path, default=ROOT, help="where assets/ and configs/ are")
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--budget-s", type=_positive, help="seconds of the transformer's training in this call")
    parser.add_argument("--horizon-s", type=_positive, help="seconds of its training until the learning rate is zero")
    parser.add_argument("--lr", type=_positive, help="its highest learning rate")
    parser.add_argument("--quantized", type=Path, help="for accept: the model's folder after rtn W4A8")
    given = parser.parse_args(arguments)
    settings = PRESETS[given.preset]()
    changes = {name: getattr(given, name) for name in ("budget_s", "horizon_s", "lr")}
    settings = replace(settings, **{name: value for name, value in changes.items() if value is not None})
    run = Run(settings, given.root, given.run, given.quantized)
    for stage in STAGES:
        if stage in given.stages:
            getattr(run, stage)()


if __name__ == "__main__":
    main()
