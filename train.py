"""Train F-Actor (paper section 6.2). One process, or one per device:

    python train.py configs/nano.yaml [key=value ...]
    torchrun --standalone --nproc_per_node=N train.py configs/nano.yaml [key=value ...]

Writes to `out`: best/ and last/ (checkpoints in the released layout), state.pt (all that `resume=true` needs), log.csv.
"""
import csv
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from config import InputError, load_settings, write_atomically
from data import (
    EXTRA_TOKENS,
    SILENCE_PAD,
    Dialogues,
    StreamFormat,
    collate,
    epoch_batches,
    instruction,
    load_dialogues,
    made_with,
    segments,
)
from model import load_checkpoint, new_model, save_checkpoint


@dataclass
class Config:
    # where from, where to
    data: str = "default/data"  # folder of prepare.py, or a hub id
    out: str = "runs/nano"
    resume: bool = False  # go on from out/state.pt
    val_split: str = "validation"  # "train" for a set that has no other
    limit: int = 0  # only the first N dialogues of every split; 0: all
    # streams (data.StreamFormat)
    codebook_size: int = 4032
    alignment: str = "word"  # text stream: word | utterance | none
    delay: int = 2  # frames by which text leads audio
    behaviour_tokens: bool = False  # [BC] and [INTER] in the text stream
    max_frames: int = 2048
    rewritten_narrative: bool = True  # False: the plain narrative, which tells who starts
    # model: `init` (an F-Actor checkpoint), `backbone` (a causal LM, its weights unless random_weights), or a new Llama
    init: str = ""
    backbone: str = ""
    random_weights: bool = False  # the backbone's architecture only
    speaker_embedding: bool = True
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 4
    intermediate: int = 768
    vocab_size: int = 2048  # of the BPE tokenizer learnt for a new Llama
    # loss (model.FActor.loss)
    user_weight: float = 1.0  # 1: the paper's s/u, 0: its s
    first_frame: bool = True  # the authors: False
    prompt_text: bool = False  # the authors: True
    listening_weight: float = 1.0  # of the text where the system is silent and may speak up
    # optimisation
    batch_size: int = 1  # dialogues per process and forward pass
    accumulation: int = 8  # forward passes per step
    steps: int = 100_000
    lr: float = 5e-5
    min_lr: float = 5e-6  # after cosine decay over `steps`
    warmup: int = 500  # steps
    weight_decay: float = 0.01
    clip: float = 1.0  # gradient norm
    eval_every: int = 500  # steps between evaluations, each of which also writes out/last and out/state.pt
    save_dtype: str = "float32"  # of best/ and last/: float32 | bfloat16
    patience: int = 10  # evaluations without a better validation loss before stopping
    seed: int = 0


def new_tokenizer(data, vocab_size, fmt):
    """A byte-level BPE tokenizer learnt on the training split's prompts and (lower-cased) words."""
    def texts():
        for dialogue in load_dialogues(data, "train").remove_columns(["dsu_c2_path"]):
            for side in (0, 1):
                yield instruction(dialogue, side, fmt)
                for segment, _, _ in segments(dialogue, side):
                    yield " ".join(word["word"].lower() for word in segment["words"] or [])

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|begin_of_text|>", "<|eot_id|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def build(cfg, fmt):
    """The model and tokenizer that the config asks for: a checkpoint, a pretrained or random backbone, a new Llama."""
    first = load_dialogues(cfg.data, "train")[0]
    speaker_size = len(first["spk_emb_c1"]) if cfg.speaker_embedding else 0
    if cfg.init:
        model, tokenizer, saved, trained = load_checkpoint(cfg.init)
        made_for = vars(saved) | {"codebooks": model.num_codebooks, "speaker numbers": model.speaker_size}
        asked = vars(fmt) | {"codebooks": len(first["dsu_c1_path"]), "speaker numbers": speaker_size}
        made = {key: value for key, value in made_with(cfg.data).items() if speaker_size or key == "codec_fingerprint"}
        made_for, asked = made_for | {key: trained[key] for key in made if key in trained}, asked | made
        if differs := [f"{key} {value} (now {asked[key]})" for key, value in made_for.items()
                       if value != asked[key] and key != "max_frames"]:
            raise InputError(f"init={cfg.init} was trained with another {', '.join(differs)}; use its data and settings")
        return model.train(), tokenizer
    if cfg.backbone:
        try:
            tokenizer = AutoTokenizer.from_pretrained(cfg.backbone)
            backbone = (AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(cfg.backbone), dtype=torch.float32)
                        if cfg.random_weights
                        else AutoModelForCausalLM.from_pretrained(cfg.backbone, dtype=torch.float32))
        except (OSError, ValueError) as e:
            raise InputError(f"backbone={cfg.backbone}: cannot be loaded ({str(e).splitlines()[0]}); give a folder or hub "
                             "id of a causal LM, and HF_TOKEN if it is gated") from e
        tokenizer.add_special_tokens({"additional_special_tokens": EXTRA_TOKENS})
    else:
        if cfg.heads < 1 or cfg.kv_heads < 1 or cfg.hidden % (2 * cfg.heads) or cfg.heads % cfg.kv_heads:
            raise InputError(f"hidden={cfg.hidden}, heads={cfg.heads}, kv_heads={cfg.kv_heads}: hidden must be a multiple "
                             "of twice the heads, and heads one of kv_heads")
        tokenizer = new_tokenizer(cfg.data, cfg.vocab_size, fmt)
        tokenizer.add_special_tokens({"additional_special_tokens": EXTRA_TOKENS})
        backbone = AutoModelForCausalLM.from_config(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=cfg.hidden, num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, intermediate_size=cfg.intermediate,
            max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id))
    return new_model(backbone, len(first["dsu_c1_path"]), cfg.codebook_size, speaker_size, tokenizer), tokenizer


def learning_rate(step, cfg):
    """Linear warm-up, then cosine decay to min_lr at the last step."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.min_lr + 0.5 * (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * min(1, progress)))


def main(argv):
    cfg = load_settings(Config, argv)
    if min(cfg.batch_size, cfg.accumulation, cfg.steps, cfg.eval_every, cfg.patience) < 1:
        raise InputError("batch_size, accumulation, steps, eval_every and patience must be at least 1")
    if cfg.save_dtype not in ("float32", "bfloat16"):
        raise InputError(f"save_dtype={cfg.save_dtype}: use float32 or bfloat16")
    fmt = StreamFormat(cfg.alignment, cfg.delay, cfg.behaviour_tokens, cfg.max_frames, cfg.rewritten_narrative,
                       cfg.codebook_size)
    info = Path(cfg.data) / "info.json"  # of prepare.py
    if info.exists() and (size := json.loads(info.read_text())["codebook_size"]) != cfg.codebook_size:
        raise InputError(f"codebook_size={cfg.codebook_size}, but the codec of {cfg.data} has {size}; set codebook_size={size}")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")
    if world > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    autocast = (torch.autocast("cuda", torch.bfloat16) if on_gpu and torch.cuda.is_bf16_supported() else nullcontext())
    say = print if rank == 0 else lambda *_, **__: None
    out = Path(cfg.out)
    state_file = out / "state.pt"
    if cfg.resume and not state_file.exists():
        raise InputError(f"resume=true, but there is no {state_file}; check out=, or start without resume")
    if not cfg.resume and state_file.exists():
        raise InputError(f"{out} already holds a run; add resume=true to go on with it, or give another out=")

    torch.manual_seed(cfg.seed)  # the same weights on every process
    model, tokenizer = build(cfg, fmt)
    model.to(device)
    train, val = (Dialogues(cfg.data, split, tokenizer, fmt, cfg.limit) for split in ("train", cfg.val_split))
    lengths = [sides[0]["audio"].shape[1] for sides in train.items]
    global_batch = cfg.batch_size * world  # dialogues of one forward pass over all processes
    if len(train) < global_batch:
        raise InputError(f"{cfg.data}: {len(train)} training dialogues are fewer than one batch of {global_batch}")
    per_epoch = len(train) // global_batch
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": cfg.weight_decay},
                                   {"params": rest, "weight_decay": 0.0}], lr=cfg.lr, betas=(0.9, 0.95))
    step, best, bad_evals = 0, float("inf"), 0
    if cfg.resume:
        state = torch.load(state_file, map_location=device, weights_only=True)
        changed = [key for key, value in asdict(cfg).items() if key != "resume" and state["config"].get(key) != value
                   and key not in ("out", "steps", "patience", "eval_every")]
        if changed:
            raise InputError(f"{state_file} was made with other settings ({', '.join(changed)}); resume with the same ones")
        if state["world"] != world:
            say(f"note: {state['world']} processes before, {world} now; the batches are others than in one go")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, best, bad_evals = state["step"], state["best"], state["bad_evals"]
    ddp = DistributedDataParallel(model, [device] if on_gpu else None) if world > 1 else model
    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {world} x {device.type}; {len(train)} + "
        f"{len(val)} dialogues ({len(train.dropped)} + {len(val.dropped)} dropped, their text does not fit the frames); "
        f"{per_epoch / cfg.accumulation:.1f} steps an epoch")

    silence_pad = tokenizer.convert_tokens_to_ids(SILENCE_PAD)

    # the loss is measured through these two functions, in training and in evaluation
    def make_batch(dialogues, keys):
        batch = collate([dialogues[key] for key in keys], tokenizer.eos_token_id, fmt)
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

    def losses_of(network, batch):
        with autocast:
            hidden = network(batch["audio"][..., :-1], batch["text"][:, :-1], batch["prompt"], batch["speaker"],
                             batch["prompt_mask"])
            return model.loss(hidden, batch, cfg.user_weight, cfg.first_frame, cfg.prompt_text, cfg.listening_weight,
                              silence_pad)

    def all_mean(sums):
        """dict of scalar tensors -> dict of floats, averaged over the processes."""
        stacked = torch.stack([value.detach().double() for value in sums.values()])
        if world > 1:
            dist.all_reduce(stacked)
        return dict(zip(sums, (stacked / world).tolist()))

    @torch.no_grad()
    def evaluate():
        """Mean losses over the validation split, every dialogue from both sides."""
        model.eval()
        keys = sorted(((i, side) for i in range(len(val)) for side in (0, 1)),
                      key=lambda key: val[key]["audio"].shape[1])
        mine = keys[rank::world]
        total = {name: torch.zeros(()) for name in ("loss", "audio_system", "audio_user", "text")}
        for k in range(0, len(mine), cfg.batch_size):
            part = mine[k:k + cfg.batch_size]
            for name, value in losses_of(model, make_batch(val, part)).items():
                total[name] += value.cpu() * len(part) / len(keys) * world
        model.train()
        return all_mean({name: value.to(device) for name, value in total.items()})

    columns = ["step", "epoch", "loss", "ppl_audio_system", "ppl_audio_user", "ppl_text", "val_loss",
               "val_ppl_audio_system", "val_ppl_audio_user", "val_ppl_text", "lr", "grad_norm", "frames_per_s"]
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        rows = []
        if cfg.resume and (out / "log.csv").exists():  # drop what was logged after the state was written
            rows = [row for row in csv.DictReader(open(out / "log.csv")) if int(row["step"]) <= step]
        log_file = open(out / "log.csv", "w", newline="")
        log = csv.DictWriter(log_file, columns)
        log.writeheader()
        log.writerows(rows)
        log_file.flush()

    def checkpoint(is_best):
        """Everything first under other names, then renamed: a kill leaves the old or the new, never a mixture."""
        if rank:
            return
        settings = {key: value for key, value in asdict(cfg).items() if key not in ("out", "resume")}
        extra = {"trained_steps": step, "train_config": settings} | made_with(cfg.data)
        for name in ["last"] + ["best"] * is_best:
            save_checkpoint(out / name, model, tokenizer, fmt, extra, getattr(torch, cfg.save_dtype))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "best": best,
                 "bad_evals": bad_evals, "config": asdict(cfg), "world": world}
        write_atomically(state_file, lambda path: torch.save(state, path))

    model.train()
    began, first_step, epoch, batches = time.time(), step, None, None
    while step < cfg.steps and bad_evals < cfg.patience:
        start = time.time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        sums, frames = {}, 0
        for micro in range(cfg.accumulation):
            position = step * cfg.accumulation + micro  # all of the data order follows from the step
            if position // per_epoch != epoch:
                epoch = position // per_epoch
                batches = epoch_batches(lengths, global_batch, epoch, cfg.seed)
            keys = batches[position % per_epoch][rank * cfg.batch_size:(rank + 1) * cfg.batch_size]
            batch = make_batch(train, keys)
            frames += int(batch["frame_mask"].sum()) * world
            with ddp.no_sync() if world > 1 and micro < cfg.accumulation - 1 else nullcontext():
                losses = losses_of(ddp, batch)
                (losses["loss"] / cfg.accumulation).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / cfg.accumulation
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        mean = all_mean(sums)
        if not math.isfinite(mean["loss"]):
            raise InputError(f"the loss is {mean['loss']} at step {step}; lower lr={cfg.lr}, or look at the data")
        eta = (time.time() - began) / (step - first_step) * (cfg.steps - step)
        row = {"step": step, "epoch": round(position / per_epoch, 3), "loss": mean["loss"],
               "ppl_audio_system": math.exp(mean["audio_system"]), "ppl_audio_user": math.exp(mean["audio_user"]),
               "ppl_text": math.exp(mean["text"]), "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm.item(),
               "frames_per_s": frames / (time.time() - start)}
        say(f"step {step}/{cfg.steps} | epoch {row['epoch']:.2f} | loss {mean['loss']:.4f} | ppl audio "
            f"{row['ppl_audio_system']:.1f} (user {row['ppl_audio_user']:.1f}) text {row['ppl_text']:.2f} | "
            f"{row['frames_per_s']:.0f} frames/s | ETA {eta / 60:.1f} min", flush=True)
        if step % cfg.eval_every == 0 or step == cfg.steps:
            found = evaluate()
            row |= {"val_loss": found["loss"]} | {f"val_ppl_{name}": math.exp(found[name])
                                                  for name in ("audio_system", "audio_user", "text")}
            is_best = found["loss"] < best
            best, bad_evals = (found["loss"], 0) if is_best else (best, bad_evals + 1)
            say(f"  validation | loss {found['loss']:.4f} | ppl audio {row['val_ppl_audio_system']:.1f} (user "
                f"{row['val_ppl_audio_user']:.1f}) text {row['val_ppl_text']:.2f}" + " | best so far" * is_best, flush=True)
        if rank == 0:
            log.writerow(row)
            log_file.flush()
        if step % cfg.eval_every == 0 or step == cfg.steps:
            checkpoint(is_best)
    if bad_evals >= cfg.patience:
        say(f"stopped: no better validation loss in {cfg.patience} evaluations")
    if world > 1:
        dist.barrier()  # gloo's threads must be done with the last tensors: freeing the group while they are not hangs
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as e:
        sys.exit(f"train.py: {e}")
