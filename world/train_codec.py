"""Train MiniCodec (codec.py), the small speech codec of the shipped default, on recordings in raw Behavior-SD form:

    python -m world.train_codec data=corpus out=out/codec minutes=40        and, after an interruption, the same + resume=true

Writes to `out`: codec.safetensors (for load_codec), checkpoint.pt and log.csv. The recipe is that of Vocos (2306.00814)
and DAC (2306.06546), cut down to what two CPU cores do in half an hour:
- a log-mel distance at several resolutions, from the first step to the last;
- after a third of the time, three small spectrogram discriminators, hinge losses and feature matching;
- our own: a small head predicts the phonemes from the quantised numbers, so that codes carry words and are easy for a
  language model. (Moshi, 2410.00037, distils WavLM into Mimi for that; our corpus knows its phonemes.) Data without a
  `phones` column trains without it. The head is thrown away.
Left out of the usual recipe: period discriminators, loss balancing, quantiser dropout. Time, not steps, sets the
schedule: a slower machine trains fewer steps, but always to the end of the decay.
"""
import copy
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from tqdm import tqdm

from codec import AUDIO_SUFFIXES, HOP, STEPS, MiniCodec, mel_filters, read_audio, save_minicodec
from config import InputError, load_settings, write_atomically

FRAME = STEPS * HOP  # samples
MEL_SCALES = {256: 20, 512: 40, 1024: 80, 2048: 120}  # STFT window -> mel bands of the distance
DISC_WINDOWS = (512, 1024, 2048)  # one discriminator each, on spectra that the distance needs anyway
COLUMNS = ("step", "minutes", "lr", "mel", "phone", "phone_right", "adversarial", "matching", "discriminator", "use",
           "perplexity", "audio_s_per_s", "held_mel", "held_phone", "held_phone_right")  # of log.csv


@dataclass
class Settings:
    data: str = "corpus"  # raw folder: {train,validation}/NAME.flac|wav|mp3 and, for the phonemes, NAME.json
    out: str = "out/codec"  # folder to write to
    resume: bool = False  # go on from out/checkpoint.pt
    decoder_only: bool = False  # with resume: the encoder stays that of out/codec.safetensors, and codes made by it valid
    minutes: float = 40.0  # of training, loading excluded; the learning rate decays to 0 over them
    steps: int = 0  # if above 0, train so many steps instead
    batch: int = 8  # crops a step
    crop_frames: int = 20  # of 80 ms
    lr: float = 8e-4  # at its highest
    warmup: int = 100  # steps
    adversarial_from: float = 0.33  # share of the training after which the discriminators join
    mel_weight: float = 15.0
    phone_weight: float = 2.0
    match_weight: float = 2.0  # feature matching, against 1 for the adversarial loss
    ema: float = 0.999  # the file holds this running average of the weights
    silence: float = 0.1  # share of crops from anywhere; the others hold speech
    level: int = 5  # FSQ levels per number; level**4 codes a codebook
    step_width: int = 192  # decoder channels at 87.5 Hz (the encoder has 2/3)
    frame_width: int = 256  # channels at 12.5 Hz
    save_minutes: float = 3.0  # between checkpoints
    seed: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# Data


def load_audio(folder, phones=None):
    """Every channel of every recording in `folder`, one behind the other, in memory.

    Returns audio (N,) int16, labels (N / 252,) uint8 (index into `phones`; 0 is silence), phones (list of str; empty
    where a recording has none, else the ones given or, if None, all that occur). Raises InputError if there are none.
    """
    paths = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
    if not paths:
        raise InputError(f"{folder}: holds no recording ({', '.join(AUDIO_SUFFIXES)}); give data=FOLDER with train/ and "
                         "validation/ in it")

    def read(path):
        audio = read_audio(path)
        audio = F.pad(audio, (0, -audio.shape[1] % FRAME)).clamp(-1, 1)
        try:
            marks = json.loads(path.with_suffix(".json").read_text()).get("phones")
        except OSError:
            marks = None
        except ValueError as e:
            raise InputError(f"{path.with_suffix('.json')}: not valid JSON ({e}); make it again") from e
        return (audio * 32767).short().numpy(), marks

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        loaded = list(tqdm(pool.map(read, paths), f"load {folder}", len(paths), unit="file", disable=None))
    if not all(marks and any(marks) for _, marks in loaded):
        phones = []
    elif phones is None:
        phones = ["silence"] + sorted({phone for _, marks in loaded for channel in marks for phone, _, _ in channel})
    if len(phones) > 255:
        raise InputError(f"{folder}: {len(phones)} different phones; check the `phones` column, 255 are supported")
    index = {phone: i for i, phone in enumerate(phones)}
    audio = np.concatenate([channels.reshape(-1) for channels, _ in loaded])
    labels, place = np.zeros(len(audio) // HOP, np.uint8), 0
    for channels, marks in loaded:
        for c in range(len(channels)):
            steps = channels.shape[1] // HOP
            for phone, start, duration in marks[c] if phones else ():
                # a step belongs to the phone at its middle
                first, last = (math.ceil(t * 22050 / HOP - 0.5) for t in (start, start + duration))
                labels[place:place + steps][max(first, 0):max(last, 0)] = index.get(phone, 0)
            place += steps
    return audio, labels, phones


def speech_frames(audio):
    """audio (N,) int16 -> places (in frames of 80 ms) of the frames louder than -50 dB."""
    peaks = np.abs(audio.reshape(-1, FRAME)).max(1)
    return np.flatnonzero(peaks > 32767 * 10 ** (-50 / 20))


def crops(audio, labels, speech, count, frames, silence, rng):
    """`count` random crops: audio (count, frames * 1764) float32, labels (count, 7, frames) int64.

    A crop may run over the border of two recordings, which does no harm.
    """
    place = rng.choice(speech, count) * STEPS - rng.integers(0, frames * STEPS, count)  # in steps of 252 samples
    anywhere = rng.integers(0, len(labels), count)
    place = np.where(rng.random(count) < silence, anywhere, place).clip(0, len(labels) - frames * STEPS)
    x = np.stack([audio[p * HOP:p * HOP + frames * FRAME] for p in place]).astype(np.float32) / 32767
    x *= 10 ** (rng.uniform(-9, 3, (count, 1)) / 20).astype(np.float32)  # louder and softer speakers than in the corpus
    y = np.stack([labels[p:p + frames * STEPS] for p in place]).reshape(count, frames, STEPS).transpose(0, 2, 1)
    return torch.from_numpy(x.clip(-1, 1)), torch.from_numpy(y.astype(np.int64))


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def spectrum(audio, n_fft):
    """STFT, Hann window, hop n_fft / 4, no padding: (B, N) -> complex (B, N // hop - 3, n_fft // 2 + 1).

    Made of whole hops put side by side, whose gradient is twice as fast on a CPU as that of torch.stft.
    """
    hop = n_fft // 4
    hops = audio[:, :audio.shape[1] // hop * hop].unflatten(1, (-1, hop))
    windows = torch.cat([hops[:, i:hops.shape[1] - 3 + i] for i in range(4)], -1)
    return torch.fft.rfft(windows * torch.hann_window(n_fft, device=audio.device))


def magnitude(spectra):
    """|S|, with a finite gradient at 0."""
    return (spectra.real.square() + spectra.imag.square() + 1e-10).sqrt()


def mel_distance(a, b, filters):
    """Mean over resolutions of |log10 mel(a) - log10 mel(b)|; a, b: {n_fft: spectrum}; below -86 dB all is silence."""
    def log_mel(spectra, n_fft):
        return torch.log10((magnitude(spectra) @ filters[n_fft]).clamp(min=1e-3))
    return sum(F.l1_loss(log_mel(a[n], n), log_mel(b[n], n)) for n in filters) / len(filters)


class Discriminator(nn.Module):
    """A spectrum (B, T, bins) -> maps of all layers, the last being its opinion. 46 k parameters."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(weight_norm(conv).to(memory_format=torch.channels_last) for conv in (
            nn.Conv2d(3, 16, (3, 9), (1, 4), (1, 4)), nn.Conv2d(16, 24, (3, 9), (1, 2), (1, 4)),
            nn.Conv2d(24, 32, (3, 5), (2, 2), (1, 2)), nn.Conv2d(32, 32, 3, 1, 1), nn.Conv2d(32, 1, 3, 1, 1)))

    def forward(self, spectra):
        size = magnitude(spectra)
        soft = (size + 1e-2).rsqrt()  # square-root compression: quiet harmonics count too, and phase stays visible
        x = torch.stack([spectra.real * soft, spectra.imag * soft, torch.log10(size + 1e-3)], -1).permute(0, 3, 1, 2)
        maps = []
        for layer in self.layers:
            x = layer(x if not maps else F.leaky_relu(x, 0.1))
            maps.append(x)
        return maps


# ---------------------------------------------------------------------------------------------------------------------
# Training


def main(argv):
    s = load_settings(Settings, argv)
    if min(s.batch, s.crop_frames - 1, s.level - 1, s.minutes, s.warmup) <= 0:
        raise InputError("batch, minutes and warmup must be above 0, crop_frames and level above 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()
    torch.manual_seed(s.seed)
    out = Path(s.out)
    if (out / "checkpoint.pt").exists() and not s.resume:
        raise InputError(f"{out}: a training is there already; give resume=true to go on, or another out=")
    audio, labels, phones = load_audio(f"{s.data}/train")
    held_audio, held_labels, _ = load_audio(f"{s.data}/validation", phones)
    speech, held_speech = speech_frames(audio), speech_frames(held_audio)
    for name, a, places in (("train", audio, speech), ("validation", held_audio, held_speech)):
        if len(a) < s.crop_frames * FRAME or not len(places):
            raise InputError(f"{s.data}/{name}: shorter than one crop, or all of it silent; give more speech")
    held = [t.to(device) for t in crops(held_audio, held_labels, held_speech, 32, 25 if len(held_audio) > 25 * FRAME
                                        else s.crop_frames, 0.1, np.random.default_rng(0))]
    print(f"train {len(audio) / 22050 / 3600:.2f} h of channels, {len(speech) / 12.5 / 3600:.2f} h of speech; "
          f"validation {len(held_speech) / 12.5 / 60:.1f} min; {len(phones)} phones; on {device}")

    codec = MiniCodec((s.level,) * 4, step_channels=(s.step_width * 2 // 3, s.step_width), frame_channels=s.frame_width)
    codec = codec.to(device)
    average = copy.deepcopy(codec).requires_grad_(False)  # the running average of the weights
    head = nn.Sequential(nn.Conv1d(16, 256, 3, padding=1), nn.SiLU(),
                         nn.Conv1d(256, max(len(phones), 1) * STEPS, 1)).to(device)
    discs = nn.ModuleDict({str(n): Discriminator() for n in DISC_WINDOWS}).to(device)
    opt = torch.optim.AdamW([*codec.parameters(), *head.parameters()], s.lr, (0.8, 0.99))
    opt_disc = torch.optim.AdamW(discs.parameters(), s.lr, (0.8, 0.99))
    filters = {n: mel_filters(bands, n, 22050).to(device) for n, bands in MEL_SCALES.items()}
    kept = {"codec": codec, "average": average, "head": head, "discs": discs, "opt": opt, "opt_disc": opt_disc}
    print(f"{sum(p.numel() for p in codec.parameters()) / 1e6:.2f} M parameters")

    step, spent = 0, 0.0  # spent: seconds of training so far, over all runs
    if s.resume:
        step, spent = load_checkpoint(out / "checkpoint.pt", kept, device)
    if s.decoder_only:
        if not s.resume:
            raise InputError("decoder_only=true goes on from a trained codec; add resume=true and its out=")
        codec.load_state_dict(average.state_dict())
        for name, weight in codec.named_parameters():
            weight.requires_grad_(not name.startswith("enc_"))

    def losses(model, x, y):
        """x (B, N), y (B, 7, T) -> {n_fft: decoded spectrum}, {n_fft: real spectrum}, codes, mel distance, phone loss,
        share of the steps not silent whose phone is predicted."""
        with autocast:
            fake, quantised, codes = model(x)
            logits = head(quantised).unflatten(1, (-1, STEPS)).float()  # (B, phones, 7, T)
        real_s, fake_s = ({n: spectrum(a.float(), n) for n in MEL_SCALES} for a in (x, fake))
        phone = F.cross_entropy(logits, y) if phones else torch.zeros((), device=device)
        right = (logits.argmax(1) == y)[y > 0].float().sum() / (y > 0).sum().clamp(min=1)
        return fake_s, real_s, codes, mel_distance(fake_s, real_s, filters), phone, right

    def save():
        """The checkpoint and the codec as it is now, each atomic."""
        state = {name: module.state_dict() for name, module in kept.items()}
        state |= {"step": step, "spent": spent, "settings": asdict(s)}
        write_atomically(out / "checkpoint.pt", lambda path: torch.save(state, path))
        save_minicodec(average, out / "codec.safetensors")

    out.mkdir(parents=True, exist_ok=True)
    if not s.resume:
        (out / "log.csv").write_text(",".join(COLUMNS) + "\n")
    scores, sums, counts, steps_counted = {}, {}, torch.zeros(codec.num_codebooks, codec.codebook_size), 0
    clock, saved, logged = time.time(), time.time(), time.time()
    while True:
        progress = step / s.steps if s.steps else spent / 60 / s.minutes
        done = progress >= 1
        adversarial = progress >= s.adversarial_from
        lr = s.lr * min(1, (step + 1) / s.warmup) * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1)))
        for group in opt.param_groups + opt_disc.param_groups:
            group["lr"] = lr

        if done or (step and time.time() - saved > 60 * s.save_minutes):
            with torch.no_grad():
                scores = dict(zip(COLUMNS[-3:], map(float, losses(average, *held)[3:])))
            save()
            saved = time.time()
        if steps_counted and (step % 50 == 0 or done):
            rate = steps_counted * s.batch * s.crop_frames / 12.5 / (time.time() - logged)
            share = counts / counts.sum(1, keepdim=True)  # (K, C)
            row = {name: (value / steps_counted).item() for name, value in sums.items()}
            row |= {"step": step, "minutes": spent / 60, "lr": lr, "audio_s_per_s": rate,
                    "use": (counts > 0).float().mean().item(),
                    "perplexity": torch.exp(-(share * share.clamp(min=1e-9).log()).sum(1)).mean().item()}
            row, scores = row | scores, {}
            with open(out / "log.csv", "a") as log:
                print(",".join(f"{row[name]:.5g}" if name in row else "" for name in COLUMNS), file=log)
            eta = max(spent / 60 * (1 / progress - 1), 0)
            print(" ".join(f"{name} {value:.3g}" if name != "step" else f"step {step}" for name, value in row.items()),
                  f"eta {eta:.1f} min", flush=True)
            sums, steps_counted, logged = {}, 0, time.time()
            counts.zero_()
        if done:
            break

        # the seed is the step, so that a resumed run sees the data it would have seen
        x, y = (t.to(device) for t in crops(audio, labels, speech, s.batch, s.crop_frames, s.silence,
                                            np.random.default_rng((s.seed, step))))
        fake, real, codes, mel, phone, right = losses(codec, x, y)
        loss = s.mel_weight * mel + s.phone_weight * phone
        parts = {"mel": mel, "phone": phone, "phone_right": right}
        if adversarial:
            # Discriminators look at half of each crop, a random half: they cost more than all the rest.
            start = np.random.default_rng((s.seed, step, 1)).random() / 2
            half = {n: slice(int(start * len(fake[n][0])), int((start + 0.5) * len(fake[n][0]))) for n in DISC_WINDOWS}
            discs.requires_grad_(True)
            with autocast:
                on_real = {n: discs[str(n)](real[n][:, half[n]]) for n in DISC_WINDOWS}
                on_fake = {n: discs[str(n)](fake[n][:, half[n]].detach()) for n in DISC_WINDOWS}
            disc = sum(F.relu(1 - on_real[n][-1].float()).mean() + F.relu(1 + on_fake[n][-1].float()).mean()
                       for n in DISC_WINDOWS) / len(DISC_WINDOWS)
            opt_disc.zero_grad(set_to_none=True)
            disc.backward()
            nn.utils.clip_grad_norm_(discs.parameters(), 1.0)
            opt_disc.step()
            discs.requires_grad_(False)
            with autocast:
                on_fake = {n: discs[str(n)](fake[n][:, half[n]]) for n in DISC_WINDOWS}
            fool = -sum(on_fake[n][-1].float().mean() for n in DISC_WINDOWS) / len(DISC_WINDOWS)
            match = sum(F.l1_loss(f.float(), r.detach().float()) for n in DISC_WINDOWS
                        for f, r in zip(on_fake[n][:-1], on_real[n][:-1])) / len(DISC_WINDOWS)
            loss = loss + fool + s.match_weight * match
            parts |= {"adversarial": fool, "matching": match, "discriminator": disc}
        if not loss.isfinite():
            raise InputError(f"step {step}: the loss is {loss.item()}; resume from {out} with a smaller lr")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*codec.parameters(), *head.parameters()], 1.0)
        opt.step()
        with torch.no_grad():
            keep = min(s.ema, (1 + step) / (10 + step))  # a short memory at first
            torch._foreach_lerp_(list(average.parameters()), list(codec.parameters()), 1 - keep)

        for name, value in parts.items():
            sums[name] = sums.get(name, 0) + value.detach()
        for k, row in enumerate(codes.transpose(0, 1).flatten(1).cpu()):
            counts[k] += torch.bincount(row, minlength=codec.codebook_size)
        step, steps_counted = step + 1, steps_counted + 1
        spent, clock = spent + time.time() - clock, time.time()
    print(f"{out / 'codec.safetensors'}: done after {step} steps")


def load_checkpoint(path, kept, device):
    """Fill the modules and optimizers in `kept`; returns (step, seconds spent). Raises InputError."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        for name, module in kept.items():
            module.load_state_dict(state[name])
        return state["step"], state["spent"]
    except OSError as e:
        raise InputError(f"{path}: no checkpoint to go on from; leave out resume=true") from e
    except Exception as e:
        raise InputError(f"{path}: doesn't fit these settings and data, or is damaged "
                         f"({' '.join(str(e).split())[:120]}); use the settings it was made with") from e


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as e:
        sys.exit(f"train_codec.py: {e}")
