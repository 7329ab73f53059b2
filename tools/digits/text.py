"""Stage `text`: two small tokenizers and two text encoders whose embeddings say which digit moves where.

In the transformer, text tokens carry no position, so that a digit is bound to its direction and slot only by what the
text encoder wrote into each token. Both encoders are trained on all prompts with linear probes (thrown away after)
that must read slot, digit and direction from exactly the tensors that `HunyuanVideoPipeline.encode_prompt` returns:
`hidden_states[-3]` of the Llama model and `pooler_output` of the CLIP model.
"""

import re

import torch
import torch.nn.functional as F
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from tools.digits.captions import DIRECTIONS, NUM_DIGITS, Caption, all_captions
from tools.digits.settings import Settings

TEXT_DIM = 128
PROMPT_WORDS = ("the", "digit", "moving", "and", *DIRECTIONS, *(str(d) for d in range(NUM_DIGITS)))
SPECIAL = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
WORDS = r"[A-Za-z]+|[0-9]|\n|[^\sA-Za-z0-9]"
NONE_DIGIT, NONE_DIRECTION = NUM_DIGITS, len(DIRECTIONS)


def _word_level(vocab: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    return tokenizer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer that cuts the default template's prefix into at least 95 tokens (the pipeline's crop)."""
    template = DEFAULT_PROMPT_TEMPLATE["template"]
    words = sorted(set(re.findall(WORDS, re.sub(r"<\|.*?\|>", "", template))) - set(PROMPT_WORDS))
    core = _word_level(["<pad>", "<unk>", "<s>", *SPECIAL, *PROMPT_WORDS, *words])
    core.add_special_tokens([*SPECIAL])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=512,
    )


def make_tokenizer_2() -> PreTrainedTokenizerFast:
    """Word-level tokenizer with CLIP's start and end tokens; the end token is what the pooled output is read at."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    core = _word_level(["<pad>", "<unk>", "!", start, end, *PROMPT_WORDS])
    core.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 3), (end, 4)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=start,
        eos_token=end,
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=77,
    )


def make_text_encoder(vocab_size: int) -> LlamaModel:
    """Four layers, of which `hidden_states[-3]` has passed two."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=TEXT_DIM,
        intermediate_size=2 * TEXT_DIM,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=5,
        initializer_range=0.08,
    )
    model = LlamaModel(config)
    nn.init.normal_(model.embed_tokens.weight, std=0.7)
    return model


def make_text_encoder_2(vocab_size: int) -> CLIPTextModel:
    """Two layers, pooled at the first end token."""
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=TEXT_DIM,
        intermediate_size=2 * TEXT_DIM,
        projection_dim=TEXT_DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        pad_token_id=0,
        bos_token_id=3,
        eos_token_id=4,
        hidden_act="gelu",
        initializer_factor=5.0,
    )
    return CLIPTextModel(config)


def _labels(captions: list[Caption]) -> Tensor:
    """[N, 4]: digit 1, direction 1, digit 2 (10 for none), direction 2 (4 for none)."""
    rows = []
    for c in captions:
        two = len(c.digits) == 2
        second = (c.digits[1], c.directions[1]) if two else (NONE_DIGIT, NONE_DIRECTION)
        rows.append([c.digits[0], c.directions[0], *second])
    return torch.tensor(rows)


class _Probe(nn.Module):
    """Linear read-outs of digit 1, direction 1, digit 2, direction 2 from one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (NUM_DIGITS, len(DIRECTIONS), NUM_DIGITS + 1, len(DIRECTIONS) + 1)
        self.linear = nn.Linear(TEXT_DIM, sum(self.sizes))

    def forward(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [N, 128], labels [N, 4] (-1 is not asked) -> (mean cross-entropy, fraction of right answers)."""
        losses, right = [], []
        for logits, label in zip(self.linear(hidden).split(self.sizes, dim=-1), labels.T, strict=True):
            asked = label >= 0
            if asked.any():
                losses.append(F.cross_entropy(logits[asked], label[asked]))
                right.append((logits.argmax(-1) == label)[asked].float().mean())
        return torch.stack(losses).mean(), torch.stack(right).mean()


def token_targets(input_ids: Tensor, tokenizer: PreTrainedTokenizerFast, labels: Tensor) -> Tensor:
    """What each token is to tell: [N, L, 4], -1 where it is not asked.

    A slot's digit token and all later ones tell its digit; its direction token and all later ones tell its direction;
    the last token also tells that there is no second digit.
    """
    digit_ids = torch.tensor(tokenizer.convert_tokens_to_ids([str(d) for d in range(NUM_DIGITS)]))
    direction_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(DIRECTIONS)))
    start = int(torch.isin(input_ids[0], torch.tensor(tokenizer.convert_tokens_to_ids("user"))).nonzero()[-1])
    prompt = torch.arange(input_ids.shape[1]) > start
    targets = torch.full((*input_ids.shape, 4), -1)
    for column, ids in ((0, digit_ids), (1, direction_ids)):
        seen = (torch.isin(input_ids, ids) & prompt).long().cumsum(1)
        for slot in (0, 1):
            known = seen > slot
            targets[:, :, 2 * slot + column][known] = labels[:, 2 * slot + column, None].expand_as(known)[known]
    targets[:, -1] = labels
    return targets


def train_text_encoder(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> tuple[LlamaModel, float]:
    """Trains on one- and two-digit prompts in turn, within the template. Returns (model, probe accuracy of the end)."""
    torch.manual_seed(settings.seed)
    model, probe, slot_probe = make_text_encoder(len(tokenizer)), _Probe(), nn.Linear(TEXT_DIM, 2)
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *probe.parameters(), *slot_probe.parameters()], lr=1e-3, weight_decay=0.0
    )
    data = []
    for num_digits in (1, 2):
        captions = all_captions(num_digits)
        texts = [DEFAULT_PROMPT_TEMPLATE["template"].format(c) for c in captions]
        input_ids = tokenizer(texts, return_tensors="pt").input_ids
        data.append((input_ids, token_targets(input_ids, tokenizer, _labels(captions))))
    steps, accuracy = min(settings.text_steps, 600), 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        input_ids, targets = data[0 if step % 4 == 3 else 1]
        rows = torch.randint(len(input_ids), (24,))
        hidden = model(input_ids[rows], output_hidden_states=True).hidden_states[-3]
        asked = (targets[rows] >= 0).any(-1)
        loss, right = probe(hidden[asked], targets[rows][asked])
        slot = (targets[rows][asked][:, 2] >= 0).long()
        loss = loss + F.cross_entropy(slot_probe(hidden[asked]), slot)
        loss = loss + 0.1 * (hidden[:, 95:].pow(2).mean() - 1).pow(2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy = 0.95 * accuracy + 0.05 * float(right.detach()) if step else float(right.detach())
        if step % 100 == 0:
            print(f"text encoder step {step} loss {float(loss.detach()):.4f} right {accuracy:.4f}", flush=True)
    return model.eval(), accuracy


def train_text_encoder_2(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> tuple[CLIPTextModel, float]:
    """Trains the pooled output on all prompts. Returns (model, probe accuracy of the end)."""
    torch.manual_seed(settings.seed + 1)
    model, probe = make_text_encoder_2(len(tokenizer)), _Probe()
    optimizer = torch.optim.AdamW([*model.parameters(), *probe.parameters()], lr=1e-3, weight_decay=0.0)
    captions = all_captions(1) * 10 + all_captions(2)
    input_ids = tokenizer([str(c) for c in captions], return_tensors="pt", padding="longest").input_ids
    labels = _labels(captions)
    accuracy = 0.0
    for step in range(settings.text_steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / settings.text_steps)
        rows = torch.randint(len(input_ids), (64,))
        loss, right = probe(model(input_ids[rows]).pooler_output, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy = 0.95 * accuracy + 0.05 * float(right.detach()) if step else float(right.detach())
        if step % 200 == 0:
            print(f"text encoder 2 step {step} loss {float(loss.detach()):.4f} right {accuracy:.4f}", flush=True)
    return model.eval(), accuracy
