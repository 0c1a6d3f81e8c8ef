"""Two instances of F-Actor talking to each other (paper section 5.1), or one answering a recording.

    python generate.py                              a prompt of the test set, by the shipped model, to out/
    python generate.py n=20 first=5 batch=10        twenty of them, ten at a time
    python generate.py --prompts FILE.json          own prompts (README.md shows the form)
    python generate.py --user FILE.wav              the other speaker is a recording

Writes per dialogue a stereo NAME.wav, NAME.json (prompts, settings, texts with times, codes) and NAME.png (timeline).
"""
import json
import sys
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm
from transformers import DynamicCache, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from codec import fingerprint, load_codec, read_audio, write_audio
from config import InputError, load_settings, write_atomically
from data import (
    BC,
    EXTRA_TOKENS,
    FRAME_RATE,
    INTER,
    SILENCE_PAD,
    WORD_PAD,
    event_counts,
    instruction,
    load_dialogues,
    made_with,
    make_prompt,
)
from model import load_checkpoint
from turns import label_segments, merge_words

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend has to be chosen first


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
    n: int = 1  # how many
    batch: int = 8  # dialogues made at a time
    # a recording as the other speaker
    user: str = ""
    user_channel: int = -1  # which channel of it, if it has several
    listen: float = 4.0  # seconds that the model may go on speaking after the recording's end
    # sampling (paper table 5)
    temperature: float = 0.9  # 0: greedy
    top_k: int = 40  # 0: all
    top_p: float = 1.0
    max_frames: int = 1024  # limit for two instances; a recording is heard to its end
    seed: int = 0  # dialogue i of a run uses seed + i, whatever the batch
    resume: bool = False  # keep the dialogues that are already in `out`, if their settings are these


class Sampler:
    """Draws ids from logits with one random generator per dialogue, so that a dialogue does not depend on its batch."""

    def __init__(self, seeds, temperature, top_k, top_p):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.greedy = temperature == 0
        self.warpers = LogitsProcessorList()
        if not self.greedy:
            self.warpers.append(TemperatureLogitsWarper(temperature))
            if top_k:
                self.warpers.append(TopKLogitsWarper(top_k))
            if top_p < 1:
                self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, logits):
        """logits (B, ..., V), B a multiple of the number of dialogues -> ids (B, ...)."""
        if self.greedy:
            return logits.argmax(-1)
        flat = self.warpers(None, logits.flatten(0, -2).float()).view_as(logits)
        shape = (logits.shape[0] // len(self.generators), *logits.shape[1:])
        noise = torch.cat([torch.empty(shape).exponential_(generator=g) for g in self.generators]).to(logits.device)
        return (flat.softmax(-1) / noise).argmax(-1)  # exponential race: the same as a draw from the softmax


@torch.inference_mode()
def talk(model, tokenizer, fmt, prompts, speakers, sampler, max_frames, user_codes=None,
         on_frame=lambda t, text: None):
    """Generate dialogues frame by frame (paper section 5.1, spec 6), with one forward pass a frame for all of them.

    prompts: list of B instruction texts; speakers: (B, S) embeddings. Rows 2i and 2i+1 are the two instances of dialogue
    i: the audio that one says is what the other hears. With user_codes (K, T) instead every row is one instance that
    hears this recording.
    on_frame(t, text): called with every new frame's text ids (B,). max_frames: limit, the delay's frames included; a
    recording is heard to its end instead.
    Returns a list of (codes (K, T_i), text ids (T_i,)) for the B rows, without the delay's frames.
    """
    device = model.dsu_head.weight.device
    ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    longest = max(map(len, ids))
    pad = tokenizer.eos_token_id
    prompt = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=device)  # (B, P)
    prompt_mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in ids], device=device)
    prompt_mask = None if prompt_mask.all() else prompt_mask
    rows, codebooks, delay_id, end_id = len(prompts), model.num_codebooks, fmt.codebook_size, fmt.codebook_size + 1
    partner = torch.arange(rows, device=device) ^ 1  # 0 <-> 1, 2 <-> 3, ...
    if user_codes is not None:
        max_frames = user_codes.shape[1] + fmt.delay
        heard = torch.full((codebooks, max_frames), delay_id, device=device)
        heard[:, fmt.delay:] = user_codes.to(device)
    cache = DynamicCache()
    hidden = model(prompt=prompt, speaker=speakers.to(device), prompt_mask=prompt_mask, cache=cache)
    lengths = [None] * rows
    audio, text = [], []
    for t in range(max_frames):
        last = hidden[:, -1]  # (B, hidden)
        next_text = sampler(model.text_logits(last))  # (B,)
        if t < fmt.delay:
            said = torch.full((rows, codebooks), delay_id, device=device)
        else:
            logits = model.audio_logits(last)[:, :codebooks]  # (B, K, C+2): the system heads
            logits[..., delay_id] = float("-inf")  # no audio, only what stands in front of it
            if user_codes is not None:
                logits[..., end_id] = float("-inf")  # it is the recording that ends
            said = sampler(logits)  # (B, K)
        user = said[partner] if user_codes is None else heard[:, t].expand(rows, -1)
        ended = ((said == end_id) | (user == end_id)).any(1).tolist()
        lengths = [t if done and length is None else length for done, length in zip(ended, lengths)]
        if None not in lengths:
            break
        audio.append(said)
        text.append(next_text)
        on_frame(t, next_text.tolist())
        if t + 1 < max_frames:
            frame = torch.cat([said, user], 1)[..., None]  # (B, 2K, 1)
            hidden = model(frame, next_text[:, None], prompt_mask=prompt_mask, cache=cache)
    if not audio:
        return [(torch.zeros(codebooks, 0, dtype=torch.long), torch.zeros(0, dtype=torch.long))] * rows
    audio, text = torch.stack(audio, -1).cpu(), torch.stack(text, -1).cpu()  # (B, K, T), (B, T)
    lengths = [audio.shape[-1] if length is None else length for length in lengths]
    # the text of a frame stands `delay` frames before its audio, so the same index is the same time after the cut
    return [(audio[b, :, fmt.delay:length], text[b, :max(0, length - fmt.delay)]) for b, length in enumerate(lengths)]


def stream_words(text, tokenizer):
    """The words of a text stream (T,) with times in seconds: [{word, start, end, kind}], kind '', '[BC]' or '[INTER]'."""
    words, mark, open_word = [], "", False
    pads = set(tokenizer.convert_tokens_to_ids(EXTRA_TOKENS)) | {tokenizer.eos_token_id}
    word_pad, *marks = tokenizer.convert_tokens_to_ids([WORD_PAD, BC, INTER])
    after_pad = True
    for t, token in enumerate(text.tolist() if hasattr(text, "tolist") else text):
        if token == word_pad and open_word:
            words[-1]["end"] = (t + 1) / FRAME_RATE
            after_pad = True
        elif token in pads:
            mark = tokenizer.convert_ids_to_tokens(token) if token in marks else ""
            open_word, after_pad = False, True
        else:
            piece = tokenizer.decode([token])
            if after_pad or piece.startswith(" ") or not open_word:
                words.append({"word": "", "start": t / FRAME_RATE, "end": 0, "kind": mark})
            words[-1]["word"] += piece.strip()
            words[-1]["end"] = (t + 1) / FRAME_RATE
            mark, open_word, after_pad = "", True, False
    return [word for word in words if word["word"]]


class Transcript:
    """Prints a dialogue's words while they are made: a new line with time and name whenever the speaker changes."""

    def __init__(self, tokenizer, names):
        self.tokenizer, self.names = tokenizer, names
        self.silence = tokenizer.convert_tokens_to_ids(SILENCE_PAD)
        self.begin, self.texts, self.printed = [0] * len(names), [[] for _ in names], [0] * len(names)
        self.speaker = None

    def __call__(self, t, text):
        for side, name in enumerate(self.names):
            self.texts[side].append(text[side])  # what came since the last silence
            words = stream_words(self.texts[side], self.tokenizer)
            growing = bool(words) and words[-1]["end"] * FRAME_RATE == len(self.texts[side])  # the last may go on
            for word in words[self.printed[side]:len(words) - growing]:
                if self.speaker != side:
                    print(f"\n{self.begin[side] / FRAME_RATE + word['start']:6.2f} s  {name}:", end="")
                    self.speaker = side
                print(f" {word['kind']}{word['word']}", end="", flush=True)
                self.printed[side] += 1
            if text[side] == self.silence:
                self.begin[side], self.texts[side], self.printed[side] = t + 1, [], 0


def read_prompts(path, voices_file):
    """Own prompts: a JSON list of pairs of speakers (README.md). Returns a list of [speaker, speaker] dicts with name,
    narrative, backchannels, interruptions, starts, voice, prompt, embedding. Raises InputError, naming the entry."""
    try:
        pairs = json.loads(Path(path).read_text())
    except OSError as e:
        raise InputError(f"{path}: cannot read the prompts file ({e.strerror})") from e
    except ValueError as e:
        raise InputError(f"{path}: not valid JSON: {e}") from e
    if not isinstance(pairs, list) or not pairs:
        raise InputError(f"{path}: a prompts file is a list of pairs of speakers; README.md shows one")
    try:
        voices = json.loads(Path(voices_file).read_text()) if Path(voices_file).exists() else {}
    except ValueError as e:
        raise InputError(f"{voices_file}: not valid JSON ({e}); prepare.py writes such a file") from e
    kinds = {"name": str, "narrative": str, "backchannels": int, "interruptions": int, "starts": bool, "voice": str}
    for i, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"{path}: entry {i} must be a list of two speakers")
        for side, speaker in enumerate(pair):
            where = f"{path}: entry {i}, speaker {side + 1}"
            if not isinstance(speaker, dict) or set(speaker) != set(kinds):
                raise InputError(f"{where}: needs exactly the keys {', '.join(kinds)}")
            for key, kind in kinds.items():
                if type(speaker[key]) is not kind:
                    raise InputError(f"{where}: '{key}' must be {kind.__name__}, not {speaker[key]!r}")
            for key in ("backchannels", "interruptions"):
                if speaker[key] < 0:
                    raise InputError(f"{where}: '{key}' is {speaker[key]}; a count is 0 or more")
            if speaker["voice"] not in voices:
                raise InputError(f"{where}: unknown voice '{speaker['voice']}'; {voices_file} has "
                                 f"{', '.join(voices) or 'none (no such file)'}")
            speaker["embedding"] = voices[speaker["voice"]]
        for speaker, other in (pair, pair[::-1]):
            speaker["prompt"] = make_prompt(speaker["name"], other["name"], speaker["narrative"],
                                            speaker["backchannels"], speaker["interruptions"], speaker["starts"])
    return pairs


def data_prompts(cfg, fmt):
    """Prompts of `n` dialogues of a data set's split, from `first` on, in the form of read_prompts."""
    opened = load_dialogues(cfg.data, cfg.split, streaming=True)  # of a hub's set no more is fetched than these
    dialogues = list(islice(opened, cfg.first, cfg.first + cfg.n)) if cfg.first >= 0 else []
    if cfg.n < 1 or len(dialogues) < cfg.n:
        raise InputError(f"first={cfg.first}, n={cfg.n}: {cfg.data} has {sum(1 for _ in opened)} dialogues in split "
                         f"'{cfg.split}'")
    pairs = []
    for dialogue in dialogues:
        pair = []
        for side in (0, 1):
            backchannels, interruptions = event_counts(dialogue, side, fmt)
            pair.append({
                "name": dialogue["speakers"][side], "narrative": dialogue[f"new_narrative_s{side + 1}"],
                "backchannels": backchannels, "interruptions": interruptions,
                "starts": dialogue["utterances"][0]["speaker_idx"] == side,
                "voice": (dialogue.get("tts_speaker_ids") or ["", ""])[side],
                "embedding": dialogue[f"spk_emb_c{side + 1}"], "prompt": instruction(dialogue, side, fmt)})
        pairs.append(pair)
    return pairs


def draw_timeline(path, audio, sample_rate, speakers):
    """A PNG with both waveforms (2, samples), the words where they are said, backchannels and interruptions marked."""
    seconds = audio.shape[1] / sample_rate
    rows = max(1, -(-int(seconds * 10) // 120))  # 12 s a row, so that words stay readable
    fig, axes = plt.subplots(rows, 1, figsize=(16, 2.9 * rows), squeeze=False)
    events = label_segments(merge_words([speaker["words"] for speaker in speakers]))
    colours, marks = ("tab:blue", "tab:orange"), {"backchannel": "tab:green", "interruption": "tab:red"}
    step = sample_rate // 200
    peaks = audio.cpu().abs().unfold(1, step, step).amax(2).numpy() / max(1e-4, audio.abs().max().item())  # (2, samples / step)
    for row, ax in enumerate(axes[:, 0]):
        begin, end = 12 * row, 12 * (row + 1)
        for side, speaker in enumerate(speakers):
            base = 1 - 2 * side
            part = 0.55 * peaks[side, begin * sample_rate // step:end * sample_rate // step]
            ax.fill_between([begin + i * step / sample_rate for i in range(len(part))], base - part, base + part,
                            lw=0, color=colours[side])
            for k, word in enumerate(w for w in speaker["words"] if begin <= w["start"] < end):
                ax.text(word["start"], base + (0.62, 0.82)[k % 2], word["word"], fontsize=7, clip_on=True)
        for event in events:
            if event["label"] in marks and event["end"] > begin and event["start"] < end:
                side = event["speaker"]
                ax.axvspan(max(begin, event["start"]), min(end, event["end"]), ymin=0.5 * (1 - side),
                           ymax=0.5 * (2 - side), alpha=0.25, color=marks[event["label"]])
        ax.set(xlim=(begin, end), ylim=(-2, 2), yticks=[1, -1], yticklabels=[s["name"] for s in speakers])
    axes[-1, 0].set_xlabel("seconds")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour, alpha=0.25) for colour in marks.values()]
    axes[0, 0].legend(handles, marks, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8)
    fig.tight_layout()
    write_atomically(path, lambda temporary: fig.savefig(temporary, dpi=90, format="png"))
    plt.close(fig)


def save_dialogue(stem, audio, sample_rate, speakers, texts, codes, tokenizer, encoder, settings):
    """Write stem.wav, stem.png and, last, stem.json. audio (2, samples); speakers: two dicts as of read_prompts, extended
    here by `words` and `text`; texts: two text streams (an empty one for a recording); codes: (K, T) of each; encoder: name of
    the speaker encoder that made the embeddings, or ''."""
    for speaker, text in zip(speakers, texts):
        speaker["words"] = stream_words(text, tokenizer)
        speaker["text"] = " ".join(word["word"] for word in speaker["words"])
    write_audio(stem.with_suffix(".wav"), audio, sample_rate)
    draw_timeline(stem.with_suffix(".png"), audio, sample_rate, speakers)
    record = {"speakers": speakers, "speaker_encoder": encoder, "settings": settings, "codes": [row.tolist() for row in codes]}
    write_atomically(f"{stem}.json", lambda path: path.write_text(json.dumps(record)))


def same_settings(path, cfg):
    """Whether the dialogue in `path` is there and was made with these settings (where it stands in the run apart)."""
    if not path.exists():
        return False
    made = json.loads(path.read_text())["settings"]
    return all(made[key] == value for key, value in asdict(cfg).items() if key not in ("first", "n", "batch", "resume"))


def main(argv):
    cfg = load_settings(Config, argv)
    if cfg.temperature < 0 or cfg.top_k < 0 or not 0 < cfg.top_p <= 1 or cfg.max_frames < 1 or cfg.batch < 1:
        raise InputError("temperature and top_k are at least 0, top_p is in (0, 1], max_frames and batch at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer, fmt, trained = load_checkpoint(cfg.model, device, torch.bfloat16 if device == "cuda" else torch.float32)
    codec = load_codec(cfg.codec).to(device)
    if (codec.num_codebooks, codec.codebook_size) != (model.num_codebooks, model.codebook_size):
        raise InputError(f"{cfg.codec} has {codec.num_codebooks} codebooks of {codec.codebook_size} codes, but {cfg.model} "
                         f"was trained on {model.num_codebooks} of {model.codebook_size}; give the codec of its data")
    if trained.get("codec_fingerprint", found := fingerprint(cfg.codec)) != found:
        raise InputError(f"{cfg.codec} is not the codec that {cfg.model} was trained on (fingerprint {found}, not "
                         f"{trained['codec_fingerprint']}), so its codes mean other sounds; give the codec of its data")
    voices = Path(cfg.voices).parent if cfg.prompts else cfg.data
    given, needed = ([made.get(key) for key in ("speaker_encoder", "speaker_size")] for made in (made_with(voices), trained))
    if model.speaker_size and None not in given + needed and given != needed:
        raise InputError(f"{voices}: its voices are embeddings by {given[0]} ({given[1]} numbers), but {cfg.model} was trained "
                         f"on those by {needed[0]} ({needed[1]}); prepare them with speaker_encoder={needed[0]}")
    pairs = read_prompts(cfg.prompts, cfg.voices) if cfg.prompts else data_prompts(cfg, fmt)
    for speaker in (speaker for pair in pairs for speaker in pair):
        if model.speaker_size and len(speaker["embedding"]) != model.speaker_size:
            raise InputError(f"{cfg.prompts or cfg.data}: voice '{speaker['voice']}' has {len(speaker['embedding'])} "
                             f"numbers, the model takes {model.speaker_size}; use the speaker encoder of its training data")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    user_audio = user_codes = None
    if cfg.user:
        user_audio = read_audio(cfg.user, sample_rate=codec.sample_rate)
        if len(user_audio) > 1 and not 0 <= cfg.user_channel < len(user_audio):
            raise InputError(f"{cfg.user}: has {len(user_audio)} channels; choose the user's with user_channel=0 or 1")
        user_audio = user_audio[max(cfg.user_channel, 0)][None]
        user_audio = torch.nn.functional.pad(user_audio, (0, int(cfg.listen * codec.sample_rate)))  # (1, samples)
        with torch.inference_mode():
            user_codes = codec.encode(user_audio.to(device))[0][0].cpu()  # (K, T)
        whole = user_codes.shape[1] * codec.samples_per_frame  # samples
        user_audio = torch.nn.functional.pad(user_audio, (0, whole - user_audio.shape[1]))
    jobs = [(cfg.first + i, pair, out / f"dialogue_{cfg.first + i:04d}") for i, pair in enumerate(pairs)]
    if cfg.resume:
        jobs = [job for job in jobs if not same_settings(job[2].with_suffix(".json"), cfg)]
    for k in range(0, len(jobs), cfg.batch):
        part = jobs[k:k + cfg.batch]
        speaking = [pair[:1] if cfg.user else pair for _, pair, _ in part]  # instances of the model
        instances = [speaker for pair in speaking for speaker in pair]
        limit = user_codes.shape[1] + fmt.delay if cfg.user else cfg.max_frames
        bar = tqdm(total=limit, unit="frame", desc=f"dialogues {k + 1}-{k + len(part)} of {len(jobs)}",
                   disable=len(jobs) == 1)
        transcript = Transcript(tokenizer, [speaker["name"] for speaker in instances])
        start = time.time()
        results = talk(model, tokenizer, fmt, [speaker["prompt"] for speaker in instances],
                       torch.tensor([speaker["embedding"] for speaker in instances], dtype=torch.float32),
                       Sampler([cfg.seed + i for i, _, _ in part], cfg.temperature, cfg.top_k, cfg.top_p),
                       cfg.max_frames, user_codes, transcript if bar.disable else lambda t, text, bar=bar: bar.update())
        seconds = time.time() - start
        bar.close()
        frames = max(codes.shape[1] for codes, _ in results) + fmt.delay
        print(f"\n{frames} frames of {len(part)} dialogue(s) in {seconds:.1f} s: {frames / seconds:.1f} frames/s each, "
              f"{frames / seconds / FRAME_RATE:.1f} x real time, on {device}")
        for j, (_, pair, stem) in enumerate(part):
            mine = results[j * len(speaking[j]):(j + 1) * len(speaking[j])]
            if not mine[0][0].shape[1]:
                print(f"{stem}: nothing written, the model ended it at once; try another seed", file=sys.stderr)
                continue
            with torch.inference_mode():
                audio = torch.cat([codec.decode(codes[None].to(device))[0].cpu() for codes, _ in mine])
            codes, texts = [codes for codes, _ in mine], [text for _, text in mine]
            if cfg.user:
                pair = [pair[0], {"name": "user", "recording": cfg.user}]
                audio = torch.cat([audio, user_audio[:, :audio.shape[1]]])
                codes, texts = codes + [user_codes[:, :codes[0].shape[1]]], texts + [[]]
            save_dialogue(stem, audio, codec.sample_rate, pair, texts, codes, tokenizer, given[0] or "", asdict(cfg))
            print(f"{stem}.wav, .json, .png: {audio.shape[1] / codec.sample_rate:.1f} s")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as e:
        sys.exit(f"generate.py: {e}")
