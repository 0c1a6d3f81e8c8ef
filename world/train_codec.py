"""Train MiniCodec (codec.py), the small speech codec of the shipped default, on the clips of the
small world:

    python -m world.train_codec data=runs/bank out=runs/codec minutes=40
    python -m world.train_codec data=runs/bank out=runs/codec minutes=40 resume=true    # goes on

Writes to `out`: codec.safetensors (for load_codec), checkpoint.pt and log.csv. The recipe is that
of Vocos (2306.00814) and DAC (2306.06546), cut down to what two CPU cores do in 40 minutes:
  - a log-mel distance at several resolutions, from the first step to the last;
  - after a share of the time, three small spectrogram discriminators, hinge losses and feature
    matching;
  - our own: a small head predicts the phonemes from the quantised numbers, so that codes carry
    words and are easy for a language model. (Moshi, 2410.00037, distils WavLM into Mimi for that;
    our corpus knows its phonemes.) Data without phones trains without it. The head is thrown away.
Left out of the usual recipe: period discriminators, loss balancing, quantiser dropout. Time, not
steps, sets the schedule: a slower machine trains fewer steps, but always to the end of the decay.
"""
import copy
import math
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from tqdm import tqdm

from codec import AUDIO_SUFFIXES, HOP, STEPS, MiniCodec, mel_filters, read_audio, save_minicodec
from config import (
    InputError,
    brief,
    count_cores,
    load_settings,
    make_folder,
    read_json,
    write_atomically,
)
from world.bank import read_bank

FRAME = STEPS * HOP  # samples
MEL_SCALES = {256: 20, 512: 40, 1024: 80, 2048: 120}  # STFT window -> mel bands of the distance
DISC_WINDOWS = (512, 1024, 2048)  # a discriminator each, on spectra the distance needs too
HELD = 50  # one clip of a bank in so many is held out
UNKNOWN = -100  # a phone that the checkpoint's bank lacked: cross_entropy leaves such labels out
COLUMNS = ("step", "minutes", "lr", "mel", "phone", "phone_right", "adversarial", "matching",
           "discriminator", "use", "perplexity", "audio_s_per_s", "seen_mel", "held_mel",
           "held_phone_right")  # of log.csv


@dataclass
class Settings:
    data: str = "runs/bank"  # bank of world.corpus, or raw: {train,validation}/NAME.flac, NAME.json
    out: str = "runs/codec"  # folder to write to
    resume: bool = False  # go on from out/checkpoint.pt
    decoder_only: bool = False  # with resume: the encoder stays, and codes made by it valid
    minutes: float = 40.0  # of training, loading excluded; the learning rate decays to 0 over them
    steps: int = 0  # if above 0, train so many steps instead
    batch: int = 4  # crops a step
    crop_frames: int = 32  # of 80 ms
    lr: float = 8e-4  # at its highest
    warmup: int = 100  # steps
    adversarial_from: float = 0.33  # share of the training after which the discriminators join
    mel_weight: float = 15.0
    phone_weight: float = 2.0
    match_weight: float = 2.0  # feature matching, against 1 for the adversarial loss
    ema: float = 0.999  # the file holds this running average of the weights
    level: int = 5  # FSQ levels per number; level**4 codes a codebook
    step_width: int = 192  # decoder channels at 87.5 Hz (the encoder has 2/3)
    frame_width: int = 256  # channels at 12.5 Hz
    save_minutes: float = 3.0  # between checkpoints
    seed: int = 0


# -------------------------------------------------------------------------------------------------
# Data: clips, short stretches of speech, strung together at random with silence in between


def load_clips(folder):
    """-> (clips to train on, clips held out), each a dict: audio (N,) int16, N whole frames of
    1764; phones [[phone, start, end]] in seconds. `folder` holds a bank (world.corpus), of which
    one clip in HELD is held out, or {train,validation}/ with recordings. Raises InputError if there
    are none."""
    if not (Path(folder) / "train").is_dir():
        clips = [clip | {"held": zlib.crc32(f"{clip['voice']} {clip['text']}".encode()) % HELD == 0}
                 for clip in read_bank(folder)]
        parts = ([c for c in clips if not c["held"]], [c for c in clips if c["held"]] or clips[:1])
    else:
        parts = [cut_recordings(Path(folder) / split) for split in ("train", "validation")]
    for name, clips in zip(("to train on", "held out"), parts):
        if not clips:
            raise InputError(f"{folder}: holds no speech {name}; give data=FOLDER, a bank of "
                             "world.corpus or recordings in train/ and validation/")
    return parts


def cut_recordings(folder):
    """Every stretch of speech of every channel of every recording in `folder`, as load_clips'
    clips."""
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
    with ThreadPoolExecutor(count_cores()) as pool:
        loaded = list(tqdm(pool.map(read_recording, paths), f"load {folder}", len(paths),
                           unit="file", disable=None))
    clips = []
    for audio, phones in loaded:
        for channel, marks in zip(audio, phones):
            loud = np.abs(channel.reshape(-1, FRAME)).max(1) > 32767 * 10 ** (-50 / 20)  # (T,)
            places = np.flatnonzero(loud)
            if not len(places):
                continue
            # half a second of silence (6 frames) parts two stretches
            for part in np.split(places, np.flatnonzero(np.diff(places) > 6) + 1):
                first, end = part[0], part[-1] + 1
                shift = first * FRAME / 22050
                clips.append({"audio": channel[first * FRAME:end * FRAME],
                              "phones": [[p, a - shift, b - shift] for p, a, b in marks]})
    return clips


def read_recording(path):
    """-> (audio (channels, N) int16, N whole frames; per channel [[phone, start, end]], perhaps
    empty)."""
    audio = read_audio(path)
    audio = F.pad(audio, (0, -audio.shape[1] % FRAME)).clamp(-1, 1)
    note = path.with_suffix(".json")
    info = read_json(note, "make it again") if note.exists() else {}
    try:  # a recording's phones have durations
        phones = [[[phone, start, start + duration] for phone, start, duration in channel]
                  for channel in info.get("phones") or [()] * len(audio)]
    except (ValueError, TypeError, AttributeError) as e:
        raise InputError(f"{note}: is not the JSON of a recording ({brief(e)}); make it "
                         "again") from e
    return (audio * 32767).short().numpy(), phones


def name_phones(clips):
    """-> every phone of the clips, sorted, after "silence"; empty where a clip has none."""
    if not all(clip["phones"] for clip in clips):
        return []
    return ["silence", *sorted({phone for clip in clips for phone, _, _ in clip["phones"]})]


def label(clips, phones):
    """Gives every clip its `labels` (N / 252,) int16: an index into `phones` for every step."""
    index = {phone: i for i, phone in enumerate(phones)}
    for clip in clips:
        clip["labels"] = np.zeros(len(clip["audio"]) // HOP, np.int16)
        for phone, *times in clip["phones"] if phones else ():
            # a step belongs to the phone at its middle
            first, last = (max(math.ceil(t * 22050 / HOP - 0.5), 0) for t in times)
            clip["labels"][first:last] = index.get(phone, UNKNOWN)


def crop(clips, frames, rng):
    """A crop of a random conversation's channel: audio (frames * 1764,) float32, labels (frames *
    7,).

    It begins anywhere in a clip or in the silence before it; the next ones follow, each after 0.1
    to 2 s and at its own level, so that silence, edges and loudness are learnt.
    """
    audio, labels = np.zeros(frames * FRAME, np.float32), np.zeros(frames * STEPS, np.int16)
    place = None  # of the next clip, in steps
    while place is None or place < len(labels):
        clip = clips[rng.integers(len(clips))]
        size, silence = len(clip["labels"]), int(rng.uniform(0.1, 2) * 22050 / HOP)
        place = -int(rng.integers(-silence, size)) if place is None else place + silence
        a, b = max(place, 0), min(place + size, len(labels))
        gain = 10 ** (rng.uniform(-5, 3) / 20) / 32767
        if a < b:
            audio[a * HOP:b * HOP] = clip["audio"][(a - place) * HOP:(b - place) * HOP] * gain
            labels[a:b] = clip["labels"][a - place:b - place]
        place += size
    return audio.clip(-1, 1), labels


def crops(clips, count, frames, rng, device):
    """`count` crops: audio (count, frames * 1764) float32, labels (count, 7, frames) int64."""
    x, y = zip(*(crop(clips, frames, rng) for _ in range(count)))
    y = torch.from_numpy(np.stack(y)).unflatten(1, (frames, STEPS)).transpose(1, 2)
    return torch.from_numpy(np.stack(x)).to(device), y.long().to(device)


# -------------------------------------------------------------------------------------------------
# Losses


def spectrum(audio, n_fft):
    """STFT, Hann window, hop n_fft / 4, no padding: (B, N) -> complex (B, N // hop - 3, n_fft // 2
    + 1).

    Made of whole hops put side by side, whose gradient is twice as fast on a CPU as that of
    torch.stft.
    """
    hop = n_fft // 4
    hops = audio[:, :audio.shape[1] // hop * hop].unflatten(1, (-1, hop))
    windows = torch.cat([hops[:, i:hops.shape[1] - 3 + i] for i in range(4)], -1)
    return torch.fft.rfft(windows * torch.hann_window(n_fft, device=audio.device))


def magnitude(spectra):
    """|S|, with a finite gradient at 0."""
    return (spectra.real.square() + spectra.imag.square() + 1e-10).sqrt()


def mel_distance(a, b, filters):
    """Mean over resolutions of |log10 mel(a) - log10 mel(b)|; a, b: {n_fft: spectrum}; below -86 dB
    all is silence."""
    def log_mel(spectra, n_fft):
        # log is much faster than log10 on a CPU
        return torch.log((magnitude(spectra) @ filters[n_fft]).clamp(min=1e-3)) / math.log(10)
    return sum(F.l1_loss(log_mel(a[n], n), log_mel(b[n], n)) for n in filters) / len(filters)


class Discriminator(nn.Module):
    """A spectrum (B, T, bins) -> maps of all layers, the last being its opinion. 46 k parameters.
    """

    def __init__(self):
        super().__init__()
        layers = (nn.Conv2d(3, 16, (3, 9), (1, 4), (1, 4)),
                  nn.Conv2d(16, 24, (3, 9), (1, 2), (1, 4)),
                  nn.Conv2d(24, 32, (3, 5), (2, 2), (1, 2)), nn.Conv2d(32, 32, 3, 1, 1),
                  nn.Conv2d(32, 1, 3, 1, 1))
        self.layers = nn.ModuleList(weight_norm(layer).to(memory_format=torch.channels_last)
                                    for layer in layers)

    def forward(self, spectra):
        size = magnitude(spectra)
        # square-root compression: quiet harmonics count too, and phase stays visible
        soft = (size + 1e-2).rsqrt()
        x = [spectra.real * soft, spectra.imag * soft, torch.log(size + 1e-3) / 2.3]
        x = torch.stack(x, -1).permute(0, 3, 1, 2)  # (B, 3, T, bins)
        maps = []
        for layer in self.layers:
            x = layer(x if not maps else F.leaky_relu(x, 0.1))
            maps.append(x)
        return maps


# -------------------------------------------------------------------------------------------------
# Training


def make_models(s, phones, device):
    """-> everything that a checkpoint keeps: modules and their optimizers, by name."""
    codec = MiniCodec((s.level,) * 4, step_channels=(s.step_width * 2 // 3, s.step_width),
                      frame_channels=s.frame_width).to(device)
    head = nn.Sequential(nn.Conv1d(16, 256, 3, padding=1), nn.SiLU(),
                         nn.Conv1d(256, max(len(phones), 1) * STEPS, 1)).to(device)
    discs = nn.ModuleDict({str(n): Discriminator() for n in DISC_WINDOWS}).to(device)
    average = copy.deepcopy(codec).requires_grad_(False)  # the running average of the weights
    adam = {"lr": s.lr, "betas": (0.8, 0.99), "fused": True}
    return {"codec": codec, "average": average, "head": head, "discs": discs,
            "opt": torch.optim.AdamW([*codec.parameters(), *head.parameters()], **adam),
            "opt_disc": torch.optim.AdamW(discs.parameters(), **adam)}


def reconstruct(codec, head, x, y, filters):
    """x (B, N), y (B, 7, T) -> (decoded and real spectra, {n_fft: (B, T', bins)} each; codes (B, K,
    T); losses {mel, phone, phone_right}, the last the share of the steps not silent whose phone is
    right)."""
    with autocast(x.device):
        decoded, quantised, codes = codec(x)
        logits = head(quantised).unflatten(1, (-1, STEPS)).float()  # (B, phones, 7, T)
    fake, real = ({n: spectrum(a.float(), n) for n in MEL_SCALES} for a in (decoded, x))
    right = (logits.argmax(1) == y)[y > 0].float().sum() / (y > 0).sum().clamp(min=1)
    return fake, real, codes, {"mel": mel_distance(fake, real, filters),
                               "phone": F.cross_entropy(logits, y), "phone_right": right}


def autocast(device):
    """Half precision in the matrix products: twice as fast on a GPU and on a CPU that knows
    bfloat16."""
    return torch.autocast(device.type, torch.bfloat16)


def judge(discs, spectra, part):
    """Maps of each discriminator's layers on `part` of the frames of its spectrum."""
    with autocast(next(discs.parameters()).device):
        return [discs[str(n)](spectra[n][:, part[n]]) for n in DISC_WINDOWS]


def discriminator_step(m, fake, real, part):
    """One step of the discriminators, hinge loss; returns it."""
    m["discs"].requires_grad_(True)
    on_real = judge(m["discs"], real, part)
    on_fake = judge(m["discs"], {n: fake[n].detach() for n in DISC_WINDOWS}, part)
    loss = sum(F.relu(1 - r[-1].float()).mean() + F.relu(1 + f[-1].float()).mean()
               for r, f in zip(on_real, on_fake)) / len(DISC_WINDOWS)
    m["opt_disc"].zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(m["discs"].parameters(), 1.0)
    m["opt_disc"].step()
    m["discs"].requires_grad_(False)
    return loss, on_real


def fooling(m, fake, on_real, part):
    """-> (adversarial loss, feature matching loss) of the codec."""
    on_fake = judge(m["discs"], fake, part)
    fool = -sum(f[-1].float().mean() for f in on_fake) / len(DISC_WINDOWS)
    match = sum(F.l1_loss(f.float(), r.detach().float()) for maps in zip(on_fake, on_real)
                for f, r in zip(maps[0][:-1], maps[1][:-1])) / len(DISC_WINDOWS)
    return fool, match


def train_step(s, m, x, y, filters, adversarial, rng):
    """One step of everything on audio x (B, N) and labels y; returns (losses by name, codes (B, K,
    T))."""
    fake, real, codes, parts = reconstruct(m["codec"], m["head"], x, y, filters)
    loss = s.mel_weight * parts["mel"] + s.phone_weight * parts["phone"]
    if adversarial:
        # discriminators look at a third of each crop, a random one: else they cost more than all
        # the rest
        start, size = rng.random() * 2 / 3, {n: real[n].shape[1] for n in DISC_WINDOWS}
        part = {n: slice(int(start * size[n]), int((start + 1 / 3) * size[n]))
                for n in DISC_WINDOWS}
        disc, on_real = discriminator_step(m, fake, real, part)
        fool, match = fooling(m, fake, on_real, part)
        loss = loss + fool + s.match_weight * match
        parts |= {"adversarial": fool, "matching": match, "discriminator": disc}
    if not loss.isfinite():
        raise InputError(f"the loss is {loss.item()}; resume from {s.out} with a smaller lr")
    m["opt"].zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([*m["codec"].parameters(), *m["head"].parameters()], 1.0)
    m["opt"].step()
    return {name: value.detach() for name, value in parts.items()}, codes


def held_scores(m, seen, held, filters):
    """-> {column: value}: clips it was trained on, strung together anew, and clips it never heard.
    """
    with torch.no_grad():
        known = reconstruct(m["average"], m["head"], *seen, filters)[3]
        new = reconstruct(m["average"], m["head"], *held, filters)[3]
    return {"seen_mel": known["mel"].item(), "held_mel": new["mel"].item(),
            "held_phone_right": new["phone_right"].item()}


def code_use(codes, size):
    """codes (B, K, T) -> {use: share of the `size` codes that occur, perplexity}, means over
    codebooks."""
    counts = torch.stack([torch.bincount(row, minlength=size)
                          for row in codes.transpose(0, 1).flatten(1).cpu()])
    share = counts / counts.sum(1, keepdim=True)  # (K, C)
    entropy = -(share * share.clamp(min=1e-9).log()).sum(1)
    return {"use": (counts > 0).float().mean().item(), "perplexity": entropy.exp().mean().item()}


def write_row(s, row, eta):
    """One line of log.csv, and the same to the screen. eta: minutes."""
    with open(f"{s.out}/log.csv", "a") as log:
        print(row["step"], *(f"{row[name]:.5g}" if name in row else "" for name in COLUMNS[1:]),
              sep=",", file=log)  # the step in full: begin_log reads it
    shown = [f"{name} {row[name]:.4g}" for name in COLUMNS if name in row]
    print(*shown, f"eta {eta:.1f} min", flush=True)


def begin_log(path, step):
    """log.csv with its header; of a training that goes on from `step`, with the rows up to it."""
    lines = path.read_text().splitlines()[1:] if step and path.exists() else []
    kept = [line for line in lines if (n := line.split(",")[0]).isdigit() and int(n) <= step]
    text = "\n".join([",".join(COLUMNS), *kept, ""])
    write_atomically(path, lambda new: new.write_text(text))


def save(s, m, phones, step, spent):
    """The checkpoint and the codec as it is now, each atomic."""
    state = {name: module.state_dict() for name, module in m.items()}
    state |= {"step": step, "spent": spent, "phones": phones, "settings": asdict(s)}
    write_atomically(f"{s.out}/checkpoint.pt", lambda path: torch.save(state, path))
    save_minicodec(m["average"], f"{s.out}/codec.safetensors")


def read_checkpoint(s, device):
    """The checkpoint in `out`, or None where a training begins. Raises InputError where `resume` is
    wrong."""
    path = Path(s.out) / "checkpoint.pt"
    if not s.resume:
        if path.exists():
            raise InputError(f"{s.out}: a training is there already; give resume=true to go on, or "
                             "another out=")
        if s.decoder_only:
            raise InputError("decoder_only=true goes on from a trained codec; add resume=true and "
                             "its out=")
        return None
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except OSError as e:
        raise InputError(f"{path}: no checkpoint to go on from; leave out resume=true") from e
    except Exception as e:  # cut off, no checkpoint: as many classes as ways
        raise InputError(f"{path}: damaged ({brief(e, 120)}); begin anew with "
                         "another out=") from e


def restore(s, m, state):
    """Fills the modules and optimizers from a checkpoint. Raises InputError where they don't fit.
    """
    try:
        for name, module in m.items():
            module.load_state_dict(state[name])
    except Exception as e:
        raise InputError(f"{s.out}/checkpoint.pt: doesn't fit these settings "
                         f"({brief(e, 120)}); use those it was made with") from e
    if s.decoder_only:
        m["codec"].load_state_dict(m["average"].state_dict())
        for name, weight in m["codec"].named_parameters():
            weight.requires_grad_(not name.startswith("enc_"))


def main(argv):
    s = load_settings(Settings, argv)
    if min(s.batch, s.crop_frames - 1, s.level - 1, s.minutes, s.warmup) <= 0:
        raise InputError("batch, minutes and warmup must be above 0, crop_frames and level above 1")
    if min(s.steps, s.seed) < 0:
        raise InputError("steps and seed must not be negative")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(s.seed)
    state = read_checkpoint(s, device)
    clips, held_clips = load_clips(s.data)
    phones = state["phones"] if state else name_phones([*clips, *held_clips])
    label([*clips, *held_clips], phones)
    m = make_models(s, phones, device)
    minutes = sum(len(clip["audio"]) for clip in clips) / 22050 / 60
    size = sum(p.numel() for p in m["codec"].parameters()) / 1e6
    print(f"{len(clips)} clips, {minutes:.1f} min of speech; {len(held_clips)} held out; "
          f"{len(phones)} phones; {size:.2f} M parameters; on {device}")
    if state:
        restore(s, m, state)
    make_folder(s.out)
    begin_log(Path(s.out, "log.csv"), state["step"] if state else 0)
    step, spent = (state["step"], state["spent"]) if state else (0, 0.0)
    steps = loop(s, m, clips, held_clips, phones, step, spent, device)
    print(f"{s.out}/codec.safetensors: done after {steps} steps")


def loop(s, m, clips, held_clips, phones, step, spent, device):
    """Trains from `step` on, `spent` seconds into the training, to the end; returns that step."""
    filters = {n: mel_filters(bands, n, 22050).to(device) for n, bands in MEL_SCALES.items()}
    seen, held = (crops(some, 16, s.crop_frames, np.random.default_rng(1), device)
                  for some in (clips, held_clips))
    clock = saved = logged = time.time()
    scores, parts, all_codes = {}, [], []
    while True:
        progress = step / s.steps if s.steps else spent / 60 / s.minutes
        lr = s.lr * min(1, (step + 1) / s.warmup) * (1 + math.cos(math.pi * min(progress, 1))) / 2
        for group in m["opt"].param_groups + m["opt_disc"].param_groups:
            group["lr"] = lr

        if progress >= 1 or (step and time.time() - saved > 60 * s.save_minutes):
            scores = held_scores(m, seen, held, filters)
            save(s, m, phones, step, spent)
            saved = time.time()
        if parts and (step % 50 == 0 or progress >= 1):
            seconds = len(parts) * s.batch * s.crop_frames / 12.5
            row = {"step": step, "minutes": spent / 60, "lr": lr,
                   "audio_s_per_s": seconds / (time.time() - logged)}
            row |= means(parts) | code_use(torch.cat(all_codes), m["codec"].codebook_size) | scores
            write_row(s, row, max(spent / 60 * (1 / progress - 1), 0))
            scores, parts, all_codes, logged = {}, [], [], time.time()
        if progress >= 1:
            return step

        # the seed is the step, so that a resumed run sees the data it would have seen
        rng = np.random.default_rng((s.seed, step))
        x, y = crops(clips, s.batch, s.crop_frames, rng, device)
        losses, codes = train_step(s, m, x, y, filters, progress >= s.adversarial_from, rng)
        keep = min(s.ema, (1 + step) / (10 + step))  # a short memory at first
        with torch.no_grad():
            torch._foreach_lerp_(list(m["average"].parameters()), list(m["codec"].parameters()),
                                 1 - keep)
        parts.append(losses), all_codes.append(codes)
        step, spent, clock = step + 1, spent + time.time() - clock, time.time()


def means(parts):
    """[{name: loss}] of some steps -> {name: mean}, of the steps that have it."""
    names = {name for part in parts for name in part}
    return {name: torch.stack([part[name] for part in parts if name in part]).mean().item()
            for name in names}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as e:
        sys.exit(f"train_codec.py: {e}")
