"""Does the suite notice a wrong line? Applies named one-line mutations to a copy of the code, one at
a time, and runs the tests that should see red.

    python tests/mutate.py                # all of them
    python tests/mutate.py gae KL         # those whose name contains one of these

Exit status 1 if one goes unnoticed. Not collected by pytest.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PPO, SFT, DATA, MODEL = "train_ppo.py", "train_sft.py", "nanogsm/data.py", "nanogsm/model.py"
NET, LORA, LOGPROB = "nanogsm/transformer.py", "nanogsm/lora.py", "nanogsm/logprob.py"
GENERATE, OPTIM, HEAD = "nanogsm/generate.py", "nanogsm/optim.py", "nanogsm/fast/head.py"
CPU, CHECKPOINTING = "nanogsm/fast/cpu.py", "nanogsm/fast/checkpointing.py"
CUDA, MANY = "nanogsm/fast/cuda.py", "nanogsm/distributed.py"
BOXED = "nanogsm/boxed.py"
LOOP, FILES, SCORES = "nanogsm/run/loop.py", "nanogsm/store/files.py", "nanogsm/report/scores.py"
ARITHMETIC, REWARDS, CRITIC = "nanogsm/arithmetic.py", "nanogsm/rewards.py", "nanogsm/run/critic.py"
RERANK, FLAGS = "nanogsm/report/rerank.py", "nanogsm/run/flags.py"
PRM, STEPS, LABEL = "train_prm.py", "nanogsm/steps.py", "experiments/label.py"
FOLDER = "nanogsm/run/folder.py"
PAST, EVALS, CURVES = "nanogsm/run/past.py", "nanogsm/report/eval_files.py", "experiments/ppo_curves.py"
TESTS = {
    PPO: "test_groups test_ppo test_rewards test_distributed", SFT: "test_sft test_distributed", DATA: "test_data test_model test_ppo test_groups", MODEL: "test_model test_lora", NET: "test_model",
    LORA: "test_lora", LOGPROB: "test_logprob", HEAD: "test_logprob test_model", GENERATE: "test_generate",
    OPTIM: "test_optim", CPU: "test_generate test_model test_optim test_cuda test_plan", CHECKPOINTING: "test_model", LOOP: "test_loop",
    CUDA: "test_cuda", MANY: "test_distributed", FILES: "test_files", SCORES: "test_scores test_rerank", BOXED: "test_boxed",
    ARITHMETIC: "test_scores", REWARDS: "test_rewards", CRITIC: "test_rerank", RERANK: "test_rerank", FLAGS: "test_groups test_rewards",
    PRM: "test_prm", STEPS: "test_prm", LABEL: "test_label",
    FOLDER: "test_runs", PAST: "test_own_data", EVALS: "test_evaluate", CURVES: "test_experiments",
}  # fmt: skip

# name, file, the text (there once), what stands there instead
MUTATIONS = [
    ("past: a changed file passes", PAST, "    if not same:\n        raise UserError(f\"{of_data} has", "    if False:\n        raise UserError(f\"{of_data} has"),
    ("past: a run continued by a later version has no digest", PAST, ', *run[1].get("continued", [])]', "]"),
    ("past: the digest looks at answers, too", PAST, 'p._replace(answer="", index=0)', "p._replace(index=0)"),
    ("evaluations: several samples count as one answer", EVALS, r'\d+x-t[', r'\d+y-t['),
    ("evaluations: one sample counts as several", EVALS, r"(?!1x)", ""),
    ("curves: other questions are paired", CURVES, "    scores.in_common(before.path, before.rows, after.path, after.rows)\n", ""),
    ("curves: other settings are paired", CURVES, "if before.summary.get(key) != after.summary.get(key)", "if False"),
    ("folder: a checkpoint that a kill left is kept", FOLDER, "        self._drop_older(steps[-1])  # a kill may have left some\n", ""),
    ("boxed: the first box counts", BOXED, '    for found in _BOX.finditer(text):\n        pass\n', '    found = _BOX.search(text)\n'),
    ("boxed: escaped braces are counted", BOXED, 'r"\\\\.|[{}]"', 'r"[{}]"'),
    ("boxed: a box decides before ####", BOXED, 'return last > answer.rfind("####")', 'return last >= 0'),
    ("boxed: hostile powers are computed", BOXED, 'or too_large(answer) or', 'or'),
    ("boxed: long answers are read", BOXED, 'MOST_CHARACTERS = 300', 'MOST_CHARACTERS = 3000'),
    ("boxed: exponents of brackets do not multiply", BOXED, 'cost *= max(size, 1)', 'highest = max(highest, size)'),
    ("boxed: a timeout is right", BOXED, 'Verdict(False, timed_out=True)', 'Verdict(True, timed_out=True)'),
    ("boxed: each rank grades for itself", BOXED, 'return _grade(answer, gold, distributed.on_rank_0)', 'return _grade(answer, gold, lambda ask: ask())'),
    ("boxed: SIGALRM is not put back", BOXED, '        signal.signal(signal.SIGALRM, handler)\n', ''),
    ("boxed: the alarm rings once", BOXED, 'signal.ITIMER_REAL, 0.1, 0.1', 'signal.ITIMER_REAL, seconds'),
    ("boxed: the package prints", BOXED, 'contextlib.redirect_stderr(io.StringIO())', 'contextlib.nullcontext()'),
    ("boxed: a sum earns a reward", BOXED, '    if _BIG.search(given) and not _BIG.search(gold):\n        return True\n', ''),
    ("boxed: a quotient earns a reward", BOXED, 'or quotient)', ')'),
    ("boxed: answers of equal value vote apart", BOXED, 'min(equal, default=i)', 'i'),
    ("PRM: a value reads one token too many", PRM, 'hidden = model(ids, lengths)[:, :-1]', 'hidden = model(ids, lengths)[:, 1:]'),
    ("PRM: a mean over answers", PRM, 'count = data.supervised_tokens(examples)  #', 'count = len(examples)  #'),
    ("PRM: AUC's ranks", PRM, '(i + end + 1) / 2', '(i + end) / 2'),
    ("PRM: the largest step decides", PRM, 'min(row) for row in logits', 'max(row) for row in logits'),
    ("PRM: one parameter group over the other", PRM, '"trunk/": AdamW', '"": AdamW'),
    ("steps: the mask is on the step itself", STEPS, 'mask[end + 1] = 1', 'mask[end] = 1'),
    ("steps: an outcome model sees all labels", STEPS, '[-1 if outcome else 0 :]', '[0:]'),
    ("steps: neutral is wrong", STEPS, 'float(rating >= 0)', 'float(rating > 0)'),
    ("steps: prefixes are labelled again", STEPS, '[None] * len(before) + [its_rating]', '[1.0] * len(before) + [its_rating]'),
    ("labels: the prefix lacks its last token", LABEL, 'ids[: end + 1]', 'ids[:end]'),
    ("labels: a cut continuation is right", LABEL, 'not one.truncated\n            and ', ''),
    ("labels: lines are written twice", LABEL, 'have - first * args.samples :', '0 :'),
    ("labels: held-out problems are labelled", LABEL, 'held_out or 0', '0'),
    ("many: a gradient is not summed", MANY, 'add_up(*large, *([together] if small else []))', 'add_up(*large)'),
    ("many: a large gradient is not summed", MANY, 'add_up(*large, *([together] if small else []))', 'add_up(*([together] if small else []))'),
    ("many: gradients are means", MANY, 'g.copy_(summed.view_as(g))', 'g.copy_(summed.view_as(g) / COUNT)'),
    ("many: FSDP's gradients are means", MANY, 'module.set_gradient_divide_factor(1.0)', 'module.set_gradient_divide_factor(2.0)'),
    ("many: an unequal deal", MANY, 'mine = cards[RANK::COUNT]', 'mine = cards[RANK::COUNT] if RANK else cards[:1]'),
    ("many: the loss is not summed", SFT, '    distributed.add_up(loss)\n', ''),
    ("many: others' log-probs are left out", PPO, '    distributed.add_up(logp, ref_logp, entropy, values)', '    distributed.add_up(logp, ref_logp, entropy)'),
    ("many: an update's metrics are one rank's", PPO, '            distributed.add_up(shares)\n', ''),
    ("many: the first row of a part", MANY, 'return min(place * -(-len(t) // parts), len(t))', 'return 0'),
    ("CUDA: padding is attended to", CUDA, 'torch.arange(n) + row * T', 'torch.arange(n) + row * T + (T - n)'),
    ("CUDA: the second level starts at 0", CUDA, 'wanted - before', 'wanted'),
    ("CUDA: a dither of its own", CUDA, 'place = (place + first) % period', 'place = place + first + 1'),
    ("CUDA: the gradient is not scaled down", CUDA, 'grad * shrink', 'grad'),
    ("AdamW: the gradient is not scaled down", CPU, '        torch._foreach_mul_([tensors[1] for *_, tensors in pieces], shrink)', '        pass'),
    ("sampling: recorded for other shapes", CUDA, 'shapes = rows, *used', 'shapes = rows'),
    ("PPO: advantage sign", PPO, 'return -torch.min(free, clipped)', 'return torch.min(free, clipped)'),
    ("PPO: clip on the wrong side", PPO, 'return -torch.min(free, clipped)', 'return -torch.max(free, clipped)'),
    ("PPO: no lower clip", PPO, 'ratio.clamp(1 - clip, 1 + (high or clip))', 'ratio.clamp(max=1 + (high or clip))'),
    ("PPO: ratio upside down", PPO, '(logp - old_logp).exp()\n    free', '(old_logp - logp).exp()\n    free'),
    ("PPO: value clip takes the smaller", PPO, 'torch.max(free, clipped), (clipped > free)', 'torch.min(free, clipped), (clipped > free)'),
    ("PPO: value loss without 1/2", PPO, '0.5 * (values - returns) ** 2, 0.5', '1.0 * (values - returns) ** 2, 0.5'),
    ("PPO: gamma left out", PPO, 'rewards[:, t] + gamma * next_value', 'rewards[:, t] + next_value'),
    ("PPO: lambda left out", PPO, 'delta + gamma * lam *', 'delta + gamma *'),
    ("PPO: value sign in delta", PPO, '* next_value - values[:, t]', '* next_value + values[:, t]'),
    ("PPO: gae looks past the answer", PPO, 'next_value = torch.where(mask[:, t], values[:, t], 0.0)', 'next_value = values[:, t]'),
    ("PPO: return is the advantage", PPO, 'torch.where(mask, advantages + values, 0.0)', 'torch.where(mask, advantages, 0.0)'),
    ("PPO: KL rewarded", PPO, '-kl_coef * (logp - ref_logp)', 'kl_coef * (logp - ref_logp)'),
    ("PPO: KL on the prompt too", PPO, 'torch.where(mask, -kl_coef * (logp - ref_logp), 0.0)', '-kl_coef * (logp - ref_logp)'),
    ("PPO: score one action early", PPO, 'torch.where(columns == last, score', 'torch.where(columns == last - 1, score'),
    ("PPO: score everywhere", PPO, 'torch.where(columns == last, score', 'torch.where(mask, score'),
    ("PPO: whitening keeps the mean", PPO, '(x - mean) * torch.rsqrt', 'x * torch.rsqrt'),
    ("PPO: whitening counts padding", PPO, 'mean = masked_mean(x, mask)\n', 'mean = x.mean()\n'),
    ("PPO: k3 without its 1", PPO, 'torch.expm1(-d) + d', '(-d).exp() + d'),
    ("PPO: k3 by exp", PPO, 'torch.expm1(-d) + d', '(-d).exp() - 1 + d'),
    ("PPO: mask not shifted", PPO, 'mask = batch.mask[:, 1:]', 'mask = batch.mask[:, :-1]'),
    ("PPO: values one token late", PPO, 'values = models.value(hidden[:, :-1])', 'values = models.value(hidden[:, 1:])'),
    ("PPO: entropy punished", PPO, 'loss - args.entropy_coef', 'loss + args.entropy_coef'),
    ("PPO: value loss not weighted", PPO, 'args.value_coef * part(of_critic[0])', 'part(of_critic[0])'),
    ("PPO: mean of each cut", PPO, 'part = lambda x: masked_share(x, mask, count)', 'part = lambda x: masked_mean(x, mask)'),
    ("PPO: warm-up trains the actor", PPO, '[*zip(optimizers, both)][int(warming) :]', '[*zip(optimizers, both)]'),
    ("PPO: warm-up trains the head alone", PPO, '            hidden = models.critic(ids, lengths)\n\n', '            hidden = models.critic(ids, lengths).detach()\n\n'),
    ("PPO: temperature forgotten", PPO, 'models.actor.vocabulary, hidden, ids, token_mask, args.temperature, entropy=True', 'models.actor.vocabulary, hidden, ids, token_mask, 1.0, entropy=True'),
    ("PPO: a cut answer is rewarded", PPO, 'right = not truncated and ', 'right = '),
    ("PPO: reference shares the actor", PPO, 'actor, reference = base, frozen_copy(base, args.precision == "bf16")', 'actor, reference = base, base'),
    ("PPO: actor's adapters on the critic", PPO, 'critic = twin(reference)', 'critic = twin(actor)'),
    ("PPO: problems repeat", DATA, 'epoch, i = divmod(place, len(problems))', 'epoch, i = 0, place % len(problems)'),
    ("groups: the clip above is the one below", PPO, '1 + (high or clip)', '1 + clip'),
    ("groups: the mean is not taken off", PPO, 'better = total - total.mean(1, keepdim=True)', 'better = total'),
    ("groups: RLOO without k / (k - 1)", PPO, 'else group / (group - 1)', 'else 1.0'),
    ("groups: GRPO's deviation divides by n", PPO, 'total.std(1, keepdim=True)', 'total.std(1, keepdim=True, correction=0)'),
    ("groups: GRPO multiplies", PPO, '1 / (total.std(1, keepdim=True) + 1e-6)', '(total.std(1, keepdim=True) + 1e-6)'),
    ("groups: a rounding error for equal rewards", PPO, '    total = total - total[:, :1]', '    pass'),
    ("groups: every group-th row", PPO, 'rewards.sum(1).view(-1, group)', 'rewards.sum(1).view(group, -1).T'),
    ("groups: padding has an advantage", PPO, 'torch.where(mask, (better * scale).view(-1, 1), 0.0)', '(better * scale).view(-1, 1).expand(mask.shape)'),
    ("groups: as many problems as answers", DATA, 'found, n = [], n // group', 'found = []'),
    ("groups: a problem's answers apart", DATA, 'found += [problems[order[i]]] * group', 'found += [problems[order[i]]]'),
    ("groups: a critic is built", PPO, '    if not args.advantage:  # None is gae, which needs a critic\n        value_head', '    if True:\n        value_head'),
    ("groups: rloo is grpo", PPO, 'if method == "grpo" else', 'if method else'),
    ("groups: group 1 is allowed", FLAGS, 'check_numbers(args, {"group": 2})', 'pass'),
    ("groups: any number of answers", FLAGS, 'if args.group and args.rollouts % args.group:', 'if False:'),
    ("groups: an upper clip below the lower one", FLAGS, 'args.clip_high < args.clip:', 'False:'),
    ("groups: the critic's flags are ignored", FLAGS, '        without_critic(args)\n', '        args.group = args.group or 8\n'),
    ("rewards: terms are not added", PPO, 'rewards = add_terms(rewards, answers)', 'pass'),
    ("rewards: a column late", REWARDS, 'answer["example"].mask.index(1) + token - 1', 'answer["example"].mask.index(1) + token'),
    ("rewards: true annotations are charged", REWARDS, 'for n, a in found if is_false(a)]', 'for n, a in found]'),
    ("rewards: a token early", REWARDS, 'tokenizer.decode(ids[: place + 1])', 'tokenizer.decode(ids[: place + 2])'),
    ("rewards: no limit of false annotations", REWARDS, 'for step in steps[:COUNTED]]', 'for step in steps]'),
    ("rewards: false annotations pay", REWARDS, '-weights["false"] / COUNTED', 'weights["false"] / COUNTED'),
    ("rewards: a number is charged", REWARDS, 'data.extract_answer(data.cut(done.text), boxed) is None', 'data.extract_answer(data.cut(done.text), boxed) is not None'),
    ("rewards: overlong from the start", REWARDS, '(SOFT * limit)', 'limit'),
    ("rewards: short answers pay", REWARDS, 'return max(0.0, 1 - ', 'return (1 - '),
    ("rewards: the metrics leave the terms out", REWARDS, 'earned = scores + torch.tensor(', 'earned = scores + 0 * torch.tensor('),
    ("rewards: the bound is not kept", FLAGS, 'for name in penalties)) > rewards.MOST + 1e-9:', 'for name in penalties)) > 2:'),
    ("rerank: the end token is read", RERANK, '    ids = ids[:-1]', '    ids = ids[:]'),
    ("rerank: the most over lines", RERANK, 'min(values) if by == "least"', 'max(values) if by == "least"'),
    ("rerank: lines of the question count", RERANK, '[m and by ==', '[by =='),
    ("rerank: any token ends a line", RERANK, '"\\n" in tokenizer.decode([i])', 'True'),
    ("rerank: the bias is forgotten", RERANK, '.sum(-1) + head.bias', '.sum(-1)'),
    ("rerank: the least value wins", RERANK, 'max(group, key=lambda', 'min(group, key=lambda'),
    ("rerank: negative values vote", RERANK, 'max(0.0, row["value"])', 'row["value"]'),
    ("rerank: fixed and broken swapped", SCORES, 'strict=True)) if y and not x]', 'strict=True)) if x and not y]'),
    ("rerank: a vote without weights", SCORES, 'votes.get(answer, 0) + weight', 'votes.get(answer, 0) + 1'),
    ("rerank: the adapters stay as they start", CRITIC, '        p.data = tensors[name]', '        pass'),
    ("rerank: alpha of another run", CRITIC, 'critic.args["lora_r"], critic.args["lora_alpha"])', 'critic.args["lora_r"], 32.0)'),
    ("rerank: any trunk will do", CRITIC, 'not in (None, hub.fingerprint(trunk))', 'not in (None, metadata.get("trunk_sha256"))'),
    ("rerank: the digest of the wrong trunk", CRITIC, '    if models.critic is models.actor:', '    if models.critic is not models.actor:'),
    ("data: label shift", DATA, 'add(target, end, supervised=1)', 'add(target, end, supervised=0)'),
    ("data: no end of sequence", DATA, 'add(target, end, supervised=1)', 'add(target, supervised=1)'),
    ("data: end not supervised", DATA, 'add(target, end, supervised=1)', 'add(target, supervised=1); add(end)'),
    ("data: BOS twice", DATA, '    add(tokenizer.bos_id)  #', '    add(tokenizer.bos_id); add(tokenizer.bos_id)  #'),
    ("data: the space goes to the prompt", DATA, 'add(f"{lead}Question: {question}\\nAnswer:")', 'add(f"{lead}Question: {question}\\nAnswer: ")'),
    ("data: last ####", DATA, 'text.partition("####")', 'text.rpartition("####")'),
    ("data: padding supervised", DATA, 'mask = torch.zeros((len(rows), T), dtype=torch.bool)', 'mask = torch.ones((len(rows), T), dtype=torch.bool)'),
    ("data: gold answers are not cut", DATA, 'kept = cut(answer)', 'kept = answer'),
    ("data: one stop id", DATA, 'frozenset({self.eos_id, self.end_of_turn_id} |', 'frozenset({self.eos_id} |'),
    ("model: w instead of 1 + w", NET, 'gain = 1.0 + self.weight.float()', 'gain = self.weight.float()'),
    ("model: embedding not scaled", NET, 'c.hidden_size**0.5, dtype', '1.0, dtype'),
    ("model: rotary pairs swapped", NET, 'torch.cat((-angle, angle), dim=-1)', 'torch.cat((angle, -angle), dim=-1)'),
    ("model: window one too wide", NET, '(distance < window)', '(distance <= window)'),
    ("model: attention scale", NET, 'c.query_pre_attn_scalar**-0.5', 'c.hidden_size**-0.5'),
    ("model: exact GELU", NET, 'approximate="tanh"', 'approximate="none"'),
    ("model: cache one short", GENERATE, 'k[:, :, :n], v', 'k[:, :, : n - 1], v'),
    ("LoRA: scale", LORA, 'LoRALinear(base, a, torch.zeros(size_out, r), alpha / r)', 'LoRALinear(base, a, torch.zeros(size_out, r), alpha)'),
    ("LoRA: merge forgets the scale", LORA, 'own = self.scale * self.lora_B', 'own = self.lora_B'),
    ("LoRA: merge forgets the adapter below", LORA, 'return own + self.base.delta() if isinstance(self.base, LoRALinear) else own', 'return own'),
    ("LoRA: two adapters' scales", LORA, 'a, b = self.lora_A.weight, self.scale * self.lora_B.weight', 'a, b = self.lora_A.weight, self.lora_B.weight'),
    ("LoRA: two adapters not paired", LORA, 'torch.cat((below[1], b), dim=1)', 'torch.cat((b, below[1]), dim=1)'),
    ("LoRA: the adapter below trains on", LORA, '    model.requires_grad_(False)\n    for name in names:', '    for name in names:'),
    ("LoRA: B not zero", LORA, 'torch.zeros(size_out, r), alpha', 'torch.ones(size_out, r), alpha'),
    ("model: rows end to end without their windows", NET, 'model.attend_rows(q, k, v, lengths, model.config.window(layer), scale, cap)', 'model.attend_rows(q, k, v, lengths, None, scale, cap)'),
    ("model: rows come back in another order", NET, 'index_put((row, position), hidden[0])', 'index_put((row, position.flip(0)), hidden[0])'),
    ("model: packed weights stay", CPU, '            layer.__dict__.pop("forward", None)', '            pass'),
    ("model: the tail's rows lose their keys", GENERATE, '            x[:, new] = x[:, old]', '            pass'),
    ("logprob: entropy sign", HEAD, 'outputs.append(denominator.log() - mean)', 'outputs.append(denominator.log() + mean)'),
    ("logprob: the head's gradient without the target's", HEAD, '        add_rows(grad, targets, by_target[:, None] * low)\n', ''),
    ("logprob: kept terms taken for the last top's", HEAD, 'd = kept_max[i] - running_max', 'd = 0 * running_max'),
    ("logprob: the entropy's mean moved the wrong way", HEAD, '(mean - d) - grads[0]', '(mean + d) - grads[0]'),
    ("logprob: the head's gradient without the entropy's own term", HEAD, 'left = (by_exp - grads[1] * scale * terms[1]).to(low.dtype)', 'left = by_exp.to(low.dtype)'),
    ("logprob: temperature multiplies", HEAD, 'logits /= temperature', 'logits *= temperature'),
    ("logprob: slope without the cap's", HEAD, '(term if slope is None else term.mul_(slope)).to(dtype)', 'term.to(dtype)'),
    ("logprob: earlier blocks' sums not put right", HEAD, '            totals *= by.exp()', '            pass'),
    ("logprob: ... nor the second of them", HEAD, 'totals[1].add_(by * totals[0])', 'pass'),
    ("logprob: the largest logit so far is 0", HEAD, 'zeros(n) + torch.finfo(torch.float32).min', 'zeros(n)'),
    ("logprob: the head's gradient of one micro-batch", HEAD, '.add_(left @ right)', '.copy_(left @ right)'),
    ("logprob: the target stays in the sums", HEAD, 'exp.scatter_(0, at, exp.gather(0, at).masked_fill(is_here, 0))', 'pass'),
    ("logprob: outputs kept on the node", HEAD, 'ctx.n_hidden = len(grad_hidden)', 'ctx.n_hidden, ctx.outputs = len(grad_hidden), outputs'),
    ("model: a light checkpoint keeps nothing", CHECKPOINTING, 'return CheckpointPolicy.MUST_SAVE', 'return CheckpointPolicy.PREFER_RECOMPUTE'),
    ("logprob: a token's other places get no gradient", HEAD, 'rows, accumulate=True', 'rows, accumulate=False'),
    ("logprob: ... on a CPU", HEAD, 'total.index_add_(0, ids, rows)', 'total[ids] += rows'),
    ("logprob: kept for a gradient that nobody asks for", HEAD, '    if not torch.is_grad_enabled():\n', '    if False:\n'),
    ("generate: a token's place in its block", CPU, 'return (block * width + token).clamp', 'return token.clamp'),
    ("generate: blocks' sums with tops of their own", CPU, '(sums * (tops - tops.amax(0)).exp())', 'sums'),
    ("generate: the last of equal tokens", CPU, '(largest > top).nonzero()', '(largest >= top).nonzero()'),
    ("generate: a group looks as far as another", GENERATE, 'used = [max(filled[i : i + size])', 'used = [min(filled[i : i + size])'),
    ("generate: prefill off by one", GENERATE, '[len(p) - 1 for', '[len(p) - 2 for'),
    ("generate: uniform numbers by place", GENERATE, 'torch.tensor([request[row] for row in rows])', 'torch.tensor(rows)'),
    ("generate: stop token ignored", GENERATE, 'over = i in stop_ids or is_over', 'over = is_over'),
    ("optim: no bias correction", OPTIM, 'self.lr / (1 - beta1**self.step_count)', 'self.lr'),
    ("optim: decay on norms", OPTIM, 'if p.dim() >= 2 else 1.0', 'if p.dim() >= 1 else 1.0'),
    ("optim: steps not restored", OPTIM, 'self.step_count = int(tensors["step_count"])', 'pass'),
    ("optim: cosine upside down", OPTIM, '(1 + math.cos(', '(1 - math.cos('),
    ("SFT: loss by micro-batch", SFT, 'pad_id, autocast).sum() / supervised\n        share', 'pad_id, autocast).sum() / sum(sum(e.mask) for e in rows)\n        share'),
    ("SFT: no shift", LOGPROB, 'vocabulary, hidden[:, :-1], ids[:, 1:], mask[:, 1:]', 'vocabulary, hidden[:, :-1], ids[:, :-1], mask[:, :-1]'),
    ("SFT: same order every epoch", DATA, 'seed * 1_000_003 + epoch', 'seed * 1_000_003'),
    ("files: nothing is put back", FILES, '        put_back()\n        shutil', '        shutil'),
    ("scores: percent without brackets", ARITHMETIC, 'r"(\\1/100)"', 'r"\\1/100"'),
    ("scores: McNemar one-sided", SCORES, 'min(1.0, 2 * sum', 'min(1.0, sum'),
    ("scores: Wilson without its centre", SCORES, 'p + z2n / 2', 'p'),
    ("seams: the lookup's gradient replaces what is there", HEAD, 'add_rows(grad_of(ctx.weight), ctx.ids.flatten(), grad.flatten(0, 1))', 'ctx.weight.grad = torch.zeros_like(ctx.weight); add_rows(ctx.weight.grad, ctx.ids.flatten(), grad.flatten(0, 1))'),
    ("seams: the in-place lookup is not set", MODEL, '    model.lookup = head.lookup', '    pass'),
    ("seams: nothing is computed again", NET, 'if self.recompute and torch.is_grad_enabled():', 'if False:'),
    ("seams: attend_rows is not asked", NET, 'return model.attend_rows(q, k, v,', 'return attend_rows(q, k, v,'),
    ("seams: packing stays after an error", CPU, '    finally:\n        for layer', '    except Exception:\n        raise\n    else:\n        for layer'),
    ("seams: Stopped in mid-step counts the step", LOOP, '            if kind is not None and issubclass(kind, console.Stopped):\n', '            if kind is not None and issubclass(kind, console.Stopped):\n                self.step += 1\n'),
    ("seams: Stopped in mid-step saves nothing", LOOP, '                self.save_checkpoint()\n                paused', '                paused'),
    ("PPO: rounding counts as a clipped value", PPO, '(clipped > free) & (moved.abs() > clip)', 'clipped > free'),
    ("data: a number that goes on counts as its beginning", DATA, " or _GOES_ON.match(rest, found.end())", ""),
    ("data: words after a gold number are taken", DATA, ' or rest[found.end() :].strip() not in ("", ".")', ""),
    ("model: Gemma 3's base of global layers guessed", MODEL, 'defaults["full_attention"] = 1e6', 'defaults["full_attention"] = 1e4'),
    ("model: an output head of its own is ignored", MODEL, "not torch.equal(loaded.setdefault(EMBEDDING, lm_head), lm_head)", "loaded.setdefault(EMBEDDING, lm_head) is None"),
    ("model: NaN in the weights is loaded", MODEL, "if not tensor.sum(dtype=torch.float32).isfinite():", "if False:"),
    ("Llama: embeddings are scaled", NET, 'if c.is_gemma:', 'if True:'),
    ("Llama: the norm rounds last", NET, 'gain, self.eps).to(x.dtype)', 'gain, self.eps).to(x.dtype if self.is_gemma else torch.float32)'),
    ("Llama: the norm's weight is Gemma's", NET, 'return normed if self.is_gemma else normed * self.weight', 'return normed if self.is_gemma else normed * (1 + self.weight)'),
    ("Llama: gated by GELU", NET, 'if self.is_gemma else F.silu(gate)', 'if True else F.silu(gate)'),
    ("Llama: no bands", NET, '    if bands:', '    if False:'),
    ("Llama: bands exempt the slow channels", NET, '1 + exempt * (factor - 1)', '1 + (1 - exempt) * (factor - 1)'),
    ("Llama: the embedding is the output head", NET, 'weight if self.config.tied else self', 'weight if True else self'),
    ("Llama: the head is cast at every use", MODEL, 'id(model.vocabulary.weight)}', '0}'),
    ("Llama: an adapter on the head is loaded", MODEL, ' if name != "lm_head" else None', ''),
    ("Llama: untied where the config says nothing", MODEL, 'tied = is_gemma if tied is None else tied', 'tied = True if tied is None else tied'),
    ("Llama: no dated system turn", DATA, 'if family.system:', 'if False:'),
    ("Llama: runs on after <|eom_id|>", DATA, 'stops=("<|eom_id|>",)', 'stops=()'),
    ("Llama: the head is packed twice", CPU, ' and n != "lm_head"', ''),
    ("Llama: an idle rank leaves the head out", MANY, 'hidden if model.config.tied else model.logits(hidden)', 'hidden'),
    ("multimodal: PEFT would adapt the vision part", MODEL, ' or model.config.multimodal:\n        targets', ':\n        targets'),
    ("multimodal: names of the text model alone", MODEL, 'if config.multimodal else name\n\n\ndef _no', 'if False else name\n\n\ndef _no'),
    ("data: tokens beyond the embedding are loaded", DATA, "if max(ids) >= size else None", "if False else None"),
]  # fmt: skip


def red(test: str, folder: Path) -> bool:
    """Whether a test file fails there; one that does not end has noticed something, too."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, timeout=300).returncode == 1
    except subprocess.TimeoutExpired:
        return True


def noticed(name: str, file: str, old: str, new: str) -> bool:
    """Whether the tests of `file` fail on a copy of the repository with this mutation in it."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if text.count(old) != 1:
        sys.exit(f"{name}: {file} has its text {text.count(old)} times: bring this list up to date")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignore = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".pytest_cache")
        shutil.copytree(ROOT, copy, ignore=ignore)
        (copy / file).write_text(text.replace(old, new), encoding="utf-8")
        return any(red(f"tests/{test}.py", copy) for test in TESTS[file].split())


def main() -> int:
    wanted = [m for m in MUTATIONS if not sys.argv[1:] or any(text in m[0] for text in sys.argv[1:])]
    survivors = []
    for test in sorted({test for _, file, *_ in wanted for test in TESTS[file].split()}):
        if red(f"tests/{test}.py", ROOT):
            sys.exit(f"{test} fails as it is: what it would notice says nothing")
    for mutation in wanted:
        began = time.time()
        seen = noticed(*mutation)
        print(f"{'noticed' if seen else 'SURVIVED':<9} {mutation[0]} ({time.time() - began:.0f} s)", flush=True)
        survivors += [] if seen else [mutation[0]]
    print(f"{len(wanted) - len(survivors)} of {len(wanted)} noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
