"""What reinforce.py learns from: the policy's own dialogues, each side as a row with its rewards.

Of the instruction (`talks`): two instances talk. Of the four axes (`listenings`): the user is a
recording, cut from a data set by world/segments.py, and what both said before it may stand in
front. Text is drawn from all ids, none left out, so that a row's probabilities are those it was
drawn with. `run` is reinforce.Run.
"""
import random

import torch
from torch.nn.utils.rnn import pad_sequence

from config import InputError, read_json
from data import (
    FRAME_RATE,
    SILENCE_PAD,
    collate,
    decision_ids,
    is_usable,
    make_prompt,
    mark_ids,
    pad_left,
    prompt_parts,
    spoil,
    usable_streams,
)
from generate import (
    LOOK,
    Conversation,
    Draws,
    Prefix,
    Sampler,
    read_prefix,
    stream_words,
)
from rewards import (
    AXES,
    axis_rewards,
    count_own,
    find_segments,
    instruction_rewards,
    rate,
    words_of,
)
from turns import merge_words
from world import segments


class Steered(Draws):
    """Draws of the rule "due minus done": `bias` (B, V) is added to the text logits."""
    bias = 0.0

    def text(self, logits, u, rows):
        return super().text(logits + self.bias, u, rows)


def due_minus_done(run, text, t, asked):
    """The rule's bias (B, V) at frame t, for the marks of who is silent while the other speaks.
    text (B, F): so far; asked (B, 2). What is asked for is due evenly, until 0.8 of `frames`."""
    silent = run.classes[text[:, t]] == 0  # (B,)
    may = (silent & ~silent.unflatten(0, (-1, 2)).flip(1).flatten())[:, None]
    due = asked * min(1, (t + 1) / (0.8 * run.cfg.frames))
    bias = torch.zeros(len(text), len(run.classes), device=run.device)
    for kind in (1, 2):
        done = (run.classes[text[:, :t + 1]] == kind).sum(1)  # (B,)
        behind = run.cfg.control * (due[:, kind - 1] - done)
        bias += may * behind[:, None] * (run.classes == kind)
    return bias


@torch.no_grad()
def rollout(run, prompts, speakers, group, seed, scenes=None, asked=None):
    """Dialogues of the policy: `group` of each prompt, or of each pair, where rows 2i and 2i+1
    talk.

    prompts: N texts; speakers (N, S); scenes: what N rows hear, of `scene_of`; asked (B, 2): for
    the rule, else None. Returns audio (B, 2K, F), text (B, F), both as in data.streams, and the
    dialogues' frames (B,); B = N * group.
    """
    model, d, sides = run.model, run.fmt.delay, 1 if scenes else 2
    prefix = read_prefix(model, run.tokenizer, prompts, speakers)
    order = torch.arange(len(prompts)).view(-1, sides).repeat_interleave(group, 0).flatten()
    prefix = Prefix([x[order] for x in prefix.keys], [x[order] for x in prefix.values],
                    prefix.mask[order], prefix.hidden[order])
    scene = scenes and stack([scenes[i] for i in order], run.device)
    frames = scene["text"].shape[1] if scenes else run.cfg.frames
    batch = Conversation(model, run.tokenizer, run.fmt, len(order), prefix.mask.shape[1],
                         frames + d, may_end=not scenes)
    if batch.memory.frames < frames + d:
        raise InputError(f"the longest prompt and {frames} frames are more than the model's "
                         f"{model.backbone.config.max_position_embeddings} positions; give a "
                         "smaller frames= or context=")
    if asked is not None:
        batch.draws = Steered(run.decisions, model.num_codebooks, len(order))
    rng = random.Random(seed)
    seeds = [rng.randrange(2 ** 31) for _ in range(len(order) // sides)]
    text = torch.zeros(len(order), d + frames, dtype=torch.long, device=run.device)
    said = text[:, None].repeat(1, model.num_codebooks, 1) + model.codebook_size
    heard = said.clone()
    text[:, :d + 1] = batch.join(prefix, Sampler(seeds, **run.sampling))[1]
    over = torch.zeros(len(order) // sides, dtype=torch.bool, device=run.device)
    for t in range(frames):
        if scenes:
            teach(batch, scene, t, d)
        said[:, :, d + t], text[:, d + t] = batch.said, batch.text
        other = batch.said.unflatten(0, (-1, sides)).flip(1).flatten(0, 1)
        heard[:, :, d + t] = scene["user"][:, :, t] if scenes else other
        over |= (batch.said == model.codebook_size + 1).any(1).unflatten(0, (-1, sides)).any(1)
        if t + 1 == frames or (t % LOOK == 0 and over.all()):
            break
        if asked is not None:
            batch.draws.bias = due_minus_done(run, text, d + t, asked)
        batch.step(heard[:, :, d + t])
    ended = (said == model.codebook_size + 1).any(1).unflatten(0, (-1, sides)).any(1)
    ended = ended.repeat_interleave(sides, 0)  # (B, F)
    lengths = torch.where(ended.any(1), ended.int().argmax(1) - d, frames)
    return torch.cat([said, heard], 1), text, scene["frames"] if scenes else lengths


def stack(scenes, device):
    """Scenes of `scene_of` as one: codes (B, K, T), text (B, T), context and frames (B,)."""
    found = {key: torch.tensor([s[key] for s in scenes]) for key in ("context", "frames")}
    for key in ("own", "user", "text"):
        rows = pad_sequence([s[key].transpose(0, -1) for s in scenes], True)  # (B, T, ...)
        found[key] = rows.transpose(1, -1)
    return {key: x.to(device) for key, x in found.items()}


def teach(batch, scene, t, delay):
    """In front of a segment stands what was said there. (Of its first frames, which have no audio,
    the text is the model's own: Conversation.join makes them.)"""
    taught = (t < scene["context"])[:, None]
    batch.said = torch.where(taught, scene["own"][:, :, t], batch.said)
    if t + delay < scene["text"].shape[1]:
        taught = t + delay < scene["context"]
        batch.text = torch.where(taught, scene["text"][:, t + delay], batch.text)


def scene_of(run, entry, dialogue, context):
    """What is needed to play a segment, with up to `context` frames in front; None where the
    dialogue cannot be used or the other side's text not be laid out."""
    system = 1 - entry["user"]
    item = usable_streams(dialogue, system, run.tokenizer, run.fmt)
    if item is None:
        return None
    first, d = max(0, entry["begin"] - context), run.fmt.delay
    own, user = item["audio"][:, d:][:, first:entry["end"]].chunk(2)  # (K, T)
    parts = list(prompt_parts(dialogue, system, run.fmt))
    parts[-1] &= entry["begin"] > first  # without a context, the user has the word
    words = [word["word"] for word in segments.words_of(dialogue)[entry["user"]]
             if first <= word["start"] * FRAME_RATE < entry["end"]]
    return {"axis": entry["axis"], "prompt": make_prompt(*parts), "speaker": item["speaker"],
            "own": own, "user": user, "text": item["text"][first:first + user.shape[1]],
            "context": entry["begin"] - first, "frames": user.shape[1],
            "heard": " ".join(words), "end": (entry["end"] - entry["begin"]) / FRAME_RATE,
            "events": [[(t - entry["begin"]) / FRAME_RATE for t in event]
                       for event in entry["events"]]}


# ---- rows: what the policy loss and the rewards need of each side ----


def row_of(run, prompt, speaker, audio, text, begin, end, group, rewards, **more):
    """One side of a rollout: begin, end: the frames that are the policy's; group: whose mean is its
    baseline."""
    ids = torch.tensor(run.tokenizer.encode(prompt, add_special_tokens=False))
    return {"prompt": ids, "speaker": speaker, "audio": audio[:, :end].cpu(), "begin": begin,
            "text": text[:end].cpu(), "end": end, "group": group, "rewards": rewards, **more}


def talks(run, dialogues, group, seed, control):
    """The instruction's rows: two instances talk about each dialogue's narrative, with counts
    drawn anew; control: whether the rule helps."""
    rng, prompts, speakers, asked = random.Random(f"asked/{seed}"), [], [], []
    for dialogue in dialogues:
        for side in (0, 1):
            asked.append((rng.randint(0, run.cfg.backchannels),
                          rng.randint(0, run.cfg.interruptions)))
            name, other, narrative, _, _, starts = prompt_parts(dialogue, side, run.fmt)
            prompts.append(make_prompt(name, other, narrative, *asked[-1], starts))
            speakers.append(torch.tensor(dialogue[f"spk_emb_c{side + 1}"]))
    pairs = torch.arange(len(prompts)).view(-1, 2).repeat_interleave(group, 0)  # (B / 2, 2)
    rule = torch.tensor(asked, device=run.device)[pairs.flatten()] if control else None
    audio, text, frames = rollout(run, prompts, torch.stack(speakers), group, seed, asked=rule)
    rows = []
    for i, pair in enumerate(pairs.tolist()):
        both = [text[2 * i + side, :frames[2 * i]] for side in (0, 1)]
        found, seconds = find_segments(both, run.tokenizer), int(frames[2 * i]) / FRAME_RATE
        for side, k in enumerate(pair):
            own, other = ([s for s in found if s["speaker"] == who] for who in (side, 1 - side))
            rows.append(row_of(
                run, prompts[k], speakers[k], audio[2 * i + side], both[side], 0,
                int(frames[2 * i]), ("talk", k), instruction_rewards(own, other, asked[k], seconds),
                asked=asked[k], found=count_own(own), heard=words_of(other), said=words_of(own)))
    return rows


def listenings(run, scenes, group, seed):
    """The axes' rows: each of the scenes is heard `group` times. One axis at a time: its segments
    are about equally long, and rollouts last as long as their longest row."""
    axes = {axis: [scene for scene in scenes if scene and scene["axis"] == axis] for axis in AXES}
    return [row for axis, own in axes.items() if own
            for row in listenings_of(run, own, group, f"{seed}/{axis}")]


def listenings_of(run, scenes, group, seed):
    """The rows of scenes of one axis."""
    prompts, speakers = ([scene[key] for scene in scenes] for key in ("prompt", "speaker"))
    audio, text, frames = rollout(run, prompts, torch.stack(speakers), group, seed, scenes)
    rows = []
    for b in range(len(text)):
        k, end = b // group, int(frames[b])
        scene, row = scenes[k], text[b, :end]
        before, new = (merge_words([stream_words(part, run.tokenizer), []])
                       for part in (row[:scene["context"]], row[scene["context"]:]))
        earlier = scene["context"] / FRAME_RATE
        own = [s | {"start": s["start"] - earlier, "end": s["end"] - earlier} for s in before] + new
        rewards = axis_rewards(scene["axis"], own, scene["events"], scene["end"])
        rows.append(row_of(run, prompts[k], speakers[k], audio[b], row, scene["context"], end,
                           (scene["axis"], k), rewards, axis=scene["axis"], heard=scene["heard"],
                           said=words_of(new)))
    return rows


# ---- what an update learns from, and what is measured ----


def draw_rows(run):
    """The rows of one update of this process, of the training split."""
    cfg = run.cfg
    seed = f"{cfg.seed}/{run.step}/{run.rank}"
    rng, dialogues, rows = random.Random(seed), run.dialogues["train"], []
    if cfg.pairs:
        drawn = []
        while len(drawn) < cfg.pairs:  # setup has found one that can be used
            dialogue = dialogues[rng.randrange(len(dialogues))]
            drawn += [dialogue] if is_usable(dialogue, run.fmt) else []
        rows += talks(run, drawn, cfg.group, seed, cfg.control > 0)
    if run.scenes["train"] and cfg.method != "raft":
        context = rng.choice([0, rng.randint(0, cfg.context)])
        entries = [entry for axis in cfg.axes.split() for entry in
                   rng.choices(run.scenes["train"][axis], k=cfg.per_axis)]
        scenes = [scene_of(run, entry, dialogues[entry["dialogue"]], context) for entry in entries]
        rows += listenings(run, scenes, cfg.group, seed)
    if run.judge:
        rate(run.judge, rows)
    return [row for row in rows if row["end"] > row["begin"]]


def held_out_rows(run):
    """The rows of this process that the best is chosen by: the same at every call, but for the
    model."""
    cfg, dialogues, rows = run.cfg, run.dialogues["validation"], []
    mine = [dialogues[i] for i in range(run.rank, min(cfg.eval_pairs, len(dialogues)), run.world)]
    mine = [dialogue for dialogue in mine if is_usable(dialogue, run.fmt)]
    if cfg.pairs and mine:
        rows += talks(run, mine, 1, f"held out/{run.rank}",
                      cfg.control > 0 and not cfg.updates)
    entries = [entry for some in run.scenes["validation"].values()
               for entry in some[run.rank:cfg.eval_pairs:run.world]]
    scenes = [scene_of(run, entry, dialogues[entry["dialogue"]], cfg.context) for entry in entries]
    return rows + listenings(run, scenes, 1, f"held out/{run.rank}")


def read_scenes(path, split, dialogues, fmt, axes):
    """A file of world/segments.py -> {axis: entries that end before max_frames}; {} for no file.
    Raises InputError where it does not belong to the data set, or has none for one of `axes`."""
    if not path:
        return {}
    what = "python -m world.segments writes such a file"
    found, kept = read_json(path, what), {axis: [] for axis in AXES}
    try:
        if found["split"] != split:
            raise InputError(f"{path}: is of split {found['split']}, not {split}; cut that one")
        if found.get("dialogues", len(dialogues)) != len(dialogues):
            raise InputError(f"{path}: is of {found['dialogues']} dialogues, the data set has "
                             f"{len(dialogues)}; {what}")
        for entry in found["segments"]:
            if (not 0 <= entry["begin"] < entry["end"] or not entry["events"]
                    or entry["dialogue"] < 0):
                raise InputError(f"{path}: the segment {entry} is none; {what}")
            length = len(dialogues[entry["dialogue"]]["dsu_c1_path"][0])
            if entry.get("frames", length) != length:  # older files do not tell
                raise InputError(f"{path}: was cut from another data set, where dialogue "
                                 f"{entry['dialogue']} has {entry['frames']} frames, not {length}; "
                                 f"{what}")
            if entry["end"] <= min(length, fmt.max_frames) and entry["user"] in (0, 1):
                kept[entry["axis"]].append(entry)
    except (KeyError, TypeError, IndexError) as e:
        raise InputError(f"{path}: does not fit the data set ({type(e).__name__}: {e}); {what}") \
            from e
    if missing := [axis for axis in axes if not kept[axis]]:
        raise InputError(f"{path}: has no segments of {', '.join(missing)}; {what}")
    return kept


def pad_rows(rows, end_token, device):
    """Rows to a batch: what FActor.forward takes, for all frames but the last, text (B, F), inside
    (B, F): which frames are the policy's, advantage (B, 1)."""
    prompt, mask = pad_left([row["prompt"] for row in rows], end_token)
    text = pad_sequence([row["text"] for row in rows], True)  # (B, F)
    audio = pad_sequence([row["audio"].T for row in rows], True).transpose(1, 2)  # (B, 2K, F)
    begin, end, advantage = (torch.tensor([row[key] for row in rows], device=device)[:, None]
                             for key in ("begin", "end", "advantage"))
    speaker = torch.stack([row["speaker"] for row in rows])
    inputs = [x if x is None else x.to(device)
              for x in (audio[..., :-1], text[:, :-1], prompt, speaker, mask)]
    frame = torch.arange(text.shape[1], device=device)
    return inputs, text.to(device), (begin <= frame) & (frame < end), advantage


def anchor_batch(run, split, keys):
    """Dialogues of the data set, keys [(index, side)], as a batch of data.collate for the
    supervised loss; what the model hears itself say is spoiled as in its training."""
    items = [usable_streams(run.dialogues[split][i], side, run.tokenizer, run.fmt)
             for i, side in keys]
    if not any(items):
        raise InputError(f"none of the dialogues {keys} of {run.cfg.data} can be laid out")
    batch = collate([item for item in items if item], run.tokenizer.eos_token_id, run.fmt)
    wrong = (run.trained.get("train_config") or {}).get("wrong_history", 0)
    if wrong and split == "train":
        seeds = [i + run.step for i in range(len(batch["text"]))]
        batch["history"] = spoil(batch, wrong, run.fmt, seeds)
    return {key: x if x is None else x.to(run.device) for key, x in batch.items()}


def text_ids(tokenizer, size, device):
    """Which text ids are decisions, and the classes of all, as of Run: two (V,)."""
    classes = torch.full((size,), 3)
    classes[len(tokenizer):] = 4  # of a backbone whose vocabulary is padded
    classes[tokenizer.convert_tokens_to_ids([SILENCE_PAD, tokenizer.eos_token])] = 0
    for number, kind in ((1, "backchannel"), (2, "interruption")):
        classes[mark_ids(tokenizer, kind)] = number
    return decision_ids(tokenizer, size).to(device), classes.to(device)
