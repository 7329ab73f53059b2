"""Stage `text`: a word-level tokenizer and a small umT5 encoder whose embeddings say which digit is what.

Cross-attention knows no order of the text's tokens: what belongs together is only what the encoder wrote into each of them. It
is trained with linear probes, thrown away after, that read from every token of a digit's phrase which of the two it is and its
six attributes, and from the end of the prompt the background.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tools.digits.checkpoints import cosine_lr_factor
from tools.wan_digits.scenes import BACKGROUNDS, SIZES, prompt, random_scenes, words
from tools.wan_digits.settings import Settings

PROBES = (3, *SIZES, len(BACKGROUNDS))
"""First, second or neither; a digit's attributes; the background."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word, and the end token that umT5 puts last."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words()])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", padding_side="right",
        model_max_length=512,
    )  # fmt: skip


def make_text_encoder(settings: Settings, vocab_size: int) -> UMT5EncoderModel:
    """Two layers with relative positions."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size, d_model=settings.text_dim, d_kv=32, d_ff=2 * settings.text_dim, num_layers=2,
            num_heads=4, dropout_rate=0.0,
        )
    )  # fmt: skip


def _targets(scenes: Tensor, length: int) -> Tensor:
    """What each token is to tell, `[N, length, 8]`; -1 where it is not asked."""
    num_words = (length - 3 - 1) // 2  # two phrases, "and" between them; "over", the background, the end
    target = torch.full((len(scenes), length, len(PROBES)), -1, device=scenes.device)
    target[:, :, 0] = 2
    for slot, first in ((0, 0), (1, num_words + 1)):
        phrase = slice(first, first + num_words)
        target[:, phrase, 0] = slot
        target[:, phrase, 1:7] = scenes[:, None, 6 * slot : 6 * slot + 6]
    target[:, -3:, 7] = scenes[:, 12:]
    return target


def train_text_encoder(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> tuple[UMT5EncoderModel, float]:
    """(the encoder in float32, the part of the probes' answers that are right at the end)."""
    torch.manual_seed(settings.seed)
    device = settings.device
    encoder = make_text_encoder(settings, len(tokenizer)).to(device)
    probe = nn.Linear(settings.text_dim, sum(PROBES)).to(device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *probe.parameters()], weight_decay=0.0)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    right = 0.0
    for step in range(settings.text_steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * cosine_lr_factor(step / settings.text_steps, 0.05)
        scenes = random_scenes(64, generator)
        tokens = token_ids(tokenizer, scenes).to(device)
        hidden = encoder(tokens).last_hidden_state
        logits = probe(hidden).split(PROBES, dim=-1)
        targets = _targets(scenes.to(device), tokens.shape[1]).unbind(-1)
        pairs = list(zip(logits, targets, strict=True))
        loss = torch.stack([F.cross_entropy(a.flatten(0, 1), b.flatten(), ignore_index=-1) for a, b in pairs]).mean()
        loss = loss + 0.1 * (hidden.square().mean() - 1).square()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hits = torch.cat([(a.argmax(-1) == b)[b >= 0] for a, b in pairs]).float().mean()
        right = 0.95 * right + 0.05 * float(hits) if step else float(hits)
        if step % 250 == 0:
            print(f"text step {step} loss {float(loss.detach()):.4f} right {right:.4f}", flush=True)
    return encoder.eval(), right


def token_ids(tokenizer: PreTrainedTokenizerFast, scenes: Tensor) -> Tensor:
    """`[N, length]` for scenes `[N, 13]`."""
    ids: Tensor = tokenizer([prompt(row) for row in scenes.tolist()], return_tensors="pt").input_ids
    return ids


class Embedder:
    """Gives the text as `WanPipeline.encode_prompt` does: zeros behind the prompt's tokens."""

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel) -> None:
        self._tokenizer, self._length = tokenizer, settings.text_length
        self._encoder = encoder.to(settings.device, torch.bfloat16).requires_grad_(False)
        empty = tokenizer("", return_tensors="pt").input_ids.to(settings.device)
        self._empty = self._padded(self._encoder(empty).last_hidden_state)

    def __call__(self, scenes: Tensor, dropped: Tensor) -> Tensor:
        """`[N, text_length, text_dim]` bfloat16; the empty prompt where `dropped` `[N]`."""
        ids = token_ids(self._tokenizer, scenes.cpu()).to(scenes.device)
        text = self._padded(self._encoder(ids).last_hidden_state)
        return torch.where(dropped[:, None, None], self._empty, text)

    def _padded(self, text: Tensor) -> Tensor:
        return F.pad(text, (0, 0, 0, self._length - text.shape[1]))
