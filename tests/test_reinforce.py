"""Reinforcement learning: what its typical bugs would break, rewards, and a run that goes on."""
import json
import math
import shutil

import pytest
import torch
from conftest import ROOT, write_split
from transformers import LlamaConfig, LlamaForCausalLM

import reinforce
import rewards
from config import InputError
from data import EXTRA_TOKENS, StreamFormat, load_dialogues, new_tokenizer
from generate import Draws
from model import load_checkpoint, new_model, save_checkpoint
from rollout import scene_of

WORDS = ["frames=24", "pairs=2", "group=4", "eval_pairs=2", "updates=2", "eval_every=1",
         "threads=1", "micro_batch=16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, dialogues):
    """A tiny random model of the paper's kind with plain marks, its data set and segments of it."""
    folder = tmp_path_factory.mktemp("reinforce")
    for split in ("train", "validation"):
        write_split(folder / "data", dialogues, split)
        entries = [{"axis": axis, "dialogue": i, "user": i % 2, "begin": 20 + i, "end": 60,
                    "events": [[30, 40]]} for i in range(3) for axis in rewards.AXES]
        (folder / f"{split}.json").write_text(json.dumps(
            {"data": "", "split": split, "segments": entries}))
    fmt = StreamFormat(behaviour_tokens="plain", max_frames=250, codebook_size=64)
    tokenizer = new_tokenizer(load_dialogues(folder / "data", "train"), 400, fmt)
    tokenizer.add_special_tokens({"additional_special_tokens": EXTRA_TOKENS})
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, tie_word_embeddings=True, head_dim=16,
        initializer_range=0.3, bos_token_id=0, eos_token_id=1))
    model = new_model(backbone, 4, 64, 192, tokenizer)
    model.dsu_head.bias.data.view(8, 66)[:, 65] = -100  # it draws no end id
    save_checkpoint(folder / "model", model, tokenizer, fmt, {"sampling": {
        "decision_temperature": 1.0, "word_temperature": 0.4, "audio_temperature": 0.2,
        "top_k": 0}})
    return folder


@pytest.fixture
def start(folder, tmp_path):
    """start("key=value", ...) -> a Run, with all of the axes."""
    def call(*words, axes=True):
        files = [f"segments={folder}/train.json", f"val_segments={folder}/validation.json"]
        return reinforce.setup(reinforce.load_settings(reinforce.Config, [
            f"model={folder}/model", f"data={folder}/data", f"out={tmp_path}/out", *WORDS,
            *(files if axes else ()), *words]))
    return call


def test_supervised_loss_of_a_model_trained_with_weighted_prompt_words(start):
    """The shipped model is one; its words of the prompt count as others here."""
    run = start()
    keys = [(i, 0) for i in range(len(run.dialogues["train"]))]
    plain = reinforce.supervised_loss(run, "train", keys)
    run.trained["train_config"] = {"prompt_word_weight": 12.0}
    weighted = reinforce.supervised_loss(run, "train", keys)
    assert all(torch.equal(plain[key], weighted[key]) for key in ("loss", "text"))


@pytest.mark.parametrize("policy", ["classes", "tokens"])
def test_probabilities_of_the_rollout_are_those_of_the_training_pass(start, monkeypatch, policy):
    """Golden: what Sampler drew from, frame by frame through its own cache, and what the loss sees
    are the same numbers, for talks and for segments behind a recorded context."""
    run, drawn = start(f"policy={policy}", "context=15"), []
    original, scenes = Draws.text, run.scenes["validation"]

    def text(self, logits, u, rows):
        drawn.append(logits.clone())
        return original(self, logits, u, rows)
    monkeypatch.setattr(Draws, "text", text)
    for pairs in (2, 0):
        drawn.clear()
        run.cfg.pairs = pairs
        run.scenes["validation"] = {} if pairs else {"turn": scenes["turn"]}  # one rollout each
        rows = reinforce.held_out_rows(run)
        for row in rows:
            row["advantage"] = 1.0
        inputs, ids, inside, _ = reinforce.pad_rows(rows, run.tokenizer.eos_token_id, run.device)
        hidden = run.model(*inputs)[:, -ids.shape[1]:]
        classes = run.classes if policy == "classes" else None
        trained = reinforce.log_chosen(reinforce.log_policy(run.model.text_logits(hidden), run),
                                       ids, classes)
        rolled = torch.stack(drawn[:ids.shape[1]], 1)  # (B, F, V)
        rolled = reinforce.log_chosen(reinforce.log_policy(rolled, run), ids, classes)
        assert inside.sum() > 30
        assert torch.allclose(trained[inside], rolled[inside], atol=1e-4)


def test_policy_sums_to_one_and_is_what_is_drawn(start):
    """The two steps of the text, decision and word, each at its temperature, by hand."""
    run = start()
    logits = torch.randn(3, len(run.classes)) * 2
    p = reinforce.log_policy(logits, run).exp()
    assert torch.allclose(p.sum(-1), torch.ones(3), atol=1e-5)
    first = logits.softmax(-1)
    words = (logits / 0.4).masked_fill(run.decisions, -torch.inf).softmax(-1)
    by_hand = torch.where(run.decisions, first, (first * ~run.decisions).sum(-1, True) * words)
    assert torch.allclose(p, by_hand, atol=1e-6)
    classes = torch.stack([p[:, run.classes == c].sum(-1) for c in range(4)], 1)
    text = torch.tensor([[5], [run.tokenizer.convert_tokens_to_ids("[BC]")],
                         [run.tokenizer.convert_tokens_to_ids("[SILENCE_PAD]")]])
    chosen = reinforce.log_chosen(p.log()[:, None], text, run.classes)[:, 0].exp()
    assert torch.allclose(chosen, classes[range(3), run.classes[text[:, 0]]])


def test_gradient_of_two_frames_by_hand(start):
    """d(-A log pi(c)) / dz = A (pi - pi(. | c) [in c]) at the decision's temperature."""
    run = start()
    run.sampling |= {"word_temperature": 1.0}
    z = torch.randn(1, 2, len(run.classes), requires_grad=True)
    text = torch.tensor([[run.tokenizer.convert_tokens_to_ids("[BC3]"), 7]])
    chosen = reinforce.log_chosen(reinforce.log_policy(z, run), text, run.classes)
    (-2.0 * chosen).sum().backward()
    for t in range(2):
        pi = z[0, t].detach().softmax(-1)
        inside = run.classes == run.classes[text[0, t]]
        by_hand = 2.0 * (pi - pi * inside / pi[inside].sum())
        assert torch.allclose(z.grad[0, t], by_hand, atol=1e-6)


def rows_of(run):
    rows = reinforce.draw_rows(run)
    reinforce.set_advantages(run, rows)
    return rows


def total_log_p(run, row):
    row = row | {"advantage": -1.0}
    with torch.no_grad():
        return reinforce.policy_loss(run, [row])[0].item()


@pytest.mark.parametrize("policy", ["classes", "tokens"])
def test_an_update_raises_the_better_one(start, policy):
    """There is a gradient, and the single better row of a group becomes likelier, the others do
    not on the whole."""
    run = start(f"policy={policy}", "anchor=0", "kl=0", "lr=1e-3", axes=False)
    rows = rows_of(run)
    group = [row for row in rows if row["group"] == rows[0]["group"]]
    for k, row in enumerate(group):
        row["advantage"] = 1.0 if k == 0 else -1.0 / (len(group) - 1)
    before = [total_log_p(run, row) for row in group]
    logged = reinforce.update(run, group)
    after = [total_log_p(run, row) for row in group]
    assert logged["grad_norm"] > 0
    assert after[0] > before[0] and after[0] - before[0] > sum(after[1:]) - sum(before[1:])


def test_no_advantage_leaves_the_weights_alone(start):
    """Without KL and anchor; with KL alone too at the start, where it is least."""
    for words in (["kl=0"], ["kl=1"]):
        run = start("anchor=0", *words)
        rows = reinforce.draw_rows(run)
        for row in rows:
            row["advantage"] = 0.0
        logged = reinforce.update(run, rows)
        assert logged["grad_norm"] < 1e-5 and abs(logged["kl"]) < 1e-6
        if run.cfg.kl == 0:
            assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(),
                                                         run.start.parameters()))


def test_ids_that_are_no_tokens_are_not_drawn(folder, start, tmp_path):
    """A backbone may have a padded vocabulary; here these ids' logits are the largest."""
    model, tokenizer, fmt, config = load_checkpoint(folder / "model")
    model.backbone.resize_token_embeddings(len(tokenizer) + 8, mean_resizing=False)
    model.backbone.get_input_embeddings().weight.data[len(tokenizer):] *= 100
    save_checkpoint(tmp_path / "model", model, tokenizer, fmt, {"sampling": config["sampling"]})
    run = start(f"model={tmp_path}/model")
    assert len(run.classes) == len(tokenizer) + 8
    rows = reinforce.draw_rows(run)
    assert max(row["text"].max() for row in rows) < len(tokenizer)
    reinforce.set_advantages(run, rows)
    assert all(map(math.isfinite, reinforce.update(run, rows).values()))


def test_advantages(start):
    """Group baselines; a reward's unit is its spread over the batch; raft takes the right ones."""
    run = start()
    rows = [{"group": g, "rewards": {"pause": value}} for g, values in enumerate(
        ([0.0, -1.0], [-1.0, -1.0])) for value in values]
    reinforce.set_advantages(run, rows)
    assert run.spread["pause"] == pytest.approx(0.125)
    assert [row["advantage"] for row in rows] == pytest.approx([2 ** 0.5, -2 ** 0.5, 0, 0])
    run.cfg.method = "raft"
    rows = [{"group": 0, "rewards": {}, "asked": (1, 0), "found": (n, 0)} for n in (0, 1, 2)]
    reinforce.set_advantages(run, rows)
    assert [row["advantage"] for row in rows] == [0, 1, 0]


def test_counts_follow_on_a_toy(start, monkeypatch):
    """Fifty updates of a random model: the number of marks comes to follow the prompt's, which is
    all the prompt here. The reward counts marks alone, for a random model says no words. With half
    of the pairs one seed in ten ends below 0.5, and which one depends on the machine's rounding."""
    monkeypatch.setattr("rollout.make_prompt", lambda *parts: f"{parts[3]}")
    run = start("updates=50", "frames=10", "pairs=16", "group=4", "lr=1e-2", "anchor=0",
                "kl=0", "micro_batch=128", "backchannels=6", axes=False)

    def draw(step):
        run.step, rows = step, reinforce.draw_rows(run)
        for row in rows:
            row["found"] = (run.classes[row["text"]] == 1).sum().item(), 0
            row["rewards"] = {"backchannels": -abs(row["found"][0] - row["asked"][0])}
        return rows

    def correlation():
        rows = [row for step in range(1000, 1004) for row in draw(step)]
        return torch.corrcoef(torch.tensor([(row["asked"][0], row["found"][0]) for row in rows]).T
                              .float())[0, 1].item()
    before = correlation()
    for step in range(50):
        rows = draw(step)
        reinforce.set_advantages(run, rows)
        reinforce.update(run, rows)
    assert before < 0.3 and correlation() > 0.5


def test_run_goes_on(folder, tmp_path, monkeypatch, capsys):
    """A run that was ended goes on to the weights of one in one go; best/ can be loaded."""
    words = [f"model={folder}/model", f"data={folder}/data", f"segments={folder}/train.json",
             f"val_segments={folder}/validation.json", *WORDS, "frames=12", "eval_pairs=1",
             "pairs=1", "group=2", "context=0", "axes=pause turn"]
    reinforce.main([*words, f"out={tmp_path}/whole"])
    original = reinforce.update

    def ends(run, rows):
        if run.step == 1:
            raise KeyboardInterrupt
        return original(run, rows)
    monkeypatch.setattr(reinforce, "update", ends)
    with pytest.raises(KeyboardInterrupt):
        reinforce.main([*words, f"out={tmp_path}/part"])
    monkeypatch.setattr(reinforce, "update", original)
    (tmp_path / "part" / "state.pt.1.tmp").write_text("of a kill")
    reinforce.main([*words, f"out={tmp_path}/part", "resume=true"])
    assert not [*(tmp_path / "part").glob("*.tmp")]
    assert "update 2/2" in capsys.readouterr().out
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True)
              for name in ("whole", "part")]
    assert [state["step"] for state in states] == [2, 2]
    assert all(torch.equal(x, states[1]["model"][key]) for key, x in states[0]["model"].items())
    for name in ("log.csv", "curves.png", "last/config.json"):
        assert (tmp_path / "part" / name).exists()
    config = load_checkpoint(tmp_path / "part" / "last")[3]
    assert config["sampling"]["word_temperature"] == 0.4 and config["reinforced"]["updates"] == 2
    torch.save(states[1] | {"world": 2}, tmp_path / "part" / "state.pt")
    reinforce.main([*words, f"out={tmp_path}/part", "resume=true"])
    assert "note: 2 processes before, 1 now" in capsys.readouterr().out
    with pytest.raises(InputError, match="other settings .kl.;"):
        reinforce.main([*words, f"out={tmp_path}/part", "resume=true", "kl=0.5"])
    torch.save(states[1] | {"made_of": {"model": "another"}}, tmp_path / "part" / "state.pt")
    with pytest.raises(InputError, match="began with another model or segments or val_segments"):
        reinforce.main([*words, f"out={tmp_path}/part", "resume=true"])
    (tmp_path / "part" / "state.pt").write_bytes(b"cut off")
    with pytest.raises(InputError, match=f"model={tmp_path}/part/last"):
        reinforce.main([*words, f"out={tmp_path}/part", "resume=true"])


def test_dialogues_that_cannot_be_used_are_not_drawn(folder, dialogues, start, tmp_path):
    """Most have no utterances: talks, segments and the supervised loss leave them out."""
    rows = [row if i < 3 else row | {"utterances": []} for i, row in enumerate(dialogues)]
    for split in ("train", "validation"):
        write_split(tmp_path / "data", [*reversed(rows)], split)
    run = start(f"data={tmp_path}/data", "eval_pairs=17")
    assert len([row for row in reinforce.draw_rows(run) if "asked" in row]) == 2 * 2 * 4
    assert len([row for row in reinforce.held_out_rows(run) if "asked" in row]) == 2 * 3
    keys = [(i, 0) for i in range(len(rows))]
    assert reinforce.supervised_loss(run, "train", keys)["loss"].isfinite()
    with pytest.raises(InputError, match="none of the dialogues .* can be laid out"):
        reinforce.supervised_loss(run, "train", keys[:2])
    for split in ("train", "validation"):
        write_split(tmp_path / "data", rows[3:], split)
    with pytest.raises(InputError, match="none of the 5 dialogues can be used; .*no utterances"):
        start(f"data={tmp_path}/data", axes=False)


def test_scene(start, dialogues):
    """A segment behind its context: codes and text of the same time, events from its begin on."""
    run = start()
    entry = run.scenes["train"]["turn"][0]
    dialogue = dialogues[entry["dialogue"]]
    scene = scene_of(run, entry, dialogue, 5)
    user = dialogue[f"dsu_c{entry['user'] + 1}_path"]
    assert scene["user"].tolist() == [row[entry["begin"] - 5:60] for row in user]
    assert scene["context"] == 5 and scene["frames"] == 60 - entry["begin"] + 5
    assert scene["events"] == [[(30 - entry["begin"]) / 12.5, (40 - entry["begin"]) / 12.5]]
    assert "starts the dialogue: False" in scene_of(run, entry, dialogue, 0)["prompt"]


def said(start, end, text="yes", label="turn", kinds=(), speaker=0):
    return {"start": start, "end": end, "text": text, "label": label, "kinds": kinds,
            "speaker": speaker}


def test_instruction_rewards():
    other = [said(0, 6, "a b c d e f", speaker=1)]
    brief = said(2, 2.5, label="backchannel", kinds=["backchannel"])
    long = said(3, 5, "a b c d", "backchannel", ["backchannel"])
    found = rewards.instruction_rewards([brief, long], other, (2, 1), 9)
    assert (found["backchannels"], found["interruptions"]) == (-1, -1)
    assert (found["overlap"], found["marks"], found["words"]) == (-1, 0, 0)
    even = [said(t, t + 0.3, label="backchannel") for t in (1.5, 4.5)]
    bunched = [said(t, t + 0.3, label="backchannel") for t in (0.2, 0.8)]
    assert (rewards.instruction_rewards(even, other, (2, 0), 9)["pace"]
            > rewards.instruction_rewards(bunched, other, (2, 0), 9)["pace"] + 0.2)
    cut = [said(4, 7, "no wait", "interruption", ["backchannel"], 1)]
    found = rewards.instruction_rewards([said(0, 6, "a b a b a b a b")], cut, (0, 0), 9)
    assert (found["yields_talk"], found["words"]) == (-1, -1)  # it goes on for 2 s, and repeats
    assert rewards.instruction_rewards(cut, [], (0, 1), 9)["marks"] == -1


def test_axis_rewards():
    turn = said(5.2, 8, "well i think we can do it")
    assert rewards.axis_rewards("pause", [turn], [], 9) == {"pause": -1}
    assert rewards.axis_rewards("pause", [turn], [], 5) == {"pause": 0}
    late = rewards.axis_rewards("turn", [turn], [[0, 5]], 9)
    assert late["turn"] > 0.95 and late["answer"] == 1
    early = rewards.axis_rewards("turn", [said(4, 8)], [[0, 5]], 9)  # barging in is not paid for
    assert early["turn"] < 0.01 and rewards.axis_rewards("turn", [], [[0, 5]], 9)["turn"] == 0
    events = [[1, 1.4], [4, 4.3]]
    both = [said(1.2, 1.5), said(4.5, 4.8)]
    assert rewards.axis_rewards("backchannel", both, events, 9)["backchannel_f1"] == 1
    assert rewards.axis_rewards("backchannel", [*both, turn], events, 9)["backchannel_f1"] == 0.8
    assert rewards.axis_rewards("backchannel", [], events, 9)["backchannel_f1"] == 0
    speaking = said(-1, 4.2, "so as i said")
    good = rewards.axis_rewards("interruption", [speaking, turn], [[4, 5]], 9)
    assert good["yields"] == 1 and good["delay"] > 0.95 and good["answer"] == 1
    brief = rewards.axis_rewards("interruption", [said(-1, 0, "oh"), said(5, 5.4)], [[4, 5]], 9)
    assert brief == {"delay": 0, "yields": 0, "answer": 0}  # nor has who spoke long ago yielded
    pieces = [said(t, t + 0.8) for t in (1, 3, 5)]
    assert rewards.axis_rewards("pause", pieces, [], 9) == {"pause": -1}
    assert rewards.axis_rewards("pause", [said(1, 1.4, "uh huh")], [], 9) == {"pause": 0}
    assert rewards.axis_rewards("pause", [said(1, 1.9, "oh i see it")], [], 9) == {"pause": -1}
    silent = rewards.axis_rewards("interruption", [], [[4, 5]], 9)
    assert silent == {"delay": 0, "yields": 0, "answer": 0}


def test_a_judge_rates_what_is_said_and_never_silence(monkeypatch):
    import rewrite
    monkeypatch.setattr(rewrite, "write", lambda model, tokenizer, prompts, *_: [
        " 2" if "B: to london" in prompt else "1, generic" for prompt in prompts])
    rows = [{"heard": "where to", "said": said, "rewards": {}, "axis": axis} for said, axis in
            (("to london", "turn"), ("", "turn"), ("well", "interruption"), ("hm", "pause"))]
    rewards.rate((None, None), rows)
    assert [row["rewards"] for row in rows] == [{"judge": 2.0}, {"judge": 0.0}, {"judge": 1.0}, {}]


def test_no_reward_of_the_two_tasks_shares_a_name():
    """Each has a spread and a column of its own."""
    talk = rewards.instruction_rewards([], [], (0, 0), 9)
    axes = [rewards.axis_rewards(axis, [], [[4, 5]], 9) for axis in rewards.AXES]
    names = [*talk, *set().union(*axes), "judge"]
    assert sorted(names) == sorted(rewards.WEIGHTS)


def test_control_follows_what_is_due(start):
    """The rule raises a mark while the other speaks and it is due, and lowers it when it is not."""
    from rollout import due_minus_done
    run = start("control=2", "updates=0")
    bc, silence = run.tokenizer.convert_tokens_to_ids(["[BC]", "[SILENCE_PAD]"])
    text = torch.tensor([[silence] * 19, [5] * 19])  # of the two who talk; 0.8 of 24 frames
    bias = due_minus_done(run, text, 18, torch.tensor([[3, 0], [3, 0]]))
    assert bias[0, bc] == pytest.approx(2 * 3 * 19 / 19.2) and bias[1].abs().max() == 0
    text[0, :4] = bc
    assert due_minus_done(run, text, 18, torch.tensor([[3, 0], [3, 0]]))[0, bc] < -2


def test_raft_may_learn_from_the_rules_dialogues(start, monkeypatch):
    """The rule helps while learning, not when what was learnt is measured."""
    helped = []
    monkeypatch.setattr("rollout.due_minus_done", lambda run, *_: helped.append(1) or 0.0)
    run = start("method=raft", "control=2", axes=False)
    rows = reinforce.draw_rows(run)
    assert helped and len(rows) == 16
    helped.clear()
    reinforce.held_out_rows(run)
    assert not helped


@pytest.mark.parametrize("change, info, message", [
    ({}, {"codec_fingerprint": "b2"}, "another codec_fingerprint a1 .now b2.; use its data"),
    ({}, {"speaker_encoder": "resemblyzer"}, "another speaker_encoder ecapa .now resemblyzer"),
    ({}, {"codebook_size": 100}, "another codebook_size 64 .now 100"),
    ({"spk_emb_c1": 10 * [0.1], "spk_emb_c2": 10 * [0.1]}, {}, "another speaker numbers 192 .now"),
    ({"dsu_c1_path": 2, "dsu_c2_path": 2}, {}, "another codebooks 4 .now 8")])
def test_data_that_does_not_fit_the_model_is_refused(folder, dialogues, start, tmp_path, change,
                                                     info, message):
    """As train.py and generate.py do: codes and vectors would mean something else."""
    shutil.copytree(folder / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"codec_fingerprint": "a1", "speaker_encoder": "ecapa"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    rows = [row | {key: value if type(value) is list else row[key] * value
                   for key, value in change.items()} for row in dialogues[:2]]
    for split in ("train", "validation"):
        write_split(tmp_path / "data", rows, split)
    words = [f"model={tmp_path}/model", f"data={tmp_path}/data"]
    made = {"codec_fingerprint": "a1", "speaker_encoder": "ecapa"}
    if not change:
        (tmp_path / "data" / "info.json").write_text(json.dumps(made))
        assert start(*words, axes=False)
    (tmp_path / "data" / "info.json").write_text(json.dumps(made | info))
    with pytest.raises(InputError, match=message):
        start(*words, axes=False)


def test_what_is_wrong_is_one_line(folder, start, tmp_path):
    for words, message in (
            (["group=1"], "at least 2"), (["policy=words"], "classes or tokens"),
            (["axes=turn pauses"], "known are pause"), (["axes="], "known are"),
            (["control=1"], "updates=0"), (["method=raft", "pairs=0"], "raft learns from"),
            (["frames=400"], "max_frames"), (["resume=true"], "no "),
            (["val_segments="], "both files"),
            ([f"segments={folder}/validation.json"], "is of split validation")):
        with pytest.raises(InputError, match=message):
            start(*words)
    with pytest.raises(InputError, match="give pairs"):
        start("pairs=0", axes=False)
    (tmp_path / "s.json").write_text('{"split": "train", "segments": [{"axis": "turn"}]}')
    with pytest.raises(InputError, match="does not fit the data set"):
        start(f"segments={tmp_path}/s.json")
    entry = {"axis": "turn", "dialogue": "a", "begin": 0, "end": 9, "events": [[0, 9]]}
    (tmp_path / "s.json").write_text(json.dumps({"split": "train", "segments": [entry]}))
    with pytest.raises(InputError, match="does not fit the data set"):
        start(f"segments={tmp_path}/s.json")
    found = json.loads((folder / "train.json").read_text())
    first = len(load_dialogues(folder / "data", "train")[0]["dsu_c1_path"][0])
    for frames, count, message in ((first, 8, ""), (first + 1, 8, "another data set, where dialo"),
                                   (first, 9, "is of 9 dialogues, the data set has 8")):
        found |= {"dialogues": count}
        for entry in found["segments"]:
            entry |= {"frames": frames} if entry["dialogue"] == 0 else {}
        (tmp_path / "s.json").write_text(json.dumps(found))
        if not message:
            assert start(f"segments={tmp_path}/s.json").scenes["train"]["turn"]
            continue
        with pytest.raises(InputError, match=message):
            start(f"segments={tmp_path}/s.json")
    for name in ("nano", "factor"):
        config = f"{ROOT}/configs/reinforce_{name}.yaml"
        assert reinforce.load_settings(reinforce.Config, [config]).policy == "classes"
    assert math.isfinite(rewards.score({"r_backchannels": 0.5, "mae_backchannels": 0.1}))
