"""Stage `transformer`: flow matching on the encoded clips, conditioned on the pipeline's own prompt embeddings.

With x0 a scaled latent and noise a standard normal: the input is (1 - sigma) * x0 + sigma * noise, the timestep
1000 * sigma, the target noise - x0, as `FlowMatchEulerDiscreteScheduler` integrates it. A batch holds prompts of one
length only, so that no token is padding and attention needs no mask.

All randomness of step k comes from a generator seeded with (seed, k): a resumed run equals an undisturbed one.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from safetensors.torch import load_file
from torch import Tensor, nn

from tools.digits.captions import all_captions
from tools.digits.checkpoints import cosine_lr_factor, load_if_present, save_atomically
from tools.digits.components import make_transformer
from tools.digits.settings import Settings

GUIDANCE = 6000.0
"""The pipeline's default guidance_scale of 6, times 1000."""


class UnmaskedProcessor(HunyuanVideoAttnProcessor2_0):
    """The model's own processor, for sequences without padding: drops the all-true mask."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        pair: tuple[Tensor, Tensor] = super().__call__(
            attn, hidden_states, encoder_hidden_states, None, image_rotary_emb
        )
        return pair


@dataclass(frozen=True)
class PromptTable:
    """Embeddings of all prompts of one length."""

    tokens: Tensor
    """[num_prompts, length, 128]"""
    pooled: Tensor
    """[num_prompts, 128]"""


@torch.no_grad()
def embed_prompts(pipe: HunyuanVideoPipeline, settings: Settings) -> tuple[PromptTable, PromptTable]:
    """What `pipe.encode_prompt` returns for all one-digit and all two-digit prompts, padding trimmed."""
    result = []
    for num_digits in (1, 2):
        prompts = [str(c) for c in all_captions(num_digits)]
        tokens, pooled, masks = [], [], []
        for first in range(0, len(prompts), 100):
            embeds, pool, mask = pipe.encode_prompt(
                prompts[first : first + 100], device=settings.device, max_sequence_length=32
            )
            tokens.append(embeds)
            pooled.append(pool)
            masks.append(mask)
        lengths = torch.cat(masks).sum(1)
        if lengths.unique().numel() != 1:
            raise ValueError(f"prompts with {num_digits} digits have several lengths: {lengths.unique().tolist()}")
        length = int(lengths[0])
        trimmed = torch.cat(tokens)[:, :length]
        result.append(PromptTable(trimmed.to(settings.dtype), torch.cat(pooled).to(settings.dtype)))
    return result[0], result[1]


def prompt_index(rows: Tensor) -> Tensor:
    """Index into the `PromptTable` of each row of a caption table [N, 4] (all rows with the same number of digits)."""
    first = rows[:, 0] * 4 + rows[:, 1]
    return torch.where(rows[:, 2] >= 0, first * 40 + rows[:, 2] * 4 + rows[:, 3], first)


@dataclass
class Trainer:
    """Model in the compute dtype, float32 master weights and their exponential average."""

    settings: Settings
    model: HunyuanVideoTransformer3DModel
    master: list[Tensor]
    average: list[Tensor]
    optimizer: torch.optim.AdamW
    step: int = 0
    elapsed_s: float = 0.0

    @classmethod
    def fresh(cls, settings: Settings, folder: Path | None = None) -> "Trainer":
        """Seeded initial weights, or those of the trained pipeline in `folder`."""
        torch.manual_seed(settings.seed + 7)
        model = make_transformer(settings)
        if folder is not None:
            trained = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
            model.load_state_dict({name: weight.float() for name, weight in trained.items()})
        # The refiner's attention sees text tokens only, and keeps its mask; the others never need one.
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
            block.attn.set_processor(UnmaskedProcessor())
        master = [p.detach().clone().float().to(settings.device) for p in model.parameters()]
        model.to(settings.device, settings.dtype).train()
        average = [m.clone() for m in master]
        for m in master:
            m.grad = torch.zeros_like(m)
        fused = settings.device != "cpu"
        optimizer = torch.optim.AdamW(master, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
        return cls(settings, model, master, average, optimizer)

    def resume(self, path: Path) -> None:
        """Continues from `path` when it exists."""
        state = load_if_present(path, self.settings.device)
        if state is None:
            return
        torch._foreach_copy_(self.master, state["master"])
        torch._foreach_copy_(self.average, state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        self._write_back()

    def save(self, path: Path) -> None:
        """Everything that the next call needs to go on as if nothing had happened."""
        state = {"master": self.master, "average": self.average, "optimizer": self.optimizer.state_dict()}
        save_atomically({**state, "step": self.step, "elapsed_s": self.elapsed_s}, path)

    @torch.no_grad()
    def _write_back(self) -> None:
        torch._foreach_copy_(list(self.model.parameters()), self.master)

    def progress(self) -> float:
        """Part of the schedule that is done, in [0, 1], by steps or by seconds."""
        return min(1.0, max(self.step / self.settings.steps, self.elapsed_s / self.settings.horizon_s))

    def update(self, loss: Tensor) -> None:
        """One AdamW step on the master weights with gradients of `loss`."""
        loss.backward()
        params = list(self.model.parameters())
        torch._foreach_copy_([m.grad for m in self.master if m.grad is not None], [p.grad for p in params])
        for p in params:
            p.grad = None
        torch.nn.utils.clip_grad_norm_(self.master, 1.0, foreach=True)
        self.optimizer.param_groups[0]["lr"] = self.settings.lr * cosine_lr_factor(
            self.progress(), self.settings.warmup_frac
        )
        self.optimizer.step()
        self.step += 1
        self._write_back()
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.master, 1 - decay)

    def averaged_model(self) -> HunyuanVideoTransformer3DModel:
        """A copy with the averaged weights and the class's own attention processors, in the compute dtype."""
        model = make_transformer(self.settings).to(self.settings.device, self.settings.dtype)
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), self.average)
        return model.eval()


def flow_loss(model: HunyuanVideoTransformer3DModel, x0: Tensor, tokens: Tensor, pooled: Tensor,
              settings: Settings, generator: torch.Generator) -> Tensor:  # fmt: skip
    """Mean squared error of the predicted velocity; x0 [B, C, F, H, W] scaled latents.

    sigma is logit-normal, moved towards noise by the scheduler's shift.
    """
    num, device = len(x0), x0.device
    noise = torch.randn(x0.shape, device=device, generator=generator)
    u = torch.sigmoid(1.2 * torch.randn(num, device=device, generator=generator))
    sigma = settings.shift * u / (1 + (settings.shift - 1) * u)
    weight = sigma[:, None, None, None, None]
    x0 = x0.float()
    predicted = model(
        hidden_states=((1 - weight) * x0 + weight * noise).to(settings.dtype),
        timestep=sigma * 1000,
        encoder_hidden_states=tokens,
        encoder_attention_mask=torch.ones(tokens.shape[:2], device=device, dtype=settings.dtype),
        pooled_projections=pooled,
        guidance=torch.full((num,), GUIDANCE, device=device, dtype=settings.dtype),
        return_dict=False,
    )[0]
    return F.mse_loss(predicted.float(), noise - x0)


def _batch(step: int, data: dict[str, Any], tables: tuple[PromptTable, PromptTable], settings: Settings
           ) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:  # fmt: skip
    """(scaled latents, tokens, pooled, generator) of one step: one-digit prompts or two-digit prompts only."""
    generator = torch.Generator(settings.device).manual_seed(settings.seed * 1_000_003 + step)
    num_clips, num_one = len(data["latents"]), data["num_one"]
    period = round(1 / settings.one_digit_frac)
    low, high, table = (0, num_one, tables[0]) if step % period == 0 else (num_one, num_clips, tables[1])
    picks = torch.randint(low, high, (settings.batch,), device=settings.device, generator=generator)
    index = prompt_index(data["rows"][picks])
    latents = data["latents"][picks].float() * data["scaling_factor"]
    return latents, table.tokens[index], table.pooled[index], generator


def compile_blocks(model: HunyuanVideoTransformer3DModel) -> None:
    """Compiles each kind of block once; leaves the model eager, with a warning, when that fails later."""
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.recompile_limit = 64
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.compile(dynamic=False)


def train_transformer(
    settings: Settings, pipe: HunyuanVideoPipeline, data: dict[str, Tensor], run: Path, *, folder: Path | None = None
) -> Trainer:
    """Trains for `budget_s` seconds or `call_steps` steps, or to the end of the schedule.

    It goes on from the checkpoint in `run`; without one it begins from the trained pipeline in `folder`, if given.
    """
    path = run / "transformer.pt"
    trainer = Trainer.fresh(settings, folder)
    trainer.resume(path)
    tables = embed_prompts(pipe, settings)
    known: dict[str, Any] = {
        **data,
        "num_one": int((data["rows"][:, 2] < 0).sum()),
        "scaling_factor": float(data["scaling_factor"]),
    }
    if settings.compile_blocks:
        compile_blocks(trainer.model)
    torch.backends.cuda.enable_flash_sdp(not settings.cudnn_attention)
    torch.backends.cuda.enable_mem_efficient_sdp(not settings.cudnn_attention)
    before_s, start, first = trainer.elapsed_s, time.monotonic(), trainer.step
    running = torch.zeros((), device=settings.device)
    last = first + settings.call_steps
    while trainer.progress() < 1 and trainer.step < last and time.monotonic() - start < settings.budget_s:
        x0, tokens, pooled, generator = _batch(trainer.step, known, tables, settings)
        loss = flow_loss(trainer.model, x0, tokens, pooled, settings, generator)
        trainer.update(loss)
        running += loss.detach()
        trainer.elapsed_s = before_s + time.monotonic() - start
        if trainer.step % settings.report_every == 0:
            rate = (trainer.step - first) * settings.batch / (time.monotonic() - start)
            print(f"transformer step {trainer.step} loss {float(running) / settings.report_every:.4f} "
                  f"{rate:.0f} samples/s progress {trainer.progress():.3f}", flush=True)  # fmt: skip
            running.zero_()
        if trainer.step % settings.save_every == 0:
            trainer.save(path)
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    trainer.save(path)
    print(f"transformer: step {trainer.step}, {trainer.step * settings.batch} samples, "
          f"{trainer.elapsed_s:.0f} s of training", flush=True)  # fmt: skip
    return trainer
