"""Better manners by reward: reinforcement learning of when to speak, on the model's own dialogues.

    python reinforce.py configs/reinforce_nano.yaml [key=value ...]
    torchrun --standalone --nproc_per_node=8 reinforce.py configs/reinforce_factor.yaml
    python reinforce.py ... updates=0 [control=2]     the start [by the rule "due minus done"]
    python reinforce.py ... method=raft control=2     learns from the rule's dialogues instead

The method is that of "Multi-Faceted Interactivity Alignment" (Ohashi et al., arXiv 2606.11167): of
one prompt, or one recorded user, sample a group of dialogues; decisions of those that are better
than the group's mean become likelier:

    loss = mean over B rows, sum over frames / F of (-A log pi(c_t) + kl * KL(pi || pi_start)_t)
    A = sum over rewards k of w_k (R_k - mean of the group) / spread_k

What it leaves out of GRPO, and why:

1. Ratio and clip: one update per batch of rollouts, so what is updated is what sampled.
2. The group's standard deviation: where all rewards are nearly equal it makes unit advantages out
   of noise. Each reward is divided by its spread over the batches, a running mean.
3. The length of each sample as normaliser, which rewards length: all are divided by one constant.
4. An estimate of the KL divergence: text has few enough ids for the exact one, at every frame.
5. Audio ids: text leads, so it decides. A little supervised loss (`anchor`) keeps the audio.

What it adds: a policy over classes of text ids (`policy`): whoever is silent keeps silent, starts,
backchannels or interrupts; whoever speaks stops or goes on. Within a class all ids rise and fall
together, so *which* word has no gradient. And the instruction: the numbers that a prompt asks for
are drawn anew for every group.

Writes to `out`: best/ (by rewards.score: held-out counts, and the axes' rewards), last/, state.pt
(all that `resume=true` needs), log.csv (every reward of rewards.py for itself), curves.png.
"""
import copy
import math
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import train
from codec import fingerprints
from config import (
    InputError,
    load_settings,
    make_folder,
    use_threads,
    write_atomically,
    write_csv,
)
from data import SILENCE_PAD, load_dialogues
from generate import Sampler
from model import load_checkpoint, save_checkpoint
from rewards import AXES, WEIGHTS, count_figures, draw_curves, merged, score
from rewrite import load_chat_model
from rollout import anchor_batch, draw_rows, held_out_rows, pad_rows, read_scenes, text_ids

FILES = ("model", "segments", "val_segments")  # that must be those of before, too
MAY_CHANGE = ("resume", "out", "updates", "eval_every", "micro_batch", "threads", "save_dtype")


@dataclass
class Config:
    model: str = "default/model"  # the start, to which the KL divergence is measured
    data: str = "default/data"  # prompts and the supervised loss: split train; held out: validation
    out: str = "runs/reinforce"
    resume: bool = False
    # the instruction: two instances talk
    pairs: int = 4  # prompts an update and process; 0: no such task
    backchannels: int = 5  # numbers asked for: drawn from 0 to this
    interruptions: int = 2
    # the four axes: the user is a recording
    segments: str = ""  # file of `python -m world.segments`; "": no such task
    val_segments: str = ""  # the same of another split, held out
    axes: str = "pause turn backchannel interruption"  # those to train
    per_axis: int = 1  # segments of each, an update and process
    context: int = 100  # half of the updates put up to so many frames before the segments
    judge: str = ""  # chat model of transformers that rates what is said; "": none
    # the method
    policy: str = "classes"  # classes | tokens
    method: str = "reinforce"  # or raft: likelihood of the dialogues with the right counts
    group: int = 8  # dialogues of one prompt
    frames: int = 400  # most of a dialogue; the constant that losses are divided by
    kl: float = 0.02
    anchor: float = 0.01  # weight of the supervised loss, of four sides; 0.1 drowns the rewards
    lr: float = 4e-5  # rises in five updates, falls linearly to 0
    clip: float = 1.0  # gradient norm
    updates: int = 100
    micro_batch: int = 8  # rows at a time in the update
    control: float = 0.0  # of the rule: added to a mark's logit for every event that is due
    eval_every: int = 10  # updates
    eval_pairs: int = 24  # held-out prompts, and segments of each axis
    cpu_bf16: bool = False  # the update in bfloat16 on a CPU too
    threads: int = 0  # on a CPU, as of train.py
    save_dtype: str = "float32"  # of best/ and last/
    seed: int = 0


@dataclass
class Run:
    """What a run is made of, in one of its processes."""
    cfg: Config
    rank: int
    world: int  # processes
    device: torch.device
    model: Any  # FActor
    start: Any  # the same, frozen
    tokenizer: Any
    fmt: Any  # data.StreamFormat
    trained: dict  # the checkpoint's config
    dialogues: dict  # split "train", "validation" -> of load_dialogues
    scenes: dict  # the same -> entries of a segments file
    sampling: dict  # keywords of Sampler
    decisions: torch.Tensor  # (V,) which text ids are decisions, not words
    classes: torch.Tensor  # (V,) 0: silent, 1: backchannel, 2: interruption, 3: speaks, 4: no token
    judge: Any  # (model, tokenizer) or None
    optimizer: Any
    bf16: bool  # whether the update's matrix products are in bfloat16
    step: int = 0  # updates done
    best: float = -math.inf
    spread: dict = field(default_factory=dict)  # reward -> running mean of its variance in a group
    log: list = field(default_factory=list)  # the rows of log.csv


# ---- the policy ----


def log_policy(logits, run):
    """Text logits (..., V) -> log-probabilities (..., V) with which Sampler draws: the decision at
    its temperature, then, if it is a word, which one at the words'."""
    (decision, _, _), (word, _, _), _ = Sampler([], **run.sampling).kinds()
    logits = logits.float().masked_fill(run.classes == 4, -1e4)  # finite: KL takes differences
    first = (logits / decision).log_softmax(-1)
    is_word = first.masked_fill(run.decisions, -torch.inf).logsumexp(-1, keepdim=True)
    which = (logits / word).masked_fill(run.decisions, -torch.inf).log_softmax(-1)
    return torch.where(run.decisions, first, is_word + which)


def log_chosen(log_p, text, classes=None):
    """log_p (B, F, V), text (B, F) -> log-probability (B, F) of each id, or of its class."""
    if classes is None:
        return log_p.gather(-1, text[..., None])[..., 0]
    others = classes != classes[text][..., None]  # (B, F, V)
    return log_p.masked_fill(others, -torch.inf).logsumexp(-1)


def policy_loss(run, rows):
    """Sums over the policy's frames of `rows`: -A log pi(c), and the exact KL to the start."""
    inputs, text, inside, advantage = pad_rows(rows, run.tokenizer.eos_token_id, run.device)

    def frames_of(model):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            hidden = model(*inputs)[:, -text.shape[1]:]  # (B, F, hidden): t predicts frame t
            return log_policy(model.text_logits(hidden), run)  # (B, F, V)
    log_p = frames_of(run.model)
    with torch.no_grad():
        reference = frames_of(run.start)
    chosen = log_chosen(log_p, text, run.classes if run.cfg.policy == "classes" else None)
    kl = (log_p.exp() * (log_p - reference)).sum(-1)  # (B, F)
    return -(advantage * chosen * inside).sum(), (kl * inside).sum()


# ---- an update ----


def set_advantages(run, rows):
    """Row -> its advantage: the weighted sum of its rewards' deviations from their groups' means,
    each in units of its spread (GDPO's way: one by one). Method raft: 1 for the right counts."""
    groups, squares = {}, {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
        row["advantage"] = 0.0
    for group in groups.values():
        for key in group[0]["rewards"]:
            mean = np.mean([row["rewards"][key] for row in group])
            for row in group:
                row.setdefault("deviation", {})[key] = row["rewards"][key] - mean
                squares.setdefault(key, []).append((row["rewards"][key] - mean) ** 2)
    for key, values in sorted(merged(together(run, [squares])).items()):
        new = float(np.mean(values))
        run.spread[key] = 0.9 * run.spread.get(key, new) + 0.1 * new
    for row in rows:
        if run.cfg.method == "raft":
            row["advantage"] = float(row.get("asked", 0) == row.get("found", 1))
            continue
        for key, value in row["deviation"].items():
            row["advantage"] += WEIGHTS[key] * value / max(run.spread[key] ** 0.5, 0.1)


def together(run, values):
    """The list of all processes' values."""
    parts = [values] * run.world
    if run.world > 1:
        dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def update(run, rows):
    """One step on rows with advantages and on a batch of the data set. Returns what is logged."""
    cfg, sums = run.cfg, np.zeros(2)
    rows = sorted(rows, key=lambda row: len(row["text"]))  # little padding
    for k in range(0, len(rows), cfg.micro_batch):
        losses = policy_loss(run, rows[k:k + cfg.micro_batch])
        ((losses[0] + cfg.kl * losses[1]) / (len(rows) * cfg.frames)).backward()
        sums += [x.item() for x in losses]
    if cfg.anchor:
        rng = Random(f"anchor/{cfg.seed}/{run.step}/{run.rank}")
        keys = [(rng.randrange(len(run.dialogues["train"])), rng.randrange(2)) for _ in range(4)]
        (cfg.anchor * supervised_loss(run, "train", keys)["loss"]).backward()
    for p in run.model.parameters() if run.world > 1 else ():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad / run.world
        dist.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), cfg.clip)
    if not norm.isfinite():
        raise InputError(f"the gradient is {norm.item()} at update {run.step + 1}; lower lr")
    for group in run.optimizer.param_groups:  # AdamW's first steps are large whatever the gradient
        group["lr"] = cfg.lr * min((run.step + 1) / 5, 1 - run.step / cfg.updates)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    frames = sum(row["end"] - row["begin"] for row in rows)
    policy, kl, frames = np.sum(together(run, [[*sums, frames]]), 0).tolist()
    return {"policy_loss": policy / max(1, frames), "kl": kl / max(1, frames),
            "grad_norm": norm.item(), "frames": int(frames)}


def supervised_loss(run, split, keys):
    """The losses of model.FActor.loss, with the weights the checkpoint was trained with, on
    dialogues of the data set, keys [(index, side)]. Words of the prompt count as others: which ones
    are rare is known from a split that is laid out, as in train.py."""
    known = {f.name for f in fields(train.Config)}
    stored = run.trained.get("train_config") or {}
    cfg = train.Config(**{key: value for key, value in stored.items() if key in known})
    cfg.prompt_word_weight = 1.0
    silence = run.tokenizer.convert_tokens_to_ids(SILENCE_PAD)
    return train.losses_of(run.model, anchor_batch(run, split, keys), cfg, run.bf16, silence)


# ---- held out ----


@torch.no_grad()
def evaluate(run):
    """What is logged of held-out prompts and segments: how counts follow those asked for, rewards,
    and the text loss of dialogues of the data set, which should stay."""
    rows = held_out_rows(run)
    found = {f"held_out_{key}": value for key, value in mean_rewards(run, rows).items()}
    counted = together(run, [(*row["asked"], *row["found"]) for row in rows if "asked" in row])
    first = [(i, side) for i in range(min(4, len(run.dialogues["validation"]))) for side in (0, 1)]
    text = supervised_loss(run, "validation", first)["text"].item()
    return found | count_figures(np.array(counted)) | {"held_out_text": text}


def mean_rewards(run, rows):
    """{reward: its mean over the rows of all processes that have it}."""
    values = merged(together(run, [{key: [value]} for row in rows
                                   for key, value in row["rewards"].items()]) or [{}])
    return {key: float(np.mean(values[key])) for key in WEIGHTS if key in values}


# ---- the loop ----


def loop(run):
    """Update by update, to the last; measured before the first, every `eval_every`, at the end."""
    cfg, log, began, first = run.cfg, run.log, time.time(), run.step
    if not log:
        log.append({"update": 0, "seconds": 0.0} | evaluate(run))
        keep(run)
    while run.step < cfg.updates:
        start = time.time()
        rows = draw_rows(run)
        set_advantages(run, rows)
        row = {"update": run.step + 1, **mean_rewards(run, rows), **update(run, rows)}
        run.step += 1
        row["seconds"] = time.time() - start
        left = (time.time() - began) / (run.step - first) * (cfg.updates - run.step)
        log.append(row)
        if run.rank == 0:
            parts = [f"{key} {row[key]:.3f}" for key in (*WEIGHTS, "kl") if key in row]
            print(f"update {run.step}/{cfg.updates} |", " | ".join(parts),
                  f"| {row['frames'] / row['seconds']:.0f} frames/s | ETA {left / 60:.0f} min",
                  flush=True)
        if run.step % cfg.eval_every == 0 or run.step == cfg.updates:
            row |= evaluate(run)
            keep(run)


def keep(run):
    """Print and write what a measurement found: log.csv, curves.png, last/, best/ and state.pt. The
    best must not have lost 5 % of the perplexity of held-out text."""
    cfg, out, row, value = run.cfg, Path(run.cfg.out), run.log[-1], score(run.log[-1])
    kept = row["held_out_text"] < run.log[0]["held_out_text"] + math.log(1.05)
    is_best = kept and value > run.best
    if is_best:
        run.best = value
    if run.rank:
        return
    names = [key for key in row if key.startswith(("r_", "mae_", "exact_", "held_out_"))]
    print("  held out |", " | ".join(f"{key} {row[key]:.3f}" for key in names),
          "| best so far" if is_best else "", flush=True)
    columns = list(dict.fromkeys(key for row in run.log for key in row))
    write_csv(out / "log.csv", columns, run.log)
    write_atomically(out / "curves.png", lambda path: draw_curves(path, run.log))
    extra = run.trained | {"sampling": run.sampling, "reinforced": {"updates": run.step}}
    for name in ["last", "best"] if is_best else ["last"]:
        save_checkpoint(out / name, run.model, run.tokenizer, run.fmt, extra,
                        getattr(torch, cfg.save_dtype))
    state = {key: getattr(run, key) for key in ("step", "best", "spread", "log")}
    state |= {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(),
              "config": asdict(cfg), "world": run.world,
              "made_of": fingerprints(cfg, *FILES)}
    write_atomically(out / "state.pt", lambda path: torch.save(state, path))


# ---- setting up ----


def check_settings(cfg):
    """Raise InputError on settings that are out of range."""
    least = {"group": 2, "frames": 1, "micro_batch": 1, "eval_every": 1, "eval_pairs": 1,
             "pairs": 0, "backchannels": 0, "interruptions": 0, "per_axis": 1, "context": 0,
             "updates": 0, "kl": 0, "anchor": 0, "threads": 0, "lr": 1e-9, "clip": 1e-9}
    for key, low in least.items():
        if not low <= getattr(cfg, key) < math.inf:
            raise InputError(f"{key}={getattr(cfg, key)}: must be a number, at least {low}")
    choices = {"policy": ("classes", "tokens"), "method": ("reinforce", "raft"),
               "save_dtype": ("float32", "bfloat16")}
    for key, values in choices.items():
        if getattr(cfg, key) not in values:
            raise InputError(f"{key}={getattr(cfg, key)}: use {' or '.join(values)}")
    if not cfg.axes.split() or not {*cfg.axes.split()} <= {*AXES}:
        raise InputError(f"axes={cfg.axes}: known are {', '.join(AXES)}")
    if bool(cfg.segments) != bool(cfg.val_segments) or not (cfg.pairs or cfg.segments):
        raise InputError(f"pairs={cfg.pairs}, segments={cfg.segments}, val_segments="
                         f"{cfg.val_segments}: give pairs, or both files, or all")
    if cfg.method == "raft" and not cfg.pairs:
        raise InputError("method=raft learns from dialogues of pairs alone; give pairs, or "
                         "method=reinforce")
    if cfg.control and cfg.updates and cfg.method != "raft":
        raise InputError(f"control={cfg.control}: dialogues by the rule are not the policy's own, "
                         "from which it learns; add updates=0 or method=raft")
    if cfg.resume != (Path(cfg.out) / "state.pt").exists():
        raise InputError(f"resume=true, but there is no {cfg.out}/state.pt" if cfg.resume else
                         f"{cfg.out} already holds a run; add resume=true, or give another out=")


def setup(cfg):
    """Model, data and optimizer, at the start or where out/state.pt was written. Returns a Run."""
    check_settings(cfg)
    use_threads(cfg.threads)
    rank, world, device = train.join_processes()
    model, tokenizer, fmt, trained = load_checkpoint(cfg.model, device)
    if cfg.frames > fmt.max_frames:
        raise InputError(f"frames={cfg.frames}: {cfg.model} has max_frames={fmt.max_frames}")
    start = copy.deepcopy(model).requires_grad_(False)
    sampling = (trained.get("sampling") or {}) | {"text_top_k": 0, "text_top_p": 1.0}
    if any(top_k < math.inf for _, top_k, _ in Sampler([], **sampling).kinds()[:2]):
        raise InputError(f"{cfg.model}: `sampling` in its config.json draws the text greedily")
    files = {"train": cfg.segments, "validation": cfg.val_segments}
    dialogues = {split: load_dialogues(cfg.data, split) for split in files}
    train.check_data(cfg, model, fmt, trained, dialogues)
    scenes = {split: read_scenes(files[split], split, dialogues[split], fmt, cfg.axes.split())
              for split in files}
    decisions, classes = text_ids(tokenizer, model.backbone.vocab_size, device)
    judge = load_chat_model(cfg.judge) if cfg.judge else None
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, (0.9, 0.95), weight_decay=0.0)
    run = Run(cfg, rank, world, device, model, start, tokenizer, fmt, trained, dialogues, scenes,
              sampling, decisions, classes, judge, optimizer, train.in_bf16(cfg, device))
    return take_up(run) if cfg.resume else run


def take_up(run):
    """The run where out/state.pt was written."""
    state = train.read_state(run.cfg, run.device, MAY_CHANGE, "model")
    if state.get("made_of", now := fingerprints(run.cfg, *FILES)) != now:
        raise InputError(f"{run.cfg.out} began with another {' or '.join(FILES)}; give a new out=")
    if run.rank == 0:
        train.remove_leftovers(run.cfg.out)
        if (before := state.get("world", run.world)) != run.world:
            print(f"note: {before} processes before, {run.world} now", flush=True)
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    for key in ("step", "best", "spread", "log"):
        setattr(run, key, state[key])
    return run


def main(argv):
    run = setup(load_settings(Config, argv))
    make_folder(run.cfg.out)
    loop(run)
    if run.world > 1:
        train.end(0)


if __name__ == "__main__":
    train.run_script(main, "reinforce.py")
