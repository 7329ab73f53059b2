"""Makes the small trained `HunyuanVideoPipeline` that draws moving handwritten digits, stage by stage.

    python -m tools.train_digits_model text recognizer prompts            # minutes on a CPU
    python -m tools.train_digits_model vae latents transformer evaluate export --run runs/digits   # a GPU
    python -m tools.train_digits_model assemble --run runs/digits
    python -m tools.train_digits_model vae latents transformer evaluate export --preset narrow --run runs/narrow
    python -m tools.train_digits_model assemble --preset narrow --run runs/narrow

Stages, in their order (each needs those before it; a finished one is loaded from `--run`):

| stage       | makes                                             | from                        |
|-------------|---------------------------------------------------|-----------------------------|
| text        | the folder with text encoders, untrained rest     | -                           |
| recognizer  | assets/digit-recognizer                           | real digits                 |
| prompts     | configs/prompts/digits_*.txt                      | -                           |
| vae         | RUN/vae.pt                                        | rendered clips              |
| latents     | RUN/latents.pt                                    | vae                         |
| transformer | RUN/transformer.pt; resumes, stops at --budget-s  | text, latents               |
| evaluate    | RUN/evaluation.png and printed rates              | transformer, recognizer     |
| export      | RUN/export: transformer in two files, and the VAE | transformer                 |
| assemble    | the trained folder                                | RUN/export, text            |
| check       | rates and picture of the folder's plain pipeline  | the folder, recognizer      |
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, DiffusionPipeline
from safetensors.torch import load_file, save_file

from tools.digits.autoencoder import encode_clips, refine_decoder, train_vae
from tools.digits.captions import prompt_sets, write_prompts
from tools.digits.components import build_pipeline, load_text_side, make_transformer, make_vae, save_pipeline
from tools.digits.evaluation import generate, report, save_picture, score
from tools.digits.recognizer import train_recognizer
from tools.digits.rendering import load_digit_images, make_bank
from tools.digits.settings import PRESETS, Settings
from tools.digits.text import make_tokenizer, make_tokenizer_2, train_text_encoder, train_text_encoder_2
from tools.digits.transformer import Trainer, train_transformer
from workers.recognition import DigitRecognizer

STAGES = ("text", "recognizer", "prompts", "vae", "latents", "transformer", "evaluate", "export", "assemble", "check")


class Run:
    """One invocation: where things lie, and what earlier stages of it hold in memory."""

    def __init__(self, settings: Settings, root: Path, run: Path) -> None:
        self.settings = settings
        self.folder = root / "assets/hunyuanvideo-digits"
        self.recognizer = root / "assets/digit-recognizer"
        self.picture = root / "assets/hunyuanvideo-digits.png"
        self.prompts_folder = root / "configs/prompts"
        self.run = run
        self.held: dict[str, Any] = {}

    def _bank(self) -> Any:
        images = load_digit_images()
        return make_bank(*images, device=self.settings.device, num_instances=self.settings.num_instances)

    def text(self) -> None:
        """Tokenizers and text encoders, saved with an untrained VAE and transformer."""
        tokenizer, tokenizer_2 = make_tokenizer(), make_tokenizer_2()
        encoder, accuracy = train_text_encoder(self.settings, tokenizer)
        encoder_2, accuracy_2 = train_text_encoder_2(self.settings, tokenizer_2)
        print(f"text: probes right {accuracy:.4f} (tokens), {accuracy_2:.4f} (pooled)", flush=True)
        parts = SimpleNamespace(
            text_encoder=encoder, tokenizer=tokenizer, text_encoder_2=encoder_2, tokenizer_2=tokenizer_2
        )
        torch.manual_seed(self.settings.seed)
        save_pipeline(build_pipeline(self.settings, parts), self.folder)

    def prompts(self) -> None:
        """The two prompt files."""
        write_prompts(self.prompts_folder)

    def train_recognizer(self) -> None:
        """The independent classifier."""
        train_recognizer(self.settings, self.recognizer)

    def vae(self) -> None:
        """The autoencoder; in the second phase, the folder's with a refined decoder."""
        if self.settings.refine:
            trained = AutoencoderKLHunyuanVideo.from_pretrained(self.folder / "vae").float()
            self.held["vae"] = refine_decoder(trained, self.settings, self._bank(), self.run)
            return
        self.held["vae"] = train_vae(self.settings, self._bank(), self.run)

    def latents(self) -> None:
        """The encoded clips."""
        if "vae" not in self.held:
            self.vae()
        self.held["data"] = encode_clips(self.settings, self.held["vae"], self._bank(), self.run)

    def transformer(self) -> None:
        """Flow matching, until the budget is spent."""
        if "data" not in self.held:
            self.latents()
        pipe = load_text_side(self.folder).to(self.settings.device)
        folder = self.folder if self.settings.refine else None
        self.held["trainer"] = train_transformer(self.settings, pipe, self.held["data"], self.run, folder=folder)

    def _trainer(self) -> Trainer:
        if "trainer" not in self.held:
            self.held["trainer"] = Trainer.fresh(self.settings)
            self.held["trainer"].resume(self.run / "transformer.pt")
        trainer: Trainer = self.held["trainer"]
        return trainer

    def evaluate(self) -> None:
        """Held-out prompts with the averaged weights, on the training device."""
        if "data" not in self.held:
            self.latents()
        vae = self.held["vae"]
        vae.register_to_config(scaling_factor=round(float(self.held["data"]["scaling_factor"]), 5))
        model = self._trainer().averaged_model()
        pipe = build_pipeline(self.settings, load_text_side(self.folder), vae, model).to(self.settings.device)
        captions = prompt_sets()[1][: self.settings.eval_prompts]
        start = time.monotonic()
        videos = generate(pipe, captions, self.settings)
        print(report(score(videos, captions, DigitRecognizer(self.recognizer))), flush=True)
        print(f"evaluate: {time.monotonic() - start:.0f} s", flush=True)
        save_picture(videos[:12], self.run / "evaluation.png")

    def export(self) -> None:
        """Trained weights as small bfloat16 files: the transformer's in two halves, the VAE's in one."""
        if "data" not in self.held:
            self.latents()
        folder = self.run / "export"
        folder.mkdir(parents=True, exist_ok=True)
        weights = self._trainer().averaged_model().state_dict()
        weights = {name: w.to("cpu", torch.bfloat16).contiguous() for name, w in weights.items()}
        names = sorted(weights)
        for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
            save_file({name: weights[name] for name in part}, folder / f"transformer-{i}.safetensors")
        vae = {name: w.to("cpu", torch.bfloat16).contiguous() for name, w in self.held["vae"].state_dict().items()}
        factor = torch.tensor(float(self.held["data"]["scaling_factor"]))
        save_file({**vae, "scaling_factor": factor}, folder / "vae.safetensors")

    def assemble(self) -> None:
        """The whole trained folder, from the exported weights."""
        exported = self.run / "export"
        vae_weights = load_file(exported / "vae.safetensors")
        vae = make_vae(self.settings)
        vae.register_to_config(scaling_factor=round(float(vae_weights.pop("scaling_factor")), 5))
        vae.load_state_dict(vae_weights)
        transformer = make_transformer(self.settings)
        parts = [load_file(path) for path in sorted(exported.glob("transformer-*.safetensors"))]
        transformer.load_state_dict({name: w for part in parts for name, w in part.items()})
        save_pipeline(build_pipeline(self.settings, load_text_side(self.folder), vae, transformer), self.folder)

    def check(self) -> None:
        """What the shipped folder does, loaded and called as anyone would."""
        pipe = DiffusionPipeline.from_pretrained(self.folder).to(self.settings.device)
        captions = prompt_sets()[1][: self.settings.eval_prompts]
        start = time.monotonic()
        videos = generate(pipe, captions, self.settings)
        seconds = (time.monotonic() - start) / len(captions)
        print(report(score(videos, captions, DigitRecognizer(self.recognizer))), flush=True)
        print(f"check: {seconds:.2f} s a video", flush=True)
        save_picture(videos[:6], self.picture)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line; every option overrides one field of the preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="full")
    parser.add_argument("--root", type=Path, default=Path(), help="folder that holds assets/ and configs/")
    parser.add_argument("--run", type=Path, default=Path("runs/digits"), help="folder of checkpoints")
    parser.add_argument("--device", help="cpu or cuda; on a CPU everything is float32")
    for name, kind in (("vae-budget-s", float), ("budget-s", float), ("horizon-s", float), ("num-clips", int),
                       ("batch", int), ("steps", int), ("lr", float), ("eval-prompts", int), ("eval-batch", int),
                       ("eval-steps", int), ("call-steps", int)):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--channels-last", action="store_true", default=None)
    parser.add_argument("--cudnn-attention", action="store_true", default=None)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Runs the named stages in order."""
    args = parse(argv)
    given = {name: value for name, value in vars(args).items() if value is not None and hasattr(Settings, name)}
    if given.get("device") == "cpu":
        given |= {"dtype": torch.float32, "compile_blocks": False}
    settings = replace(PRESETS[args.preset](), **given)
    run = Run(settings, args.root, args.run)
    for stage in STAGES:
        if stage in args.stages:
            getattr(run, "train_recognizer" if stage == "recognizer" else stage)()


if __name__ == "__main__":
    main()
