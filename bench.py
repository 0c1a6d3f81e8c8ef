"""How fast is it on this machine, and how fast could it be? On random weights and dialogues.

    python bench.py [hidden=384 layers=6 vocab=8192 codebook_size=4032 prompt=160 frames=800 batch=4
        parts="training generation codec live long"]
    python bench.py parts=training backbone=configs/llama-3.2-1b prompt=300 frames=2048 batch=1 \\
        accumulation=8 budget_gb=40              # does the paper's training fit a GPU of 40 GB?

Beside every figure stands its floor: what the work would take if nothing but its matrix products
had to be computed, or its weights to be read, at the speeds of a large matrix product and of a sum
over a large tensor that are timed in the same run; and the share of that which is reached.

Without a GPU, the peak of memory in training is computed, not measured: the same step on tensors
without storage (PyTorch's FakeTensor), whose sizes are added up.
"""
import sys
import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import train
from codec import load_codec
from config import InputError, hub_problem, keep_memory, load_settings, most_memory, use_threads
from data import EXTRA_TOKENS, FRAME_RATE, StreamFormat
from generate import Conversation, Sampler, read_prefix
from model import FActor, load_checkpoint

GB = 1e9
PARTS = ("training", "generation", "codec", "live", "long")


@dataclass
class Config:
    parts: str = "training generation codec live"
    seconds: float = 5.0  # that each figure is measured for
    threads: int = 1  # on a CPU; 0: its cores less the load at the start, at least one
    # the model: `backbone` (folder or hub id, of which config.json is read) or a Llama so large
    backbone: str = ""
    hidden: int = 384
    layers: int = 6
    heads: int = 6
    intermediate: int = 1024
    vocab: int = 8192
    codebooks: int = 4  # of the codec
    codebook_size: int = 4032
    speaker_numbers: int = 192  # of the speaker encoder
    # the work
    prompt: int = 160  # tokens
    frames: int = 800
    batch: int = 4  # training: dialogues of a forward pass
    accumulation: int = 1  # training: forward passes of a step
    checkpointing: bool = False  # training: compute activations again
    compile: bool = False  # training: by torch.compile
    pairs: str = "1 8 64"  # generation: dialogues at a time, two rows each
    long: int = 10_000  # part long, which is only done when it is asked for: frames
    # parts codec, live and long
    model: str = "default/model"
    codec: str = "default/codec.safetensors"
    # the planned training
    budget_gb: float = 40.0
    gpus: int = 4
    steps: int = 100_000


@dataclass
class Machine:
    """What a device can do: products in FLOP/s, reads in bytes/s."""
    device: torch.device
    dtype: torch.dtype  # of products: bfloat16 on a GPU, float32 on a CPU
    name: str
    products: float = 0.0
    reads: float = 0.0

    def time(self, function, seconds):
        """Seconds that each call of function() takes, a sorted list; called for `seconds`, at least
        three times after one that is not counted."""
        function()
        self.wait()
        found, end = [], time.perf_counter() + seconds
        while len(found) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            function()
            self.wait()
            found.append(time.perf_counter() - start)
        return sorted(found)

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def floor(self, flops, read):
        """Seconds that work takes at least: FLOPs of its products, bytes of what it has to read."""
        return max(flops / self.products, read / self.reads)


def this_machine(cfg):
    """The GPU, if there is one, else the CPU, with its two speeds measured."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        machine = Machine(torch.device("cuda"), torch.bfloat16, torch.cuda.get_device_name())
        size = 8192
    else:
        use_threads(cfg.threads)
        keep_memory()  # as in training
        threads = torch.get_num_threads()
        machine = Machine(torch.device("cpu"), torch.float32, f"CPU, {threads} thread(s)")
        size = 2048
    a, b = torch.randn(2, size, size, device=machine.device, dtype=machine.dtype)
    machine.products = 2 * size ** 3 / machine.time(lambda: a @ b, cfg.seconds / 5)[0]
    numbers = torch.ones(2 ** 26, device=machine.device)  # 268 MB
    machine.reads = 4 * len(numbers) / machine.time(numbers.sum, cfg.seconds / 5)[0]
    return machine


def show(what, found, floor, unit, text=""):
    """A line of the table. found, floor: in `unit`, higher is better."""
    print(f"{what:40s} {found:10,.1f} {unit:16s} floor {floor:10,.1f}  {found / floor:4.0%}  "
          f"{text}", flush=True)


# ---- the model ----


def backbone_config(cfg):
    """Of the backbone, from its config.json or the sizes; with room for the extra tokens."""
    if cfg.backbone:
        try:
            config = AutoConfig.from_pretrained(cfg.backbone)
        except Exception as e:  # no network, gated, no such folder ...
            raise InputError(f"backbone={cfg.backbone}: its config.json cannot be read: "
                             f"{hub_problem(e)}; configs/llama-3.2-1b has the paper's") from e
    else:
        config = LlamaConfig(
            vocab_size=cfg.vocab, hidden_size=cfg.hidden, num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.heads, num_key_value_heads=cfg.heads,
            intermediate_size=cfg.intermediate, max_position_embeddings=8192,
            tie_word_embeddings=True)
    config.vocab_size += len(EXTRA_TOKENS)
    return config


def random_model(cfg, config):
    backbone = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return FActor(backbone, cfg.codebooks, cfg.codebook_size, cfg.speaker_numbers)


def weights(model):
    """(of the layers, of the text head, of the audio head): numbers that a position multiplies."""
    layers = sum(p.numel() for p in model.backbone.base_model.layers.parameters())
    return (layers, model.backbone.get_output_embeddings().weight.numel(),
            model.dsu_head.weight.numel())


# ---- training ----


def random_batch(cfg, vocabulary):
    """What data.collate returns for `batch` dialogues of `frames` frames and equal prompts."""
    size, frames = cfg.batch, cfg.frames + 3  # the paper's delay of 2, and the end
    return {"prompt": torch.randint(vocabulary, (size, cfg.prompt)), "prompt_mask": None,
            "audio": torch.randint(cfg.codebook_size, (size, 2 * cfg.codebooks, frames)),
            "text": torch.randint(vocabulary, (size, frames)),
            "frame_mask": torch.ones(size, frames, dtype=torch.bool),
            "speaker": torch.randn(size, cfg.speaker_numbers)}


def training_flops(model, batch):
    """FLOPs of one forward and backward pass: two for each weight and position in the forward pass,
    twice that in the backward pass; and attention's two products, each of every position with those
    before it."""
    frames = batch["text"].numel()
    length = batch["prompt"].shape[1] + batch["text"].shape[1]  # of a dialogue
    layers, text, audio = weights(model)
    config = model.backbone.config
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size
                                                 // config.num_attention_heads)
    pairs = len(batch["text"]) * length * (length + 1) / 2
    attention = 2 * 2 * width * config.num_hidden_layers * pairs
    positions = len(batch["text"]) * length
    return 3 * (2 * layers * positions + 2 * (text + audio) * frames + attention)


def computed_memory(cfg, config):
    """Bytes at the peak of a later step (AdamW's averages and the gradients of the passes before
    are there), by kind, from tensors without storage."""
    settings = train.Config()
    with FakeTensorMode():
        model, batch = random_model(cfg, config).train(), random_batch(cfg, config.vocab_size)
        if cfg.checkpointing:
            model.recompute_activations()
        optimizers = train.make_optimizers(model, settings)
        train.train_step(model, optimizers, [batch], settings, True)
        train.losses_of(model, batch, settings, True)["loss"].backward()
        tracker = MemTracker()
        tensors = [value for value in batch.values() if value is not None]
        tracker.track_external(model, *optimizers, *tensors)
        with tracker:
            train.train_step(model, optimizers, [batch], settings, True)
    peak = Counter()
    for sizes in tracker.get_tracker_snapshot("peak").values():
        peak.update({getattr(kind, "value", kind): size for kind, size in sizes.items()})
    return peak


def bench_training(cfg, config, machine):
    settings, on_gpu = train.Config(), machine.device.type == "cuda"
    with machine.device:
        model, batch = random_model(cfg, config).train(), random_batch(cfg, config.vocab_size)
    if cfg.checkpointing:
        model.recompute_activations()
    if cfg.compile:
        model.compile()
    optimizers = train.make_optimizers(model, settings)

    def step():
        train.train_step(model, optimizers, [batch] * cfg.accumulation, settings, on_gpu)
    step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    found = machine.time(step, cfg.seconds)
    seconds = found[len(found) // 2]
    length = cfg.prompt + batch["text"].shape[1]
    positions = cfg.batch * cfg.accumulation * length
    floor = cfg.accumulation * training_flops(model, batch) / machine.products
    show(f"training, {cfg.batch} x {length} positions", positions / seconds, positions / floor,
         "positions/s", f"{cfg.batch * cfg.accumulation * cfg.frames / seconds:,.0f} frames/s")
    if on_gpu:
        peak, how = torch.cuda.max_memory_allocated(), "measured"
    else:
        peak, how = computed_memory(cfg, config)["Total"], "computed for bfloat16, not measured"
    fits = "fits" if peak < cfg.budget_gb * GB else "does not fit"
    print(f"  peak memory {peak / GB:.1f} GB ({how}): {fits} {cfg.budget_gb:.0f} GB")
    print(f"  {cfg.steps} such steps on each of {cfg.gpus} devices like this one take "
          f"{cfg.steps * seconds / 3600:.0f} h, without what they tell each other")


# ---- generation ----


class Ids:
    """In a tokenizer's place: every text is `length` ids; the extra tokens are the last ones."""

    def __init__(self, length, vocabulary):
        self.length, self.vocabulary, self.eos_token_id = length, vocabulary, 0
        self.extra = {token: vocabulary - 1 - i for i, token in enumerate(EXTRA_TOKENS)}

    def __len__(self):
        return self.vocabulary

    def encode(self, text, add_special_tokens):
        return list(range(1, 1 + self.length))

    def convert_tokens_to_ids(self, tokens):
        return self.extra[tokens] if isinstance(tokens, str) else [self.extra[t] for t in tokens]


def step_floor(model, rows, context, machine):
    """Seconds of a generated frame for `rows` rows at least: its products, or reading the weights
    and the cached keys and values of `context` positions. The audio head's user half is unused."""
    layers, text, audio = weights(model)
    config = model.backbone.config
    width = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * width * context * rows
    used = layers + text + audio // 2
    flops = 2 * used * rows + 2 * cached * config.num_attention_heads / config.num_key_value_heads
    memory = cached * model.dsu_head.weight.element_size()
    return machine.floor(flops, 2 * used + memory)  # weights are in 16 bits: generate.linear


def talkers(model, tokenizer, fmt, rows, prompt, speaker_size):
    """A Conversation in which `rows` rows have just begun."""
    prefix = read_prefix(model, tokenizer, [prompt] * rows, torch.randn(rows, speaker_size))
    batch = Conversation(model, tokenizer, fmt, rows, prefix.mask.shape[1], may_end=False)
    batch.join(prefix, Sampler(list(range(rows))))
    return batch


def looked_at(batch):
    """Cached positions of the median frame: it is the one in the middle, for frames look at ever
    more until the ring of memory is full."""
    memory = batch.memory
    return memory.prefix_size + min(memory.ages[0] // 2, memory.frames)


def bench_generation(cfg, config, machine):
    torch.manual_seed(0)
    model = random_model(cfg, config).to(machine.device, machine.dtype).eval()
    for weight in model.parameters():  # as checkpoints are stored
        weight.data = weight.data.bfloat16().to(machine.dtype)
    tokenizer = Ids(cfg.prompt, config.vocab_size)
    fmt = StreamFormat(max_frames=cfg.frames, codebook_size=cfg.codebook_size)
    for pairs in map(int, cfg.pairs.split()):
        batch = talkers(model, tokenizer, fmt, 2 * pairs, "", cfg.speaker_numbers)

        def step(batch=batch, size=(pairs, 2)):
            batch.step(batch.said.unflatten(0, size).flip(1).flatten(0, 1))  # each hears the other
        found = machine.time(step, cfg.seconds)
        floor = step_floor(model, 2 * pairs, looked_at(batch), machine)
        median = found[len(found) // 2]
        show(f"generation, {pairs} dialogue(s)", pairs / median, pairs / floor, "frames/s in sum",
             f"{1e3 * median:.1f} ms a frame")


# ---- the codec, and a live frame ----


def codec_flops(codec, machine, frames=50):
    """FLOPs of products and convolutions a frame: (to encode, to decode)."""
    audio = torch.zeros(1, frames * codec.samples_per_frame, device=machine.device)
    with FlopCounterMode(display=False) as encoding:
        codes, _ = codec.encode(audio)
    with FlopCounterMode(display=False) as decoding:
        codec.decode(codes)
    return encoding.get_total_flops() / frames, decoding.get_total_flops() / frames


@torch.no_grad()
def bench_codec(cfg, codec, machine):
    frames, size = 125, codec.samples_per_frame  # ten seconds
    audio = 0.1 * torch.randn(1, frames * size, device=machine.device)
    codes, _ = codec.encode(audio)
    stream = codec.streaming()
    chunks, columns = audio.split(size, 1), codes.split(1, 2)

    def whole(function, whole_input):
        return machine.time(lambda: function(whole_input), cfg.seconds / 2)[0]

    def streamed(function, pieces):
        def all_of_them():
            for piece in pieces:
                function(piece)
        return machine.time(all_of_them, cfg.seconds / 2)[0]
    flops = codec_flops(codec, machine)
    seconds = frames / FRAME_RATE
    for name, a_frame, function, together, one_by_one, streaming in (
            ("encode", flops[0], codec.encode, audio, chunks, stream.encode),
            ("decode", flops[1], codec.decode, codes, columns, stream.decode)):
        floor = seconds / (frames * a_frame / machine.products)
        show(f"codec, {name}", seconds / whole(function, together), floor, "x real time")
        show(f"codec, {name}, frame by frame", seconds / streamed(streaming, one_by_one), floor,
             "x real time")


@torch.no_grad()
def bench_live(cfg, codec, machine):
    """One frame as a live server makes it: encode what was heard, step, decode what is said."""
    model, tokenizer, fmt, _ = load_checkpoint(cfg.model, machine.device, machine.dtype)
    made_for = model.num_codebooks, model.codebook_size
    if made_for != (codec.num_codebooks, codec.codebook_size):
        raise InputError(f"model={cfg.model} is made for {made_for[0]} codebooks of {made_for[1]} "
                         f"codes, {cfg.codec} has {codec.num_codebooks} of {codec.codebook_size}")
    prompt = " ".join(["word"] * cfg.prompt)
    batch = talkers(model, tokenizer, fmt, 1, prompt, model.speaker_size)
    heard, spoken = codec.streaming(), codec.streaming()
    chunk = 0.1 * torch.randn(1, codec.samples_per_frame, device=machine.device)
    silence = codec.encode(chunk)[0][:, :, 0]  # (1, K), until the encoder gives its first frame

    def frame():
        codes = heard.encode(chunk)  # (1, K, T), T = 0 while it looks ahead
        said, _ = batch.step(codes[:, :, -1] if codes.shape[2] else silence)
        spoken.decode(said.clamp(max=codec.codebook_size - 1)[:, :, None]).cpu()
    found = machine.time(frame, max(cfg.seconds, 10))
    flops = sum(codec_flops(codec, machine)) / machine.products
    floor = flops + step_floor(model, 1, looked_at(batch), machine)
    median, late = found[len(found) // 2], found[len(found) * 99 // 100]
    show("live: encode, step and decode a frame", 1 / median, 1 / floor, "frames/s",
         f"median {1e3 * median:.1f} ms, 99th percentile {1e3 * late:.1f} ms, floor "
         f"{1e3 * floor:.1f} ms, of {len(found)} frames")


def bench_long(cfg, machine):
    """Two instances of the shipped model that talk on and on: does a late frame cost more?"""
    model, tokenizer, fmt, _ = load_checkpoint(cfg.model, machine.device, machine.dtype)
    batch = talkers(model, tokenizer, fmt, 2, "word", model.speaker_size)
    seconds, memory = [], []
    for _ in range(cfg.long):
        start = time.perf_counter()
        batch.step(batch.said.flip(0))
        machine.wait()
        seconds.append(time.perf_counter() - start)
        memory.append(peak_memory(machine))
    tenth = cfg.long // 10
    for begin in (tenth // 2, cfg.long // 2, cfg.long - tenth):
        part = sorted(seconds[begin:begin + tenth])
        print(f"frames {begin} to {begin + tenth}: median {1e3 * part[tenth // 2]:.2f} ms, peak "
              f"memory {memory[begin + tenth - 1] / GB:.3f} GB", flush=True)


def peak_memory(machine):
    """Bytes that this process has held at most: on the GPU, or on a CPU in all."""
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return most_memory()


def main(argv):
    cfg = load_settings(Config, argv)
    parts = cfg.parts.split()
    if unknown := [part for part in parts if part not in PARTS]:
        raise InputError(f"parts: there is no {unknown[0]}; use {', '.join(PARTS)}")
    if small := [key for key, value in vars(cfg).items()
                 if type(value) in (int, float) and value <= (-1 if key == "threads" else 0)]:
        raise InputError(f"{small[0]}={getattr(cfg, small[0])}: must be more")
    if not cfg.pairs.split() or not all(n.isdecimal() and int(n) for n in cfg.pairs.split()):
        raise InputError(f"pairs={cfg.pairs}: give numbers of dialogues, as 1 8 64")
    if cfg.long < 10:
        raise InputError(f"long={cfg.long}: must be 10 or more, since tenths are compared")
    if not cfg.backbone and cfg.hidden % (2 * cfg.heads):
        raise InputError(f"hidden={cfg.hidden}: must be an even multiple of heads={cfg.heads}")
    config = backbone_config(cfg)
    machine = this_machine(cfg)
    print(f"{machine.name}: a matrix product in {machine.dtype} {machine.products / 1e9:,.0f} "
          f"GFLOP/s, reading {machine.reads / GB:,.1f} GB/s")
    if "training" in parts:
        bench_training(cfg, config, machine)
    if "generation" in parts:
        bench_generation(cfg, config, machine)
    if "long" in parts:
        bench_long(cfg, machine)
    if "codec" in parts or "live" in parts:
        codec = load_codec(cfg.codec).to(machine.device)
        if "codec" in parts:
            bench_codec(cfg, codec, machine)
        if "live" in parts:
            bench_live(cfg, codec, machine)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as e:
        sys.exit(f"bench.py: {e}")
