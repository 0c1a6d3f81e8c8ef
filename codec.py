"""Speech to codes and back: NanoCodec in plain PyTorch, our own small MiniCodec, the FSQ they
share, Mimi of transformers, and audio files.

All make 12.5 frames a second: 1764 samples at 22,050 Hz (Mimi: 1920 at 24 kHz); each frame becomes
K independent codes, one per codebook (Mimi: K that build on each other). A codec is
`load_codec(path)`; `encode` and `decode` are its whole interface (`streaming()`: the same two,
piece by piece):

    audio (B, N) --encoder--> z (B, K*D, T) --FSQ--> codes (B, K, T)
                 codes --FSQ^-1--> z^ (B, K*D, T) --decoder--> audio (B, N)

NanoCodec (Casanova et al. 2025, arXiv 2508.05835) is an inverted HiFi-GAN, FSQ (Mentzer et al.
2023, arXiv 2309.15505) and a causal HiFi-GAN. Its architecture is read from the archive, so any
size loads. Left out, since inference needs none of it: the discriminators, the losses, and weight
norm (folded at loading).
"""
import hashlib
import inspect
import io
import json
import math
import pickle
import re
import tarfile
import zlib
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import scipy.signal
import soundfile
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from config import InputError, brief, hub_problem, write_atomically

# -------------------------------------------------------------------------------------------------
# Finite scalar quantisation


class FSQ(nn.Module):
    """K independent codebooks, each a grid over D numbers: number d is rounded to one of
    `levels[d]` values in [-1, 1]. A code is the D digits of its grid point in mixed radix,
    `levels[0]` the lowest digit; C = prod(levels) codes. With L levels, in one line each:

        w = (L - 1) / 2 * (1 - eps),  o = 1/2 for even L, else 0
        digit = round(w tanh(z + tan(o / w)) - o) + floor(L / 2)
        code = sum_d digit_d prod_{j<d} L_j

    Why the offset: w tanh(.) lies in (-w, w). For L = 5 that is (-2, 2) and rounds to -2 .. 2, five
    values. For L = 4 it would be (-1.5, 1.5), which rounds to -1, 0, 1 (and -2 or 2 at the very
    edge): three and a bit. Moved by o to (-2, 1) it rounds to -2, -1, 0, 1, digits 0 .. 3. The same
    o inside the tanh keeps z = 0 near a grid point: L = 4, eps = 0: w tanh(tan(1/3)) - 1/2 =
    -0.0004, so digit 2, which decodes to (2 - 2) / 2 = 0.
    """

    def __init__(self, levels, num_codebooks, eps=1e-3):
        super().__init__()
        self.num_codebooks, self.codebook_size, self.eps = num_codebooks, math.prod(levels), eps
        bases = [math.prod(levels[:d]) for d in range(len(levels))]
        # not persistent: they follow from the settings, so they stay out of checkpoints
        self.register_buffer("levels", torch.tensor(levels)[:, None], persistent=False)  # (D, 1)
        self.register_buffer("bases", torch.tensor(bases)[:, None], persistent=False)  # (D, 1)

    def forward(self, z):
        """z (B, K*D, T), unbounded -> (quantised (B, K*D, T) in [-1, 1], codes (B, K, T) int64).

        Rounding passes the gradient straight through, so the same call serves training.
        """
        z = z.unflatten(1, (self.num_codebooks, -1))  # (B, K, D, T)
        # tan is NeMo's: atanh would send 0 to 0 exactly, but the weights expect tan
        half_width = (self.levels - 1) / 2 * (1 - self.eps)
        offset = 0.5 * (self.levels % 2 == 0)
        bounded = half_width * torch.tanh(z + torch.tan(offset / half_width)) - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        digits = bounded.detach().round().long() + self.levels // 2  # (B, K, D, T), 0 .. levels-1
        return (rounded / (self.levels // 2)).flatten(1, 2), (digits * self.bases).sum(2)

    def decode(self, codes):
        """codes (B, K, T) in 0..C-1 -> the grid points they name, (B, K*D, T) in [-1, 1]."""
        digits = codes.long()[:, :, None] // self.bases % self.levels  # (B, K, D, T)
        return ((digits - self.levels // 2) / (self.levels // 2)).flatten(1, 2)


# -------------------------------------------------------------------------------------------------
# NanoCodec


def length_mask(lengths, size):
    """(B,) lengths -> (B, size) bool, true inside each item."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def with_past(x, dim, layer, state):
    """x preceded along `dim` by the `layer.span` steps before it: zeros where x is a beginning.

    `state` is what a stream remembers between its chunks: a dict, layer -> the last `span` steps of
    its input (zeros, or nothing, at first). This call reads and renews the layer's entry; None: no
    stream.
    """
    past = None if state is None else state.get(layer)
    if past is None:
        past = x.new_zeros(*x.shape[:dim], layer.span, *x.shape[dim + 1:])
    x = torch.cat([past, x], dim)
    if state is not None:
        state[layer] = x.narrow(dim, x.shape[dim] - layer.span, layer.span).clone()
    return x


class Past(nn.Module):
    """A place in the stream's state for a step without weights of its own (see with_past)."""

    def __init__(self, span):
        super().__init__()
        self.span = span


class Conv(nn.Conv1d):
    """1-d convolution that pads its own input: causally with zeros, or on both sides with the edge
    values."""

    def __init__(self, c_in, c_out, kernel, stride=1, dilation=1, causal=False):
        self.causal, self.span = causal, (kernel - 1) * dilation
        padding = {}
        if not causal:
            padding = {"padding": (self.span + 2 - stride) // 2, "padding_mode": "replicate"}
        super().__init__(c_in, c_out, kernel, stride, dilation=dilation, **padding)

    def forward(self, x, lengths=None, state=None):
        """x (B, c_in, T) -> (B, c_out, T / stride). `lengths` (B,) or None (all T) matter to a
        non-causal one only, `state` (see with_past) to a causal one."""
        if self.causal:
            return super().forward(with_past(x, 2, self, state))
        if lengths is not None:
            # Repeat an item's last step through its padding: then it sees the edge it would see
            # alone. (NeMo puts zeros there, so that its codes of the last frames depend on what
            # else is in the batch.)
            steps = torch.arange(x.shape[-1], device=x.device)
            index = steps.minimum(lengths[:, None] - 1)  # (B, T)
            x = x.gather(2, index[:, None].expand_as(x))
        return super().forward(x)


class UpConv(nn.ConvTranspose1d):
    """Causal transposed convolution, T -> T * rate: a step reaches into the `rate` outputs after
    its own, never into those before."""

    span = 1

    def __init__(self, c_in, c_out, rate, groups):
        super().__init__(c_in, c_out, 2 * rate, rate, groups=groups)

    def forward(self, x, state=None):
        rate = self.stride[0]
        # cut off: what the past step itself gives, and what reaches into the step after the last
        return super().forward(with_past(x, 2, self, state))[..., rate:-rate]


class HalfSnake(nn.Module):
    """Snake, x + sin^2(alpha x) / alpha, on the first half of the channels; leaky ReLU on the rest.
    """

    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels // 2, 1))

    def forward(self, x):
        snake, rest = x.tensor_split([self.alpha.shape[1]], dim=1)
        snake = snake + torch.sin(self.alpha * snake).square() / (self.alpha + 1e-9)
        return torch.cat([snake, F.leaky_relu(rest)], dim=1)


def leaky_relu(channels):
    """The encoder's activation; `channels` is there because HalfSnake, the decoder's, needs it."""
    return nn.LeakyReLU()


class ResidualBlock(nn.Module):
    """x + conv(act(conv_dilated(act(x)))), both convolutions of one kernel size."""

    def __init__(self, channels, kernel, dilation, activation, causal):
        super().__init__()
        self.input_activation, self.skip_activation = activation(channels), activation(channels)
        self.input_conv = Conv(channels, channels, kernel, dilation=dilation, causal=causal)
        self.skip_conv = Conv(channels, channels, kernel, causal=causal)

    def forward(self, x, lengths=None, state=None):
        y = self.input_conv(self.input_activation(x), lengths, state)
        return x + self.skip_conv(self.skip_activation(y), lengths, state)


class ResidualLayer(nn.ModuleList):
    """HiFi-GAN's multi-receptive field: the mean over kernel sizes of a chain of residual blocks
    over dilations."""

    def __init__(self, channels, kernels, dilations, activation, causal):
        super().__init__(
            nn.ModuleList(ResidualBlock(channels, k, d, activation, causal) for d in dilations)
            for k in kernels)

    def forward(self, x, lengths=None, state=None):
        total = 0
        for chain in self:
            y = x
            for block in chain:
                y = block(y, lengths, state)
            total = total + y
        return total / len(self)


class Encoder(nn.Module):
    """Audio (B, 1, N) -> z (B, encoded_dim, N / prod(rates)): an inverted HiFi-GAN, not causal,
    channels doubling."""

    def __init__(self, down_sample_rates, encoded_dim, base_channels=32, in_kernel_size=7,
                 out_kernel_size=7, resblock_kernel_sizes=(3, 7, 11),
                 resblock_dilation_sizes=(1, 3, 5)):
        super().__init__()
        c = base_channels
        self.rates = down_sample_rates
        self.pre_conv = Conv(1, c, in_kernel_size)
        self.res_layers, self.down_sample_conv_layers = nn.ModuleList(), nn.ModuleList()
        for rate in self.rates:
            self.res_layers.append(ResidualLayer(
                c, resblock_kernel_sizes, resblock_dilation_sizes, leaky_relu, causal=False))
            self.down_sample_conv_layers.append(Conv(c, 2 * c, 2 * rate, stride=rate))
            c *= 2
        self.post_conv = Conv(c, encoded_dim, out_kernel_size)

    def forward(self, x, lengths=None):
        """`lengths` (B,) in samples, whole frames; None where all items fill x."""
        x = self.pre_conv(x, lengths)
        for rate, res, down in zip(self.rates, self.res_layers, self.down_sample_conv_layers):
            x = down(F.leaky_relu(res(x, lengths)), lengths)
            lengths = None if lengths is None else lengths // rate
        return self.post_conv(F.leaky_relu(x), lengths)

    def reach(self):
        """-> how many samples before a frame, and how many after it, play a part in its codes."""
        back = ahead = self.pre_conv.span // 2
        step = 1  # samples
        for rate, chains, down in zip(self.rates, self.res_layers, self.down_sample_conv_layers):
            spans = [sum(block.input_conv.span + block.skip_conv.span for block in chain)
                     for chain in chains]
            sides = max(spans) // 2
            left = down.padding[0]  # of its 2 * rate inputs, `rate` are the step's own
            back, ahead = back + step * (sides + left), ahead + step * (sides + rate - left)
            step *= rate
        return back + step * (self.post_conv.span // 2), ahead + step * (self.post_conv.span // 2)


class Decoder(nn.Module):
    """z (B, input_dim, T) -> audio (B, 1, T * prod(rates)) in [-1, 1]: a causal HiFi-GAN, channels
    halving."""

    def __init__(self, up_sample_rates, input_dim, base_channels=512, in_kernel_size=7,
                 out_kernel_size=3, resblock_kernel_sizes=(3, 7, 11),
                 resblock_dilation_sizes=(1, 3, 5), n_groups_equal_to_out_channels=True):
        super().__init__()
        c = base_channels
        self.pre_conv = Conv(input_dim, c, in_kernel_size, causal=True)
        self.activations, self.up_sample_conv_layers = nn.ModuleList(), nn.ModuleList()
        self.res_layers = nn.ModuleList()
        for rate in up_sample_rates:
            self.activations.append(HalfSnake(c))
            self.up_sample_conv_layers.append(
                UpConv(c, c // 2, rate, groups=c // 2 if n_groups_equal_to_out_channels else 1))
            c //= 2
            self.res_layers.append(ResidualLayer(
                c, resblock_kernel_sizes, resblock_dilation_sizes, HalfSnake, causal=True))
        self.post_activation = HalfSnake(c)
        self.post_conv = Conv(c, 1, out_kernel_size, causal=True)

    def forward(self, z, state=None):
        x = self.pre_conv(z, state=state)
        for act, up, res in zip(self.activations, self.up_sample_conv_layers, self.res_layers):
            x = res(up(act(x), state), state=state)
        return self.post_conv(self.post_activation(x), state=state).clamp(-1, 1)


# The parts of an archive's settings, and what of theirs must be so for it to be a NanoCodec's
PARTS = {"audio_encoder": {"_target_": "HiFiGANEncoder", "activation": "lrelu",
                           "pad_mode": "replicate"},
         "audio_decoder": {"_target_": "CausalHiFiGANDecoder", "activation": "half_snake",
                           "output_activation": "clamp", "pad_mode": "zeros"},
         "vector_quantizer": {"_target_": "GroupFiniteScalarQuantizer"}}


class NanoCodec(nn.Module):
    """NVIDIA's NanoCodec from the settings in a `.nemo` archive. Use `load_codec`, which fills its
    weights.

    Attributes: sample_rate (Hz), samples_per_frame, num_codebooks K, codebook_size C; context and
    lookahead: the frames before and after a frame that play a part in its codes. (Released: 9,150
    samples ahead, so 6 frames.)
    """

    def __init__(self, config):
        super().__init__()
        enc, dec, fsq = (dict(config[part]) for part in PARTS)
        enc.setdefault("activation", "lrelu")  # NeMo's defaults
        dec.setdefault("pad_mode", "zeros")
        for part, given in zip(PARTS, (enc, dec, fsq)):
            for key, value in PARTS[part].items():
                if (found := str(given.pop(key, None)).split(".")[-1]) != value:
                    raise InputError(f"{part}.{key} is {found}, only NanoCodec's {value} is "
                                     "supported")
        self.sample_rate = config["sample_rate"]
        self.samples_per_frame = size = config["samples_per_frame"]
        if not math.prod(enc["down_sample_rates"]) == math.prod(dec["up_sample_rates"]) == size:
            raise InputError(f"the sampling rates of encoder and decoder don't make {size} samples")
        self.fsq = FSQ(fsq["num_levels_per_group"], fsq["num_groups"], fsq.get("eps", 1e-3))
        self.num_codebooks, self.codebook_size = self.fsq.num_codebooks, self.fsq.codebook_size
        self.encoder, self.decoder = Encoder(**enc), Decoder(**dec)
        self.context, self.lookahead = (math.ceil(n / size) for n in self.encoder.reach())

    @torch.no_grad()
    def encode(self, audio, lengths=None):
        """audio (B, N) float32 at sample_rate in [-1, 1], lengths (B,) in samples or None (all N)
        -> (codes (B, K, T) int64, frame lengths (B,)). The last frame is filled up with zeros;
        codes behind an item's length are 0. An item's codes do not depend on the others in the
        batch.
        """
        audio, frames = whole_frames(audio, lengths, self.samples_per_frame)
        samples = frames * self.samples_per_frame
        alike = (samples == audio.shape[1]).all()
        z = self.encoder(audio[:, None], None if alike else samples)  # (B, K*D, T)
        codes = self.fsq(z)[1]
        return codes * length_mask(frames, codes.shape[2])[:, None], frames

    @torch.no_grad()
    def decode(self, codes, lengths=None):
        """codes (B, K, T) in 0..C-1, lengths (B,) in frames or None (all T) -> (audio (B, T *
        samples_per_frame) float32 in [-1, 1], zero behind an item's length, sample lengths (B,)).
        Raises InputError on codes of the wrong shape or out of range.
        """
        check_codes(codes, self.num_codebooks, self.codebook_size)
        # causal: what follows an item cannot change it
        audio = self.decoder(self.fsq.decode(codes))[:, 0]
        return silence_behind(audio, lengths, self.samples_per_frame)

    def streaming(self, rows=1, lookahead=None):
        """-> NanoStream, `rows` recordings piece by piece. `lookahead`: frames to wait for before a
        frame is coded; None: all that play a part, which gives `encode`'s codes."""
        return NanoStream(self, rows, self.lookahead if lookahead is None else lookahead)


def whole_frames(audio, lengths, samples_per_frame):
    """audio (B, N), lengths (B,) in samples or None -> (audio (B, T * samples_per_frame), frames
    (B,)): each item followed by zeros, T frames for the longest. Raises InputError unless every
    item has at least one sample."""
    check_audio(audio)
    if lengths is None:
        lengths = torch.full((len(audio),), audio.shape[1])
    lengths = torch.as_tensor(lengths)
    if lengths.min() < 1 or lengths.max() > audio.shape[1]:
        raise InputError(f"audio lengths must be in 1..{audio.shape[1]} samples, not "
                         f"{lengths.tolist()}")
    lengths = lengths.to(audio.device)
    frames = (lengths + samples_per_frame - 1) // samples_per_frame
    size = int(frames.max()) * samples_per_frame
    audio = F.pad(audio, (0, size - audio.shape[1]))  # a negative pad cuts
    return audio * length_mask(lengths, size), frames


def silence_behind(audio, lengths, samples_per_frame):
    """audio (B, T * samples_per_frame), lengths (B,) in frames or None (all T) -> (audio with zeros
    behind each item, sample lengths (B,))."""
    if lengths is None:
        lengths = torch.full((len(audio),), audio.shape[1] // samples_per_frame)
    samples = torch.as_tensor(lengths).to(audio.device) * samples_per_frame
    return audio * length_mask(samples, audio.shape[1]), samples


def check_audio(audio):
    """Raises InputError unless audio is (B, N), N > 0."""
    if audio.ndim != 2 or audio.shape[1] == 0:
        raise InputError("the codec takes audio (batch, samples) of at least one sample, not "
                         f"{tuple(audio.shape)}")


def check_codes(codes, num_codebooks, codebook_size):
    """Raises InputError unless codes are (B, K, T), T > 0, all in 0..C-1."""
    if codes.ndim != 3 or codes.shape[1] != num_codebooks or codes.shape[2] == 0:
        raise InputError(f"the codec takes codes (batch, {num_codebooks}, frames), not "
                         f"{tuple(codes.shape)}")
    if codes.min() < 0 or codes.max() >= codebook_size:
        raise InputError(f"codes must be in 0..{codebook_size - 1}, found {int(codes.min())}.."
                         f"{int(codes.max())}")


# -------------------------------------------------------------------------------------------------
# MiniCodec: our own, small enough to ship and to train on a laptop (world/train_codec.py)

HOP, N_FFT, STEPS = 252, 1008, 7  # a frame of 1764 samples is 7 steps of 252; a window is 4 steps


class ConvNeXt(nn.Module):
    """Depthwise convolution over a step and those before it, then two linear layers per step, added
    to the input."""

    def __init__(self, channels, kernel):
        super().__init__()
        self.span = kernel - 1
        self.depthwise = nn.Conv2d(channels, channels, (kernel, 1), groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 3 * channels), nn.Linear(3 * channels, channels)
        # small residuals at first, so that deep stacks start
        self.scale = nn.Parameter(torch.full((channels,), 0.3))

    def forward(self, x, state=None):
        """x (B, T, channels) -> (B, T, channels)."""
        # 2-D with channels last in memory: 3 times faster on a CPU
        y = with_past(x, 1, self, state).transpose(1, 2).unsqueeze(3)  # (B, channels, span + T, 1)
        y = self.norm(self.depthwise(y).squeeze(3).transpose(1, 2))
        # SiLU: on a CPU GELU takes longer than both products
        return x + self.scale * self.down(F.silu(self.up(y)))


class MiniCodec(nn.Module):
    """Log-mel -> ConvNeXt at 87.5 and 12.5 Hz -> FSQ -> ConvNeXt at 12.5 and 87.5 Hz -> inverse
    STFT (Vocos, Siuzdak 2023, arXiv 2306.00814). Not in the paper: our codec for the shipped
    default.

    Causal: frame t of the audio depends on codes up to t only, and is whole once they are there;
    codes up to t depend on audio up to the end of frame t + 1 (`lookahead`). The encoder's past is
    kept short, about 9 frames, so that a word gives the same codes wherever it is said; the
    decoder's is 2.5 s. Inside, sequences are (B, T, channels), which makes every linear layer one
    matrix product.

    Attributes: sample_rate (Hz), samples_per_frame, num_codebooks K, codebook_size C; `config`
    makes another like it.
    """

    sample_rate, samples_per_frame, lookahead = 22050, STEPS * HOP, 1

    def __init__(self, levels=(5, 5, 5, 5), num_codebooks=4, mel_bands=80, step_channels=(128, 192),
                 step_blocks=(2, 5), frame_channels=256, frame_blocks=(3, 5), frame_kernels=(3, 7)):
        """Pairs are (encoder, decoder); step_: of the blocks at 87.5 Hz, frame_: of those at 12.5
        Hz."""
        super().__init__()
        self.config = {"levels": levels, "num_codebooks": num_codebooks, "mel_bands": mel_bands,
                       "step_channels": step_channels, "step_blocks": step_blocks,
                       "frame_channels": frame_channels, "frame_blocks": frame_blocks,
                       "frame_kernels": frame_kernels}
        self.fsq = FSQ(levels, num_codebooks)
        self.num_codebooks, self.codebook_size = self.fsq.num_codebooks, self.fsq.codebook_size
        numbers = num_codebooks * len(levels)
        (enc_step, dec_step), size = step_channels, frame_channels
        mel = mel_filters(mel_bands, N_FFT, self.sample_rate)
        self.register_buffer("mel", mel, persistent=False)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)

        def blocks(count, channels, kernel):
            return nn.ModuleList(ConvNeXt(channels, kernel) for _ in range(count))

        self.enc_windows = Past(N_FFT - HOP)  # samples
        self.enc_in = nn.Linear(mel_bands, enc_step)
        self.enc_steps = blocks(step_blocks[0], enc_step, 7)
        self.enc_down = nn.Linear(STEPS * enc_step, size)
        self.enc_frames = blocks(frame_blocks[0], size, frame_kernels[0])
        self.enc_out = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, numbers))

        self.dec_in = nn.Linear(numbers, size)
        self.dec_frames = blocks(frame_blocks[1], size, frame_kernels[1])
        self.dec_up = nn.Linear(size, STEPS * dec_step)
        self.dec_steps = blocks(step_blocks[1], dec_step, 7)
        self.dec_out = nn.Sequential(nn.LayerNorm(dec_step), nn.Linear(dec_step, N_FFT + 2))
        # start quiet: most of a spectrum is
        nn.init.constant_(self.dec_out[1].bias[:N_FFT // 2 + 1], -3)
        self.dec_windows = Past(N_FFT // HOP - 1)  # steps

    def analyse(self, audio, state=None):
        """audio (B, T * 1764) -> (quantised (B, K*D, T) in [-1, 1], codes (B, K, T)), causal: that
        the encoder looks ahead by a frame means that the codes of frame t come out at t + 1."""
        # a step's window ends with it
        audio = with_past(audio, 1, self.enc_windows, state)
        windows = audio.unfold(1, N_FFT, HOP)  # (B, 7T, 1008)
        power = torch.fft.rfft(windows * self.window).abs().square()
        log_mel = torch.log((power @ self.mel).clamp(min=1e-5))
        x = self.enc_in((log_mel + 4) / 4)  # (B, 7T, enc_step); about -2..3 goes in
        for block in self.enc_steps:
            x = block(x, state)
        # (B, T, size): seven steps side by side are a frame
        x = self.enc_down(x.unflatten(1, (-1, STEPS)).flatten(2))
        for block in self.enc_frames:
            x = block(x, state)
        return self.fsq(self.enc_out(x).float().transpose(1, 2))

    def synthesise(self, quantised, state=None):
        """quantised (B, K*D, T) -> audio (B, T * 1764)."""
        x = self.dec_in(quantised.transpose(1, 2))
        for block in self.dec_frames:
            x = block(x, state)
        x = self.dec_up(x).unflatten(2, (STEPS, -1)).flatten(1, 2)  # (B, 7T, dec_step)
        for block in self.dec_steps:
            x = block(x, state)
        log_size, phase = self.dec_out(x).float().chunk(2, -1)  # (B, 7T, 505) each
        size = torch.exp(log_size.clamp(max=5))
        spectra = torch.complex(size * phase.cos(), size * phase.sin())
        windows = torch.fft.irfft(spectra) * self.window  # (B, 7T, 1008)
        # Overlap-add: a step's window begins with it, so that no later one adds to its samples.
        # Squared Hann windows at this hop add up to 1.5 everywhere.
        hops = with_past(windows, 1, self.dec_windows, state).unflatten(2, (4, HOP)) / 1.5
        return sum(hops[:, 3 - i:hops.shape[1] - i, i] for i in range(4)).flatten(1)

    def forward(self, audio):
        """audio (B, T * 1764) -> (decoded audio, the same shape, quantised (B, K*D, T), codes
        (B, K, T)): training. The last frame is coded as if silence came next."""
        quantised, codes = self.analyse(F.pad(audio, (0, self.samples_per_frame)))
        return self.synthesise(quantised[:, :, 1:]), quantised[:, :, 1:], codes[:, :, 1:]

    @torch.no_grad()
    def encode(self, audio, lengths=None):
        """As NanoCodec.encode."""
        audio, frames = whole_frames(audio, lengths, self.samples_per_frame)
        codes = self.analyse(F.pad(audio, (0, self.samples_per_frame)))[1][:, :, 1:]
        return codes * length_mask(frames, codes.shape[2])[:, None], frames

    @torch.no_grad()
    def decode(self, codes, lengths=None):
        """As NanoCodec.decode."""
        check_codes(codes, self.num_codebooks, self.codebook_size)
        audio = self.synthesise(self.fsq.decode(codes)).clamp(-1, 1)
        return silence_behind(audio, lengths, self.samples_per_frame)

    def streaming(self, rows=1):
        """-> MiniStream, `rows` recordings piece by piece."""
        return MiniStream(self, rows, self.lookahead)


def mel_filters(bands, n_fft, sample_rate):
    """Triangles of height 1, evenly spaced in mel (O'Shaughnessy) from 0 Hz to half the rate:
    (n_fft // 2 + 1, bands), to be multiplied by a spectrum from the right."""
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.float64) / 2595) - 1)  # Hz
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


def save_minicodec(codec, path):
    """Writes a MiniCodec as float16 safetensors with its `config` in the file's metadata. Atomic.
    """
    weights = {name: value.detach().to("cpu", torch.float16).contiguous()
               for name, value in codec.state_dict().items()}
    metadata = {"architecture": "MiniCodec", "config": json.dumps(codec.config)}
    write_atomically(path, lambda new: safetensors.torch.save_file(weights, new, metadata))


# -------------------------------------------------------------------------------------------------
# Mimi


class Mimi(nn.Module):
    """Kyutai's Mimi (Defossez et al. 2024, arXiv 2410.00037): transformers' MimiModel behind
    NanoCodec's interface.

    Residual quantisation: codebook k codes what is left by those before it, so its codes depend on
    theirs; the first, the semantic one, stands apart. Of the released 32 the paper uses the first
    8. Causal in both directions.

    Attributes: sample_rate (24,000 Hz), samples_per_frame (1920), num_codebooks K (8),
    codebook_size C (2048).
    """

    num_codebooks, lookahead = 8, 0

    def __init__(self, model):
        super().__init__()
        self.model, self.sample_rate = model, model.config.sampling_rate
        self.codebook_size = model.config.codebook_size
        self.samples_per_frame = round(self.sample_rate / model.config.frame_rate)

    @torch.no_grad()
    def encode(self, audio, lengths=None):
        """As NanoCodec.encode."""
        audio, frames = whole_frames(audio, lengths, self.samples_per_frame)
        found = self.model.encode(audio[:, None], num_quantizers=self.num_codebooks)
        codes = found.audio_codes  # (B, K, T)
        return codes * length_mask(frames, codes.shape[2])[:, None], frames

    @torch.no_grad()
    def decode(self, codes, lengths=None):
        """As NanoCodec.decode."""
        check_codes(codes, self.num_codebooks, self.codebook_size)
        audio = self.model.decode(codes.long()).audio_values[:, 0].clamp(-1, 1)
        return silence_behind(audio, lengths, self.samples_per_frame)

    def streaming(self, rows=1):
        """-> MimiStream, `rows` recordings piece by piece."""
        return MimiStream(self, rows, self.lookahead)


# -------------------------------------------------------------------------------------------------
# Streams: a codec piece by piece


class Stream:
    """What the streams of all codecs share: `encode` and `decode` of the next piece of B rows,
    which go on in step; together the pieces give what the codec's own encode and decode give at one
    go.

    State: `pending` (B, n), audio that is no whole frame yet; `ages` (B,), frames that each row has
    heard; what the codec's layers remember stands in its own class. A row is one recording: `reset`
    makes it a new one, no other row changes.
    """

    def __init__(self, codec, rows, lookahead):
        self.codec, self.rows, self.lookahead = codec, rows, lookahead
        self.device = next(codec.parameters()).device
        self.reset()

    def reset(self, row=None):
        """Row `row` begins anew, with its next frame; None: all of them."""
        if row is None:
            self.pending = torch.zeros(self.rows, 0, device=self.device)
            self.ages = torch.zeros(self.rows, dtype=torch.long, device=self.device)
        else:
            self.pending[row], self.ages[row] = 0, 0

    @torch.no_grad()
    def encode(self, chunk):
        """chunk (B, n) float32, any n -> codes (B, K, T) of the frames that can be coded by now:
        those that have been heard whole and whose look-ahead has been. T may be 0. A row that began
        later than others holds -1 where they have codes and it has none yet.
        """
        if chunk.ndim != 2 or len(chunk) != self.rows:
            raise InputError(f"the stream has {self.rows} rows and takes audio ({self.rows}, "
                             f"samples), not {tuple(chunk.shape)}")
        audio, size = torch.cat([self.pending, chunk], 1), self.codec.samples_per_frame
        frames = audio.shape[1] // size
        # a copy: a piece of a view would keep the whole
        self.pending = audio[:, frames * size:].clone()
        if frames == 0:
            return self.no_codes(0)
        codes = self.next_codes(audio[:, :frames * size])
        self.ages = self.ages + frames
        return self.begun(codes, self.lookahead)

    @torch.no_grad()
    def finish(self):
        """The recordings end here: codes (B, K, T) of the frames still owed, the last filled up
        with zeros. The stream is as new afterwards."""
        rest = -self.pending.shape[1] % self.codec.samples_per_frame
        codes = [self.encode(torch.zeros(self.rows, rest, device=self.device))]
        if self.lookahead:
            codes.append(self.begun(self.last_codes(), behind=0))
        self.reset()
        return torch.cat(codes, 2)

    def no_codes(self, frames):
        """-> (B, K, frames) zeros."""
        shape = self.rows, self.codec.num_codebooks, frames
        return torch.zeros(shape, dtype=torch.long, device=self.device)

    def begun(self, codes, behind):
        """codes (B, K, T), the last of them of `behind` frames ago -> the same with -1 before each
        row's first frame, without the columns in which no row has begun."""
        ago = torch.arange(-codes.shape[2], 0, device=self.device) - behind
        places = self.ages[:, None] + ago  # (B, T), frame numbers
        codes = codes.masked_fill((places < 0)[:, None], -1)
        return codes[:, :, (places >= 0).any(0)]


class MiniStream(Stream):
    """MiniCodec's: all its layers are causal, so each remembers its last inputs (see with_past):
    `heard` those of the encoder, `said` those of the decoder."""

    def reset(self, row=None):
        super().reset(row)
        if row is None:
            self.heard, self.said = {}, {}
        else:
            for past in (*self.heard.values(), *self.said.values()):
                past[row] = 0

    def next_codes(self, audio):
        """audio (B, T * samples_per_frame) -> codes (B, K, T), `lookahead` frames late."""
        return self.codec.analyse(audio, self.heard)[1]

    def last_codes(self):
        """-> the codes (B, K, lookahead) that are still owed at the end."""
        size = self.lookahead * self.codec.samples_per_frame
        return self.next_codes(torch.zeros(self.rows, size, device=self.device))

    @torch.no_grad()
    def decode(self, codes):
        """codes (B, K, T), T > 0 -> audio (B, T * samples_per_frame) in [-1, 1], every frame at
        once."""
        check_codes(codes, self.codec.num_codebooks, self.codec.codebook_size)
        return self.codec.synthesise(self.codec.fsq.decode(codes), self.said).clamp(-1, 1)


class NanoStream(Stream):
    """NanoCodec's: the layers of the decoder remember their last inputs (`said`); the encoder,
    which is not causal, codes anew a window of the last frames (`window`, audio) with every piece.

    A look-ahead below codec.lookahead makes other codes than `encode`: the encoder then takes the
    last sample for what follows, as it does at the end of a recording.
    """

    def reset(self, row=None):
        super().reset(row)
        if row is None:
            self.said = {}
            size = (self.codec.context + self.lookahead) * self.codec.samples_per_frame
            self.window = torch.zeros(self.rows, size, device=self.device)
        else:
            for past in self.said.values():
                past[row] = 0

    def next_codes(self, audio):
        """audio (B, T * samples_per_frame) -> codes (B, K, T), `lookahead` frames late."""
        frames = audio.shape[1] // self.codec.samples_per_frame
        window = torch.cat([self.window, audio], 1)
        self.window = window[:, audio.shape[1]:].clone()
        first = self.codec.context  # the frames before it are there to be looked back at
        return self.window_codes(window, self.ages + frames)[:, :, first:first + frames]

    def last_codes(self):
        """-> the codes (B, K, lookahead) that are still owed at the end."""
        return self.window_codes(self.window, self.ages)[:, :, self.codec.context:]

    def window_codes(self, window, ages):
        """window (B, T * samples_per_frame) of the last frames heard, of which `ages` (B,) or all
        belong to a row's recording -> codes (B, K, T), 0 before it."""
        frames = window.shape[1] // self.codec.samples_per_frame
        codes, ages = self.no_codes(frames), ages.clamp(max=frames)
        for age in ages[ages > 0].unique().tolist():  # rows of one age together
            part = window[ages == age, -age * self.codec.samples_per_frame:]
            codes[ages == age, :, -age:] = self.codec.encode(part)[0]
        return codes

    @torch.no_grad()
    def decode(self, codes):
        """codes (B, K, T), T > 0 -> audio (B, T * samples_per_frame) in [-1, 1], every frame at
        once."""
        check_codes(codes, self.codec.num_codebooks, self.codec.codebook_size)
        return self.codec.decoder(self.codec.fsq.decode(codes), self.said)[:, 0]


class MimiStream(Stream):
    """Mimi's: transformers' own caches, one set a row, since they cannot forget one row of several.

    State of a row: `encoder` (attention), `padding` (convolutions of the encoder), `decoder`
    (attention); transformers has none for the decoder's convolutions, so the last `latent` (of the
    upsampling) and the last REACH outputs of the transformer (`hidden`) are kept, and decoded again
    in front of the new ones.
    """

    REACH = 16  # of 40 ms; the convolutions of the released model reach 12 back

    def __init__(self, codec, rows, lookahead):
        # transformers renamed the arguments in 5.24
        known = inspect.signature(codec.model.encode).parameters
        self.cache = "cache" if "encoder_cache" in known else "past_key_values"
        super().__init__(codec, rows, lookahead)

    def reset(self, row=None):
        super().reset(row)
        new = {"encoder": None, "padding": None, "decoder": None, "latent": None, "hidden": None}
        if row is None:
            self.states = [dict(new) for _ in range(self.rows)]
        else:
            self.states[row] = new

    def next_codes(self, audio):
        """audio (B, T * samples_per_frame) -> codes (B, K, T)."""
        codes = []
        for row, state in zip(audio, self.states):
            found = self.codec.model.encode(
                row[None, None], num_quantizers=self.codec.num_codebooks, use_streaming=True,
                padding_cache=state["padding"], **{f"encoder_{self.cache}": state["encoder"]})
            state["encoder"] = getattr(found, f"encoder_{self.cache}")
            state["padding"] = found.padding_cache
            codes.append(found.audio_codes)  # (1, K, T)
        return torch.cat(codes)

    @torch.no_grad()
    def decode(self, codes):
        """codes (B, K, T), T > 0 -> audio (B, T * samples_per_frame) in [-1, 1], every frame at
        once."""
        check_codes(codes, self.codec.num_codebooks, self.codec.codebook_size)
        return torch.cat([self._decode(row[None], state) for row, state in zip(codes, self.states)])

    def _decode(self, codes, state):
        """codes (1, K, T) of the row that `state` belongs to -> audio (1, T * samples_per_frame).
        """
        decoder = self.codec.model.decoder
        latents = self.codec.model.quantizer.decode(codes.long())  # (1, channels, T)
        known = latents if state["latent"] is None else torch.cat([state["latent"], latents], 2)
        steps = latents.shape[2] * decoder.config.latent_stride
        hidden = decoder.upsample(known)[:, :, -steps:].transpose(1, 2)  # (1, 2T, channels), 25 Hz
        found = decoder.decoder_transformer(hidden, use_cache=True,
                                            **{self.cache: state["decoder"]})
        hidden = found.last_hidden_state
        known = hidden if state["hidden"] is None else torch.cat([state["hidden"], hidden], 1)
        audio = decoder.decoder_seanet(known.transpose(1, 2))[:, 0]
        state |= {"latent": latents[:, :, -1:], "decoder": found[self.cache],
                  "hidden": known[:, -self.REACH:]}
        return audio[:, -codes.shape[2] * self.codec.samples_per_frame:].clamp(-1, 1)


def encode_in_pieces(codec, audio, seconds=60.0):
    """A long recording's codes in flat memory: audio (B, N) float32 at the codec's rate -> codes
    (B, K, T), those that codec.encode(audio) gives, from pieces of `seconds`."""
    check_audio(audio)
    stream = codec.streaming(len(audio))
    pieces = audio.split(max(round(seconds * codec.sample_rate), 1), 1)
    return torch.cat([*map(stream.encode, pieces), stream.finish()], 2)


def decode_in_pieces(codec, codes, frames=750):
    """The audio of long codes in flat memory: codes (B, K, T) -> (B, T * samples_per_frame), as of
    codec.decode, on the CPU, from pieces of `frames`."""
    stream = codec.streaming(len(codes))
    return torch.cat([stream.decode(piece).cpu() for piece in codes.split(frames, 2)], 1)


# -------------------------------------------------------------------------------------------------
# Loading


def load_codec(path):
    """The codec in `path`, in eval mode on the CPU: NanoCodec from a `.nemo` archive (fetched,
    given its hub name `nvidia/...`), MiniCodec from a `.safetensors` file, Mimi from a folder or
    the hub (`kyutai/mimi`). Raises InputError on one that is missing, damaged or no codec.
    """
    torch.backends.cudnn.allow_tf32 = False  # its 10 bits would change codes on a GPU
    if Path(path).is_dir() or (str(path).startswith("kyutai/") and not Path(path).exists()):
        return _load_mimi(str(path))
    path = _fetch(path)
    if not path.is_file():
        raise InputError(f"{path}: no such codec file; give a .nemo archive, a .safetensors file, "
                         "a folder of Mimi's, nvidia/NAME or kyutai/mimi")
    if path.suffix == ".safetensors":
        return _load_minicodec(path)
    return _load_nemo(path)


def fingerprints(cfg, *keys):
    """{setting: fingerprint of the file it names}, of those of the keys that are not empty."""
    return {key: fingerprint(getattr(cfg, key)) for key in keys if getattr(cfg, key)}


def fingerprint(path):
    """16 hex digits that tell codecs apart: SHA-256 of the file that `load_codec(path)` opens, or
    of a folder's weights (a model's too), and of a hub name's. Raises InputError where a codec's
    hub name cannot be fetched.

    It travels with a data set and the models trained on it, whose codes mean nothing to another
    codec.
    """
    path = _fetch(path)
    files = [file for file in (path, *sorted(path.glob("*.safetensors"))) if file.is_file()]
    digest = hashlib.sha256(b"" if files else str(path).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _load_minicodec(path):
    """What `save_minicodec` wrote -> MiniCodec."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            weights = {name: file.get_tensor(name).float() for name in names}
    except (safetensors.SafetensorError, OSError) as e:
        raise InputError(f"{path}: not a whole .safetensors file ({e}); copy or download it "
                         "again") from e
    if metadata.get("architecture") != "MiniCodec":
        raise InputError(f"{path}: not a codec written by train_codec.py (its metadata names no "
                         "MiniCodec)")
    config = json.loads(metadata["config"])
    if "frame_kernels" not in config:
        raise InputError(f"{path}: a MiniCodec from before it was causal; take the one in "
                         "default/, or train it anew with world/train_codec.py")
    codec = MiniCodec(**config)
    try:
        codec.load_state_dict(weights)
    except RuntimeError as e:
        raise InputError(f"{path}: its weights don't fit its config ({brief(e, 120)})") from e
    return codec.eval().requires_grad_(False)


def _load_mimi(source):
    """A folder or hub name with transformers' config.json and model.safetensors -> Mimi."""
    # here, since it takes seconds and no other codec needs it
    from transformers import AutoConfig, MimiModel
    try:
        kind = AutoConfig.from_pretrained(source).model_type
        if kind != "mimi":
            raise InputError(f"{source}: holds a model of the kind {kind}, not a Mimi codec; give "
                             "kyutai/mimi or its copy")
        model, report = MimiModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True,
                                                  output_loading_info=True)
    except InputError:
        raise
    except Exception as e:  # no network, no such folder, cut off, of another shape: as many classes
        raise InputError(f"{source}: cannot be loaded as a Mimi codec ({brief(e, 120)}); give "
                         "kyutai/mimi, or without a network a folder with its config.json and "
                         "model.safetensors") from e
    if missing := report["missing_keys"]:  # transformers would leave them random
        raise InputError(f"{source}: {len(missing)} of Mimi's weights are missing, the first: "
                         f"{min(missing)}; download it again")
    return Mimi(model).eval().requires_grad_(False)


def _fetch(path):
    """The path of a codec; of a hub model `nvidia/NAME` that of its NAME.nemo, of `kyutai/NAME`
    that of its weights, downloaded or found in the cache."""
    name = str(path)
    if Path(path).exists() or not name.startswith(("nvidia/", "kyutai/")):
        return Path(path)
    file = "model.safetensors" if name.startswith("kyutai/") else name.split("/")[-1] + ".nemo"
    try:
        from huggingface_hub import hf_hub_download
        return Path(hf_hub_download(name, file))
    except Exception as e:
        # no network, no such model, refused, disk full: all end the same way for the user
        raise InputError(f"codec {name}: {hub_problem(e)}") from e


def _load_nemo(path):
    """`.nemo` (tar, perhaps gzipped, of model_config.yaml and model_weights.ckpt) -> NanoCodec."""
    files, again = dict.fromkeys(("model_config.yaml", "model_weights.ckpt")), "download it again"
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if (name := Path(member.name).name) in files and member.isfile():
                    files[name] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as e:
        raise InputError(f"{path}: not a whole .nemo archive ({brief(e, 120)}); {again}") from e
    for name, content in files.items():
        if content is None:
            raise InputError(f"{path}: no {name} in it, so it is cut off or not a .nemo codec "
                             f"archive; {again}")
    try:
        codec = NanoCodec(yaml.safe_load(files["model_config.yaml"]))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, RuntimeError) as e:
        # a ValueError may be an InputError of NanoCodec's
        what = f"no {e}" if isinstance(e, KeyError) else brief(e, 120)
        raise InputError(f"{path}: its model_config.yaml is not one of a NanoCodec ({what}); "
                         "give a NanoCodec") from e
    try:
        content = io.BytesIO(files["model_weights.ckpt"])
        weights = torch.load(content, map_location="cpu", weights_only=True)
        weights = fold_weight_norm(weights)
    except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as e:
        raise InputError(f"{path}: its model_weights.ckpt cannot be read ({brief(e, 120)}); "
                         f"{again}") from e
    renamed = {_our_name(name): value for name, value in weights.items()}
    wrong = []
    for name, own in codec.state_dict().items():
        found = list(renamed[name].shape) if name in renamed else "missing"
        if found != list(own.shape):
            wrong.append(f"{name} is {found}, needs {list(own.shape)}")
    if wrong:
        raise InputError(f"{path}: {len(wrong)} of its weights don't fit its model_config.yaml, so "
                         f"it is no NanoCodec or a damaged one; the first: {wrong[0]}")
    codec.load_state_dict(renamed, strict=False)  # the archive holds more than inference needs
    return codec.eval().requires_grad_(False)


def fold_weight_norm(weights):
    """State dict with weight norm in either naming -> the same with plain weights, w = g * v / |v|,
    |v| per first axis.

    Old naming: NAME_g, NAME_v. New: parametrizations.NAME.original0 (g), .original1 (v).
    """
    plain = {}
    for name, value in weights.items():
        name = re.sub(r"parametrizations\.weight\.original([01])$",
                      lambda m: "weight_" + "gv"[int(m[1])], name)
        if isinstance(value, torch.Tensor):
            plain[name] = value
    for name in [n for n in plain if n.endswith("weight_v")]:
        stem = name.removesuffix("_v")
        if stem + "_g" in plain:
            v, g = plain.pop(name), plain.pop(stem + "_g")
            plain[stem] = g * v / v.flatten(1).norm(dim=1).view(-1, *[1] * (v.ndim - 1))
    return plain


def _our_name(nemo_name):
    """NeMo wraps every convolution and activation once or twice; our modules are those themselves.
    """
    name = nemo_name.replace("audio_encoder.", "encoder.").replace("audio_decoder.", "decoder.")
    name = name.replace(".conv.", ".").replace(".activation.snake_act.", ".")
    return name.replace(".res_blocks.", ".")


# --------------------------------------------------------------------------------------------------
# Audio files

_SUFFIXES = {  # -> the format of libsndfile that reads it; older versions lack some
    ".wav": "WAV", ".flac": "FLAC", ".mp3": "MP3", ".ogg": "OGG", ".oga": "OGG", ".opus": "OGG",
    ".aiff": "AIFF", ".aif": "AIFF", ".aifc": "AIFF", ".au": "AU", ".snd": "AU", ".sph": "NIST",
    ".nist": "NIST", ".w64": "W64", ".rf64": "RF64", ".caf": "CAF", ".voc": "VOC", ".sf": "IRCAM",
    ".avr": "AVR", ".paf": "PAF", ".pvf": "PVF"}
AUDIO_SUFFIXES = tuple(suffix for suffix, form in _SUFFIXES.items()
                       if form in soundfile.available_formats())
UNREADABLE_SUFFIXES = (  # recordings too, but not for libsndfile
    ".m4a", ".mp4", ".aac", ".wma", ".webm", ".mka", ".mkv", ".mov", ".avi", ".amr", ".3gp",
    ".ac3", ".ape", ".wv", ".ra", ".mpeg", ".mpg", ".m4b", ".gsm", ".raw", ".pcm", ".shn",
    *(suffix for suffix in _SUFFIXES if suffix not in AUDIO_SUFFIXES))


def missing_recording(transcript):
    """Why the transcript at this path has no recording that can be read: a sentence's end."""
    for path in sorted(Path(transcript).parent.iterdir()):
        if path.stem == Path(transcript).stem and path.suffix.lower() in UNREADABLE_SUFFIXES:
            return f"{path.name} lies there, but this kind cannot be read; convert it to wav"
    return (f"has no recording of its name ({Path(transcript).stem}.wav, or another of "
            f"{', '.join(AUDIO_SUFFIXES[1:6])} ...)")


def read_audio(path, channels=None, sample_rate=22050):
    """An audio file (any of AUDIO_SUFFIXES) -> float32 tensor (channels, samples), resampled to
    `sample_rate` (Hz).

    `channels`: how many it must have, None for any. Raises InputError on a file that is missing,
    not audio, cut off, empty, or of another number of channels.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such audio file")
    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (samples, channels)
    except (soundfile.SoundFileError, OSError, TypeError) as e:  # TypeError: of a .raw
        todo = "give a whole wav, flac, ogg or mp3 file"
        if path.suffix.lower() in UNREADABLE_SUFFIXES:
            todo = "this kind cannot be read; convert it to wav"
        raise InputError(f"{path}: cannot be read as audio ({brief(e, 120)}); {todo}") from e
    if len(audio) == 0:
        raise InputError(f"{path}: empty, it has no samples; record or export it again")
    if channels is not None and audio.shape[1] != channels:
        found, wanted = ({1: "mono", 2: "stereo"}.get(n, f"of {n} channels")
                         for n in (audio.shape[1], channels))
        todo = "give a file with each speaker on a channel of their own"
        if channels == 1:
            todo = "give one channel of it"
        raise InputError(f"{path}: is {found}, must be {wanted}; {todo}")
    if rate < 8000:
        raise InputError(f"{path}: sampled at {rate} Hz, too low for speech; needs 8000 Hz or more "
                         f"({sample_rate} Hz is best)")
    audio = np.ascontiguousarray(audio.T)  # (channels, samples)
    if not np.isfinite(audio.sum(axis=1)).all():
        raise InputError(f"{path}: holds samples that are not numbers (NaN or infinite); export it "
                         "again")
    return torch.from_numpy(resample(audio, rate, sample_rate))


def resample(audio, rate, new_rate):
    """numpy (C, N) at `rate` -> (C, M) float32 at `new_rate`; row by row, to save memory."""
    if rate == new_rate:
        return audio
    g = math.gcd(rate, new_rate)
    return np.stack([scipy.signal.resample_poly(row, new_rate // g, rate // g) for row in audio])


def set_level(audio, sample_rate, level):
    """Brings each channel's speech to `level` dB of full scale, in place: codecs and models know
    one loudness, and 20 dB below it give other codes. audio (channels, samples) tensor; level 0
    leaves it. Returns audio.

    Speech: the 20 ms frames within 15 dB of the loudest hundredth, at least half a second; so what
    leaks from the other channel hardly counts. Nothing is raised by more than 40 dB or so far that
    it clips; silence stays.
    """
    size = sample_rate // 50
    for channel in audio if level else []:
        frames = channel[:len(channel) // size * size].view(-1, size)
        energy = torch.linalg.vector_norm(frames, dim=1).square() / size
        if len(energy) == 0 or energy.max() < 1e-7:  # -70 dB
            continue
        loud = energy.topk(min(len(energy), max(25, len(energy) // 100))).values[-1]
        now = 10 * energy[energy >= loud * 10 ** -1.5].mean().log10().item()
        gain = 10 ** (min(level - now, 40) / 20)
        channel *= min(gain, max(1.0, 0.99 / channel.abs().max().item())) if gain > 1 else gain
    return audio


def audio_kind(path):
    """The suffix of a path to write audio to, in lower case. InputError on an unknown one."""
    suffix = Path(path).suffix.lower()
    if suffix not in AUDIO_SUFFIXES:
        raise InputError(f"{path}: cannot write audio of this kind; end the name in .wav, .flac or "
                         ".mp3")
    return suffix


def write_audio(path, audio, sample_rate):
    """Writes audio (channels, samples), float in [-1, 1] (louder is clipped), as the format of the
    path's suffix.

    Atomic: the file appears whole or not at all. Raises InputError on an unknown suffix or a place
    it cannot write to.
    """
    path, audio, suffix = Path(path), torch.as_tensor(audio), audio_kind(path)
    audio, kind = audio.detach().cpu().float().numpy().T, "OPUS" if suffix == ".opus" else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda new: soundfile.write(new, audio, sample_rate, kind,
                                                           format=_SUFFIXES[suffix]))
    except (soundfile.SoundFileError, OSError) as e:
        raise InputError(f"{path}: cannot be written ({brief(e, 120)}); choose another "
                         "place") from e
