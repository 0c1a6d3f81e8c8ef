"""F-Actor (paper section 4): a Llama-like language model that reads and predicts two speakers'
audio codes and one's text.

    sequence    [speaker vector] [prompt tokens ...] [frame 0] [frame 1] ...
    at a frame  x = sum over both speakers and all codebooks of Embed(code) + Embed(text token)
    heads       H -> 2K x (C+2) audio logits (one linear layer)
                H -> text logits (the backbone's own head)

Every position predicts the next frame, so the prompt's last position predicts frame 0.
"""
import dataclasses
import inspect
import json
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from config import InputError, brief, hub_problem
from data import stored_format, text_mask

LOGITS_AT_ONCE = 2 ** 27  # of a loss: 0.5 GB in float32


class FActor(nn.Module):
    """The full-duplex model around a causal LM of transformers.

    backbone: any Llama-like AutoModelForCausalLM whose vocabulary holds data.EXTRA_TOKENS.
    num_codebooks K, codebook_size C: of the codec; ids C and C+1 are the delay and the end id, so
        tables have C+2 rows.
    speaker_size S: numbers in a speaker embedding; 0 for a model without one.
    """

    def __init__(self, backbone, num_codebooks, codebook_size, speaker_size):
        super().__init__()
        hidden = backbone.config.hidden_size
        self.backbone, self.speaker_size = backbone, speaker_size
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.speaker_embed_proj = nn.Linear(speaker_size, hidden) if speaker_size else None
        self.audio_embeds = nn.ModuleList(nn.Embedding(codebook_size + 2, hidden)
                                          for _ in range(2 * num_codebooks))
        self.dsu_head = nn.Linear(hidden, 2 * num_codebooks * (codebook_size + 2))
        for module in (*self.audio_embeds, self.dsu_head):
            nn.init.normal_(module.weight, std=backbone.config.initializer_range)
        nn.init.zeros_(self.dsu_head.bias)
        # transformers renamed the argument in 5.24, and drops the old name in 5.40
        known = inspect.signature(backbone.base_model.forward).parameters
        self.cache_argument = "cache" if "cache" in known else "past_key_values"

    def embed_frames(self, audio, text):
        """audio (B, 2K, T) and text (B, T) ids -> (B, T, hidden): the sum of paper section 4, text
        included."""
        x = self.backbone.get_input_embeddings()(text)
        for row, table in enumerate(self.audio_embeds):
            x = x + table(audio[:, row])
        return x

    def forward(self, audio=None, text=None, prompt=None, speaker=None, prompt_mask=None,
                cache=None):
        """Hidden states, for training (prompt and all frames at once) and for inference (a prefix,
        then frame by frame).

        audio (B, 2K, T), text (B, T): frames, or None. prompt (B, P): instruction tokens, padded on
        the left where prompt_mask (B, P) is False (None: nowhere); it comes with speaker (B, S) and
        opens a sequence. cache: a transformers Cache, extended in place; prompt_mask must be given
        with it at every call that continues such a prompt.
        Returns (B, [1+P] + T, hidden).
        """
        parts = []
        if prompt is not None:
            if self.speaker_embed_proj is not None:
                speaker = speaker.to(self.speaker_embed_proj.weight.dtype)
                parts.append(self.speaker_embed_proj(speaker)[:, None])  # (B, 1, hidden)
            parts.append(self.backbone.get_input_embeddings()(prompt))
        if audio is not None:
            parts.append(self.embed_frames(audio, text))
        x = torch.cat(parts, dim=1)
        past = cache.get_seq_length() if cache is not None else 0
        mask = positions = None
        if prompt_mask is not None:
            # the speaker vector stands in front of the padding; positions skip the padding,
            # attention does not see it
            mask = torch.ones(x.shape[0], past + x.shape[1], dtype=torch.bool, device=x.device)
            lead = int(self.speaker_embed_proj is not None)
            mask[:, lead:lead + prompt_mask.shape[1]] = prompt_mask
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        return self.backbone.base_model(
            inputs_embeds=x, attention_mask=mask, position_ids=positions,
            use_cache=cache is not None, **{self.cache_argument: cache}).last_hidden_state

    def audio_logits(self, hidden):
        """hidden (..., hidden) -> (..., 2K, C+2): system codebooks first, then the user's."""
        return self.dsu_head(hidden).unflatten(-1, (2 * self.num_codebooks, self.codebook_size + 2))

    def text_logits(self, hidden):
        """hidden (..., hidden) -> (..., vocabulary), through the backbone's tied head."""
        return self.backbone.get_output_embeddings()(hidden)

    def recompute_activations(self):
        """In training, compute the layers' activations again in the backward pass instead of
        keeping them: less memory, slower by a third."""
        newer = getattr(self.backbone, "activation_checkpointing_enable", None)  # transformers 5.24
        (newer or self.backbone.gradient_checkpointing_enable)()

    def loss(self, hidden, batch, user_weight=1.0, first_frame=True, prompt_text=False,
             listening_weight=1.0, silence_pad=None, text_weight=1.0, prompt_word_weight=1.0):
        """Training loss on a batch of data.collate (paper section 4):

            loss = (audio_system + w audio_user) / (1 + w)
                 + v (text + (l - 1) listening + (p - 1) prompt_words)

        w, v, l, p: user_, text_, listening_ and prompt_word_weight; listening, prompt_words: the
            parts of the text's loss that are in silence, and in words taken up from the prompt.
        hidden (B, [1+P] + T-1, hidden): of `forward` on the batch's prompt and all its frames but
            the last.
        user_weight: 1 is the paper's loss "s/u", 0 its loss "s" (audio_user is then not computed,
            and nan).
        first_frame: whether frame 0 is an audio target. The authors' program leaves it out, so that
            their model is untrained at the very position where generation starts; harmless only
            while that frame is a delay id.
        prompt_text: see text_loss. listening_weight, silence_pad: see listening_loss.
        prompt_word_weight: of the text where the system takes up a word of the prompt, that is at
            the frames `taken_up` (B, T) of the batch (data.taken_up). Of all words only these few
            have to be read in the prompt; the others follow from those before them, and at the
            paper's weight of 1 a small model learns only that.
        text_weight: 1 is the paper's. A small model has few of its nats in the text, though the
            text decides what is said.
        Returns a dict of scalars: loss, and its parts audio_system, audio_user, text. Every one is
        averaged over an item's real positions, then over the batch.
        """
        rows = 2 * self.num_codebooks if user_weight else self.num_codebooks  # the system's first
        outputs = rows * (self.codebook_size + 2)
        target = batch["audio"][:, :rows].transpose(1, 2)  # (B, T, rows)
        frames = hidden[:, -target.shape[1]:]  # (B, T, hidden): position t predicts frame t
        audio_mask = batch["frame_mask"].clone()
        audio_mask[:, 0] &= first_frame

        ce = cross_entropy(frames, self.dsu_head.weight[:outputs], self.dsu_head.bias[:outputs],
                           target)  # (B, T, rows)
        system = masked_mean(ce[..., :self.num_codebooks].mean(-1), audio_mask)
        user = masked_mean(ce[..., self.num_codebooks:].mean(-1), audio_mask)
        audio = (system + user_weight * user) / (1 + user_weight) if user_weight else system
        text, text_ce = self.text_loss(hidden, batch, prompt_text)
        loss = audio + text_weight * text
        if listening_weight != 1:
            extra = listening_loss(text_ce, batch, silence_pad)
            loss = loss + text_weight * (listening_weight - 1) * extra
        if prompt_word_weight != 1:
            extra = masked_mean(text_ce * batch["taken_up"], text_mask(batch))
            loss = loss + text_weight * (prompt_word_weight - 1) * extra
        return {"loss": loss, "audio_system": system, "audio_user": user, "text": text}

    def text_loss(self, hidden, batch, prompt_text=False):
        """The text's part of `loss`, and its cross-entropy at every frame (B, T).

        prompt_text: whether it covers the prompt's tokens too, as in the authors' program.
        """
        target, mask = batch["text"], text_mask(batch)  # (B, T)
        num_frames = target.shape[1]
        if prompt_text:
            prompt, prompt_mask = batch["prompt"], batch["prompt_mask"]
            if prompt_mask is None:
                prompt_mask = torch.ones_like(prompt, dtype=torch.bool)
            # of each row, the token behind the padding
            first = torch.arange(len(prompt), device=prompt.device), prompt_mask.int().argmax(1)
            if self.speaker_embed_proj is None:  # then nothing predicts the first token
                mask = torch.cat([prompt_mask.index_put(first, mask.new_zeros(())), mask], 1)[:, 1:]
                prompt = prompt[:, 1:]
            else:  # it is predicted from the speaker, not from the padding between
                mask = torch.cat([prompt_mask, mask], 1)
                hidden = hidden.index_put(first, hidden[:, 0])
            target = torch.cat([prompt, target], 1)
        head = self.backbone.get_output_embeddings()
        ce = cross_entropy(hidden[:, -target.shape[1]:], head.weight, head.bias, target)
        return masked_mean(ce, mask), ce[:, -num_frames:]


def listening_loss(text_ce, batch, silence_pad):
    """The text's cross-entropy (B, T) where the system is silent, averaged over all frames: at the
    first frame, and wherever the token before is the id `silence_pad`.

    There the text decides when to speak up, which the prompt's counts are about, but few of the
    text loss's nats are there: a small data set teaches little of it at the paper's weight of 1.
    """
    listening = F.pad(batch["text"][:, :-1] == silence_pad, (1, 0), value=True)
    return masked_mean(text_ce * listening, text_mask(batch))


def cross_entropy(hidden, weight, bias, target):
    """Cross-entropy in nats, (B, T) or (B, T, R) as `target` is, of the logits of a linear layer on
    hidden (B, T, hidden), whose outputs are the R rows' logits one behind the other.

    Large logits are never held all at once: they are computed in pieces of positions, and each
    piece's again in the backward pass.
    """
    def piece(hidden, target):
        logits = F.linear(hidden, weight, bias).view(target.numel(), -1)  # (N R, V)
        return CrossEntropy.apply(logits.float(), target.flatten()).view_as(target)

    flat, flat_target = hidden.flatten(0, 1), target.flatten(0, 1)  # (B T, ...)
    positions = max(1, LOGITS_AT_ONCE // len(weight))
    if len(flat) <= positions:
        return piece(flat, flat_target).view_as(target)
    pieces = zip(flat.split(positions), flat_target.split(positions))
    found = [checkpoint(piece, *part, use_reentrant=False) for part in pieces]
    return torch.cat(found).view_as(target)


class CrossEntropy(torch.autograd.Function):
    """F.cross_entropy(logits (N, V), target (N,), reduction="none"), whose gradient takes the place
    of what it is computed from: torch's own makes two more tensors of that size, and on a CPU the
    backward pass takes eight times as long."""

    @staticmethod
    def forward(ctx, logits, target):
        log_chance = logits.log_softmax(1)
        ctx.save_for_backward(log_chance, target)
        return -log_chance.gather(1, target[:, None])[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # of logit v: its chance, less 1 where it is the target
        log_chance, target = ctx.saved_tensors
        change = log_chance.exp_()
        change.scatter_add_(1, target[:, None], -torch.ones_like(change[:, :1]))
        return change.mul_(gradient[:, None]), None


def masked_mean(values, mask):
    """values, mask (B, T) -> scalar: mean over an item's unmasked positions, then over items."""
    return ((values * mask).sum(1) / mask.sum(1)).mean()


def new_model(backbone, num_codebooks, codebook_size, speaker_size, tokenizer):
    """An untrained FActor around `backbone`, its vocabulary extended to the tokenizer's length."""
    if len(tokenizer) > backbone.get_input_embeddings().num_embeddings:
        backbone.resize_token_embeddings(len(tokenizer))
    return FActor(backbone, num_codebooks, codebook_size, speaker_size)


def save_checkpoint(folder, model, tokenizer, fmt, extra, dtype=None, weights=None):
    """Write a checkpoint in the released layout: config.json, model.safetensors, tokenizer files.

    The config is the backbone's, with the entries that the authors' program reads and ours:
    `stream_format` (data.StreamFormat) and what `extra` holds. dtype: of the stored weights
    (default: as they are). weights: the model's state dict, if it is split over processes.
    """
    folder = Path(folder)
    new, old = beside(folder, ".tmp"), beside(folder, ".old")
    if old.exists() and not folder.exists():  # a kill between the two renames below
        os.replace(old, folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    weights = model.state_dict() if weights is None else weights
    tensors = {name.removeprefix("backbone."): tensor.detach().to("cpu", dtype).contiguous()
               for name, tensor in weights.items()}
    if model.backbone.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    config = model.backbone.config.to_dict() | {
        "architectures": ["DSULlama"], "num_dsus": model.num_codebooks,
        "audio_vocab_size": model.codebook_size, "text_stream": True, "multi_text_stream": False,
        "calc_loss_on_c1_only": False, "use_speaker_embedding": model.speaker_size > 0,
        "stream_format": vars(fmt), **extra}
    config.pop("_name_or_path", None)  # a path of this machine
    (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(new)
    # the whole folder changes at once, so that its files belong together; a folder with files
    # cannot be replaced in one step: between these two, load_checkpoint takes the old one
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def beside(folder, ending):
    return folder.with_name(folder.name + ending)


def load_checkpoint(source, device="cpu", dtype=torch.float32):
    """A checkpoint in the released layout: a folder, or a hub id. K, C and S follow from the
    tensors.

    Returns (model in eval mode, tokenizer, StreamFormat, config dict). The format's max_frames is
    what the model was trained on, the config's max_position_embeddings the end of its positions. A
    released config has no `stream_format`: the paper's best one is taken. Raises InputError if
    files are missing or the tensors do not fit the config.
    """
    settings, backbone_config, tokenizer, tensors = read_checkpoint(source)
    tables = [name for name in tensors if name.startswith("audio_embeds.")]
    if not tables:
        raise InputError(f"{source}: no audio_embeds.* tensors in it; this is not an F-Actor "
                         "checkpoint")
    num_codebooks, codebook_size = len(tables) // 2, tensors[tables[0]].shape[0] - 2
    for key, found in (("num_dsus", num_codebooks), ("audio_vocab_size", codebook_size)):
        if settings.get(key, found) != found:
            raise InputError(f"{source}: config.json says {key}={settings[key]}, but the tensors "
                             f"are made for {found}; use the config.json that they were saved with")
    speaker = tensors.get("speaker_embed_proj.weight")
    backbone = AutoModelForCausalLM.from_config(backbone_config, dtype=torch.float32)
    model = FActor(backbone, num_codebooks, codebook_size,
                   0 if speaker is None else speaker.shape[1])
    own = ("speaker_embed_proj.", "audio_embeds.", "dsu_head.")
    tensors = {name if name.startswith(own) else f"backbone.{name}": tensor
               for name, tensor in tensors.items()}
    fill(model, tensors, backbone_config.tie_word_embeddings, source)
    fmt = dataclasses.replace(stored_format(settings), codebook_size=codebook_size)
    for parameter in model.parameters():  # not the rotary frequencies: rounded to 16 bits, they
        parameter.data = parameter.data.to(dtype)  # would turn a position of 1,000 by radians
    return model.to(device).eval(), tokenizer, fmt, settings


def read_checkpoint(source):
    """The files of load_checkpoint: (config.json as a dict, the backbone's config, tokenizer,
    tensors by name)."""
    folder = Path(source)
    if not folder.exists() and beside(folder, ".old").exists():
        folder = beside(folder, ".old")  # save_checkpoint was killed between its two renames
    if not folder.exists():
        from huggingface_hub import snapshot_download
        try:
            folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
        except Exception as e:  # no network, no such repository, gated, not a name ...
            raise InputError(f"checkpoint {source}: no such folder, and from the hub: "
                             f"{hub_problem(e)}") from e
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config, tokenizer = (auto.from_pretrained(folder) for auto in (AutoConfig, AutoTokenizer))
        names = ["model.safetensors"]
        index = folder / "model.safetensors.index.json"  # of a checkpoint in several files
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        tensors = {}
        for name in names:
            tensors |= load_file(folder / name)
    except Exception as e:  # tokenizers, for one, raises a plain Exception on a cut-off file
        raise InputError(f"{source}: not a readable checkpoint ({brief(e, 200)}); "
                         "it needs config.json, model.safetensors and the tokenizer's files") from e
    return settings, config, tokenizer, tensors


def fill(model, tensors, tied, source):
    """Load tensors by name into the model. Raises InputError where they do not fit it."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if tied:
        expected.pop("backbone.lm_head.weight", None)
        tensors.pop("backbone.lm_head.weight", None)
    if missing := [name for name in expected if name not in tensors]:
        raise InputError(f"{source}: {len(missing)} of {len(expected)} tensors are missing, first "
                         f"{missing[0]}; copy or download it again, or use the config.json that "
                         "the weights were saved with")
    wrong = [f"{name} {tuple(tensors[name].shape)} instead of {tuple(shape)}"
             for name, shape in expected.items() if tensors[name].shape != shape]
    wrong += [f"{name} unexpected" for name in tensors if name not in expected]
    if wrong:
        raise InputError(f"{source}: {len(wrong)} tensors do not fit config.json, first "
                         f"{wrong[0]}; use the config.json that the weights were saved with")
    model.load_state_dict(tensors, strict=False)
