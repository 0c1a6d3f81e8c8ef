"""F-Actor: a Llama-like language model that reads and predicts two speakers' audio codes and one's text (paper section 4).

    sequence    [speaker vector] [prompt tokens ...] [frame 0] [frame 1] ...
    at a frame  x = sum over both speakers and all codebooks of Embed(code) + Embed(text token)
    heads       H -> 2K x (C+2) audio logits (one linear layer), H -> text logits (the backbone's own head)

Every position predicts the next frame, so the prompt's last position predicts frame 0.
"""
import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from config import InputError, hub_problem
from data import StreamFormat


class FActor(nn.Module):
    """The full-duplex model around a causal LM of transformers.

    backbone: any Llama-like AutoModelForCausalLM whose vocabulary holds data.EXTRA_TOKENS.
    num_codebooks K, codebook_size C: of the codec; ids C and C+1 are the delay and the end id, so tables have C+2 rows.
    speaker_size S: numbers in a speaker embedding; 0 for a model without one.
    """

    def __init__(self, backbone, num_codebooks, codebook_size, speaker_size):
        super().__init__()
        hidden = backbone.config.hidden_size
        self.backbone, self.num_codebooks, self.codebook_size = backbone, num_codebooks, codebook_size
        self.speaker_size = speaker_size
        self.speaker_embed_proj = nn.Linear(speaker_size, hidden) if speaker_size else None
        self.audio_embeds = nn.ModuleList(nn.Embedding(codebook_size + 2, hidden) for _ in range(2 * num_codebooks))
        self.dsu_head = nn.Linear(hidden, 2 * num_codebooks * (codebook_size + 2))
        for module in (*self.audio_embeds, self.dsu_head):
            nn.init.normal_(module.weight, std=backbone.config.initializer_range)
        nn.init.zeros_(self.dsu_head.bias)

    def embed_frames(self, audio, text):
        """audio (B, 2K, T) and text (B, T) ids -> (B, T, hidden): the sum of paper section 4, text included."""
        x = self.backbone.get_input_embeddings()(text)
        for row, table in enumerate(self.audio_embeds):
            x = x + table(audio[:, row])
        return x

    def forward(self, audio=None, text=None, prompt=None, speaker=None, prompt_mask=None, cache=None):
        """Hidden states, for training (prompt and all frames at once) and for inference (a prefix, then frame by frame).

        audio (B, 2K, T), text (B, T): frames, or None. prompt (B, P): instruction tokens, padded on the left where
        prompt_mask (B, P) is False (None: nowhere); it comes with speaker (B, S) and opens a sequence. cache: a
        transformers Cache, extended in place; prompt_mask must be given with it at every call that continues such a prompt.
        Returns (B, [1+P] + T, hidden).
        """
        parts = []
        if prompt is not None:
            prompt_embeds = self.backbone.get_input_embeddings()(prompt)
            if self.speaker_embed_proj is not None:
                parts.append(self.speaker_embed_proj(speaker.to(self.speaker_embed_proj.weight.dtype))[:, None])
            parts.append(prompt_embeds)
        if audio is not None:
            parts.append(self.embed_frames(audio, text))
        x = torch.cat(parts, dim=1)
        past = cache.get_seq_length() if cache is not None else 0
        mask = positions = None
        if prompt_mask is not None:
            # the speaker vector stands in front of the padding; positions skip the padding, attention does not see it
            mask = torch.ones(x.shape[0], past + x.shape[1], dtype=torch.bool, device=x.device)
            lead = int(self.speaker_embed_proj is not None)
            mask[:, lead:lead + prompt_mask.shape[1]] = prompt_mask
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        return self.backbone.base_model(inputs_embeds=x, attention_mask=mask, position_ids=positions,
                                        past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def audio_logits(self, hidden):
        """hidden (..., hidden) -> (..., 2K, C+2): system codebooks first, then the user's."""
        return self.dsu_head(hidden).unflatten(-1, (2 * self.num_codebooks, self.codebook_size + 2))

    def text_logits(self, hidden):
        """hidden (..., hidden) -> (..., vocabulary), through the backbone's tied head."""
        return self.backbone.get_output_embeddings()(hidden)

    def loss(self, hidden, batch, user_weight=1.0, first_frame=True, prompt_text=False, listening_weight=1.0,
             silence_pad=None):
        """Training loss on a batch of data.collate (paper section 4; spec 4).

        hidden (B, [1+P] + T-1, hidden): of `forward` on the batch's prompt and all its frames but the last.
        user_weight: weight of the user's audio rows: 1 is the paper's loss "s/u", 0 its loss "s".
        first_frame: whether frame 0 is an audio target. The authors' program leaves it out, so that their model is
            untrained at the very position where generation starts; harmless only while that frame is a delay id.
        prompt_text: whether the text loss covers the prompt's tokens too, as in the authors' program.
        listening_weight: weight of the text where the system is silent (the token before is `silence_pad`, an id). There it
            decides when to speak up, which the prompt's counts are about, but few of the text loss's nats are there: a
            small data set teaches little of it at the paper's 1.
        Returns a dict of scalars: loss = audio + text, and apart from each other audio_system, audio_user, text. Every
        one is averaged over an item's real positions, then over the batch.
        """
        audio, text, frame_mask = batch["audio"], batch["text"], batch["frame_mask"]
        num_frames = text.shape[1]
        frame_hidden = hidden[:, -num_frames:]  # (B, T, hidden): position t predicts frame t
        logits = self.audio_logits(frame_hidden)  # (B, T, 2K, C+2)
        ce = F.cross_entropy(logits.flatten(0, 2).float(), audio.transpose(1, 2).flatten(), reduction="none")
        ce = ce.view(audio.shape[0], num_frames, 2, self.num_codebooks).mean(-1)  # (B, T, [system, user])
        audio_mask = frame_mask.clone()
        audio_mask[:, 0] &= first_frame
        system, user = (_masked_mean(ce[:, :, i], audio_mask) for i in (0, 1))
        # the end token is no text target: it is the padding too, and the end id of the audio ends a dialogue
        text_hidden, target, text_mask = frame_hidden, text, F.pad(frame_mask[:, 1:], (0, 1))
        if prompt_text:
            unseen = int(self.speaker_embed_proj is None)  # without a speaker vector nothing predicts the first token
            text_hidden = hidden[:, unseen - num_frames - batch["prompt"].shape[1]:]
            target = torch.cat([batch["prompt"][:, unseen:], text], 1)
            prompt_mask = torch.ones_like(batch["prompt"]).bool() if batch["prompt_mask"] is None else batch["prompt_mask"]
            text_mask = torch.cat([prompt_mask[:, unseen:], text_mask], 1)
        text_ce = F.cross_entropy(self.text_logits(text_hidden).flatten(0, 1).float(), target.flatten(),
                                  reduction="none").view_as(target)
        text_loss = _masked_mean(text_ce, text_mask)
        loss = (system + user_weight * user) / (1 + user_weight) + text_loss
        if listening_weight != 1:
            listening = F.pad(text[:, :-1] == silence_pad, (1, 0), value=True)  # (B, T)
            text_ce, text_mask = text_ce[:, -num_frames:], text_mask[:, -num_frames:]
            loss = loss + (listening_weight - 1) * _masked_mean(text_ce * listening, text_mask)
        return {"loss": loss, "audio_system": system, "audio_user": user, "text": text_loss}


def _masked_mean(values, mask):
    """values, mask (B, T) -> scalar: mean over an item's unmasked positions, then over the items."""
    return ((values * mask).sum(1) / mask.sum(1)).mean()


def new_model(backbone, num_codebooks, codebook_size, speaker_size, tokenizer):
    """An untrained FActor around `backbone`, whose vocabulary is extended to the tokenizer's length."""
    if len(tokenizer) > backbone.get_input_embeddings().num_embeddings:
        backbone.resize_token_embeddings(len(tokenizer))
    return FActor(backbone, num_codebooks, codebook_size, speaker_size)


def save_checkpoint(folder, model, tokenizer, fmt, extra, dtype=None):
    """Write a checkpoint in the released layout (spec 4): config.json, model.safetensors and the tokenizer's files.

    The config is the backbone's, with the entries that the authors' program reads and ours: `stream_format`
    (data.StreamFormat) and what `extra` holds. dtype: of the stored weights (default: as they are).
    """
    folder = Path(folder)
    new, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    tied = model.backbone.config.tie_word_embeddings
    tensors = {name.removeprefix("backbone."): tensor.detach().to("cpu", dtype).contiguous()
               for name, tensor in model.state_dict().items() if not (tied and name == "backbone.lm_head.weight")}
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    config = model.backbone.config.to_dict() | {
        "architectures": ["DSULlama"], "num_dsus": model.num_codebooks, "audio_vocab_size": model.codebook_size,
        "text_stream": True, "multi_text_stream": False, "calc_loss_on_c1_only": False,
        "use_speaker_embedding": model.speaker_size > 0, "stream_format": vars(fmt), **extra}
    (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(new)
    if folder.exists():  # the whole folder changes at once, so that its files always belong together
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(source, device="cpu", dtype=torch.float32):
    """A checkpoint in the released layout: a folder, or a hub id. K, C and S follow from the tensors.

    Returns (model in eval mode, tokenizer, StreamFormat, config dict). A released config has no `stream_format`: the
    paper's best one is taken. Raises InputError if files are missing or the tensors do not fit the config.
    """
    folder = Path(source)
    if not folder.exists():
        from huggingface_hub import snapshot_download
        try:
            folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
        except Exception as e:  # no network, no such repository, gated, not a name ...
            raise InputError(f"checkpoint {source}: no such folder, and from the hub: {hub_problem(e)}") from e
    try:
        settings = json.loads((folder / "config.json").read_text())
        backbone_config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        index = folder / "model.safetensors.index.json"  # of a checkpoint in several files
        shards = ([folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
                  if index.exists() else [folder / "model.safetensors"])
        tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    except Exception as e:  # tokenizers, for one, raises a plain Exception on a file that is cut off
        raise InputError(f"{source}: not a readable checkpoint ({' '.join(str(e).split())[:200]}); it needs config.json, "
                         "model.safetensors and the tokenizer's files") from e
    tables = [name for name in tensors if name.startswith("audio_embeds.")]
    if not tables:
        raise InputError(f"{source}: no audio_embeds.* tensors in it; this is not an F-Actor checkpoint")
    num_codebooks, codebook_size = len(tables) // 2, tensors[tables[0]].shape[0] - 2
    for key, found in (("num_dsus", num_codebooks), ("audio_vocab_size", codebook_size)):
        if settings.get(key, found) != found:
            raise InputError(f"{source}: config.json says {key}={settings[key]}, but the tensors are made for {found}; "
                             "use the config.json that the weights were saved with")
    speaker = tensors.get("speaker_embed_proj.weight")
    model = FActor(AutoModelForCausalLM.from_config(backbone_config, dtype=torch.float32), num_codebooks, codebook_size,
                   0 if speaker is None else speaker.shape[1])
    own = ("speaker_embed_proj.", "audio_embeds.", "dsu_head.")
    tensors = {name if name.startswith(own) else f"backbone.{name}": tensor for name, tensor in tensors.items()}
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if backbone_config.tie_word_embeddings:
        expected.pop("backbone.lm_head.weight", None)
        tensors.pop("backbone.lm_head.weight", None)
    if missing := [name for name in expected if name not in tensors]:
        raise InputError(f"{source}: {len(missing)} of {len(expected)} tensors are missing, first {missing[0]}; copy or "
                         "download it again, or use the config.json that the weights were saved with")
    wrong = [f"{name} {tuple(tensors[name].shape)} instead of {tuple(shape)}"
             for name, shape in expected.items() if tensors[name].shape != shape]
    wrong += [f"{name} unexpected" for name in tensors if name not in expected]
    if wrong:
        raise InputError(f"{source}: {len(wrong)} tensors do not fit config.json, first {wrong[0]}; "
                         "use the config.json that the weights were saved with")
    model.load_state_dict(tensors, strict=False)
    known = {field.name for field in dataclasses.fields(StreamFormat)}
    fmt = StreamFormat(**{key: value for key, value in (settings.get("stream_format") or {}).items() if key in known}
                       | {"codebook_size": codebook_size})
    return model.to(device, dtype).eval(), tokenizer, fmt, settings
