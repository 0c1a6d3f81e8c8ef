"""Two instances of F-Actor talking to each other (paper section 5.1), or one answering a recording.

    python generate.py                              a prompt of the test set, to out/
    python generate.py n=20 first=5 batch=10        twenty of them, ten at a time
    python generate.py --prompts FILE.json          own prompts (README.md shows the form)
    python generate.py --user FILE.wav              the other speaker is a recording
    python generate.py --user DIR                   answers every input.wav below DIR in output.wav
    torchrun --nproc_per_node=4 generate.py n=20    the dialogues split over processes, same files

Writes per dialogue a stereo NAME.wav, NAME.json (prompts, settings, texts with times, codes) and
NAME.png (timeline).

The file in reading order: how ids are drawn (Sampler, Draws), what the rows of a batch remember
(Memory, decode_frame), the two together as a running batch (Conversation), a dialogue from its
prompts to its codes (converse, talk), and what the command does with it.
"""
import functools
import glob
import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import DynamicCache

from codec import (
    decode_in_pieces,
    encode_in_pieces,
    fingerprint,
    fingerprints,
    load_codec,
    read_audio,
    resample,
    set_level,
    write_audio,
)
from config import (
    InputError,
    load_settings,
    make_folder,
    read_json,
    use_threads,
    write_atomically,
    write_json,
)
from data import (
    BC,
    COUNTED,
    EXTRA_TOKENS,
    FRAME_RATE,
    INTER,
    SILENCE_PAD,
    WORD_PAD,
    are_numbers,
    check_prompt,
    decision_ids,
    dialogue_name,
    is_number,
    load_dialogues,
    made_with,
    make_prompt,
    mark_kind,
    pad_left,
    prompt_parts,
)
from model import load_checkpoint
from turns import label_segments, merge_words

matplotlib.use("Agg")
matplotlib.rcParams["text.parse_math"] = False  # a name may hold $
import matplotlib.pyplot as plt  # noqa: E402  the backend has to be chosen first

LOOK = 16  # frames between two looks at which dialogues are over, where a look waits for the GPU
ANSWER_RATE = 16000  # Hz, of the answers to a folder of recordings
LLAMA_LIKE = ("llama", "mistral", "qwen2")  # what decode_frame knows; all three are one structure


@dataclass
class Config:
    model: str = "default/model"  # checkpoint folder or hub id
    codec: str = "default/codec.safetensors"
    out: str = "out"
    # what they talk about: own prompts, or those of a data set's split
    prompts: str = ""  # JSON file with a list of pairs
    voices: str = "default/data/voices.json"  # voice name -> speaker embedding, for own prompts
    data: str = "default/data"
    split: str = "test"
    first: int = 0  # the first dialogue taken
    n: int = 0  # how many; 0: one of a data set, all from `first` on of prompts
    batch: int = 8  # dialogues made at a time
    # a recording as the other speaker
    user: str = ""  # file, or folder of Full-Duplex-Bench's layout
    user_channel: int = -1  # which channel of it, if it has several
    level: float = -20.0  # dB of full scale that its speech is brought to; 0: as it is
    listen: float = 4.0  # seconds that the model may go on speaking after the recording's end
    # sampling; -1: as the checkpoint says, else the paper's (table 5: temperature 0.9, top-k 40)
    temperature: float = -1.0  # of all three that follow; 0: greedy
    decision_temperature: float = -1.0  # what the text does: which pad, which mark, or a word
    word_temperature: float = -1.0  # which word, where it is one
    audio_temperature: float = -1.0
    top_k: int = -1  # of text and audio; 0: all
    text_top_k: int = -1
    audio_top_k: int = -1
    top_p: float = -1.0  # of text and audio
    text_top_p: float = -1.0
    audio_top_p: float = -1.0
    max_frames: int = 0  # limit for two instances; 0: the checkpoint's; a recording is heard out
    may_end: bool = True  # whether two instances may end it before
    seed: int = 1  # dialogue i of a run uses seed + i, whatever the batch
    resume: bool = False  # keep the dialogues already in `out`, if made in the same way


# ---- how ids are drawn ----


@dataclass
class Sampler:
    """How the ids of some dialogues are drawn, and from which seeds.

    The paper has one temperature (0.9, top-k 40: table 5). Here the text is drawn in two steps,
    each with its own: the *decision* (which pad, which mark, the end, or a word), then, if it is a
    word, *which*. Events are rare, so a low temperature makes them vanish; words break at a high
    one. With equal temperatures (and top_p 1) the two steps are one draw, the paper's.

    seeds: one a dialogue; its rows draw apart from each other. None: as temperature, top_k, top_p.
    temperature 0 is greedy, top_k 0 takes all ids. Raises InputError outside these ranges.
    """
    seeds: list
    temperature: float = 0.9
    top_k: int = 40
    top_p: float = 1.0
    decision_temperature: float | None = None
    word_temperature: float | None = None
    audio_temperature: float | None = None
    text_top_k: int | None = None
    audio_top_k: int | None = None
    text_top_p: float | None = None
    audio_top_p: float | None = None

    def kinds(self):
        """[decision, word, audio], each as [temperature, top_k, top_p], top_k inf for all."""
        def own(name, common):
            value = getattr(self, f"{name}_{common}")
            return getattr(self, common) if value is None else value
        rows = [[own(kind, "temperature"), own(stream, "top_k"), own(stream, "top_p")]
                for kind, stream in (("decision", "text"), ("word", "text"), ("audio", "audio"))]
        for row in rows:
            temperature, top_k, top_p = row
            if not (0 <= temperature < math.inf and top_k >= 0 and 0 < top_p <= 1):
                raise InputError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: a "
                                 "temperature and a top_k are 0 or more, a top_p is in (0, 1]")
            # greedy: of the best id alone, at whatever temperature
            row[:] = [temperature, top_k or math.inf, top_p] if temperature else [1, 1, 1]
        return rows


def sampling_of(cfg, trained):
    """The keywords of Sampler that are not the paper's: the checkpoint's (key `sampling` of its
    config, the dict `trained`), then those of the settings `cfg` that are not -1. Raises InputError
    for a keyword that Sampler has not."""
    names = [name for name in Sampler.__dataclass_fields__ if name != "seeds"]
    asked = {name: getattr(cfg, name) for name in names if getattr(cfg, name) != -1}
    stored = trained.get("sampling") or {}
    if unknown := set(stored) - set(names):
        raise InputError(f"the checkpoint's config.json: `sampling` has {sorted(unknown)}; known "
                         f"are {', '.join(names)}")
    for name, value in stored.items():
        if value is not None and not is_number(value):
            raise InputError(f"the checkpoint's config.json: `sampling` has {name}={value!r}, "
                             "must be a number")
    # temperature=1 on the command line means all temperatures, also where the checkpoint has three
    kept = {name: value for name, value in stored.items()
            if not any(name.endswith(f"_{common}") for common in asked)}
    return kept | asked


def pick(scores, order, u, kind):
    """M candidates of each row, drawn by inverting the cumulative distribution in the order of ids,
    so that how many candidates the other rows need changes nothing.

    scores, order (B, M, N): of `candidates`; u (B, M): uniform numbers in [0, 1); kind (B, M or 1,
    3): temperature, top_k, top_p of each. Returns their indices (B, M) in N.
    """
    temperature, top_k, top_p = kind.split(1, 2)  # (B, M or 1, 1)
    rank = scores.isfinite().cumsum(-1) - 1  # among those that may be taken
    chance = (scores / temperature).masked_fill(rank >= top_k, -torch.inf).softmax(-1)
    # nucleus: what stands in front of an id is less than top_p; the best id is always in
    chance = torch.where(chance.cumsum(-1) - chance < top_p, chance, 0)
    sums = chance.gather(-1, order).cumsum(-1)
    index = (sums <= u[..., None] * sums[..., -1:]).sum(-1, keepdim=True)
    index = index.clamp(max=scores.shape[-1] - 1)  # where none may be taken: any, it is not used
    return order.gather(-1, index)[..., 0]


def most_needed(kinds):
    """How many candidates the settings [[temperature, top_k, top_p], ...] need; 0: all, unsorted,
    where none of them has a limit."""
    if all(top_k == math.inf and top_p == 1 for _, top_k, top_p in kinds):
        return 0
    return min(max(top_k for _, top_k, _ in kinds), 2 ** 30)


def candidates(logits, most):
    """The `most` best of logits (..., V), best first: (logits, ids, places in the order of ids).
    0: all of them, unsorted."""
    if most:
        scores, ids = logits.float().topk(min(most, logits.shape[-1]))
        return scores, ids, ids.argsort(-1)
    ids = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    return logits.float(), ids, ids


def events_left(tokenizer, fmt, size):
    """How many backchannels and interruptions are still to come after each of `size` text ids, as
    marks that count down say: (V, 2), -1 where the id says nothing of it."""
    left = torch.full((size, 2), -1)
    if fmt.behaviour_tokens == "count_down":
        for kind, mark in enumerate((BC, INTER)):
            ids = tokenizer.convert_tokens_to_ids(COUNTED[mark])
            left[ids, kind] = torch.arange(len(ids))  # the first one says that it is the last event
    return left


class Draws:
    """Draws the ids of B rows, each with settings and random numbers of its own, so that a row's
    ids do not depend on its batch.

    A frame of a row takes 2 + K uniform numbers (decision, word, audio) of the row's generator,
    which are drawn for BLOCK frames at a time.
    """
    BLOCK = 64

    def __init__(self, decisions, codebooks, size):
        """decisions (V,): which text ids are decisions, not words; size: most rows."""
        self.decisions, device = decisions, decisions.device
        self.kinds = torch.ones(size, 3, 3, device=device)  # [decision, word, audio], as of Sampler
        self.noise = torch.zeros(size, self.BLOCK, 2 + codebooks, device=device)
        self.generators, self.asked = [], []  # of each row; what is asked: Sampler.kinds()

    def join(self, sampler, count):
        """`count` rows more, count / len(seeds) of each dialogue."""
        kinds, begin = sampler.kinds(), len(self.generators)
        self.kinds[begin:begin + count] = torch.tensor(kinds)
        sides = count // len(sampler.seeds)
        for seed in sampler.seeds:
            for side in range(sides):
                self.generators.append(torch.Generator().manual_seed(2 * seed + side))
                self.asked.append(kinds)
        self._count_candidates()

    def leave(self, row):
        """The last row takes the place of `row`."""
        last = len(self.generators) - 1
        for values in (self.kinds, self.noise):
            values[row] = values[last]
        for values in (self.generators, self.asked):
            values[row] = values[last]
            values.pop()
        self._count_candidates()

    def _count_candidates(self):
        self.text_most = most_needed([kind for asked in self.asked for kind in asked[:2]])
        self.audio_most = most_needed([asked[2] for asked in self.asked])

    def uniform(self, rows, ages, age):
        """rows: slice of the batch; ages, age: frames that each has made, as a list and (B,)."""
        for row in range(rows.start, rows.stop):
            if ages[row] % self.BLOCK == 0:
                noise = torch.rand(self.noise.shape[1:], generator=self.generators[row])
                self.noise[row] = noise.clamp(max=1 - 2 ** -20)  # rounding never reaches the end
        return self.noise[rows][torch.arange(len(age), device=age.device), age % self.BLOCK]

    def text(self, logits, u, rows):
        """logits (B, V), u (B, 2 + K) of `uniform` -> ids (B,)."""
        scores, ids, order = candidates(logits, self.text_most)
        decided = self.decisions[ids]  # (B, N)
        # not below the row's top_k, also where another row needs more candidates
        limit = self.kinds[rows, :2, 1].amax(1, keepdim=True)
        low = torch.arange(scores.shape[-1], device=scores.device) >= limit
        words = scores.masked_fill(decided | low, -torch.inf)
        both = torch.stack([scores, words], 1)  # (B, 2, N)
        drawn = pick(both, order[:, None].expand_as(both), u[:, :2], self.kinds[rows, :2])
        decision, word = ids.gather(1, drawn).unbind(1)
        return torch.where(self.decisions[decision], decision, word)

    def audio(self, logits, u, rows):
        """logits (B, K, C+2), u (B, 2 + K) of `uniform` -> ids (B, K)."""
        scores, ids, order = candidates(logits, self.audio_most)
        return ids.gather(2, pick(scores, order, u[:, 2:], self.kinds[rows, 2:])[..., None])[..., 0]


# ---- what the rows remember ----


@dataclass
class Place:
    """Where Memory keeps one frame of B rows, and what that frame looks at: S slots of each row."""
    rows: slice  # of the batch
    slots: torch.Tensor  # (B,), in each row
    near: tuple  # rotation for the ring, of Memory.rotation
    far: tuple | None  # rotation for the prefix; None where it is the same
    bias: torch.Tensor  # (B * kv_heads, S, 1): 0, or -inf where nothing is
    found: torch.Tensor  # (B * kv_heads, S): the slots' numbers among those of all rows and heads


class Memory:
    """Keys and values of B rows of different age, in tensors of a fixed size: the prefix, which
    stays, and a ring of the last R frames, in which a new frame takes the place of the oldest.

        slots of a row   [ prefix, P | frame R, frame 1, frame 2, ..., frame R-1 ]   at age R + 1

    Keys are stored as they stood when they came (rotated to their position), for attention sees
    only distances. For the ring these are at most R. The prefix would move away for ever, beyond
    what the model was trained on; so for the prefix alone the query stands where it would stand if
    only the R frames in the ring had been. While the ring is not full this is the plain model.
    """

    def __init__(self, backbone, size, prefix_size, frames, like):
        """like: a tensor with the device and type that are wanted."""
        config = backbone.config
        self.heads = config.num_key_value_heads
        self.dim = backbone.base_model.layers[0].self_attn.head_dim
        self.prefix_size, self.frames = prefix_size, frames
        shape = (size, self.heads, prefix_size + frames, self.dim)
        self.keys = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.values = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.bias = like.new_full((size, shape[2]), -torch.inf)  # 0 where something is
        self.lengths = torch.zeros(size, dtype=torch.long, device=like.device)  # of the prefixes
        self.age = torch.zeros_like(self.lengths)  # frames that each row has made
        self.ages = []  # the same on this side of the GPU, for the rows that are there
        rotary = backbone.base_model.rotary_emb
        # in double precision, since positions of a long conversation are large
        self.frequencies, self.scaling = rotary.inv_freq.double(), rotary.attention_scaling

    def join(self, prefix):
        """The rows of a Prefix, at the end."""
        begin, (count, width) = len(self.ages), prefix.mask.shape
        rows = slice(begin, begin + count)
        for mine, new in zip(self.keys + self.values, prefix.keys + prefix.values):
            mine[rows, :, :width] = new
        self.bias[rows] = -torch.inf
        self.bias[rows, :width].masked_fill_(prefix.mask, 0)
        self.lengths[rows], self.age[rows] = prefix.mask.sum(1), 0
        self.ages += [0] * count
        return rows

    def leave(self, row):
        """The last row takes the place of `row`."""
        last = len(self.ages) - 1
        for values in (*self.keys, *self.values, self.bias, self.lengths, self.age, self.ages):
            values[row] = values[last]
        self.ages.pop()

    def rotation(self, positions):
        """positions (B,) -> what `rotate` needs, two tensors (B, 1, dim)."""
        angles = positions[:, None, None].double() * self.frequencies
        cos, sin = angles.cos() * self.scaling, angles.sin() * self.scaling
        dtype = self.bias.dtype
        return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)

    def place(self, rows):
        """Makes room for one more frame of `rows` (a slice). Returns a Place."""
        age = self.age[rows]
        slots = self.prefix_size + age % self.frames
        self.bias[rows].scatter_(1, slots[:, None], 0)
        near = self.rotation(self.lengths[rows] + age)
        longest, far = max(self.ages[rows]), None
        if longest >= self.frames:
            far = self.rotation(self.lengths[rows] + age.clamp(max=self.frames - 1))
        used = self.prefix_size + min(longest + 1, self.frames)
        bias = self.bias[rows, None, :used].expand(-1, self.heads, -1).reshape(-1, used, 1)
        first = torch.arange(rows.start * self.heads, rows.stop * self.heads,
                             device=age.device) * self.bias.shape[1]
        found = first[:, None] + torch.arange(used, device=age.device)
        return Place(rows, slots, near, far, bias, found)

    def advance(self, rows):
        self.age[rows] += 1
        for row in range(rows.start, rows.stop):
            self.ages[row] += 1


def rotate(x, rotation):
    """Rotary position embedding: x (B, heads, dim), rotation of Memory.rotation."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attend(query, far_query, keys, values, place, prefix_size):
    """One frame's attention. query (B, heads, dim); far_query: the one for the prefix, or None;
    keys, values: of Memory; place: a Place. Returns (B, heads * dim)."""
    used, dim = place.bias.shape[1], query.shape[-1]
    near_keys = keys[place.rows, :, :used].flatten(0, 1)  # (B * kv_heads, S, dim)

    def scores(query, keys, bias):  # the heads that share keys are columns of one product
        query = query.reshape(len(keys), -1, dim).transpose(1, 2)
        return torch.baddbmm(bias, keys, query, alpha=dim ** -0.5)
    score = scores(query, near_keys, place.bias)  # (B * kv_heads, S, heads / kv_heads)
    if far_query is not None:
        score[:, :prefix_size] = scores(far_query, near_keys[:, :prefix_size],
                                        place.bias[:, :prefix_size])
    weights = score.transpose(1, 2).softmax(-1, dtype=torch.float32).to(values.dtype)
    return weighted_sum(weights, values, place).view(len(query), -1)


def weighted_sum(weights, values, place):
    """weights (B * kv_heads, heads / kv_heads, S); values: of Memory -> the sums of the values at
    the Place `place`, (B * heads, dim) in all."""
    if values.is_cuda:
        return weights @ values[place.rows, :, :weights.shape[2]].flatten(0, 1)
    # on a CPU a product of one row reads its matrix at half the speed of this
    found = place.found[:, None].expand_as(weights)
    return F.embedding_bag(found.flatten(0, 1), values.view(-1, values.shape[-1]), mode="sum",
                           per_sample_weights=weights.flatten(0, 1))


def linear(weight, bias=None):
    """The linear layer x (B, in) -> x weightᵀ + bias (B, out) as a function, for few rows.

    With few rows, a product on a CPU takes half the time if its weights are laid out in the order
    in which they are read. FBGEMM, torch's library for CPUs with AVX2, holds them as float16 too:
    two rows take half of that again. It is used where it loses nothing: for checkpoints stored in
    16 bits.
    """
    if weight.is_cuda:
        return functools.partial(F.linear, weight=weight, bias=bias)
    weight, bias = weight.float(), None if bias is None else bias.float()
    in_16_bits = (weight.half().float() - weight).abs().max() <= 1e-7
    if in_16_bits and "fbgemm" in torch.backends.quantized.supported_engines:
        packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x.float(), packed).to(x.dtype)
    if not torch.backends.mkldnn.is_available():
        return lambda x: F.linear(x.float(), weight, bias).to(x.dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)  # what torch.compile calls
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x: multiply(x.float(), packed, bias, "none", [], "").to(x.dtype)


def products(backbone):
    """The linear layers in each of the backbone's layers, [{name: function of `linear`}]. Those of
    one input are one product: qkv (B, (heads + 2 kv_heads) * dim), gate_up (B, 2 * intermediate).
    """
    def together(*modules):
        biases = [module.bias for module in modules if module.bias is not None]
        return linear(torch.cat([module.weight for module in modules]),
                      torch.cat(biases) if biases else None)
    found = []
    for layer in backbone.base_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        found.append({"qkv": together(attention.q_proj, attention.k_proj, attention.v_proj),
                      "out": together(attention.o_proj),
                      "gate_up": together(mlp.gate_proj, mlp.up_proj),
                      "down": together(mlp.down_proj)})
    return found


def decode_frame(backbone, matrices, x, memory, rows):
    """The backbone's forward pass for one frame of `rows` (a slice): transformers' for Llama, but
    keys and values are written to `memory` in place, and rows may differ in age.

    matrices: of `products`; x (B, hidden): the embedded frame -> (B, hidden).
    """
    def norm(module, x):
        return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
    place, network = memory.place(rows), backbone.base_model
    number = torch.arange(rows.start, rows.stop, device=x.device)
    for layer, matrix, keys, values in zip(network.layers, matrices, memory.keys, memory.values):
        h = norm(layer.input_layernorm, x)
        heads = matrix["qkv"](h).view(len(x), -1, memory.dim)
        to_turn, value = heads.tensor_split((-memory.heads,), 1)  # queries and keys; values
        query, key = rotate(to_turn, place.near).tensor_split((-memory.heads,), 1)
        keys[number, :, place.slots], values[number, :, place.slots] = key, value
        far_query = None
        if place.far is not None:
            far_query = rotate(to_turn[:, :-memory.heads], place.far)
        mixed = attend(query, far_query, keys, values, place, memory.prefix_size)
        x = x + matrix["out"](mixed)
        gate, up = matrix["gate_up"](norm(layer.post_attention_layernorm, x)).chunk(2, 1)
        x = x + matrix["down"](layer.mlp.act_fn(gate) * up)
    memory.advance(rows)
    return norm(network.norm, x)


# ---- a running batch ----


@dataclass
class Prefix:
    """N rows after their speaker vectors and prompts; kept, it can be joined again and again."""
    keys: list  # per layer (N, kv_heads, 1 + P, dim)
    values: list
    mask: torch.Tensor  # (N, 1 + P), False where a shorter prompt is padded
    hidden: torch.Tensor  # (N, hidden): of the last position, which predicts frame 0


@torch.no_grad()
def read_prefix(model, tokenizer, prompts, speakers):
    """prompts: N instruction texts; speakers: (N, S) embeddings -> Prefix.

    Raises InputError for a prompt longer than the model's positions.
    """
    device = model.dsu_head.weight.device
    ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    positions = model.backbone.config.max_position_embeddings
    if (longest := max(map(len, ids))) + 2 > positions:
        raise InputError(f"a prompt of {longest} tokens: the model has {positions} positions for "
                         "prompt and dialogue; shorten the narrative")
    prompt, mask = pad_left(ids, tokenizer.eos_token_id)
    prompt, mask = prompt.to(device), None if mask is None else mask.to(device)
    cache = DynamicCache()
    hidden = model(prompt=prompt, speaker=speakers.to(device), prompt_mask=mask, cache=cache)
    mask = torch.ones_like(prompt, dtype=torch.bool) if mask is None else mask
    mask = F.pad(mask, (hidden.shape[1] - mask.shape[1], 0), value=True)  # the speaker vector
    return Prefix([layer.keys for layer in cache.layers], [layer.values for layer in cache.layers],
                  mask, hidden[:, -1])


class Conversation:
    """A running batch: rows join, make a frame together at each step, and leave.

    A row is one instance of the model. What it gives does not depend on the others, whatever their
    prompts, ages and settings; but for the end of a talk of two, rows 2i and 2i + 1: neither draws
    the end id while a mark of either has announced events still to come (`count_down`), which the
    paper, without such marks, cannot know.
    """

    @torch.no_grad()
    def __init__(self, model, tokenizer, fmt, size, prefix_size, frames=0, may_end=True):
        """size: most rows; prefix_size: positions of the longest prefix, 1 + P; frames: how many
        frames back a row can look (0: as many as the model was trained on); may_end: whether the
        model may draw the end id, in talks of two. Raises InputError for a backbone that
        decode_frame does not know.
        """
        config, head = model.backbone.config, model.dsu_head
        if config.model_type not in LLAMA_LIKE:
            raise InputError(f"the backbone is a {config.model_type}; generation knows "
                             f"{', '.join(LLAMA_LIKE)}")
        trained = fmt.max_frames + fmt.delay
        room = max(1, config.max_position_embeddings - prefix_size)
        self.model, self.delay, self.may_end = model, fmt.delay, may_end
        frames = min(frames or trained, trained, room)
        self.memory = Memory(model.backbone, size, prefix_size, frames, like=head.weight)
        self.matrices = products(model.backbone)
        text_head = model.backbone.get_output_embeddings()
        self.text_head = linear(text_head.weight, text_head.bias)
        self.vocabulary = len(tokenizer)  # a padded backbone has ids beyond it, which are no tokens
        # the audio head's first half: who hears needs no other
        system = model.num_codebooks * (model.codebook_size + 2)
        self.audio_head = linear(head.weight[:system], head.bias[:system])
        decisions = decision_ids(tokenizer, len(text_head.weight)).to(head.weight.device)
        self.draws = Draws(decisions, model.num_codebooks, size)
        # the last frame of each row, which the next step reads
        self.text = torch.zeros(size, dtype=torch.long, device=head.weight.device)
        self.said = self.text[:, None].repeat(1, model.num_codebooks)
        self.announced = events_left(tokenizer, fmt, len(text_head.weight)).to(head.weight.device)
        self.left = torch.zeros_like(self.announced[:size])  # (size, 2), of each row

    def __len__(self):
        return len(self.memory.ages)

    @torch.no_grad()
    def join(self, prefix, sampler):
        """The rows of a Prefix join at the end. They make their `delay` frames without audio at
        once, so that every row of the batch is always at a frame with audio.

        sampler: a Sampler with a seed per dialogue; a dialogue's rows follow each other.
        Returns said (N, K), audio frame 0, and text (N, delay + 1), of all frames made so far.
        """
        rows = self.memory.join(prefix)
        self.draws.join(sampler, len(prefix.hidden))
        self.said[rows] = self.model.codebook_size  # the delay id
        self.left[rows] = 0
        hidden, text = prefix.hidden, []
        for _ in range(self.delay):
            self._draw(hidden, rows, audio=False)
            text.append(self.text[rows].clone())
            hidden = self._read(rows, self.said[rows])
        self._draw(hidden, rows)
        return self.said[rows].clone(), torch.stack([*text, self.text[rows]], 1)

    @torch.no_grad()
    def step(self, user_codes, waiting=()):
        """One frame of every row. user_codes (B, K): what each heard during its last frame.
        waiting: rows that make none this time and stay as they are; what comes back for them has
        no meaning. Returns said (B, K) and text (B,) of the next; text runs `delay` frames ahead.
        """
        rows, waiting = slice(0, len(self)), list(waiting)
        before = self.said[waiting], self.text[waiting]
        states = [self.draws.generators[row].get_state() for row in waiting]
        self._draw(self._read(rows, user_codes), rows)
        said, text = self.said[rows].clone(), self.text[rows].clone()
        self.said[waiting], self.text[waiting] = before
        self.memory.age[waiting] -= 1  # so that the next step writes over this one
        for row, state in zip(waiting, states):
            self.memory.ages[row] -= 1
            self.draws.generators[row].set_state(state)  # it may have drawn its next block
        return said, text

    def leave(self, row):
        """A row goes, and the last one takes its place."""
        last = len(self) - 1
        for kept in (self.said, self.text, self.left):
            kept[row] = kept[last]
        self.memory.leave(row)
        self.draws.leave(row)

    def _read(self, rows, user_codes):
        """The last frame of `rows`, with what they heard -> hidden (B, hidden), which predicts the
        next one."""
        audio = torch.cat([self.said[rows], user_codes], 1)[..., None]  # (B, 2K, 1)
        x = self.model.embed_frames(audio, self.text[rows, None])[:, 0]
        return decode_frame(self.model.backbone, self.matrices, x, self.memory, rows)

    def _draw(self, hidden, rows, audio=True):
        """The next frame of `rows` from hidden (B, hidden)."""
        memory, width = self.memory, self.model.codebook_size + 2
        u = self.draws.uniform(rows, memory.ages, memory.age[rows])
        logits = self.text_head(hidden)
        logits[:, self.vocabulary:] = -torch.inf
        self.text[rows] = self.draws.text(logits, u, rows)
        if self.may_end:
            left = self.announced[self.text[rows]]
            self.left[rows] = torch.where(left < 0, self.left[rows], left)
        if audio:
            logits = self.audio_head(hidden).view(len(hidden), -1, width)  # (B, K, C+2)
            logits[..., width - 2] = -torch.inf  # no delay id: it only stands in front of the audio
            if self.may_end:
                busy = self.left[rows].reshape(-1, 4).any(1)  # (B / 2,), both sides and kinds
                logits[busy.repeat_interleave(2), :, width - 1] = -torch.inf
            else:
                logits[..., width - 1] = -torch.inf
            self.said[rows] = self.draws.audio(logits, u, rows)


# ---- from prompts to codes ----


@torch.no_grad()
def converse(model, tokenizer, fmt, prompts, speakers, sampler, max_frames, user_codes=None,
             on_frame=None, may_end=True, bar=None):
    """Dialogues frame by frame (paper section 5.1), in one batch that each leaves when it is over.
    Arguments as of `talk`; may_end: whether the model may draw the end id; bar: a tqdm of the
    frames that have audio. Yields (i, [(codes, text ids) of each row]) when dialogue i is over."""
    sides, device = (2 if user_codes is None else 1), model.dsu_head.weight.device
    if user_codes is not None:
        heard = user_codes.movedim(-1, 0).to(device)  # (T, K) or (T, B, K)
        max_frames = len(heard) + fmt.delay
    frames = max(0, max_frames - fmt.delay)
    prefix = read_prefix(model, tokenizer, prompts, speakers)
    batch = Conversation(model, tokenizer, fmt, len(prompts), prefix.mask.shape[1], max_frames,
                         may_end=may_end and user_codes is None)
    said, begin = batch.join(prefix, sampler)
    codes = said.new_zeros(*said.shape, frames)  # (B, K, T)
    text = begin.new_full((len(prompts), fmt.delay + frames), tokenizer.eos_token_id)
    text[:, :fmt.delay] = begin[:, :fmt.delay]
    rows = list(range(len(prompts)))  # which prompt each row of the batch is of
    look = 1 if on_frame or device.type == "cpu" else LOOK
    for t in range(min(fmt.delay, max_frames) if on_frame else 0):
        on_frame(t, text[:, t].tolist())
    for t in range(frames):
        codes[rows, :, t] = batch.said[:len(batch)]
        text[rows, fmt.delay + t] = batch.text[:len(batch)]
        if t % look == look - 1:
            for k in over(codes[rows, :, t - look + 1:t + 1], fmt.codebook_size + 1, sides):
                mine = rows[k:k + sides]
                yield mine[0] // sides, cut(codes[mine, :, :t + 1], text[mine], fmt)
                for row in reversed(range(k, k + sides)):
                    batch.leave(row)
                    rows[row] = rows[-1]
                    rows.pop()
            if not rows:
                return
        if on_frame:
            on_frame(fmt.delay + t, text[:, fmt.delay + t].tolist())
        if bar is not None:
            bar.update()
        if t + 1 < frames:
            said = batch.said[:len(batch)]
            other = said.unflatten(0, (-1, sides)).flip(1).flatten(0, 1)  # 0 <-> 1, 2 <-> 3, ...
            batch.step(other if user_codes is None else heard[t].expand_as(said))
    for k in range(0, len(rows), sides):
        mine = rows[k:k + sides]
        yield mine[0] // sides, cut(codes[mine], text[mine], fmt)


def over(codes, end_id, sides):
    """Which dialogues are over in codes (B, K, T): their first rows, the last dialogue first."""
    ended = (codes == end_id).flatten(1).any(1).unflatten(0, (-1, sides)).any(1)
    return (ended.nonzero()[:, 0] * sides).flip(0).tolist()


def cut(codes, text, fmt):
    """The rows of one dialogue up to the first end id of any: codes (rows, K, T), text (rows, >= T)
    -> [(codes (K, T'), text ids (T',))]. The same index is the same time: the delay's frames
    without audio are not among the codes, and text runs ahead by as many."""
    ended = (codes == fmt.codebook_size + 1).flatten(0, 1).any(0)  # (T,)
    length = int(ended.int().argmax()) if ended.any() else codes.shape[2]
    return [(row[:, :length].cpu(), ids[:length].cpu()) for row, ids in zip(codes, text)]


def talk(model, tokenizer, fmt, prompts, speakers, sampler, max_frames, user_codes=None,
         on_frame=None):
    """Generate dialogues frame by frame (paper section 5.1), one forward pass a frame for all.

    prompts: list of B instruction texts; speakers: (B, S) embeddings. Rows 2i and 2i+1 are the two
    instances of dialogue i: what one says is what the other hears. With user_codes (K, T) instead
    every row is one instance that hears this recording; with (B, K, T) each hears its own.
    sampler: a Sampler with a seed per dialogue.
    max_frames: limit, the delay's frames included; a recording is heard to its end instead.
    on_frame(t, text): called with every new frame's text ids (B,), the end token for rows that are
    over. Returns a list of (codes (K, T_i), text ids (T_i,)) for the B rows, without the delay.
    """
    rows = [None] * len(prompts)
    for i, made in converse(model, tokenizer, fmt, prompts, speakers, sampler, max_frames,
                            user_codes, on_frame):
        rows[i * len(made):(i + 1) * len(made)] = made
    return rows


# ---- from tokens to words ----


def stream_words(text, tokenizer):
    """The words of a text stream (T,) with times in seconds: [{word, start, end, kind}], kind '' or
    the mark in front of it ('[BC]', '[INTERRUPT2]', ...).

        token                 what it does
        piece of a word       opens a word if it begins with a space or follows no other piece,
                              else goes on with the word
        word pad              the open word lasts to here
        mark                  ends the word; the next one is of its kind
        other pad, end        ends the word
    """
    ids = text.tolist() if hasattr(text, "tolist") else list(text)
    pads = {*EXTRA_TOKENS, tokenizer.eos_token}
    words, kind, before = [], "", ""  # before: what the last frame held, "piece", "word pad" or ""
    for t, (number, token) in enumerate(zip(ids, tokenizer.convert_ids_to_tokens(ids))):
        if token == WORD_PAD and before:
            words[-1]["end"], before = (t + 1) / FRAME_RATE, "word pad"
        elif token is None or token in pads:  # None: beyond the tokenizer, as padded tables have
            kind, before = (token if mark_kind(token) else ""), ""
        else:
            if before != "piece" or token[0] in "Ġ▁ ":  # as tokenizers write a leading space
                words.append({"word": [], "start": t / FRAME_RATE, "end": 0, "kind": kind})
            words[-1]["word"].append(number)
            words[-1]["end"], kind, before = (t + 1) / FRAME_RATE, "", "piece"
    for word in words:  # all pieces at once, since one letter may be split over two of them
        word["word"] = tokenizer.decode(word["word"]).strip()
    return [word for word in words if word["word"]]


class Transcript:
    """Prints a dialogue's words while they are made: a new line with time and name whenever the
    speaker changes."""

    def __init__(self, tokenizer, names):
        self.tokenizer, self.names = tokenizer, names
        self.silence = tokenizer.convert_tokens_to_ids(SILENCE_PAD)
        self.begin, self.texts = [0] * len(names), [[] for _ in names]  # since the last silence
        self.printed, self.speaker = [0] * len(names), None

    def __call__(self, t, text):
        for side, name in enumerate(self.names):
            self.texts[side].append(text[side])
            words = stream_words(self.texts[side], self.tokenizer)
            # the last word may go on
            growing = bool(words) and round(words[-1]["end"] * FRAME_RATE) == len(self.texts[side])
            for word in words[self.printed[side]:len(words) - growing]:
                if self.speaker != side:
                    seconds = self.begin[side] / FRAME_RATE + word["start"]
                    print(f"\n{seconds:6.2f} s  {name}:", end="")
                    self.speaker = side
                print(f" {word['kind']}{word['word']}", end="", flush=True)
                self.printed[side] += 1
            if text[side] == self.silence:
                self.begin[side], self.texts[side], self.printed[side] = t + 1, [], 0

    def finish(self):
        """Prints the words that reach up to the last frame."""
        self(0, [self.silence] * len(self.names))


# ---- what the command does ----


SPEAKER_KEYS = {"name": str, "narrative": str, "backchannels": int, "interruptions": int,
                "starts": bool, "voice": str}


def read_voices(path):
    """{voice: embedding, a list of numbers} of a JSON file. Raises InputError."""
    voices = read_json(path, what := "prepare.py writes such a file")
    if not isinstance(voices, dict):
        raise InputError(f"{path}: must hold {{voice: list of numbers}}; {what}")
    for name, numbers in voices.items():
        if not are_numbers(numbers):
            raise InputError(f"{path}: voice '{name}' is no list of finite numbers; {what}")
    return voices


def read_prompts(path, voices_file):
    """Own prompts: a JSON list of pairs of speakers (README.md). Returns a list of [speaker,
    speaker] dicts with name, narrative, backchannels, interruptions, starts, voice, prompt,
    embedding. Raises InputError, naming the entry."""
    what = "a prompts file is a list of pairs of speakers; README.md shows one"
    pairs = read_json(path, what)
    if not isinstance(pairs, list) or not pairs:
        raise InputError(f"{path}: {what}")
    voices = read_voices(voices_file) if Path(voices_file).exists() else {}
    for i, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"{path}: entry {i} must be a list of two speakers")
        for side, speaker in enumerate(pair):
            where = f"{path}: entry {i}, speaker {side + 1}"
            check_speaker(speaker, where)
            if speaker["voice"] not in voices:
                raise InputError(f"{where}: unknown voice '{speaker['voice']}'; {voices_file} has "
                                 f"{', '.join(voices) or 'none (no such file)'}")
            speaker["embedding"] = voices[speaker["voice"]]
        for speaker, other in (pair, pair[::-1]):
            speaker["prompt"] = make_prompt(
                speaker["name"], other["name"], speaker["narrative"], speaker["backchannels"],
                speaker["interruptions"], speaker["starts"])
    return pairs


def own_prompts(cfg):
    """The `n` pairs from `first` on of the prompts file (n=0: all), as of read_prompts."""
    pairs = read_prompts(cfg.prompts, cfg.voices)
    taken = pairs[cfg.first:cfg.first + (cfg.n or len(pairs))]
    if not taken or len(taken) < cfg.n:
        raise InputError(f"first={cfg.first}, n={cfg.n}: {cfg.prompts} has {len(pairs)} dialogues")
    return taken


def check_speaker(speaker, where):
    """Raise InputError unless `speaker` has the keys of a prompts file, with values of their kind.
    Name and narrative lose the spaces around them."""
    if not isinstance(speaker, dict) or set(speaker) != set(SPEAKER_KEYS):
        raise InputError(f"{where}: needs exactly the keys {', '.join(SPEAKER_KEYS)}")
    for key, kind in SPEAKER_KEYS.items():
        if type(speaker[key]) is not kind:
            raise InputError(f"{where}: '{key}' must be {kind.__name__}, not {speaker[key]!r}")
    for key in ("name", "narrative"):
        speaker[key] = speaker[key].strip()
        if not speaker[key]:
            raise InputError(f"{where}: '{key}' is empty; write something")
    for key in ("backchannels", "interruptions"):
        if speaker[key] < 0:
            raise InputError(f"{where}: '{key}' is {speaker[key]}; a count is 0 or more")


def data_prompts(cfg, fmt):
    """Prompts of `n` dialogues of a split (n=0: one), from `first` on, in the form of
    read_prompts."""
    opened = load_dialogues(cfg.data, cfg.split, streaming=True)  # fetches no more than is taken
    count = cfg.n or 1
    taken = list(itertools.islice(opened, cfg.first, cfg.first + count))
    if len(taken) < count:
        raise InputError(f"first={cfg.first}, n={count}: {cfg.data} has {sum(1 for _ in opened)} "
                         f"dialogues in split '{cfg.split}'")
    pairs = []
    for dialogue in taken:
        try:
            check_prompt(dialogue, fmt)
        except InputError as e:
            raise InputError(f"{cfg.data}, dialogue {dialogue_name(dialogue)}: {e}") from e
        pairs.append([data_prompt(dialogue, side, fmt) for side in (0, 1)])
    return pairs


def data_prompt(dialogue, side, fmt):
    """One speaker of a data set's dialogue, in the form of read_prompts."""
    parts = prompt_parts(dialogue, side, fmt)
    name, _, narrative, backchannels, interruptions, starts = parts
    return {"name": name, "narrative": narrative, "backchannels": backchannels,
            "interruptions": interruptions, "starts": starts,
            "voice": (dialogue.get("tts_speaker_ids") or ["", ""])[side],
            "embedding": dialogue[f"spk_emb_c{side + 1}"],
            "prompt": make_prompt(*parts)}


def check_parts(cfg, model, codec, trained):
    """Raise InputError if model, codec and voices do not belong together. Returns the name of the
    speaker encoder that made the voices, or ''."""
    given = codec.num_codebooks, codec.codebook_size
    if given != (model.num_codebooks, model.codebook_size):
        raise InputError(f"{cfg.codec} has {given[0]} codebooks of {given[1]} codes, but "
                         f"{cfg.model} was trained on {model.num_codebooks} of "
                         f"{model.codebook_size}; give the codec of its data")
    if trained.get("codec_fingerprint", found := fingerprint(cfg.codec)) != found:
        raise InputError(f"{cfg.codec} is not the codec that {cfg.model} was trained on "
                         f"(fingerprint {found}, not {trained['codec_fingerprint']}), so its codes "
                         "mean other sounds; give the codec of its data")
    own = cfg.prompts or cfg.user and any(Path(cfg.user).rglob("prompt.json"))
    voices = Path(cfg.voices).parent if own else cfg.data
    given, needed = ([made.get(key) for key in ("speaker_encoder", "speaker_size")]
                     for made in (made_with(voices), trained))
    if model.speaker_size and None not in given + needed and given != needed:
        raise InputError(f"{voices}: its voices are embeddings by {given[0]} ({given[1]} numbers), "
                         f"but {cfg.model} was trained on those by {needed[0]} ({needed[1]}); "
                         f"prepare them with speaker_encoder={needed[0]}")
    return given[0] or ""


def check_pairs(cfg, model, tokenizer, pairs, longest=None):
    """Raise InputError for a voice or a prompt that the model cannot take. longest: tokens of the
    longest prompt that it was trained on, if that is known; a longer one is noted."""
    positions, long = model.backbone.config.max_position_embeddings, []
    for i, pair in enumerate(pairs):
        for speaker in pair:
            where = f"{cfg.prompts or cfg.data}: dialogue {cfg.first + i}, {speaker['name']}"
            voice, numbers = f"voice '{speaker['voice']}'", speaker["embedding"]
            if not are_numbers(numbers):
                raise InputError(f"{where}: {voice} is no list of finite numbers; make it again "
                                 "with prepare.py")
            if model.speaker_size and len(numbers) != model.speaker_size:
                raise InputError(f"{where}: {voice} has {len(numbers)} numbers, the model takes "
                                 f"{model.speaker_size}; use the speaker encoder of its data")
            tokens = len(tokenizer.encode(speaker["prompt"], add_special_tokens=False))
            if tokens + 2 > positions:
                raise InputError(f"{where}: its prompt has {tokens} tokens, but {cfg.model} has "
                                 f"{positions} positions for prompt and dialogue; shorten it")
            if longest and tokens > longest:
                long.append((tokens, where))
    if long:
        tokens, where = max(long)
        print(f"note: {len(long)} prompts have more tokens than the {longest} that {cfg.model} was "
              f"trained on; {where}'s has {tokens}", file=sys.stderr)


def read_user(cfg, codec, fmt, device):
    """The recording that is the other speaker, with `listen` seconds of silence behind it, as
    (audio (1, samples), codes (K, T)). Raises InputError for a channel that it has not."""
    audio = read_audio(cfg.user, sample_rate=codec.sample_rate)
    if len(audio) == 1 and cfg.user_channel not in (-1, 0):
        raise InputError(f"{cfg.user}: has one channel, not user_channel={cfg.user_channel}; leave "
                         "it out")
    if len(audio) > 1 and not 0 <= cfg.user_channel < len(audio):
        raise InputError(f"{cfg.user}: has {len(audio)} channels; choose the user's with "
                         "user_channel=0 or 1")
    audio = set_level(audio[max(cfg.user_channel, 0)][None], codec.sample_rate, cfg.level)
    audio = F.pad(audio, (0, int(cfg.listen * codec.sample_rate)))  # (1, samples)
    codes = encode_in_pieces(codec, audio.to(device))[0].cpu()  # (K, T)
    if codes.shape[1] > fmt.max_frames:
        print(f"note: {cfg.user} has {codes.shape[1]} frames, more than the {fmt.max_frames} that "
              f"{cfg.model} was trained on: it looks back at the last {fmt.max_frames} of them",
              file=sys.stderr)
    return F.pad(audio, (0, codes.shape[1] * codec.samples_per_frame - audio.shape[1])), codes


COLOURS = {"backchannel": "tab:green", "interruption": "tab:red"}


def draw_timeline(path, audio, sample_rate, speakers):
    """A PNG with both waveforms (2, samples), the words where they are said, a marked one with its
    mark and in its colour; what is heard as backchannel or interruption is shaded."""
    seconds = audio.shape[1] / sample_rate
    rows = min(200, max(1, round(seconds / 12)))  # readable ones; a picture has room for 250
    length = seconds / rows
    fig, axes = plt.subplots(rows, 1, figsize=(16, 2.9 * rows), squeeze=False)
    events = label_segments(merge_words([speaker["words"] for speaker in speakers]))
    step = sample_rate // 200
    peaks = audio.cpu().abs().unfold(1, step, step).amax(2)  # (2, samples / step)
    peaks = (peaks / peaks.max().clamp(min=1e-4)).numpy()
    for row, ax in enumerate(axes[:, 0]):
        draw_row(ax, length * row, length * (row + 1), peaks, step / sample_rate, speakers, events)
    axes[-1, 0].set_xlabel("seconds")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour, alpha=0.25) for colour in COLOURS.values()]
    axes[0, 0].legend(handles, COLOURS, loc="lower right", bbox_to_anchor=(1, 1), ncols=2,
                      fontsize=8)
    fig.tight_layout()
    write_atomically(path, lambda temporary: fig.savefig(temporary, dpi=90, format="png"))
    plt.close(fig)


def draw_row(ax, begin, end, peaks, step, speakers, events):
    """The seconds `begin` to `end` of a timeline; peaks (2, N): loudness, `step` seconds apart."""
    for side, speaker in enumerate(speakers):
        base, colour = 1 - 2 * side, ("tab:blue", "tab:orange")[side]
        part = 0.55 * peaks[side, int(begin / step):int(end / step)]
        times = [begin + i * step for i in range(len(part))]
        ax.fill_between(times, base - part, base + part, lw=0, color=colour)
        words = [word for word in speaker["words"] if begin <= word["start"] < end]
        for k, word in enumerate(words):
            style = {"color": COLOURS.get(mark_kind(word["kind"]), "black"), "fontsize": 7}
            ax.text(word["start"], base + (0.62, 0.82)[k % 2], word["word"], clip_on=True, **style)
            ax.text(word["start"], base - 0.9, word["kind"], clip_on=True, **style)
    for event in events:
        if event["label"] in COLOURS and event["end"] > begin and event["start"] < end:
            side = event["speaker"]
            ax.axvspan(max(begin, event["start"]), min(end, event["end"]), ymin=0.5 * (1 - side),
                       ymax=0.5 * (2 - side), alpha=0.25, color=COLOURS[event["label"]])
    names = [speaker["name"] for speaker in speakers]
    ax.set(xlim=(begin, end), ylim=(-2, 2), yticks=[1, -1], yticklabels=names)


def save_dialogue(stem, audio, sample_rate, speakers, texts, codes, tokenizer, record):
    """Write stem.wav, stem.png and, last, stem.json. audio (2, samples); speakers: two dicts as of
    read_prompts, extended here by `words` and `text`; texts: two text streams (None for a
    recording, or where the model has none); codes: (K, T) of each; record: what else the JSON
    says."""
    for speaker, text in zip(speakers, texts):
        speaker |= {"words": [], "text": None}
        if text is not None:
            speaker["words"] = stream_words(text, tokenizer)
            speaker["text"] = " ".join(word["word"] for word in speaker["words"])
    write_audio(stem.with_suffix(".wav"), audio, sample_rate)
    draw_timeline(stem.with_suffix(".png"), audio, sample_rate, speakers)
    record = {"speakers": speakers, **record, "codes": [row.tolist() for row in codes]}
    write_json(f"{stem}.json", record)
    print(f"\n{stem}.wav, .json, .png: {audio.shape[1] / sample_rate:.1f} s")


def made_from(cfg, sampling):
    """What a dialogue's JSON says of how it was made: the settings, the keywords of Sampler, and
    the fingerprints of the files at the settings' paths, where others may lie the next time."""
    keys, folder = ["model", "codec", "prompts"], cfg.user and Path(cfg.user).is_dir()
    if cfg.prompts or folder:  # the prompt.json files of a folder name voices, too
        keys.append("voices")
    if not folder:
        keys.append("user")
    files = fingerprints(cfg, *keys)
    if not cfg.prompts:
        info = Path(cfg.data) / "info.json"  # what the data set was made of
        if info.exists():
            files["data"] = fingerprint(info)
        # of the shards only the sizes: they may be gigabytes
        shards = sorted(Path(cfg.data).glob(f"{glob.escape(cfg.split)}-*.parquet"))
        files["sizes"] = [path.stat().st_size for path in shards]
    if folder:
        files["first"] = cfg.first  # whose prompt answers; elsewhere it is a place in the run
    return {"settings": asdict(cfg), "sampling": sampling, "fingerprints": files}


def same_settings(path, made):
    """Whether the dialogue in `path` is there and was `made`, of made_from, like this (where it
    stands in the run apart)."""
    try:
        before = json.loads(path.read_text())
        settings, sampling, files = (before[key] for key in made)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    apart = ("first", "n", "batch", "resume")
    asked = {key: value for key, value in made["settings"].items() if key not in apart}
    return (sampling == made["sampling"] and files == made["fingerprints"]
            and all(settings.get(key) == value for key, value in asked.items()))


def make_batch(cfg, model, tokenizer, fmt, codec, jobs, sampling, user, record):
    """Generate the dialogues `jobs`, [(number, pair, stem)], in one batch, and write each when it
    is over. sampling: keywords of Sampler; user: of read_user, or None; record: what the JSON says
    beside the dialogue."""
    device = model.dsu_head.weight.device
    speaking = [speaker for _, pair, _ in jobs for speaker in (pair[:1] if user else pair)]
    embeddings = torch.tensor([speaker["embedding"] for speaker in speaking], dtype=torch.float32)
    sampler = Sampler([cfg.seed + number for number, _, _ in jobs], **sampling)
    limit = cfg.max_frames or fmt.max_frames
    bar = tqdm(total=user[1].shape[1] if user else limit - fmt.delay, unit="frame",
               desc=f"dialogues {jobs[0][0]}-{jobs[-1][0]}", disable=len(jobs) == 1)
    transcript = Transcript(tokenizer, [speaker["name"] for speaker in speaking])
    start, frames = time.time(), 0
    for i, rows in converse(model, tokenizer, fmt, [speaker["prompt"] for speaker in speaking],
                            embeddings, sampler, limit, user[1] if user else None,
                            transcript if bar.disable else None, cfg.may_end, bar):
        if bar.disable:
            transcript.finish()
        (_, pair, stem), length = jobs[i], rows[0][0].shape[1]
        frames = max(frames, length + fmt.delay)
        if not length:
            print(f"{stem}: nothing written, the model ended it at once; try another seed",
                  file=sys.stderr)
            continue
        codes = [codes for codes, _ in rows]
        texts = [text if fmt.alignment != "none" else None for _, text in rows]
        audio = torch.cat([decode_in_pieces(codec, row[None].to(device)) for row in codes])
        if user:
            pair = [pair[0], {"name": "user", "recording": cfg.user}]
            audio = torch.cat([audio, user[0][:, :audio.shape[1]]])
            codes, texts = codes + [user[1][:, :length]], texts + [None]
        save_dialogue(stem, audio, codec.sample_rate, pair, texts, codes, tokenizer, record)
    bar.close()
    seconds = time.time() - start
    print(f"{frames} frames of {len(jobs)} dialogue(s) in {seconds:.1f} s: {frames / seconds:.1f} "
          f"frames/s each, {frames / seconds / FRAME_RATE:.1f} x real time, on {device}")


def answer_batch(cfg, model, tokenizer, fmt, codec, jobs, sampling):
    """The answers of one batch of answer_folder: jobs [(number, input, output, speaker)]."""
    device, late = model.dsu_head.weight.device, codec.lookahead * codec.samples_per_frame
    users = [read_user(replace(cfg, user=str(path), listen=0.0), codec, fmt, device)
             for _, path, _, _ in jobs]
    speaking = [speaker for *_, speaker in jobs]
    longest = max(codes.shape[1] for _, codes in users)
    heard = torch.stack([F.pad(codes, (0, longest - codes.shape[1])) for _, codes in users])
    embeddings = torch.tensor([speaker["embedding"] for speaker in speaking], dtype=torch.float32)
    made = talk(model, tokenizer, fmt, [speaker["prompt"] for speaker in speaking], embeddings,
                Sampler([cfg.seed + number for number, *_ in jobs], **sampling), 0, heard)
    for (_, path, out, _), (audio, codes), (said, _) in zip(jobs, users, made):
        answer = decode_in_pieces(codec, said[None, :, :codes.shape[1]].to(device))
        answer = F.pad(answer, (late, 0))[:, :audio.shape[1]].numpy()
        size = read_audio(path, sample_rate=ANSWER_RATE).shape[1]
        write_audio(out, resample(answer, codec.sample_rate, ANSWER_RATE)[:, :size], ANSWER_RATE)


def answer_folder(cfg, model, tokenizer, fmt, codec, sampling, pairs):
    """Answers every input.wav and clean_input.wav below the folder cfg.user in an output.wav or
    clean_output.wav beside it, as long as the input is (the layout of Full-Duplex-Bench).

    Who answers is the first speaker of prompt.json beside it, else that of `pairs`. As in a live
    talk, the answer comes late by as much as the codec looks ahead. answers.json says by what
    settings and of what files the answers are made; only resume=true with the same ones keeps what
    is there.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("a folder of recordings is answered by one process, without torchrun")
    found = [path for name in ("input.wav", "clean_input.wav")
             for path in sorted(Path(cfg.user).rglob(name))]
    if not found:
        raise InputError(f"{cfg.user}: no input.wav below it; give a recording, or a folder of "
                         "Full-Duplex-Bench's layout")
    jobs, mark, made = [], Path(cfg.user) / "answers.json", made_from(cfg, sampling)
    kept = cfg.resume and same_settings(mark, made)
    before, answered = json.loads(mark.read_text()).get("answered", {}) if kept else {}, {}
    for number, path in enumerate(found):
        out = path.with_name(path.name.replace("input", "output"))
        own, told = path.with_name("prompt.json"), pairs
        if own.exists():
            told = read_prompts(own, cfg.voices)
            check_pairs(replace(cfg, prompts=str(own), first=0), model, tokenizer, told)
        name = str(path.relative_to(cfg.user))
        answered[name] = [fingerprint(file) for file in (path, own) if file.exists()]
        if not (out.exists() and before.get(name) == answered[name]):
            out.unlink(missing_ok=True)
            jobs.append((number, path, out, told[0][0]))
    write_json(mark, made | {"answered": answered})
    with tqdm(total=len(jobs), unit="recording") as bar:
        for k in range(0, len(jobs), cfg.batch):
            part = jobs[k:k + cfg.batch]
            answer_batch(cfg, model, tokenizer, fmt, codec, part, sampling)
            bar.update(len(part))
    print(f"{cfg.user}: {len(jobs)} answers")


@torch.no_grad()
def main(argv):
    cfg = load_settings(Config, argv)
    if min(cfg.first, cfg.n, cfg.max_frames) < 0 or cfg.batch < 1 or not 0 <= cfg.listen < math.inf:
        raise InputError("batch is at least 1; first, n, max_frames and listen are 0 or more")
    if abs(cfg.seed) > 2 ** 60:
        raise InputError(f"seed={cfg.seed}: must be of at most 18 digits")
    if not -60 <= cfg.level <= 0:
        raise InputError(f"level={cfg.level}: must be from -60 to 0 dB; 0 leaves it as it is")
    use_threads()
    device, dtype = "cpu", torch.float32
    if torch.cuda.is_available():
        device, dtype = f"cuda:{os.environ.get('LOCAL_RANK', 0)}", torch.bfloat16
    model, tokenizer, fmt, trained = load_checkpoint(cfg.model, device, dtype)
    if 0 < cfg.max_frames <= fmt.delay:
        raise InputError(f"max_frames={cfg.max_frames}: text leads by {fmt.delay}, so give "
                         f"{fmt.delay + 1} or more, or 0")
    sampling = sampling_of(cfg, trained)
    Sampler([], **sampling).kinds()  # raises InputError before anything is made
    codec = load_codec(cfg.codec).to(device)
    encoder = check_parts(cfg, model, codec, trained)
    pairs = own_prompts(cfg) if cfg.prompts else data_prompts(cfg, fmt)
    check_pairs(cfg, model, tokenizer, pairs, trained.get("longest_prompt"))
    if cfg.user and Path(cfg.user).is_dir():
        return answer_folder(cfg, model, tokenizer, fmt, codec, sampling, pairs)
    user = read_user(cfg, codec, fmt, device) if cfg.user else None
    out = Path(cfg.out)
    make_folder(out)
    numbers = range(cfg.first, cfg.first + len(pairs))
    jobs = [(i, pair, out / f"dialogue_{i:04d}") for i, pair in zip(numbers, pairs)]
    # under torchrun every process makes its share
    jobs = jobs[int(os.environ.get("RANK", 0))::int(os.environ.get("WORLD_SIZE", 1))]
    made = made_from(cfg, sampling)
    if cfg.resume:
        jobs = [job for job in jobs if not same_settings(job[2].with_suffix(".json"), made)]
    for *_, stem in jobs:  # an earlier run's would pass for this one's if it stops before
        for suffix in (".json", ".wav", ".png"):
            stem.with_suffix(suffix).unlink(missing_ok=True)
    record = {"speaker_encoder": encoder, **made}
    for k in range(0, len(jobs), cfg.batch):
        make_batch(cfg, model, tokenizer, fmt, codec, jobs[k:k + cfg.batch], sampling, user, record)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as e:
        sys.exit(f"generate.py: {e}")
