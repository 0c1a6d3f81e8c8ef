"""Does a training config fit the GPU, and how long does it take? On random weights and random dialogues of full length.

    python memory.py configs/factor.yaml backbone=configs/llama-3.2-1b [budget_gb=40] [checkpointing=true]

With a GPU: `measured` steps of training; prints frames and positions a second, the peak of memory, and the hours of `steps`
steps. Without: the same forward pass, backward pass and optimiser step on tensors without storage (PyTorch's FakeTensor),
whose sizes are added up: the peak is then computed, and said to be.
"""
import sys
import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, AutoModelForCausalLM

import train
from config import InputError, hub_problem, load_settings
from data import EXTRA_TOKENS
from model import FActor

GB = 1e9


@dataclass
class Config(train.Config):
    backbone: str = "configs/llama-3.2-1b"  # folder or hub id; only its config.json is read
    codebooks: int = 4  # of the codec
    speaker_numbers: int = 192  # of the speaker encoder
    prompt_tokens: int = 300
    measured: int = 10  # steps, after two that are not counted
    budget_gb: float = 40.0
    gpus: int = 4  # of the planned run


def random_model(cfg, config):
    """An FActor with random weights, whose text vocabulary holds the extra tokens."""
    config.vocab_size += len(EXTRA_TOKENS)
    backbone = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = FActor(backbone, cfg.codebooks, cfg.codebook_size, cfg.speaker_numbers if cfg.speaker_embedding else 0)
    if cfg.checkpointing:
        model.recompute_activations()
    return model.train()


def random_batch(cfg, vocabulary):
    """What data.collate returns for `batch_size` dialogues of max_frames frames, all of the same prompt length."""
    size, frames = cfg.batch_size, cfg.max_frames + cfg.delay + 1
    return {"prompt": torch.randint(vocabulary, (size, cfg.prompt_tokens)), "prompt_mask": None,
            "audio": torch.randint(cfg.codebook_size, (size, 2 * cfg.codebooks, frames)),
            "text": torch.randint(vocabulary, (size, frames)),
            "frame_mask": torch.ones(size, frames, dtype=torch.bool), "speaker": torch.randn(size, cfg.speaker_numbers)}


def measure(cfg, config):
    """Train on this GPU. Returns (peak of allocated bytes, seconds a step)."""
    torch.cuda.set_device(0)
    torch.set_float32_matmul_precision("high")
    with torch.device("cuda"):
        model, batch = random_model(cfg, config), random_batch(cfg, config.vocab_size)
    optimizer = train.make_optimizer(model, cfg)
    for step in range(2 + cfg.measured):
        if step == 2:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            began = time.time()
        train.train_step(model, optimizer, [batch] * cfg.accumulation, cfg, torch.cuda.is_bf16_supported())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), (time.time() - began) / cfg.measured


def compute(cfg, config):
    """Bytes at the peak of a later pass (AdamW's averages and the gradients of the passes before are there), by kind, from
    tensors without storage."""
    with FakeTensorMode():
        model, batch = random_model(cfg, config), random_batch(cfg, config.vocab_size)
        optimizer = train.make_optimizer(model, cfg)
        train.train_step(model, optimizer, [batch], cfg, True)
        train.losses_of(model, batch, cfg, True)["loss"].backward()
        tracker = MemTracker()
        tracker.track_external(model, optimizer, *(value for value in batch.values() if value is not None))
        with tracker:
            train.train_step(model, optimizer, [batch], cfg, True)
    peak = Counter()
    for sizes in tracker.get_tracker_snapshot("peak").values():
        peak.update({getattr(kind, "value", kind): size for kind, size in sizes.items()})
    return peak


def main(argv):
    cfg = load_settings(Config, argv)
    try:
        config = AutoConfig.from_pretrained(cfg.backbone)
    except Exception as e:  # no network, gated, no such folder ...
        raise InputError(f"backbone={cfg.backbone}: its config.json cannot be read: {hub_problem(e)}; configs/llama-3.2-1b has "
                         "the paper's") from e
    positions = cfg.max_frames + cfg.delay + cfg.prompt_tokens + cfg.speaker_embedding
    print(f"{cfg.backbone}: {cfg.batch_size} x {positions} positions ({cfg.max_frames} frames + {cfg.delay} of delay, a prompt "
          f"of {cfg.prompt_tokens} tokens), checkpointing={cfg.checkpointing}")
    if torch.cuda.is_available():
        peak, seconds = measure(cfg, config)
        tokens = cfg.accumulation * cfg.batch_size * positions / seconds
        hours = cfg.steps * seconds / 3600
        print(f"measured on one {torch.cuda.get_device_name()}: {tokens:.0f} positions/s, {seconds:.2f} s a step of "
              f"{cfg.accumulation} x {cfg.batch_size} dialogues; {cfg.steps} steps of {cfg.gpus} x {cfg.accumulation} x "
              f"{cfg.batch_size} dialogues take {hours:.0f} h on {cfg.gpus} of them (without what they tell each other), "
              f"{hours * cfg.gpus:.0f} h on one")
    else:
        sizes = compute(cfg, config)
        peak = sizes.pop("Total")
        print("computed, not measured (no GPU here): " + ", ".join(f"{kind} {size / GB:.1f} GB"
                                                                   for kind, size in sizes.most_common() if size >= 5e7))
    print(f"peak memory {peak / GB:.1f} GB: {'fits' if peak < cfg.budget_gb * GB else 'does not fit'} {cfg.budget_gb:.0f} GB")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as e:
        sys.exit(f"memory.py: {e}")
